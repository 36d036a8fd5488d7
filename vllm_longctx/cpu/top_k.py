"""LM-Infinite's top-k branch (arXiv 2308.16137, its official code) in vLLM's CPU engine.

Layers with the branch keep all their KV, and what has left the window of a request that writes is un-rotated
in place (`top_k_runner`). To the best of these keys a query attends beside Λ attention, in one softmax.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.utils.math_utils import cdiv

from vllm_longctx.cpu.kernels.branches import capped
from vllm_longctx.cpu.kernels.retrieval import Memory, Pages, top_k
from vllm_longctx.cpu.sliding import ChunkPart, LambdaBackend, LambdaImpl, LambdaMetadataBuilder
from vllm_longctx.engine.layers import LayerSite
from vllm_longctx.geometry import RequestView
from vllm_longctx.rotary import Rotary
from vllm_longctx.settings import TopK


@dataclass(frozen=True)
class TopKChunkPart(ChunkPart):
    """Queries that may have a top-k branch.

    middle: (begin, end) of the un-rotated tokens, the end exclusive. None if they are not seen.
    block_table: The request's blocks up to that end, int64.
    """

    middle: tuple[int, int] | None
    block_table: Tensor


class TopKBackend(LambdaBackend):
    """Layers with a top-k branch."""

    @staticmethod
    def get_impl_cls() -> type["TopKImpl"]:
        return TopKImpl

    @staticmethod
    def get_builder_cls() -> type["TopKMetadataBuilder"]:
        return TopKMetadataBuilder

    @classmethod
    def make_layer(cls, site: LayerSite) -> "TopKImpl":
        return TopKImpl.over(site, top_k=site.settings.top_k)


class TopKMetadataBuilder(LambdaMetadataBuilder):
    impl: "TopKImpl"

    def _chunk(
        self, row: int, starts: Tensor, seq_lens: Tensor, table: Tensor, view: RequestView | None = None
    ) -> ChunkPart:
        chunk = super()._chunk(row, starts, seq_lens, table, view)
        begin, end = self.geometry.n_global, chunk.plan.context - chunk.plan.n_local + 1
        is_seen = row in self.rows.writing and end - begin >= self.impl.top_k.k
        blocks = table[row, : cdiv(end, self.block_size)].long()
        return TopKChunkPart(**vars(chunk), middle=(begin, end) if is_seen else None, block_table=blocks)


class TopKImpl(LambdaImpl):
    rotary: Rotary
    top_k: TopK

    def _further(self, query: Tensor, kv_cache: Tensor, chunk: ChunkPart) -> tuple[Tensor, Tensor] | None:
        """Scores [1, heads, k] and values [1, heads, k, d] of the middle's best keys for one query."""
        assert isinstance(chunk, TopKChunkPart)
        if chunk.middle is None:
            return None
        query = self.rotary.turn(query, torch.full((1, 1), self.top_k.insert_at - chunk.plan.context))
        memory = Memory(Pages(kv_cache, self.places), chunk.block_table, *chunk.middle)
        best = top_k(query, memory, self.top_k.k, self.scale)
        return capped(best.scores, self.logits_soft_cap), memory.values(best.positions)
