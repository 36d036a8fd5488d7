"""From a user's engine arguments to an engine that runs a long-context configuration.

Two steps around vLLM's own `create_engine_config`: `prepare` parses the configuration and asks vLLM for what
it needs; `complete` fills in what depends on the model and refuses what cannot work; the scheduler logs the
outcome. An engine without a `longctx` configuration is not touched, unless its model is LongLLaMA.
"""

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger

from vllm_longctx import seams
from vllm_longctx.config import KEY, AdaptationSection, LongContextConfig, LongContextError
from vllm_longctx.engine.memory_kv import memory_blocks
from vllm_longctx.models import longllama
from vllm_longctx.models.properties import TEXT_ONLY, keep_trained_window, trained_length
from vllm_longctx.modes import load
from vllm_longctx.settings import Settings, for_model, plugin_configs
from vllm_longctx.startup.checks import check_model, check_settings
from vllm_longctx.startup.platform import choose_backend, worker_of_platform
from vllm_longctx.startup.pool import check_pool, fit_memory, log_windows, pool_of, window_room
from vllm_longctx.startup.recommended import RECOMMENDED, with_recommended

logger = init_logger("vllm.longctx")

# vLLM keeps max_num_seqs * max_model_len token ids of 4 bytes in the worker: 1 GiB at 256 sequences.
DEFAULT_MAX_MODEL_LEN = 1 << 20
DEFAULT_BLOCK_SIZE = 32


@contextmanager
def prepared(args: EngineArgs) -> Iterator[LongContextConfig | None]:
    """As `prepare`; afterwards the arguments are the user's again, so that the next engine made from them is
    the same.
    """
    given = dict(vars(args))
    ours = set(given)
    try:
        config = prepare(args)
        ours = {name for name, value in given.items() if getattr(args, name) is not value}
        yield config
    finally:
        for name in ours:
            setattr(args, name, given[name])


@contextmanager
def own_words(config: LongContextConfig | None) -> Iterator[None]:
    """vLLM 0.33 refuses models without LoRA support itself, and names an option that the user has not given.

    Raises LongContextError in its place.
    """
    try:
        yield
    except ValueError as e:
        text = str(e)
        if config is None or not config.mode.adapts or "LoRA is not supported for" not in text:
            raise
        model = text.partition("LoRA is not supported for ")[2].partition(" ")[0]
        raise LongContextError(
            f"the model has no LoRA support in vLLM ({model}); leave adaptation out"
        ) from e


def prepare(args: EngineArgs) -> LongContextConfig | None:
    """Parse `additional_config["longctx"]` and set the engine arguments it needs; None if there is no
    configuration.

    Raises LongContextError for a bad configuration, another vLLM version, another platform, or a conflicting
    argument.
    """
    if isinstance(args.additional_config, str):  # type: ignore[unreachable]  # a user may give one all the same
        raise LongContextError(f"additional_config = {args.additional_config!r} is a string; give a dict")
    is_configured = KEY in (args.additional_config or {})
    is_longllama = longllama.is_checkpoint(args.model, ask_hub=is_configured)
    if not is_configured:
        if not is_longllama:
            return None
        args.additional_config = {**(args.additional_config or {}), KEY: {}}
    config = LongContextConfig.parse(args.additional_config[KEY])
    if (
        is_longllama
        and config.attention.method == "lm_infinite"
        and "method" not in config.attention.model_fields_set
    ):
        attention = {**config.attention.model_dump(exclude_unset=True), "method": "focused"}
        config = LongContextConfig.parse({**config.model_dump(exclude_unset=True), "attention": attention})
    mode = config.mode
    if mode.is_plain:
        return config
    seams.check_version()
    worker, (scheduler, _) = worker_of_platform(), mode.scheduler_paths
    if args.worker_cls not in ("auto", worker):
        raise LongContextError(
            f"worker_cls = {args.worker_cls!r}, but longctx needs its own; leave worker_cls out"
        )
    if args.scheduler_cls not in (None, scheduler):
        raise LongContextError(
            f"scheduler_cls = {args.scheduler_cls!r}, but longctx needs its own; leave scheduler_cls out"
        )
    choose_backend(args)
    args.worker_cls, args.scheduler_cls = worker, scheduler
    args.language_model_only = True  # of a model for images too; of others it says nothing
    if mode.adapts:
        adaptation = with_recommended(_with_directories(config.temp_lora), args)
        config = config.model_copy(update={"adaptation": adaptation})
        args.enable_lora = True  # what vLLM decides is to go with LoRA layers; `complete` takes it back
    args.block_size = args.block_size or DEFAULT_BLOCK_SIZE
    if args.max_model_len in (None, -1):
        # A memory grows with the text: vLLM finds out what fits into its pool.
        args.max_model_len = -1 if mode.grows else DEFAULT_MAX_MODEL_LEN
    longest = DEFAULT_MAX_MODEL_LEN if args.max_model_len == -1 else args.max_model_len
    args.hf_overrides = _with_max_length(args.hf_overrides, longest)
    return config


def _with_directories(adaptation: AdaptationSection) -> AdaptationSection:
    """With `adapters_root` and `cache_dir` as every process finds them.

    Raises LongContextError unless they can be written to.
    """
    found = {}
    for name, what, mode in (("adapters_root", "adapters", 0o777), ("cache_dir", "versions", 0o700)):
        if (given := getattr(adaptation, name)) is None:
            continue
        path = Path(given).expanduser().absolute()
        try:
            path.mkdir(mode, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as e:
            raise LongContextError(
                f"adaptation.{name} = {given!r}: {what} cannot be written there ({e.strerror}); give a "
                "directory that exists or can be made, and in which this user may write"
            ) from None
        found[name] = str(path)
    if len(found) == 2 and len(set(found.values())) == 1:
        raise LongContextError(
            f"adaptation.cache_dir = {adaptation.cache_dir!r} is adaptation.adapters_root; give another one"
        )
    return adaptation.model_copy(update=found)


def _with_max_length(overrides: Any, max_model_len: int) -> Any:
    """`model_max_length` is the config entry that lets vLLM accept a length past max_position_embeddings."""
    if callable(overrides):
        return functools.partial(
            _override, overrides, max_model_len
        )  # which pickle takes where it takes the user's
    return {**(overrides or {}), "model_max_length": max_model_len}


def _override(
    overrides: Callable[[PretrainedConfig], PretrainedConfig], max_model_len: int, hf_config: PretrainedConfig
) -> PretrainedConfig:
    hf_config = overrides(hf_config)
    hf_config.update({"model_max_length": max_model_len})
    return hf_config


def complete(config: LongContextConfig, vllm_config: VllmConfig, enable_lora: bool) -> None:
    """Fill in the configuration for the model and put it where every process finds it.

    enable_lora: the user's; all but the workers know of the users' adapters only. Raises LongContextError for
    a model or a setting that cannot work.
    """
    mode, cache, scheduler = config.mode, vllm_config.cache_config, vllm_config.scheduler_config
    if mode.is_plain:
        return
    keep_trained_window(vllm_config.model_config)
    if vllm_config.model_config.is_multimodal_model:
        vllm_config.model_config.hf_text_config.update({TEXT_ONLY: True})
    check_model(vllm_config.model_config)
    check_settings(vllm_config, mode)
    if scheduler.async_scheduling:  # only now vLLM has decided
        scheduler.scheduler_cls = mode.scheduler_paths[1]
    for check in mode.checks:
        load(f"startup.checks.{check}")(config, vllm_config)
    if not enable_lora:
        vllm_config.lora_config = None
    if not mode.caches_prefixes:
        cache.enable_prefix_caching = False
    config = _fitted(config, vllm_config)
    settings = Settings.of(config)
    check_pool(settings, vllm_config)
    if (blocks := memory_blocks(settings, vllm_config)) is not None:
        fit_memory(settings, vllm_config, blocks)
    vllm_config.additional_config = {**plugin_configs(vllm_config), KEY: config.dump()}


def _fitted(config: LongContextConfig, vllm_config: VllmConfig) -> LongContextConfig:
    """Filled in, with default windows that the KV cache holds."""
    full = _for_model(config, vllm_config)
    settings = Settings.of(full)
    pool = pool_of(settings, vllm_config)
    if pool is None or (room := window_room(settings, pool, vllm_config)) is None:
        return full
    fitted = _for_model(config, vllm_config, room)
    log_windows(settings, Settings.of(fitted), pool, vllm_config.cache_config.block_size)
    return fitted


def _for_model(
    config: LongContextConfig, vllm_config: VllmConfig, room: int | None = None
) -> LongContextConfig:
    """Filled in; what the checkpoint recommends is left out where it does not go with what the user says."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    sizes = (
        trained_length(model),
        cache.block_size,
        model.get_total_num_hidden_layers(),
        model.hf_text_config.to_dict(),
        cache.enable_prefix_caching,
        vllm_config.scheduler_config.max_num_seqs,
        room,
    )
    try:
        return for_model(config, *sizes)
    except LongContextError as e:
        if config.adaptation is None or not (recommended := config.adaptation.recommended_sizes):
            raise
        ignored = ", ".join(f"adaptation.{name} = {value}" for name, value in recommended.items())
        without = config.model_copy(update={"adaptation": config.adaptation.without_recommended_sizes()})
        filled = for_model(without, *sizes)
        logger.warning("longctx: %s of model %s: ignored: %s (%s)", RECOMMENDED, model.model, ignored, e)
        return filled


def additional_config_from_flags(
    additional_config: Mapping[str, Any] | None,
    plugin: str | None,
    longctx: Mapping[str, Any] | None,
    preset: str | None,
) -> dict[str, Any]:
    """`--plugin longctx`, `--longctx` and `--longctx-preset` as `additional_config` (docs/configuration.md).

    Raises LongContextError where a flag contradicts another or `additional_config` itself.
    """
    merged = dict(additional_config or {})
    if plugin is None and longctx is None and preset is None:
        return merged
    if KEY in merged:
        raise LongContextError(
            f"additional_config[{KEY!r}] is given beside --plugin, --longctx or --longctx-preset; give one "
            f"of them"
        )
    value = dict(longctx or {})
    if preset is not None:
        if value.get("preset", preset) != preset:
            raise LongContextError(
                f"--longctx-preset {preset} contradicts preset {value['preset']} in --longctx"
            )
        value["preset"] = preset
    merged[KEY] = value
    return merged
