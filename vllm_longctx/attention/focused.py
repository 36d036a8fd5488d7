"""Memory layers of Focused Transformers (arXiv 2307.03170) in vLLM's CPU engine.

All positions are counted from the query's window (`focused.worker`), so keys of the window are rotated by their places in
it and queries by theirs. A key before the window must look as if it were the window's first: it is rotated by nothing. So a
memory layer is plain attention over all blocks, and what remains to be done is to turn back the keys of a window that ends.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionMetadataBuilder

from vllm_longctx.attention.scratch import as_kernel_cache, packed_order, unpack
from vllm_longctx.attention.selection import cdiv
from vllm_longctx.rotary import Rotary


@dataclass(frozen=True)
class ClosedWindow:
    """A request's window that becomes memory: positions start .. end - 1. blocks [n]: from the one that holds `start` on."""

    start: int
    end: int
    blocks: Tensor


class MemoryBackend(CPUAttentionBackend):
    """vLLM's CPU backend. Chosen per layer by `vllm_longctx.worker`, with a spec of its own."""

    @staticmethod
    def get_builder_cls() -> type["MemoryMetadataBuilder"]:
        return MemoryMetadataBuilder


class MemoryMetadataBuilder(CPUAttentionMetadataBuilder):
    seconds = 0.0  # as `LambdaMetadataBuilder`'s; nothing is selected here


def remember(cache: Tensor, window: ClosedWindow, rotary: Rotary | None, mem_dtype: torch.dtype, isa: str) -> None:
    """Turn a closed window's keys back to no rotation at all, and round keys and values to mem_dtype, in place.

    cache [blocks, kv_heads, block_size, 2 * head_size]: of one layer. rotary: None for a layer without positions.
    """
    block_size, head_size = cache.shape[2], cache.shape[3] // 2
    if rotary is None and mem_dtype == cache.dtype:
        return
    skip = window.start % block_size
    length = window.end - window.start
    places = packed_order(block_size, head_size, cache.dtype, isa)
    keys, values = (x[skip : skip + length] for x in unpack(cache[window.blocks], places))
    if rotary is not None:
        keys = rotary.turn(keys, -torch.arange(length)[:, None])
    keys, values = (x.to(mem_dtype).to(cache.dtype).contiguous() for x in (keys, values))
    entries = torch.arange(skip, skip + length)
    slots = window.blocks[entries // block_size].long() * block_size + entries % block_size
    ops.cpu_attn_reshape_and_cache(keys, values, *as_kernel_cache(cache).chunk(2, dim=2), slots, isa)


def covering(table: Tensor, start: int, end: int, block_size: int) -> Tensor:
    """The blocks of a request's table [blocks] that hold positions start .. end - 1."""
    return table[start // block_size : cdiv(end, block_size)]
