"""Memory layers of Focused Transformers (arXiv 2307.03170) in vLLM's GPU engine.

As on the CPU (`vllm_longctx.cpu.memory`) all positions are counted from the query's window, and keys before
it are stored unrotated. So a memory layer that attends to all is plain attention: `sliding` with a geometry
that sees everything. Where queries look up the best keys, `kernels.lookup` attends to these and `window` to
the keys since the window's start.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

from vllm_longctx.cuda.kernels.lambda_decode import MAX_SPLITS, decode_workspace, lambda_decode
from vllm_longctx.cuda.kernels.lookup import WORKSPACE, Memories, Summaries, attend_best
from vllm_longctx.cuda.kernels.stepped import stepped_attention
from vllm_longctx.cuda.sliding import LambdaBackend, LambdaImpl, taken_over
from vllm_longctx.cuda.window import WindowImpl, WindowMetadata, WindowMetadataBuilder
from vllm_longctx.engine.layers import LayerSite
from vllm_longctx.engine.lookup import ClosedWindow
from vllm_longctx.engine.memory_kv import blocks_apart
from vllm_longctx.geometry import Geometry
from vllm_longctx.rotary import Rotary
from vllm_longctx.settings import Lookup, Settings


@dataclass(frozen=True)
class LookupPart:
    """Rows with equally many queries, the step's tokens `tokens`.

    ends int32 [rows]: of their memories; longest: of these.
    """

    tokens: slice
    block_table: Tensor
    ends: Tensor
    longest: int


@dataclass(frozen=True)
class LookupMetadata(WindowMetadata):
    lookups: tuple[LookupPart, ...] = ()


class MemoryBackend(LambdaBackend):
    """Memory layers whose queries see all of it."""

    @classmethod
    def make_layer(cls, site: LayerSite) -> LambdaImpl:
        lookup = site.settings.memory.lookup
        impl = taken_over(site, Geometry())
        return impl if lookup is None else LookupImpl.of(impl, lookup=lookup, summaries=None)

    @classmethod
    def for_settings(cls, settings: Settings) -> type[AttentionBackend]:
        return cls if settings.memory.lookup is None else LookupBackend


class LookupBackend(MemoryBackend):
    """Memory layers whose queries look up the best keys."""

    @staticmethod
    def get_builder_cls() -> type["LookupMetadataBuilder"]:
        return LookupMetadataBuilder


class LookupMetadataBuilder(WindowMetadataBuilder):
    """No CUDA graphs: how much there is to look up changes from step to step."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LookupMetadata:
        m = super().build(common_prefix_len, common_attn_metadata, fast_build)
        return LookupMetadata(**vars(m), lookups=self._lookups(common_attn_metadata, m.starts))

    def _lookups(self, m: CommonAttentionMetadata, starts: Tensor) -> tuple[LookupPart, ...]:
        """All decodes are one part, every chunk is one of its own; rows without memory have none."""
        decodes = split_decodes_and_prefills(m, decode_threshold=1)[0]
        begins = m.query_start_loc_cpu.tolist()
        rows = [slice(0, decodes)] if decodes else []
        rows += [slice(row, row + 1) for row in range(decodes, m.num_reqs)]
        parts = (
            LookupPart(
                slice(begins[r.start], begins[r.stop]),
                m.block_table_tensor[r],
                starts[r],
                int(self.rows.starts_on_host[r].max()),
            )
            for r in rows
        )
        return tuple(part for part in parts if part.longest and part.tokens.stop > part.tokens.start)


class LookupImpl(WindowImpl):
    """A layer of `sliding` taken over after the weights are loaded.

    summaries: Of its blocks, with a lookup by blocks.
    """

    lookup: Lookup
    summaries: Summaries | None

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """kv_cache: The layer's, once it is there."""
        if self.lookup.share is not None:
            self.summaries = Summaries.like(self._caches(kv_cache)[0])

    def warm_up(self, kv_cache: Tensor, block_table: Tensor) -> None:
        """Compile what lookups need before a request waits for it.

        block_table [rows, columns]: vLLM's own, by its strides.
        """
        key_cache, value_cache = self._caches(kv_cache)
        for length in (1, 16 // (self.num_heads // self.num_kv_heads) + 1):  # tiles of queries have two sizes
            zeros, ones = (torch.full((2,), n, dtype=torch.int32, device=kv_cache.device) for n in (0, 1))
            memories = Memories(
                key_cache, value_cache, block_table[:1], zeros[:1], ones[:1], 1, self.summaries
            )
            query = torch.zeros(
                length, self.num_heads, self.head_size, dtype=key_cache.dtype, device=kv_cache.device
            )
            best = self._attend_best(query[None], memories)
            ends = ones * length
            starts = torch.stack((zeros[0], ends[0]))
            branch = best[0][0], best[1][0]
            out = torch.empty_like(query)
            if length == 1:
                self._warm_up_decode(query, key_cache, value_cache, block_table, ends, zeros, branch)
                continue
            stepped_attention(
                query,
                key_cache,
                value_cache,
                block_table[:1],
                zeros,
                ends[:1],
                starts,
                length,
                self.scale,
                out,
                branch,
                self.logits_soft_cap,
                self.sinks,
            )

    def _warm_up_decode(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_table: Tensor,
        ends: Tensor,
        zeros: Tensor,
        branch: tuple[Tensor, Tensor],
    ) -> None:
        workspace = decode_workspace(1, self.num_heads, self.head_size, MAX_SPLITS, query.device)
        for splits in (1 << n for n in range(MAX_SPLITS.bit_length())):
            lambda_decode(
                query,
                key_cache,
                value_cache,
                block_table[:1],
                ends[:1],
                None,
                None,
                self.view,
                self.scale,
                torch.empty_like(query),
                workspace,
                splits,
                starts=zeros[:1],
                branch=branch,
            )

    def summarise(self, kv_cache: Tensor, window: ClosedWindow) -> None:
        """A closed window's blocks, un-rotated, can be looked up."""
        if self.summaries is None:
            return
        key_cache, _ = self._caches(kv_cache)
        block_size = key_cache.shape[1]
        numbers = torch.arange(
            window.start // block_size, -(-window.end // block_size), device=key_cache.device
        )
        self.summaries.summarise(
            key_cache, window.blocks.long(), (window.end - numbers * block_size).clamp_max(block_size)
        )

    def _memory_branch(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, metadata: WindowMetadata
    ) -> tuple[Tensor, Tensor] | None:
        assert isinstance(metadata, LookupMetadata)
        if not metadata.lookups:
            return None
        branch = (
            torch.empty(query.shape, device=query.device),
            torch.empty(query.shape[:2], device=query.device),
        )
        branch[0].zero_()
        branch[1].fill_(-torch.inf)
        for part in metadata.lookups:
            rows = len(part.ends)
            memories = Memories(
                key_cache,
                value_cache,
                part.block_table,
                torch.zeros_like(part.ends),
                part.ends,
                part.longest,
                self.summaries,
            )
            queries = query[part.tokens].unflatten(0, (rows, -1))
            best = self._attend_best(queries, memories)
            for whole, found in zip(branch, best, strict=True):
                whole[part.tokens] = found.flatten(0, 1)
        return branch

    def _attend_best(self, query: Tensor, memories: Memories) -> tuple[Tensor, Tensor]:
        lookup = self.lookup
        return attend_best(query, memories, lookup.top_k, self.scale, lookup.share, self.logits_soft_cap)


def close_window(
    kv_cache: Tensor, window: ClosedWindow, rotary: Rotary | None, mem_dtype: torch.dtype
) -> None:
    """Turn a closed window's keys back to no rotation at all, and round keys and values to mem_dtype, in
    place.

    kv_cache [blocks, kv_heads, block_size, 2 * head_size]: of one layer. rotary: None for a layer without
    positions.
    """
    if rotary is None and mem_dtype == kv_cache.dtype:
        return
    block_size, head_size = kv_cache.shape[2], kv_cache.shape[3] // 2
    skip = window.start % block_size
    entries = torch.arange(skip, skip + window.end - window.start, device=kv_cache.device)
    blocks, offsets = window.blocks.long()[entries // block_size], entries % block_size
    by_token = kv_cache.transpose(1, 2)
    keys, values = by_token[blocks, offsets].split(head_size, -1)
    if rotary is not None:
        by = torch.arange(
            window.origin - window.start, window.origin - window.end, -1, device=kv_cache.device
        )
        keys = rotary.turn(keys, by[:, None])
    by_token[blocks, offsets] = torch.cat((keys, values), -1).to(mem_dtype).to(kv_cache.dtype)


def pool_beside_lookups(
    available: int, lookup: Lookup | None, element_size: int, specs: Iterable[KVCacheSpec] = ()
) -> int:
    """What is left for the KV cache of `available` bytes: lookups need workspaces, and summaries a byte per
    key element.

    specs: of all layers. The summaries of a memory apart are here too, though its KV is not; without such,
    they grow with the pool.
    """
    if lookup is None:
        return available
    available -= 4 * WORKSPACE * 8
    if lookup.share is None:
        return available
    apart = [
        Summaries.nbytes(blocks, spec.block_size, spec.num_kv_heads, spec.head_size)
        for spec in specs
        if isinstance(spec, AttentionSpec) and (blocks := blocks_apart(spec))
    ]
    if apart:
        return available - sum(apart)
    return available * 2 * element_size // (2 * element_size + 1) - (available >> 8)  # and their steps
