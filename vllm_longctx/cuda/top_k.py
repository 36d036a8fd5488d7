"""LM-Infinite's top-k branch (arXiv 2308.16137, its official code) in vLLM's GPU engine.

Layers with the branch keep all their KV, and what has left the window of a request that writes is un-rotated
in place (`turn_back`). To the best of these keys a query attends beside Λ attention, in one softmax. Only
decodes have the branch: the scheduler computes one at a time the tokens that have it
(`scheduling.memory.TopKScheduler`).
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.config import VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadata, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

from vllm_longctx.cuda.kernels.decode_lookups import (
    DecodeLookup,
    DecodeLookups,
    cudagraph_support,
    of_first_token,
)
from vllm_longctx.cuda.kernels.lookup_decode import turned
from vllm_longctx.cuda.rows import StepRows
from vllm_longctx.cuda.sliding import LambdaBackend, LambdaImpl, LambdaMetadata, LambdaMetadataBuilder
from vllm_longctx.engine.layers import LayerSite, TakenOver
from vllm_longctx.rotary import Rotary
from vllm_longctx.settings import Lookup, TopK, active_settings


@dataclass(frozen=True)
class Middles:
    """What decodes look up between first tokens and window.

    cos, sin: of the turn of each query to the distance at which it sees them, [rows, rotary_dim / 2].
    """

    lookup: DecodeLookup
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class TopKMetadata(LambdaMetadata):
    """middles: None where no request has any, and no graph replays."""

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
    """CUDA graphs: of decodes whose lookup they can hold."""

    impl: "TopKImpl"
    rows: StepRows
    # The last ends that were built from: those of a step before are none of a step that vLLM makes up.
    _seen: NDArray[np.int64] | None = None

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> AttentionCGSupport:
        assert isinstance(kv_cache_spec, AttentionSpec)
        return cudagraph_support(vllm_config, kv_cache_spec, _lookup(active_settings(vllm_config).top_k))

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        rows, self.first = vllm_config.scheduler_config.max_num_seqs, self.impl.view.geometry.n_global
        lookup = _lookup(self.impl.top_k)
        self.lookups = DecodeLookups(vllm_config, kv_cache_spec, lookup, self.first, device)
        self.ends = torch.zeros(rows, dtype=torch.int32, device=device)
        assert self.impl.rotary is not None
        shape = 2, rows, self.impl.rotary.rotary_dim // 2
        self.angles = torch.empty(shape, dtype=torch.float32, device=device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TopKMetadata:
        m = super().build(common_prefix_len, common_attn_metadata, fast_build)
        ends = None if self.rows.middle_ends is self._seen else self.rows.middle_ends
        self._seen = self.rows.middle_ends
        middles = None
        if m.decodes is not None:
            assert common_attn_metadata.positions is not None
            positions = common_attn_metadata.positions[: len(m.decodes.seq_lens)]
            middles = self._middles(ends, positions, m.decodes.block_table, m.chunks is None)
        return TopKMetadata(**vars(m), middles=middles)

    def _middles(
        self, of_rows: NDArray[np.int64] | None, positions: Tensor, block_table: Tensor, is_whole_batch: bool
    ) -> Middles | None:
        """Those with enough keys: a request with fewer has no branch (`geometry.middle_branch`).

        of_rows: where they end; None for a step that vLLM makes up. Rows of padding are behind these.
        """
        top_k, rotary, rows = self.impl.top_k, self.impl.rotary, len(positions)
        assert rotary is not None
        ends = np.zeros(rows, np.int32)
        if of_rows is not None:
            of_rows = of_rows[:rows]
            ends[: len(of_rows)] = np.where(of_rows >= self.first + top_k.k, of_rows, 0)
        async_tensor_h2d(ends, out=self.ends[:rows])
        lookup = self.lookups.of(block_table, self.ends[:rows], int(ends.max()), is_whole_batch)
        if lookup is None:
            return None
        cos, sin = self.angles[:, :rows]
        for buffer, angles in zip((cos, sin), rotary.cos_sin(top_k.insert_at - positions), strict=True):
            buffer.copy_(angles)
        return Middles(lookup, cos, sin)


def _lookup(top_k: TopK) -> Lookup:
    return Lookup(top_k.k, None)


class TopKImpl(TakenOver, LambdaImpl):
    """A layer of `sliding` taken over after the weights are loaded."""

    top_k: TopK

    def warm_up(self, kv_cache: Tensor, block_table: Tensor) -> None:
        """Compile what lookups need before a request waits.

        block_table [rows, columns]: by its strides vLLM's own.
        """
        caches, lookup = self._caches(kv_cache), _lookup(self.top_k)
        query = torch.zeros(
            (1, self.num_heads, self.head_size), dtype=caches[0].dtype, device=kv_cache.device
        )
        assert self.rotary is not None
        angles = self.rotary.cos_sin(torch.zeros(1, dtype=torch.int64, device=kv_cache.device))
        query = turned(query, *angles, self.rotary.neox)
        decode = of_first_token(block_table, caches[0].shape[1], self.num_heads // self.num_kv_heads, lookup)
        decode.attend(query, *caches, lookup, self.scale, self.logits_soft_cap)

    def _further_keys(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, metadata: AttentionMetadata
    ) -> tuple[Tensor, Tensor] | None:
        assert isinstance(metadata, TopKMetadata) and self.rotary is not None
        middles = metadata.middles
        if middles is None:
            return None
        query = turned(query, middles.cos, middles.sin, self.rotary.neox)
        lookup = _lookup(self.top_k)
        return middles.lookup.attend(query, key_cache, value_cache, lookup, self.scale, self.logits_soft_cap)


def turn_back(
    kv_cache: Tensor, blocks: Tensor, offsets: Tensor, rotary: Rotary, cos: Tensor, sin: Tensor
) -> None:
    """Rotate keys of one layer in place.

    kv_cache [blocks, kv_heads, block_size, 2 * head_size]; blocks, offsets int64 [n].

    cos, sin: of the rotation that undoes the keys' own, [n, 1, rotary_dim / 2].
    """
    keys = kv_cache.transpose(1, 2)[..., : kv_cache.shape[3] // 2]
    keys[blocks, offsets] = rotary.rotate(keys[blocks, offsets], cos, sin)
