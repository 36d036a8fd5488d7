"""Memory layers' KV in host memory, apart from vLLM's pool, on CUDA: kernels read and write it where it is,
over the bus.

By unified addressing, as vLLM offloads weights (vllm/model_executor/offloader/uva.py). To kernels, and in
CUDA graphs, such a cache is a tensor on the device like any other; each key that is read crosses the bus each
time.
"""

import contextlib
import math
import mmap
from collections.abc import Sequence

import psutil
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.utils.cpu_resource_utils import get_cgroup_memory_limit
from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_longctx.config import LongContextError
from vllm_longctx.engine.layers import LayerSite
from vllm_longctx.engine.memory_kv import blocks_apart
from vllm_longctx.settings import active_settings

GIB = 1 << 30


class HostMemory:
    """Zeros in pinned memory. on_device: int8 [num_bytes], the same bytes as a tensor on the current device.

    Raises OSError or RuntimeError where they cannot be had. Not from torch's allocator, which rounds up to a
    power of two.
    """

    def __init__(self, num_bytes: int):
        pages = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_DONTFORK)  # Linux copies pinned pages for a child
        with contextlib.suppress(
            OSError
        ):  # a kernel without huge pages, of which a device needs fewer addresses
            pages.madvise(mmap.MADV_HUGEPAGE)
        self.pages = torch.frombuffer(pages, dtype=torch.int8)
        self.on_device = mapped(self.pages)

    def release(self) -> None:
        """Once nothing reads `on_device` any more."""
        torch.cuda.cudart().cudaHostUnregister(self.pages.data_ptr())


def mapped(pages: Tensor) -> Tensor:
    """A device tensor of the same memory, which must outlive it.

    Raises RuntimeError if it cannot be pinned.
    """
    error = torch.cuda.cudart().cudaHostRegister(pages.data_ptr(), pages.nbytes, 0)
    if error.value != 0:
        raise RuntimeError(f"cudaHostRegister: {error}")
    if not pages.is_pinned():  # then vLLM would make a view of a copy
        raise RuntimeError("CUDA does not take registered memory for pinned")
    return get_accelerator_view_from_cpu_tensor(pages)


def free_host_bytes() -> int:
    """What this process could still get."""
    free, limit = psutil.virtual_memory().available, get_cgroup_memory_limit()
    return free if limit is None else min(free, limit)


def check_host_memory(vllm_config: VllmConfig) -> None:
    """Before any rank has pinned its own.

    Raises LongContextError if the host has less than all its ranks ask for.
    """
    limit = active_settings(vllm_config).attention.memory_limit_gib
    if limit is None:
        return
    ranks, free = vllm_config.parallel_config.local_world_size, free_host_bytes()
    if limit * GIB * ranks > free:
        of_ranks = "" if ranks == 1 else f" for each of {ranks} ranks"
        raise LongContextError(
            f"attention.memory_limit_gib = {limit}{of_ranks} is to be pinned, but this host has "
            f"{free / GIB:.1f} GiB free; "
            "lower it, or leave it out to keep memory in vLLM's pool"
        )


def allocate_apart(sites: Sequence[LayerSite], kv_cache_config: KVCacheConfig) -> HostMemory | None:
    """Give memory layers with a pool of their own caches in host memory, like those they have in vLLM's; what
    holds them.

    kv_cache_config: the model runner's own, once caches are there. vLLM makes up block ids below its
    num_blocks to warm its kernels, at least one for each group; so this many there must be, and num_blocks
    not be more. Raises LongContextError if the memory cannot be pinned.
    """
    layers, groups = {site.name: site.layer for site in sites}, kv_cache_config.kv_cache_groups
    apart = {
        name: blocks
        for group in groups
        if (blocks := blocks_apart(group.kv_cache_spec))
        for name in group.layer_names
    }
    if not apart:
        return None
    num_blocks = max(*apart.values(), len(groups) + 1)  # all have the same
    caches = [layers[name].kv_cache for name in apart]
    shape = num_blocks, *caches[0].shape[1:]
    num_bytes = len(caches) * math.prod(shape) * caches[0].itemsize
    try:
        memory = HostMemory(num_bytes)
    except (OSError, RuntimeError) as e:
        raise LongContextError(
            f"attention.memory_limit_gib: {num_bytes / GIB:.2f} GiB of host memory cannot be pinned for the "
            f"GPU ({e}); this "
            f"host has {free_host_bytes() / GIB:.1f} GiB free; lower it, or leave it out to keep memory in "
            f"vLLM's pool"
        ) from e
    for name, cache, part in zip(apart, caches, memory.on_device.chunk(len(caches)), strict=True):
        layers[name].kv_cache = part.view(cache.dtype).view(shape)
    kv_cache_config.num_blocks = min(kv_cache_config.num_blocks, num_blocks)
    return memory
