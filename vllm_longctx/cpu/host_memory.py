"""Memory layers' KV in host memory, apart from vLLM's pool, on the CPU: a pool beside vLLM's."""

from collections.abc import Sequence

import torch
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_longctx.engine.layers import LayerSite
from vllm_longctx.engine.memory_kv import blocks_apart


def allocate_apart(sites: Sequence[LayerSite], kv_cache_config: KVCacheConfig) -> None:
    """Give memory layers with a pool of their own caches like those that they have in vLLM's.

    The operating system gives the pages as they are written.
    """
    layers = {site.name: site.layer for site in sites}
    for group in kv_cache_config.kv_cache_groups:
        if num_blocks := blocks_apart(group.kv_cache_spec):
            for name in group.layer_names:
                cache = layers[name].kv_cache
                layers[name].kv_cache = torch.zeros((num_blocks, *cache.shape[1:]), dtype=cache.dtype)
