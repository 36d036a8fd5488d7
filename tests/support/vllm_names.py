"""What the tests take from vLLM and its versions have in different modules, and a step of its engine core."""

from collections.abc import Iterable, Mapping
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

try:  # vLLM 0.33
    from vllm.entrypoints.common.cli_args import make_arg_parser
    from vllm.v1.core.kv_cache_planning import get_kv_cache_config_from_groups, get_kv_cache_groups
except ImportError:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_kv_cache_groups

__all__ = ["kv_cache_config", "make_arg_parser"]


def kv_cache_config(
    vllm_config: VllmConfig, specs: Mapping[str, KVCacheSpec], layers: Iterable[Any], memory: int
) -> KVCacheConfig:
    """The KV cache of a worker's layers, as the engine core plans it.

    specs: By the layer's name. memory: Bytes for the KV cache.
    """
    supported = get_supported_kv_cache_layouts(layer.get_attn_backend() for layer in layers)
    resolve_kv_cache_layout(vllm_config, [[layout.name for layout in supported]], specs.values())
    groups = get_kv_cache_groups(vllm_config, dict(specs))
    return get_kv_cache_config_from_groups(vllm_config, groups, available_memory=memory)
