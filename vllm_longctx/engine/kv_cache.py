"""The KV cache of all modes: what vLLM must know of our specs, and how prefixes are hit, for users."""

from vllm.config import CacheConfig, VllmConfig
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_longctx.engine.memory_kv import (
    MemoryManager,
    MemorySpec,
    MiddleManager,
    MiddleSpec,
    WindowManager,
    WindowSpec,
)
from vllm_longctx.engine.sliding_kv import LambdaManager, LambdaSpec
from vllm_longctx.engine.stepped_kv import SteppedManager, SteppedSpec
from vllm_longctx.modes import Role
from vllm_longctx.settings import Settings

MANAGERS: dict[type[LambdaSpec | SteppedSpec | MemorySpec | MiddleSpec], type[SingleTypeKVCacheManager]] = {
    LambdaSpec: LambdaManager,
    SteppedSpec: SteppedManager,
    WindowSpec: WindowManager,
    MemorySpec: MemoryManager,
    MiddleSpec: MiddleManager,
}


def prefix_caching(settings: Settings, cache: CacheConfig) -> str:
    """From which length on and in which steps prefixes are hit, for users."""
    if not cache.enable_prefix_caching:
        return "off"
    steps = f"in steps of {cache.block_size} tokens"
    if settings.attention.method == "focused":
        windows = settings.memory.windows
        first = f"{steps} inside of the first window"
        later = f"in steps of {windows.tokens}, up to {windows.last_tokens} tokens before the end of"
        if Role.MEMORY in settings.mode.layers:
            return f"{first}, while that is open; then {later} either prompt"
        return f"{first}; then {later} the prompt, also where nothing was computed before"
    if not settings.mode.adapts:
        return steps
    shares = "off" if settings.temp_lora.cache_gib == 0 else "with the same versions only"
    return f"{steps}; requests that learn: {shares}"


def layer_spec(kind: str, spec: AttentionSpec, vllm_config: VllmConfig) -> KVCacheSpec:
    """What the pool keeps of a layer.

    kind: The name of the spec in `modes.MODES`. spec: What vLLM would keep of the layer.
    """
    return next(s for s in MANAGERS if s.__name__ == kind).for_layer(spec, vllm_config)


def register() -> None:
    """Make the specs known to vLLM; also needed where it is only unpickled."""
    # vLLM registers its own when it is first asked, but not if there are any: so it is asked before.
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})
    for spec, manager in MANAGERS.items():
        KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=spec)
