"""Memory layers of Focused Transformers (arXiv 2307.03170) in vLLM's GPU engine.

As on the CPU (`vllm_longctx.cpu.memory`) all positions are counted from the query's window, and keys before
it are stored unrotated. So a memory layer that attends to all is plain attention: `sliding` with a geometry
that sees everything. Where queries look up the best keys, `kernels.decode_lookups` or, for chunks,
`kernels.lookup` attends to these, and `window` to the keys since the window's start.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

from vllm_longctx.cuda.kernels.decode_lookups import (
    DecodeLookup,
    DecodeLookups,
    cudagraph_support,
    of_first_token,
)
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
from vllm_longctx.settings import Lookup, Settings, active_settings

Caches = tuple[Tensor, Tensor]  # of keys, of values


@dataclass(frozen=True)
class ChunkLookup:
    """Of one chunk: `tokens` of those of all chunks.

    block_table [1, columns]; end int32 [1]: of its memory; length: the same.
    """

    tokens: slice
    block_table: Tensor
    end: Tensor
    length: int


@dataclass(frozen=True)
class LookupMetadata(WindowMetadata):
    """Of rows with a memory. decodes: of all of them."""

    decodes: DecodeLookup | None = None
    chunks: tuple[ChunkLookup, ...] = ()


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
    """CUDA graphs: of decodes whose lookup they can hold."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> AttentionCGSupport:
        assert isinstance(kv_cache_spec, AttentionSpec)
        return cudagraph_support(vllm_config, kv_cache_spec, _lookup(vllm_config))

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.lookups = DecodeLookups(vllm_config, kv_cache_spec, _lookup(vllm_config), 0, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LookupMetadata:
        m = super().build(common_prefix_len, common_attn_metadata, fast_build)
        n, rows = m.num_decodes, len(m.starts)
        lengths = self.rows.starts_on_host[:rows].tolist()
        decodes = None
        if n > 0:
            decodes = self.lookups.of(m.block_table[:n], m.starts[:n], max(lengths[:n]), n == rows)
        begins = (common_attn_metadata.query_start_loc_cpu[n : rows + 1] - n).tolist()
        tokens = [slice(*ends) for ends in pairwise(begins)]
        chunks = tuple(
            ChunkLookup(part, m.block_table[row : row + 1], m.starts[row : row + 1], lengths[row])
            for row, part in enumerate(tokens, n)
            if lengths[row] and part.stop > part.start
        )
        return LookupMetadata(**vars(m), decodes=decodes, chunks=chunks)


def _lookup(vllm_config: VllmConfig) -> Lookup:
    lookup = active_settings(vllm_config).memory.lookup
    assert lookup is not None
    return lookup


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
        caches = self._caches(kv_cache)
        zeros, ones = (torch.full((2,), n, dtype=torch.int32, device=kv_cache.device) for n in (0, 1))
        group = self.num_heads // self.num_kv_heads
        for length in (1, 16 // group + 1):  # tiles of queries have two sizes
            query = torch.zeros(
                length, self.num_heads, self.head_size, dtype=caches[0].dtype, device=kv_cache.device
            )
            chunk = ChunkLookup(slice(0, length), block_table[:1], ones[:1], 1)
            branch = self._attend_chunk(query, caches, chunk)
            ends = ones * length
            starts = torch.stack((zeros[0], ends[0]))
            stepped_attention(
                query,
                *caches,
                block_table[:1],
                zeros,
                ends[:1],
                starts,
                length,
                self.scale,
                torch.empty_like(query),
                branch,
                self.logits_soft_cap,
                self.sinks,
            )
        decode = of_first_token(block_table, caches[0].shape[1], group, self.lookup)
        branch = self._attend_decodes(query[:1], caches, decode)
        self._warm_up_decode(query[:1], *caches, block_table, ones, zeros, branch)

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

    def _further_keys(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, metadata: AttentionMetadata
    ) -> tuple[Tensor, Tensor] | None:
        assert isinstance(metadata, LookupMetadata)
        if metadata.decodes is None:
            return None
        return self._attend_decodes(query, (key_cache, value_cache), metadata.decodes)

    def _further_keys_of_chunks(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, metadata: WindowMetadata
    ) -> tuple[Tensor, Tensor] | None:
        assert isinstance(metadata, LookupMetadata)
        if not metadata.chunks:
            return None
        output = torch.zeros(query.shape, device=query.device)
        lse = torch.full(query.shape[:2], -torch.inf, device=query.device)
        for chunk in metadata.chunks:
            found = self._attend_chunk(query[chunk.tokens], (key_cache, value_cache), chunk)
            output[chunk.tokens], lse[chunk.tokens] = found
        return output, lse

    def _attend_decodes(self, query: Tensor, caches: Caches, decodes: DecodeLookup) -> tuple[Tensor, Tensor]:
        return decodes.attend(query, *caches, self.lookup, self.scale, self.logits_soft_cap, self.summaries)

    def _attend_chunk(self, query: Tensor, caches: Caches, chunk: ChunkLookup) -> tuple[Tensor, Tensor]:
        begin, lookup = torch.zeros_like(chunk.end), self.lookup
        memories = Memories(*caches, chunk.block_table, begin, chunk.end, chunk.length, self.summaries)
        best = attend_best(
            query[None], memories, lookup.top_k, self.scale, lookup.share, self.logits_soft_cap
        )
        return best[0][0], best[1][0]


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
