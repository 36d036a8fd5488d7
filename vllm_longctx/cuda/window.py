"""Stepped windows in vLLM's GPU engine: layers whose queries see the keys since their window, or their pass,
began.

In a memory engine (`memory`) all positions are counted from the query's window; in passes of Temp-LoRA they
are those of the text. Either way tables and slots are vLLM's own, and where windows begin comes in one tensor
per step.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_longctx.config import LongContextError
from vllm_longctx.cuda.kernels.stepped import stepped_attention
from vllm_longctx.cuda.rows import StepRows
from vllm_longctx.cuda.sliding import LambdaBackend, LambdaImpl, taken_over
from vllm_longctx.engine.layers import LayerSite, TakenOver
from vllm_longctx.geometry import Geometry


@dataclass(frozen=True)
class WindowMetadata(AttentionMetadata):
    """Of a step. starts int32 [rows]: of the windows. Rows of length 0 are padding."""

    num_actual_tokens: int
    block_table: Tensor
    starts: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    max_query_len: int


class WindowBackend(LambdaBackend):
    """Layers without memory."""

    @staticmethod
    def get_builder_cls() -> type["WindowMetadataBuilder"]:
        return WindowMetadataBuilder

    @classmethod
    def make_layer(cls, site: LayerSite) -> "WindowImpl":
        """Raises LongContextError for a layer with a window of its own."""
        if site.window is not None:
            raise LongContextError(
                f"layer {site.name} has a window of its own ({site.window} tokens), which goes with "
                "attention.method lm_infinite and streaming on CUDA; use one of these"
            )
        return WindowImpl.of(taken_over(site, Geometry()))


class WindowMetadataBuilder(AttentionMetadataBuilder[WindowMetadata]):
    rows: StepRows
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)  # decodes first

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> WindowMetadata:
        m = common_attn_metadata
        return WindowMetadata(
            m.num_actual_tokens,
            m.block_table_tensor,
            self.rows.starts[: m.num_reqs],
            m.seq_lens,
            m.query_start_loc,
            m.max_query_len,
        )


class WindowImpl(TakenOver, LambdaImpl):
    """A layer of `sliding` taken over after the weights are loaded."""

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: WindowMetadata | None,  # type: ignore[override]  # of WindowMetadataBuilder, which these layers have
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """As `LambdaImpl.forward`."""
        if attn_metadata is None:  # profiling run
            return output.fill_(0)
        m, (key_cache, value_cache) = attn_metadata, self._caches(kv_cache)
        query, out = query[: m.num_actual_tokens], output[: m.num_actual_tokens]
        branch = self._memory_branch(query, key_cache, value_cache, m)
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
            self.logits_soft_cap,
            self.sinks,
        )
        return output

    def _memory_branch(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, metadata: WindowMetadata
    ) -> tuple[Tensor, Tensor] | None:
        """What queries see before their window: output [tokens, heads, d], log-sum-exp [tokens, heads]; here
        nothing.
        """
        return None
