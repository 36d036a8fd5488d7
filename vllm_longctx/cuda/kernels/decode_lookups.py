"""What decodes look up, in memory layers and in LM-Infinite's top-k branch, as CUDA graphs can replay it.

A graph knows how many rows there are, and where their tables, bounds and queries stand. How long memories are
stands on the device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_longctx.cuda.kernels.lambda_decode import num_sms
from vllm_longctx.cuda.kernels.lookup import Memories, Summaries, attend_best, block_counts
from vllm_longctx.cuda.kernels.lookup_decode import attend_best_decode, fits, lookup_splits
from vllm_longctx.engine.lookup import SCANNED
from vllm_longctx.settings import Lookup


@dataclass(frozen=True)
class DecodeLookup:
    """Of row r the tokens begins[r] .. ends[r] - 1 of its text; none if ends <= begins.

    splits: programs that share a row's blocks. longest: a host's bound of ends, where lookups are too large
    for a graph; otherwise None. counts int64 [rows]: blocks to read; None to find the best keys exactly.
    """

    block_table: Tensor
    begins: Tensor
    ends: Tensor
    splits: int
    longest: int | None
    counts: Tensor | None

    def attend(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        lookup: Lookup,
        scale: float,
        soft_cap: float,
        summaries: Summaries | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of query [rows, heads, d] to the best keys: output [rows, heads, d], log-sum-exp [rows,
        heads], both float32.
        """
        memories = Memories(
            key_cache, value_cache, self.block_table, self.begins, self.ends, self.longest, summaries
        )
        k, share = lookup.top_k, lookup.share
        if self.longest is None:
            return attend_best_decode(query, memories, k, scale, self.splits, share, self.counts, soft_cap)
        output, lse = attend_best(query[:, None], memories, k, scale, share, soft_cap)
        return output[:, 0], lse[:, 0]


class DecodeLookups:
    """The part of a metadata builder that makes them. What graphs read is written in place.

    begin: of all memories.
    """

    def __init__(
        self, vllm_config: VllmConfig, spec: AttentionSpec, lookup: Lookup, begin: int, device: torch.device
    ):
        rows = vllm_config.scheduler_config.max_num_seqs
        self.lookup, self.fits = lookup, has_graphs(vllm_config, spec.block_size, spec.num_kv_heads, lookup)
        self._block_size, self._kv_heads = spec.block_size, spec.num_kv_heads
        self._group, self._num_sms = _group(vllm_config, spec.num_kv_heads), num_sms(device)
        self._begins = torch.full((rows,), begin, dtype=torch.int32, device=device)
        self._counts = torch.zeros(rows, dtype=torch.int64, device=device)

    def of(
        self, block_table: Tensor, ends: Tensor, longest: int, is_whole_batch: bool
    ) -> DecodeLookup | None:
        """Of the rows of a block table; None where no memory has keys, and no graph replays.

        ends int32 [rows], where they always stand. longest: a bound of these.
        """
        if longest <= 0 and not (self.fits and is_whole_batch):
            return None
        rows, lookup, counts = len(ends), self.lookup, None
        begins = self._begins[:rows]
        if lookup.share is not None:
            counts = self._counts[:rows]
            counts.copy_(
                block_counts(begins, ends, self._block_size, self._group, lookup.top_k, lookup.share, SCANNED)
            )
        splits = lookup_splits(block_table.shape[1], rows, self._kv_heads, self._num_sms)
        return DecodeLookup(block_table, begins, ends, splits, None if self.fits else longest, counts)


def has_graphs(vllm_config: VllmConfig, block_size: int, kv_heads: int, lookup: Lookup) -> bool:
    """Whether CUDA graphs can hold decodes with such a lookup. kv_heads: of a rank."""
    columns = cdiv(vllm_config.model_config.max_model_len, block_size)
    return fits(columns, block_size, _group(vllm_config, kv_heads), lookup.top_k, lookup.share)


def cudagraph_support(vllm_config: VllmConfig, spec: AttentionSpec, lookup: Lookup) -> AttentionCGSupport:
    """Of a metadata builder whose decodes have such a lookup."""
    if has_graphs(vllm_config, spec.block_size, spec.num_kv_heads, lookup):
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    return AttentionCGSupport.NEVER


def of_first_token(block_table: Tensor, block_size: int, group: int, lookup: Lookup) -> DecodeLookup:
    """Of a text of one token, by which kernels are compiled before a request waits for them.

    block_table [rows, columns]: vLLM's own, by its strides. group: query heads of a KV head.
    """
    zero, one = (torch.full((1,), n, dtype=torch.int32, device=block_table.device) for n in (0, 1))
    is_in_graphs = fits(block_table.shape[1], block_size, group, lookup.top_k, lookup.share)
    return DecodeLookup(block_table[:1], zero, one, 1, None if is_in_graphs else 1, one.long())


def _group(vllm_config: VllmConfig, kv_heads: int) -> int:
    """Query heads of a KV head."""
    return vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config) // kv_heads
