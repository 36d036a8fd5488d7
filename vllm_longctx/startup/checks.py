"""Models and settings of vLLM's that do not go with longctx: refused before anything is loaded, each with its
reason.
"""

import vllm.envs as envs
from vllm.config import ModelConfig, VllmConfig
from vllm.platforms import current_platform

from vllm_longctx.config import LongContextConfig, LongContextError
from vllm_longctx.engine.memory_kv import FP8
from vllm_longctx.models import longllama
from vllm_longctx.models.properties import check_load_format, why_not_adaptable
from vllm_longctx.modes import Mode
from vllm_longctx.startup.platform import CUDA, attention_backend, check_capability, platform
from vllm_longctx.startup.trainer import check_trainer
from vllm_longctx.temp_lora.shared_weights import SOFT_CAP


def check_model(model: ModelConfig) -> None:
    """Refuse what the model's config tells; its layers tell the rest once it is loaded (`engine.layers`).

    Raises LongContextError naming why the model cannot be run, and what can be done.
    """
    name = f"model {model.model} ({', '.join(model.architectures)})"
    backend = attention_backend()
    attention = platform().attention
    head_size, head_sizes = model.get_head_size(), backend.get_supported_head_sizes()
    dual_chunk = getattr(model.hf_text_config, "dual_chunk_attention_config", None)
    reasons = {
        "is an encoder-decoder": model.is_encoder_decoder,
        "has MLA layers (a compressed KV cache)": model.use_mla,
        "has Mamba or linear-attention layers, whose state has no window": (
            model.is_hybrid or model.has_inner_state
        ),
        "has no attention": model.is_attention_free,
        "has dual chunk attention of its own": dual_chunk is not None,
        f"has heads of {head_size} elements; {attention} takes {', '.join(map(str, head_sizes))}": head_size
        not in head_sizes,
        f"computes in {model.dtype}; {attention} takes {', '.join(map(str, backend.supported_dtypes))}; give "
        "--dtype": (model.dtype not in backend.supported_dtypes),
    }
    for reason, holds in reasons.items():
        if holds:
            raise LongContextError(f"longctx cannot run {name}: it {reason}")


def check_settings(vllm_config: VllmConfig, mode: Mode) -> None:
    """Raises LongContextError naming an engine setting that does not go with longctx, or with the mode."""
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    model = vllm_config.model_config
    here = platform()
    refused = {
        f"kv_cache_dtype = {cache.cache_dtype!r}; {here.kv_remedy}": cache.cache_dtype not in here.kv_dtypes,
        **_no_drafts(vllm_config, mode),
        # vLLM makes the buffers between ranks in a first run of the model, which it skips on a CPU then.
        f"pipeline_parallel_size = {parallel.pipeline_parallel_size} with enforce_eager, where vLLM's model "
        "runner for CPUs has no buffers between ranks; leave enforce_eager out": (
            here is not CUDA and parallel.pipeline_parallel_size > 1 and model.enforce_eager
        ),
        f"kv_offloading_size = {cache.kv_offloading_size}; leave it out": cache.kv_offloading_size
        is not None,
        "kv_transfer_config is set; leave it out": vllm_config.kv_transfer_config is not None,
        f"kv_cache_dtype_skip_layers = {cache.kv_cache_dtype_skip_layers}; leave it out": bool(
            cache.kv_cache_dtype_skip_layers
        ),
        f"runner = {model.runner_type!r}; leave it out: longctx is for models that write": model.runner_type
        != "generate",
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
        "the Model Runner V2 is chosen; set VLLM_USE_V2_MODEL_RUNNER=0": not here.has_runner_v2
        and vllm_config.use_v2_model_runner,
        f"block_size = {cache.block_size}; give a multiple of {here.block_multiple}": cache.block_size
        % here.block_multiple
        != 0,
    }
    for setting, holds in refused.items():
        if holds:
            raise LongContextError(f"longctx does not run with this setting: {setting}")
    if cache.cache_dtype in FP8:
        from vllm_longctx.cuda.sliding import MIN_FP8_CAPABILITY

        check_capability(
            MIN_FP8_CAPABILITY, f"kv_cache_dtype = {cache.cache_dtype!r}", "leave kv_cache_dtype at 'auto'"
        )


def _no_drafts(vllm_config: VllmConfig, mode: Mode) -> dict[str, bool]:
    """Reasons against speculative decoding, and whether they hold."""
    speculative = vllm_config.speculative_config
    if speculative is None:
        return {}
    return {
        f"speculative_config is set, and {mode.asked_for} ends windows or blocks of text at tokens that "
        "may be rejected; leave it out": not mode.takes_drafts,
        f"speculative_config.method = {speculative.method!r}, whose draft model has a KV cache with windows "
        "that longctx does not know; give 'ngram', or leave speculative_config out": speculative.method
        != "ngram",
        "speculative_config is set, and nothing of it has run on a GPU; leave it out": platform() is CUDA,
    }


def check_runner(config: LongContextConfig, vllm_config: VllmConfig) -> None:
    """Raises LongContextError naming an engine setting that does not go with a runner of CUDA's that prepares
    other inputs than vLLM's.
    """
    if platform() is not CUDA:
        return
    cache, looks_up, limit = (
        vllm_config.cache_config,
        config.attention.top_k is not None,
        config.attention.memory_limit_gib,
    )
    asked = "attention.top_k" if config.attention.lookup is None else "attention.lookup"
    refused = {
        "the Model Runner V1 is chosen; leave VLLM_USE_V2_MODEL_RUNNER "
        "out": not vllm_config.use_v2_model_runner,
        f"kv_cache_dtype = {cache.cache_dtype!r}; leave it at 'auto'": cache.cache_dtype != "auto",
        "microbatches are on; leave enable_dbo and ubatch_size "
        "out": vllm_config.parallel_config.use_ubatching,
        f"block_size = {cache.block_size}; with {asked} give a power of two": (
            looks_up and cache.block_size & (cache.block_size - 1) != 0
        ),
        f"attention.memory_limit_gib = {limit}, where vLLM has no pinned host memory that the GPU can "
        "address; leave it out": (limit is not None and not current_platform.is_pin_memory_available()),
    }
    for setting, holds in refused.items():
        if holds:
            raise LongContextError(
                f"{config.mode.asked_for} does not run on CUDA with this setting: {setting}"
            )


def check_adaptation(config: LongContextConfig, vllm_config: VllmConfig) -> None:
    """Raises LongContextError for a model or a setting with which Temp-LoRA cannot work."""
    adaptation, model, scheduler, parallel = (
        config.temp_lora,
        vllm_config.model_config,
        vllm_config.scheduler_config,
        vllm_config.parallel_config,
    )
    name = f"model {model.model} ({', '.join(model.architectures)})"
    most = scheduler.max_num_seqs
    why_not = why_not_adaptable(model)
    here = platform()
    executor, offload = parallel.distributed_executor_backend, vllm_config.offload_config
    refused = {
        f"{name} {why_not}": why_not is not None,
        "adaptation.trainer.attention = 'xformers', which has no soft cap of attention logits, but the model "
        "has one; leave attention out": adaptation.trainer.attention == "xformers"
        and bool(getattr(model.hf_text_config, SOFT_CAP, None)),
        f"adaptation.slots = {adaptation.slots}, but max_num_seqs = {most} requests run at once; lower "
        f"slots, or raise "
        "max_num_seqs": adaptation.slots is not None and adaptation.slots > most,
        f"scheduling_policy = {scheduler.policy!r} may preempt a request that adapts; leave it at 'fcfs'": (
            scheduler.policy != "fcfs"
        ),
        f"pipeline_parallel_size = {parallel.pipeline_parallel_size}; set it to "
        "1": parallel.pipeline_parallel_size > 1,
        f"distributed_executor_backend = {executor!r}: the trainer shares memory with workers of its "
        f"machine, below one "
        "engine; leave it out": executor not in (None, "mp", "uni"),
        f"nnodes = {parallel.nnodes}: the trainer shares memory with workers of its machine; set it to "
        "1": parallel.nnodes > 1,
        "weight_transfer_config is set, but the trainer keeps the weights that it has loaded; leave it out": (
            vllm_config.weight_transfer_config is not None
        ),
        f"weights are offloaded (cpu_offload_gb = {offload.uva.cpu_offload_gb}, offload_group_size = "
        f"{offload.prefetch.offload_group_size}), which the trainer cannot share; leave both out": (
            offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0
        ),
        f"data_parallel_size = {parallel.data_parallel_size} on CUDA, where all trainers would be on the "
        f"first GPU; set it to "
        "1, and start a server for each GPU": here.trains_beside_engine and parallel.data_parallel_size > 1,
        "microbatches are on, which go with no LoRA; leave enable_dbo and ubatch_size "
        "out": parallel.use_ubatching,
    }
    for reason, holds in refused.items():
        if holds:
            raise LongContextError(f"longctx cannot adapt here: {reason}")
    if (
        adaptation.trainer.address is None and not here.trains_beside_engine
    ):  # else it may share the engine's weights
        check_load_format(vllm_config.load_config)
    check_trainer(adaptation.trainer)


def check_together(config: LongContextConfig, vllm_config: VllmConfig) -> None:
    """Raises LongContextError where a mode that joins methods does not run."""
    if platform() is CUDA:
        raise LongContextError(
            f"{config.mode.asked_for} does not run on CUDA: model runners there were not joined with "
            "adapters; leave one of them out"
        )


def check_lookup(config: LongContextConfig, vllm_config: VllmConfig) -> None:
    """Raises LongContextError for a model or a setting with which a memory, or a top-k branch, cannot
    work.
    """
    model = vllm_config.model_config
    name = f"model {model.model} ({', '.join(model.architectures)})"
    refused = {
        f"{name} has positions for images too (M-RoPE), and windows count positions of their own": (
            model.uses_mrope
        ),
        f"{name} has ALiBi, by which no key looks as if it were elsewhere": model.uses_alibi,
        "disable_hybrid_kv_cache_manager is set, and memory layers keep what the others free; "
        "leave it out": bool(vllm_config.scheduler_config.disable_hybrid_kv_cache_manager),
        f"pipeline_parallel_size = {vllm_config.parallel_config.pipeline_parallel_size}; set it to 1": (
            vllm_config.parallel_config.pipeline_parallel_size > 1
        ),
    }
    for reason, holds in refused.items():
        if holds:
            raise LongContextError(f"longctx cannot look up keys here: {reason}")
    if model.hf_config.model_type == longllama.MODEL_TYPE:
        try:
            longllama.check_weights(model.model, model.hf_text_config)
        except ValueError as e:
            raise LongContextError(str(e)) from None
