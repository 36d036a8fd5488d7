"""The private seams of vLLM that longctx leans on, each with its reason, and whether this vLLM has it.

Each is touched in one place (named below). `vllm-longctx doctor` shows them; on another vLLM version longctx refuses to start.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Seam:
    """what: the thing touched. where: our one place. why: what it is needed for. present: looks for it in this vLLM.

    patch: the diff in patches/ that would make it public; None for what is not vLLM's.
    """

    what: str
    where: str
    why: str
    present: Callable[[], bool]
    patch: str | None


def _has(path: str, *attributes: str) -> Callable[[], bool]:
    def present() -> bool:
        import importlib

        module, _, name = path.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            return False
        return all(hasattr(found, a) for a in attributes)

    return present


def _tensor_fields() -> bool:
    from vllm.v1.kv_cache_interface import KVCacheTensor

    return {"size", "layers", "layer_stride", "block_stride"} <= set(inspect.signature(KVCacheTensor).parameters)


def _statistics() -> bool:
    from vllm.v1.metrics.loggers import StatLoggerManager
    from vllm.v1.metrics.stats import SchedulerStats

    return hasattr(StatLoggerManager, "record") and "kv_connector_stats" in inspect.signature(SchedulerStats).parameters


SEAMS = [
    Seam(
        "EngineArgs.create_engine_config, add_cli_args, from_cli_args (wrapped)",
        "plugin.py",
        "read the configuration before the engine is set up, and add the --longctx flags",
        _has("vllm.engine.arg_utils:EngineArgs", "create_engine_config", "add_cli_args", "from_cli_args"),
        "0001-engine-config-hooks.diff",
    ),
    Seam(
        "Attention.impl, Attention.attn_backend and the rotary_emb beside it (replaced after loading)",
        "worker.py",
        "choose the backend per layer and per engine, and know the rotation of each layer's queries",
        _has("vllm.model_executor.layers.attention:Attention", "get_attn_backend", "get_kv_cache_spec"),
        "0002-attention-backend-per-layer.diff",
    ),
    Seam(
        "KVCacheTensor.layer_stride, size (enlarged before allocation)",
        "worker.py",
        "scratch blocks behind each layer's blocks that the scheduler never hands out",
        _tensor_fields,
        "0003-scratch-blocks.diff",
    ),
    Seam(
        "KVCacheSpecRegistry._ensure_registered",
        "kv_cache.py",
        "register our spec without losing the built-in ones",
        _has("vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry", "_ensure_registered", "register"),
        "0004-plugin-specs-before-builtin-ones.diff",
    ),
    Seam(
        "SingleTypeKVCacheManager._remove_blocks_in_range, num_cached_block, _get_num_evictable_blocks",
        "kv_cache.py",
        "free the middle of a request",
        _has(
            "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager",
            "_remove_blocks_in_range",
            "_get_num_evictable_blocks",
        ),
        "0005-public-block-range-in-managers.diff",
    ),
    Seam(
        "GPUModelRunner.input_batch.generators, discard_request_mask (hidden while sampling)",
        "worker.py",
        "seeded requests whose prompt comes in chunks, which kill vLLM's engine on the CPU",
        _has("vllm.v1.worker.cpu_model_runner:CPUModelRunner", "sample_tokens"),
        "0006-seeded-chunked-prefill-on-cpu.diff",
    ),
    Seam(
        "StatLoggerManager.__init__ (wrapped), SchedulerStats.kv_connector_stats (borrowed), an attribute on ModelRunnerOutput",
        "plugin.py, scheduler.py, worker.py",
        "metrics of long requests beside vLLM's own, only for engines that run longctx, in LLM too",
        _statistics,
        "0008-statistics-of-plugins.diff",
    ),
    Seam(
        "InputProcessor.process_inputs (wrapped)",
        "serving.py",
        "refuse, in the front end, requests that vLLM would run otherwise than asked for",
        _has("vllm.v1.engine.input_processor:InputProcessor", "process_inputs"),
        "0009-request-checks-of-plugins.diff",
    ),
    Seam(
        "APIRoute.app (wrapped) and default_sampling_params of vLLM's handlers (max_tokens set)",
        "serving.py",
        "check bodies behind vLLM's authentication, and end open-ended requests without capping the others",
        _has("vllm.entrypoints.launchers.app:build_app"),
        "0010-app-hooks-of-plugins.diff",
    ),
    Seam(
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
        "attention/branches.py",
        "attention with its log-sum-exp, to merge branches",
        _has("torch.ops:aten", "_scaled_dot_product_flash_attention_for_cpu"),
        None,
    ),
]
