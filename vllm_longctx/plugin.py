"""vLLM's door to this package: the entry point `longctx` in the group `vllm.general_plugins`.

`register` runs in every process of vLLM. It makes the KV specs, the CUDA attention backend, MPT and LongLLaMA
known and wraps three methods of EngineArgs and the constructor of StatLoggerManager; it changes nothing for
an engine without a `longctx` configuration. A LongLLaMA model is the exception: in a local directory it gets
one, by its hub name it is refused.
"""

import argparse
import functools
from typing import Any

from transformers import AutoConfig
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.registry import ModelRegistry
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.metrics.loggers import StatLoggerManager

from vllm_longctx import processes, refusals
from vllm_longctx.config import KEY, PRESETS, LongContextError, checked_json
from vllm_longctx.engine import kv_cache
from vllm_longctx.metrics import LongContextStatLogger
from vllm_longctx.models import longllama
from vllm_longctx.modes import SCHEDULERS
from vllm_longctx.startup import engine_args
from vllm_longctx.startup.platform import CUDA_BACKEND

MIDDLEWARE = "vllm_longctx.serving.app.RequestChecks"


def register() -> None:
    kv_cache.register()
    for architecture in ("MptForCausalLM", "MPTForCausalLM"):
        ModelRegistry.register_model(architecture, "vllm_longctx.models.mpt:MptForCausalLM")
    ModelRegistry.register_model(longllama.ARCHITECTURE, "vllm.model_executor.models.llama:LlamaForCausalLM")
    AutoConfig.register(longllama.MODEL_TYPE, longllama.LongLlamaConfig, exist_ok=True)
    if not AttentionBackendEnum.CUSTOM.is_overridden():  # it is chosen by name only, never by vLLM itself
        register_backend(AttentionBackendEnum.CUSTOM, CUDA_BACKEND)
    if not hasattr(EngineArgs.create_engine_config, "__wrapped__"):
        _wrap_create_engine_config()
        _wrap_cli()
        _wrap_stat_loggers()


def _wrap_create_engine_config() -> None:
    create_engine_config = EngineArgs.create_engine_config

    @functools.wraps(create_engine_config)
    def create(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        with engine_args.prepared(self) as config:
            if config is not None:
                processes.interrupt_start()
            with engine_args.own_words(config):
                vllm_config = create_engine_config(self, *args, **kwargs)
        if config is not None:
            engine_args.complete(config, vllm_config, self.enable_lora)
            from vllm_longctx.serving import (
                app,
                stop_strings,
                token_cache,
            )  # the front end's, which other processes do not load

            app.check_engine_requests()
            app.refuse_images()
            app.limit_requests()
            stop_strings.wait_for_saves()
            token_cache.keep_ids()
            refusals.raise_in_front_end()
            if not config.mode.is_plain:
                processes.end_together()
        elif longllama.ARCHITECTURE in vllm_config.model_config.architectures:
            raise LongContextError(
                f"model {self.model} is LongLLaMA, which needs its memory; start it with --plugin longctx"
            )
        return vllm_config

    EngineArgs.create_engine_config = create  # type: ignore[method-assign]  # a seam


def _wrap_cli() -> None:
    """Add the flags to every parser built on EngineArgs, and fold them into additional_config."""
    add_cli_args, from_cli_args = EngineArgs.add_cli_args, EngineArgs.from_cli_args

    @functools.wraps(add_cli_args)
    def add(parser: FlexibleArgumentParser) -> FlexibleArgumentParser:
        parser = add_cli_args(parser)
        group = parser.add_argument_group(
            "longctx", "Texts far longer than the model was trained on (vllm-longctx)."
        )
        group.add_argument(
            "--plugin", choices=["longctx"], help="Run the plugin, by default with preset lm-infinite."
        )
        group.add_argument("--longctx", type=_checked_json, help="Its configuration as JSON.")
        group.add_argument("--longctx-preset", choices=sorted(PRESETS), help="A preset to start from.")
        return parser

    @functools.wraps(from_cli_args.__func__)  # type: ignore[attr-defined]  # of a bound class method
    def from_args(cls: type[EngineArgs], args: argparse.Namespace) -> EngineArgs:
        if hasattr(args, "longctx"):
            args.additional_config = engine_args.additional_config_from_flags(
                args.additional_config, args.plugin, args.longctx, args.longctx_preset
            )
            args.plugin = args.longctx = args.longctx_preset = None
        middleware = getattr(args, "middleware", None)  # an option of `vllm serve`
        if middleware is not None and KEY in (args.additional_config or {}) and MIDDLEWARE not in middleware:
            args.middleware = [*middleware, MIDDLEWARE]
        return from_cli_args.__func__(cls, args)  # type: ignore[attr-defined]

    EngineArgs.add_cli_args = staticmethod(add)  # type: ignore[method-assign]  # a seam
    EngineArgs.from_cli_args = classmethod(from_args)  # type: ignore[method-assign, assignment]  # a seam


def _wrap_stat_loggers() -> None:
    """Add our metrics to the engines whose scheduler sends them.

    vLLM's own door, the entry points `vllm.stat_logger_plugins`, would turn statistics on in every AsyncLLM,
    whatever its configuration, and does not open for LLM. Ours is made last, because vLLM's Prometheus logger
    unregisters what it finds.
    """
    init = StatLoggerManager.__init__

    @functools.wraps(init)
    def with_ours(self: StatLoggerManager, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        init(self, vllm_config, *args, **kwargs)
        if vllm_config.scheduler_config.scheduler_cls in SCHEDULERS:
            self.stat_loggers.insert(0, LongContextStatLogger(vllm_config, self.engine_indexes))

    StatLoggerManager.__init__ = with_ours  # type: ignore[method-assign]  # a seam


def _checked_json(text: str) -> dict[str, Any]:
    try:
        return checked_json(text)
    except LongContextError as e:
        raise argparse.ArgumentTypeError(str(e)) from None
