"""LM-Infinite's top-k branch (arXiv 2308.16137, its official code) in vLLM's GPU engine.

Layers with the branch keep all their KV, and what has left the window of a request that writes is un-rotated
in place (`turn_back`). To the best of these keys a query attends beside Λ attention, joined by their
log-sum-exps. Only decodes have the branch: the scheduler computes one at a time the tokens that have it
(`scheduling.memory.TopKScheduler`).
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.config import VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionCGSupport, AttentionLayer, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_longctx.cuda.kernels.lookup import Memories, attend_best
from vllm_longctx.cuda.rows import StepRows
from vllm_longctx.cuda.sliding import (
    Decodes,
    LambdaBackend,
    LambdaImpl,
    LambdaMetadata,
    LambdaMetadataBuilder,
)
from vllm_longctx.engine.layers import LayerSite, TakenOver
from vllm_longctx.engine.lookup import weigh
from vllm_longctx.rotary import Rotary
from vllm_longctx.settings import TopK


@dataclass(frozen=True)
class Middles:
    """The keys begins .. ends - 1 of each decode, int32 [rows]; none if ends is 0. longest: a bound of ends.

    cos, sin: of the turn of each query to the distance at which it sees them, [rows, 1, rotary_dim / 2].
    """

    begins: Tensor
    ends: Tensor
    longest: int
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class TopKMetadata(LambdaMetadata):
    """middles: None where no request has enough keys between its first tokens and its window."""

    middles: Middles | None = None


class TopKBackend(LambdaBackend):
    """Layers with a top-k branch."""

    @staticmethod
    def get_builder_cls() -> type["TopKMetadataBuilder"]:
        return TopKMetadataBuilder

    @classmethod
    def make_layer(cls, site: LayerSite) -> "TopKImpl":
        return TopKImpl.of(super().make_layer(site), top_k=site.settings.top_k)


class TopKMetadataBuilder(LambdaMetadataBuilder):
    """No CUDA graphs: how much there is to look up changes from step to step."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER
    impl: "TopKImpl"
    rows: StepRows
    # The last ends that were built from: those of a step before are none of a step that vLLM makes up.
    _seen: NDArray[np.int64] | None = None

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        rows = vllm_config.scheduler_config.max_num_seqs
        self.geometry = self.impl.view.geometry
        self.begins = torch.full((rows,), self.geometry.n_global, dtype=torch.int32, device=device)
        self.lse = torch.empty((rows, self.impl.num_heads), dtype=torch.float32, device=device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TopKMetadata:
        m = super().build(common_prefix_len, common_attn_metadata, fast_build)
        ends = None if self.rows.middle_ends is self._seen else self.rows.middle_ends
        self._seen = self.rows.middle_ends
        decodes, middles = m.decodes, None
        if decodes is not None:
            rows = len(decodes.seq_lens)
            decodes = replace(decodes, lse=self.lse[:rows])
            if ends is not None:
                assert common_attn_metadata.positions is not None
                middles = self._middles(ends[:rows], common_attn_metadata.positions[:rows])
        return TopKMetadata(m.num_actual_tokens, decodes, m.chunks, m.workspace, middles)

    def _middles(self, ends: NDArray[np.int64], positions: Tensor) -> Middles | None:
        """Those with enough keys: a request with fewer has no branch (`geometry.middle_branch`)."""
        top_k, rotary = self.impl.top_k, self.impl.rotary
        assert rotary is not None
        ends = np.where(ends >= self.geometry.n_global + top_k.k, ends, 0).astype(np.int32)
        if not ends.any():
            return None
        cos, sin = rotary.cos_sin(top_k.insert_at - positions[:, None])
        return Middles(
            self.begins[: len(ends)], async_tensor_h2d(ends, device=self.device), int(ends.max()), cos, sin
        )


class TopKImpl(TakenOver, LambdaImpl):
    """A layer of `sliding` taken over after the weights are loaded."""

    top_k: TopK

    def warm_up(self, kv_cache: Tensor, block_table: Tensor) -> None:
        """Compile what lookups need before a request waits.

        block_table [rows, columns]: by its strides vLLM's own.
        """
        key_cache, value_cache = self._caches(kv_cache)
        begins, ends = (torch.full((1,), n, dtype=torch.int32, device=kv_cache.device) for n in (0, 1))
        query = torch.zeros(
            (1, 1, self.num_heads, self.head_size), dtype=key_cache.dtype, device=kv_cache.device
        )
        attend_best(
            query,
            Memories(key_cache, value_cache, block_table[:1], begins, ends, 1),
            self.top_k.k,
            self.scale,
            soft_cap=self.logits_soft_cap,
        )

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: TopKMetadata | None,  # type: ignore[override]  # of TopKMetadataBuilder, which these layers have
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """As `LambdaImpl.forward`."""
        super().forward(
            layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
        )
        if attn_metadata is not None and attn_metadata.middles is not None:
            assert attn_metadata.decodes is not None
            self._add_middles(query, kv_cache, attn_metadata.decodes, attn_metadata.middles, output)
        return output

    def _add_middles(
        self, query: Tensor, kv_cache: Tensor, decodes: Decodes, middles: Middles, output: Tensor
    ) -> None:
        """Turn the output of Λ attention into that of one softmax over its keys and the best ones of the
        middles.
        """
        assert self.rotary is not None and decodes.lse is not None
        rows = len(decodes.seq_lens)
        memories = Memories(
            *self._caches(kv_cache), decodes.block_table, middles.begins, middles.ends, middles.longest
        )
        turned = self.rotary.rotate(query[:rows], middles.cos, middles.sin)
        found, lse = attend_best(
            turned[:, None], memories, self.top_k.k, self.scale, soft_cap=self.logits_soft_cap
        )
        weights, rest = weigh(decodes.lse, lse.transpose(1, 2))
        output[:rows] = torch.addcmul(found[:, 0] * weights, output[:rows].float(), rest)


def turn_back(
    kv_cache: Tensor, blocks: Tensor, offsets: Tensor, rotary: Rotary, cos: Tensor, sin: Tensor
) -> None:
    """Rotate keys of one layer in place.

    kv_cache [blocks, kv_heads, block_size, 2 * head_size]; blocks, offsets int64 [n].

    cos, sin: of the rotation that undoes the keys' own, [n, 1, rotary_dim / 2].
    """
    keys = kv_cache.transpose(1, 2)[..., : kv_cache.shape[3] // 2]
    keys[blocks, offsets] = rotary.rotate(keys[blocks, offsets], cos, sin)
