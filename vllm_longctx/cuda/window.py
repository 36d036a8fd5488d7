"""Memory layers and stepped windows of Focused Transformers (arXiv 2307.03170) in vLLM's GPU engine.

As on the CPU (`attention.focused`) all positions are counted from the query's window, so keys before it must be rotated by
nothing, and a memory layer that attends to all is plain attention: `attention.cuda` with a geometry that sees everything. In
the other layers, and where queries look up the best keys, a kernel takes the keys since the window's start. Tables and slots
are vLLM's own; where windows start comes in one tensor per step.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionLayer,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

from vllm_longctx.cuda.kernels.lookup import WORKSPACE, Memories, Summaries, attend_best
from vllm_longctx.cuda.kernels.stepped import stepped_attention
from vllm_longctx.cuda.sliding import LambdaBackend, LambdaImpl
from vllm_longctx.engine.kv_cache import blocks_apart
from vllm_longctx.engine.lookup import ClosedWindow, Lookup
from vllm_longctx.rotary import Rotary


@dataclass(frozen=True)
class LookupPart:
    """Rows with equally many queries, the step's tokens `tokens`. ends int32 [rows]: of their memories; longest: of these."""

    tokens: slice
    block_table: Tensor
    ends: Tensor
    longest: int


@dataclass(frozen=True)
class SteppedMetadata:
    """Of a step. starts int32 [rows]: of the windows. Rows of length 0 are padding."""

    num_actual_tokens: int
    block_table: Tensor
    starts: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    max_query_len: int
    lookups: tuple[LookupPart, ...] = ()


class SteppedBackend(LambdaBackend):
    """Layers without memory."""

    @staticmethod
    def get_builder_cls() -> type["SteppedMetadataBuilder"]:
        return SteppedMetadataBuilder


class LookupBackend(LambdaBackend):
    """Memory layers whose queries look up the best keys."""

    @staticmethod
    def get_builder_cls() -> type["LookupMetadataBuilder"]:
        return LookupMetadataBuilder


class SteppedMetadataBuilder(AttentionMetadataBuilder[SteppedMetadata]):
    """starts int32 [max_num_seqs], and a copy on the host: written by the worker before each step, always in place."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)  # decodes first
        max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        self.starts = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        self.starts_on_host: NDArray[np.int32] = np.zeros(max_num_seqs, np.int32)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SteppedMetadata:
        m = common_attn_metadata
        starts = self.starts[: m.num_reqs]
        return SteppedMetadata(
            m.num_actual_tokens,
            m.block_table_tensor,
            starts,
            m.seq_lens,
            m.query_start_loc,
            m.max_query_len,
            self._lookups(m, starts),
        )

    def _lookups(self, m: CommonAttentionMetadata, starts: Tensor) -> tuple[LookupPart, ...]:
        return ()


class LookupMetadataBuilder(SteppedMetadataBuilder):
    """No CUDA graphs: how much there is to look up changes from step to step."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def _lookups(self, m: CommonAttentionMetadata, starts: Tensor) -> tuple[LookupPart, ...]:
        """All decodes are one part, every chunk is one of its own; rows without memory have none."""
        decodes = split_decodes_and_prefills(m, decode_threshold=1)[0]
        begins = m.query_start_loc_cpu.tolist()
        rows = [slice(0, decodes)] if decodes else []
        rows += [slice(row, row + 1) for row in range(decodes, m.num_reqs)]
        parts = (
            LookupPart(
                slice(begins[r.start], begins[r.stop]), m.block_table_tensor[r], starts[r], int(self.starts_on_host[r].max())
            )
            for r in rows
        )
        return tuple(part for part in parts if part.longest and part.tokens.stop > part.tokens.start)


class SteppedImpl(LambdaImpl):
    """A layer of `attention.cuda` taken over after the weights are loaded. lookup: of a memory layer that has one."""

    summaries: Summaries | None = None

    def __init__(self, stock: LambdaImpl, lookup: Lookup | None = None):
        self.__dict__.update(vars(stock))
        self.lookup = lookup

    def look_into(self, kv_cache: Tensor) -> None:
        """kv_cache: the layer's, once it is there."""
        if self.lookup is not None and self.lookup.share is not None:
            self.summaries = Summaries.like(self._caches(kv_cache)[0])

    def warm_up(self, kv_cache: Tensor, block_table: Tensor) -> None:
        """Compile what lookups need before a request waits for it. block_table [rows, columns]: vLLM's own, by its strides."""
        assert self.lookup is not None
        key_cache, value_cache = self._caches(kv_cache)
        for length in (1, 16 // (self.num_heads // self.num_kv_heads) + 1):  # tiles of queries have two sizes
            zeros, ones = (torch.full((2,), n, dtype=torch.int32, device=kv_cache.device) for n in (0, 1))
            memories = Memories(key_cache, value_cache, block_table[:1], zeros[:1], ones[:1], 1, self.summaries)
            query = torch.zeros(length, self.num_heads, self.head_size, dtype=key_cache.dtype, device=kv_cache.device)
            best = attend_best(query[None], memories, self.lookup.top_k, self.scale, self.lookup.share)
            ends = ones * length
            starts = torch.stack((zeros[0], ends[0]))
            branch = best[0][0], best[1][0]
            out = torch.empty_like(query)
            stepped_attention(
                query, key_cache, value_cache, block_table[:1], zeros, ends[:1], starts, length, self.scale, out, branch
            )

    def summarise(self, kv_cache: Tensor, window: ClosedWindow) -> None:
        """After `remember`: a closed window's blocks can be looked up."""
        if self.summaries is None:
            return
        key_cache, _ = self._caches(kv_cache)
        block_size = key_cache.shape[1]
        numbers = torch.arange(window.start // block_size, -(-window.end // block_size), device=key_cache.device)
        self.summaries.summarise(key_cache, window.blocks.long(), (window.end - numbers * block_size).clamp_max(block_size))

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: SteppedMetadata | None,  # type: ignore[override]
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """As `LambdaImpl.forward`."""
        if attn_metadata is None:  # profiling run
            return output.fill_(0)
        m, (key_cache, value_cache) = attn_metadata, self._caches(kv_cache)
        query, out = query[: m.num_actual_tokens], output[: m.num_actual_tokens]
        branch = None
        if m.lookups:
            assert self.lookup is not None
            branch = torch.empty(query.shape, device=query.device), torch.empty(query.shape[:2], device=query.device)
            branch[0].zero_()
            branch[1].fill_(-torch.inf)
            for part in m.lookups:
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
                best = attend_best(queries, memories, self.lookup.top_k, self.scale, self.lookup.share)
                for whole, found in zip(branch, best, strict=True):
                    whole[part.tokens] = found.flatten(0, 1)
        stepped_attention(
            query,
            key_cache,
            value_cache,
            m.block_table,
            m.starts,
            m.seq_lens,
            m.query_start_loc,
            m.max_query_len,
            self.scale,
            out,
            branch,
        )
        return output


def remember(kv_cache: Tensor, window: ClosedWindow, rotary: Rotary | None, mem_dtype: torch.dtype) -> None:
    """Turn a closed window's keys back to no rotation at all, and round keys and values to mem_dtype, in place.

    kv_cache [blocks, kv_heads, block_size, 2 * head_size]: of one layer. rotary: None for a layer without positions.
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
        by = torch.arange(window.origin - window.start, window.origin - window.end, -1, device=kv_cache.device)
        keys = rotary.turn(keys, by[:, None])
    by_token[blocks, offsets] = torch.cat((keys, values), -1).to(mem_dtype).to(kv_cache.dtype)


def pool_beside_lookups(available: int, lookup: Lookup | None, element_size: int, specs: Iterable[KVCacheSpec] = ()) -> int:
    """What is left for the KV cache of `available` bytes: lookups need workspaces, and summaries a byte per key element.

    specs: of all layers. The summaries of a memory apart are here too, though its KV is not; without such, they grow with the
    pool.
    """
    if lookup is None:
        return available
    available -= 4 * WORKSPACE * 8
    if lookup.share is None:
        return available
    apart = [
        Summaries.nbytes(blocks, spec.block_size, spec.num_kv_heads, spec.head_size)
        for spec in specs
        if (blocks := blocks_apart(spec))
    ]
    if apart:
        return available - sum(apart)
    return available * 2 * element_size // (2 * element_size + 1) - (available >> 8)  # and their steps
