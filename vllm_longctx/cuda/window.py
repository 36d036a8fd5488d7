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
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_longctx.config import LongContextError
from vllm_longctx.cuda.kernels.lambda_decode import lambda_decode
from vllm_longctx.cuda.kernels.stepped import stepped_attention
from vllm_longctx.cuda.rows import StepRows
from vllm_longctx.cuda.sliding import DecodeSplits, LambdaBackend, LambdaImpl, taken_over
from vllm_longctx.engine.layers import LayerSite, TakenOver
from vllm_longctx.geometry import Geometry
from vllm_longctx.models.properties import trained_length
from vllm_longctx.settings import active_settings


@dataclass(frozen=True)
class WindowMetadata(AttentionMetadata):
    """Of a step: first its decodes, rows of one token, then its chunks.

    starts int32 [rows]: of the windows. Rows of length 0 are padding. chunk_starts int32 [chunks + 1]: where
    each chunk begins among the chunks' tokens, and their end. splits, workspace: of the decodes, as in
    `lambda_decode`.
    """

    num_actual_tokens: int
    num_decodes: int
    block_table: Tensor
    starts: Tensor
    seq_lens: Tensor
    chunk_starts: Tensor
    max_query_len: int
    splits: int
    workspace: Tensor


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
        impl: LambdaImpl = vllm_config.compilation_config.static_forward_context[layer_names[0]].impl
        most = vllm_config.scheduler_config.max_num_seqs
        self.splits = DecodeSplits(impl, longest_window(vllm_config), most, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> WindowMetadata:
        m = common_attn_metadata
        num_decodes, _, first_token, _ = split_decodes_and_prefills(m, decode_threshold=1)
        return WindowMetadata(
            m.num_actual_tokens,
            num_decodes,
            m.block_table_tensor,
            self.rows.starts[: m.num_reqs],
            m.seq_lens,
            m.query_start_loc[num_decodes:] - first_token,
            m.max_query_len,
            self.splits(max(num_decodes, 1)),
            self.splits.workspace,
        )


def longest_window(vllm_config: VllmConfig) -> int:
    """Most keys of a window, in tokens."""
    settings = active_settings(vllm_config)
    if settings.adaptation is None:
        return settings.memory.windows.tokens
    # A request that does not adapt has one window, up to the trained length.
    return max(settings.adaptation.window_tokens, trained_length(vllm_config.model_config))


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
        m, caches = attn_metadata, self._caches(kv_cache)
        n, chunks = m.num_decodes, slice(m.num_decodes, m.num_actual_tokens)
        lambda_decode(
            query[:n],
            *caches,
            m.block_table[:n],
            m.seq_lens[:n],
            None,
            None,
            self.view,
            self.scale,
            output[:n],
            m.workspace,
            m.splits,
            starts=m.starts[:n],
            branch=self._further_keys(query[:n], *caches, m),
        )
        stepped_attention(
            query[chunks],
            *caches,
            m.block_table[n:],
            m.starts[n:],
            m.seq_lens[n:],
            m.chunk_starts,
            m.max_query_len,
            self.scale,
            output[chunks],
            self._further_keys_of_chunks(query[chunks], *caches, m),
            self.logits_soft_cap,
            self.sinks,
            self.view.alibi_slopes,
        )
        return output

    def _further_keys_of_chunks(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, metadata: WindowMetadata
    ) -> tuple[Tensor, Tensor] | None:
        """What chunks see before their window, as `branch` of `stepped_attention`; here nothing."""
        return None
