"""Memory layers of Focused Transformers (arXiv 2307.03170) in vLLM's CPU engine.

All positions are counted from the query's window (`memory_runner`). Keys of the window are rotated by their
places in it, and so are its queries. Keys before the window are stored unrotated (position 0), so that they
appear at its start. So a memory layer that attends to all is plain attention over all blocks, in vLLM's own
kernel; all that is left to do is to turn back the keys of a window that ends. Queries that look up the best
keys use that kernel for the window, and `kernels.retrieval` for the memory.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_longctx.cpu.kernels.branches import additive, attend, with_sinks
from vllm_longctx.cpu.kernels.retrieval import Codes, Memory, Pages, attend_best
from vllm_longctx.cpu.kernels.scratch import as_kernel_caches, packed_order, unpack
from vllm_longctx.cpu.rows import StepRows, WindowRow
from vllm_longctx.cpu.window import from_blocks
from vllm_longctx.engine.layers import LayerSite, TakenOver
from vllm_longctx.engine.lookup import ClosedWindow, covering
from vllm_longctx.rotary import Rotary
from vllm_longctx.settings import Lookup


@dataclass(frozen=True)
class Lookups:
    """A request's queries whose memory is larger than top_k.

    tokens: of the step. start: of their window; end: behind it. how: of the keys that they find.

    block_table int64: the request's blocks up to `end`.
    """

    tokens: slice
    start: int
    end: int
    block_table: Tensor
    how: Lookup


@dataclass
class MemoryMetadata(CPUAttentionMetadata):
    """vLLM's, for which requests with lookups end at their window's first block."""

    lookups: tuple[Lookups, ...] = ()


class MemoryBackend(CPUAttentionBackend):
    """vLLM's CPU backend, whose queries may look up the best keys."""

    @staticmethod
    def get_builder_cls() -> type["MemoryMetadataBuilder"]:
        return MemoryMetadataBuilder

    @classmethod
    def make_layer(cls, site: LayerSite) -> "MemoryImpl":
        return MemoryImpl.of(site.layer.impl, lookup=site.settings.memory.lookup)


class MemoryMetadataBuilder(CPUAttentionMetadataBuilder):
    rows: StepRows

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        m = common_attn_metadata
        # The kernel attends to all of a memory that is no larger than top_k.
        rows = tuple((w, w.lookup) for w in self.rows.windows if w.lookup and w.first > w.lookup.top_k)
        if not rows:
            return super().build(common_prefix_len, m, fast_build)
        lookups = tuple(self._lookups(m, w, how) for w, how in rows)
        first_blocks = torch.zeros_like(m.seq_lens)
        for w, _ in rows:
            first_blocks[w.row] = w.first // self.block_size
        m = from_blocks(m, first_blocks, m.seq_lens - first_blocks * self.block_size, self.block_size)
        stock = super().build(common_prefix_len, m, fast_build)
        return MemoryMetadata(**{f.name: getattr(stock, f.name) for f in fields(stock)}, lookups=lookups)

    def _lookups(self, m: CommonAttentionMetadata, w: WindowRow, how: Lookup) -> Lookups:
        begin, behind = m.query_start_loc[w.row : w.row + 2].tolist()
        end = int(m.seq_lens[w.row])
        table = m.block_table_tensor[w.row, : cdiv(end, self.block_size)].long()
        return Lookups(slice(begin, behind), w.first, end, table, how)


class MemoryImpl(TakenOver, CPUAttentionBackendImpl):
    """A stock CPU attention layer taken over after the weights are loaded.

    lookup: Of requests that have not chosen another one; None where queries see all.
    codes: Of the memory's blocks; None where no query looks up keys, unless it has chosen so.
    """

    lookup: Lookup | None
    pages: Pages
    codes: Codes | None

    def bind_kv_cache(self, cache: Tensor, isa: str) -> None:
        """cache: The layer's, once it is there."""
        num_blocks, kv_heads, block_size, width = cache.shape
        self.pages, self.codes = Pages(cache, packed_order(block_size, width // 2, cache.dtype, isa)), None
        if self.lookup is not None:
            self.codes = Codes.empty(num_blocks, kv_heads, block_size, width // 2)

    def summarise(self, window: ClosedWindow) -> None:
        """A closed window's blocks, un-rotated, can be looked up."""
        if self.codes is None:
            return
        block_size = self.pages.cache.shape[2]
        first = window.start // block_size
        filled = (window.end - (first + torch.arange(len(window.blocks))) * block_size).clamp_max(block_size)
        self.codes.summarise(self.pages, window.blocks.long(), filled)

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """As `CPUAttentionBackendImpl.forward`; keys and values of the step are in the cache already."""
        super().forward(
            layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
        )
        if isinstance(attn_metadata, MemoryMetadata):
            for lookups in attn_metadata.lookups:
                output[lookups.tokens] = self._look_up(query[lookups.tokens], lookups)
        return output

    def _look_up(self, query: Tensor, lookups: Lookups) -> Tensor:
        memory = Memory(self.pages, lookups.block_table, 0, lookups.start, self.codes)
        window, lookup = self._window(query, lookups), lookups.how
        return attend_best(
            query, memory, window, lookup.top_k, self.scale, lookup.share, self.logits_soft_cap
        )

    def _window(self, query: Tensor, lookups: Lookups) -> tuple[Tensor, Tensor]:
        """Attention over the window and the sinks: output [T, heads, d], log-sum-exp [T, heads]."""
        cache, block_size = self.pages.cache, self.pages.cache.shape[2]
        blocks = covering(lookups.block_table, lookups.start, lookups.end, block_size)
        skip, length = lookups.start % block_size, lookups.end - lookups.start
        keys, values = (
            x[skip : skip + length].transpose(0, 1)[None] for x in unpack(cache[blocks], self.pages.places)
        )
        places = torch.arange(length)
        mask = additive(places[None] <= places[length - len(query) :, None])
        attended, lse = attend(
            query.transpose(0, 1)[None], keys, values, mask, self.scale, self.logits_soft_cap
        )
        return with_sinks((attended[0].transpose(0, 1), lse[0].transpose(0, 1)), self.sinks)


def close_window(
    cache: Tensor, window: ClosedWindow, rotary: Rotary | None, mem_dtype: torch.dtype, isa: str
) -> None:
    """Turn a closed window's keys back to no rotation at all, and round keys and values to mem_dtype, in
    place.

    cache [blocks, kv_heads, block_size, 2 * head_size]: of one layer. rotary: None for a layer without
    positions.
    """
    block_size, head_size = cache.shape[2], cache.shape[3] // 2
    if rotary is None and mem_dtype == cache.dtype:
        return
    skip = window.start % block_size
    length = window.end - window.start
    places = packed_order(block_size, head_size, cache.dtype, isa)
    keys, values = (x[skip : skip + length] for x in unpack(cache[window.blocks], places))
    if rotary is not None:
        keys = rotary.turn(
            keys, torch.arange(window.origin - window.start, window.origin - window.end, -1)[:, None]
        )
    keys, values = (x.to(mem_dtype).to(cache.dtype).contiguous() for x in (keys, values))
    entries = torch.arange(skip, skip + length)
    slots = window.blocks[entries // block_size].long() * block_size + entries % block_size
    ops.cpu_attn_reshape_and_cache(keys, values, *as_kernel_caches(cache), slots, isa)
