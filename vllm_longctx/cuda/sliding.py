"""Λ attention in vLLM's GPU engine: a backend, a metadata builder and an implementation around `kernels`.

vLLM makes the layers with this backend (its place `CUSTOM`), and `make_layer` tells each layer its view once
the weights are loaded. Everything a step needs stays on the device: the kernels read vLLM's own block tables
and lengths, and the builder adds one thing, by how much each query is turned towards the first tokens. A CUDA
graph of decodes replays over the same tensors, so those are written in place.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.config import VllmConfig
from vllm.config.cache import CacheDType
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout, is_quantized_kv_cache

from vllm_longctx.cuda.kernels.lambda_attention import lambda_attention
from vllm_longctx.cuda.kernels.lambda_decode import decode_splits, decode_workspace, lambda_decode, num_sms
from vllm_longctx.cuda.kernels.lambda_tile import Turn, View
from vllm_longctx.engine.layers import LayerSite
from vllm_longctx.geometry import Geometry
from vllm_longctx.rotary import Rotary
from vllm_longctx.settings import Settings

MIN_CAPABILITY = DeviceCapability(8, 0)  # bfloat16 in tensor cores
MIN_FP8_CAPABILITY = DeviceCapability(8, 9)  # float8_e4m3 in Triton


@dataclass(frozen=True)
class Decodes:
    """The first rows of a batch, those with one query: row r's is token r.

    splits: programs that share a row's keys.
    """

    block_table: Tensor
    seq_lens: Tensor
    turn: Turn
    splits: int


@dataclass(frozen=True)
class Chunks:
    """The other rows, whose tokens begin at `first_token` of the step; query_start_loc counts from there."""

    first_token: int
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    max_query_len: int
    turn: Turn


@dataclass(frozen=True)
class LambdaMetadata(AttentionMetadata):
    """Of a step, for all layers. Rows of length 0 are padding."""

    num_actual_tokens: int
    decodes: Decodes | None
    chunks: Chunks | None
    workspace: Tensor


class LambdaBackend(AttentionBackend):
    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = ["auto", "float16", "bfloat16", "fp8", "fp8_e4m3"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["LambdaImpl"]:
        return LambdaImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder[Any]]:
        return LambdaMetadataBuilder

    @classmethod
    def for_settings(cls, settings: Settings) -> type[AttentionBackend]:
        """The backend that serves the role in an engine with these settings."""
        return cls

    @classmethod
    def make_layer(cls, site: LayerSite) -> "LambdaImpl":
        return taken_over(site, site.geometry)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [32, 64, 80, 96, 112, 128, 160, 192, 224, 256]

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """By `make_layer`, from the layer's site; a role that has no such layers refuses them there."""
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return capability >= MIN_CAPABILITY

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: CacheDType | None,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: DeviceCapability,
    ) -> str | None:
        if (
            kv_cache_dtype is not None
            and is_quantized_kv_cache(kv_cache_dtype)
            and device_capability < MIN_FP8_CAPABILITY
        ):
            needed = MIN_FP8_CAPABILITY.as_version_str()
            return f"kv_cache_dtype {kv_cache_dtype} needs compute capability {needed}"
        return None

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Any; first those in which a program, which reads one KV head of a block, reads one piece of
        memory.
        """
        head_major = (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC, KVCacheLayout.LHBNC, KVCacheLayout.BHLNC)
        return (*head_major, KVCacheLayout.LBNHC, KVCacheLayout.BLNHC)


class DecodeSplits:
    """Among how many programs decodes of a layer share their keys, by the number of decodes.

    workspace: As in `lambda_decode`, for the batch that needs most of it.
    """

    def __init__(self, impl: "LambdaImpl", longest: int, max_num_seqs: int, device: torch.device):
        """longest: Most keys of a decode, in tokens, where its window does not bound them."""
        self._impl, self._longest, self._num_sms = impl, longest, num_sms(device)
        shares = max(rows * self(rows) for rows in range(1, max_num_seqs + 1))
        self.workspace = decode_workspace(shares, impl.num_heads, impl.head_size, 1, device)

    def __call__(self, rows: int) -> int:
        return decode_splits(self._impl.view, rows, self._impl.num_kv_heads, self._num_sms, self._longest)


class LambdaMetadataBuilder(AttentionMetadataBuilder[LambdaMetadata]):
    """Nothing here waits for the device: what depends on values is computed there, the rest from shapes and
    host copies.

    CUDA graphs: of batches of decodes. What they read is vLLM's own persistent input, `turn` and `workspace`.
    """

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
        self.impl: LambdaImpl = vllm_config.compilation_config.static_forward_context[layer_names[0]].impl
        impl, scheduler = self.impl, vllm_config.scheduler_config
        longest = vllm_config.model_config.max_model_len
        self.splits = DecodeSplits(impl, longest, scheduler.max_num_seqs, device)
        self.turn: Turn = None
        if impl.view.turns_queries:
            shape = scheduler.max_num_batched_tokens, impl.view.rotary_dim // 2
            cos, sin = torch.empty((2, *shape), dtype=torch.float32, device=device)
            self.turn = cos, sin

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LambdaMetadata:
        m = common_attn_metadata
        assert m.positions is not None  # both of vLLM's model runners give them
        turn = self._write_turn(m.positions[: m.num_actual_tokens])
        num_decodes, num_chunks, first_token, _ = split_decodes_and_prefills(m, decode_threshold=1)
        decodes = chunks = None
        if num_decodes > 0:
            decodes = Decodes(
                m.block_table_tensor[:num_decodes],
                m.seq_lens[:num_decodes],
                turn and (turn[0][:num_decodes], turn[1][:num_decodes]),
                self.splits(num_decodes),
            )
        if num_chunks > 0:
            chunks = Chunks(
                first_token,
                m.block_table_tensor[num_decodes:],
                m.seq_lens[num_decodes:],
                m.query_start_loc[num_decodes:] - first_token,
                m.max_query_len,
                turn and (turn[0][first_token:], turn[1][first_token:]),
            )
        return LambdaMetadata(m.num_actual_tokens, decodes, chunks, self.splits.workspace)

    def _write_turn(self, positions: Tensor) -> Turn:
        """Angles of the queries' turns, in place, once for all layers; [tokens, rotary_dim / 2] each."""
        by = self.impl.view.query_turn(positions)
        if self.turn is None or by is None:
            return None
        assert self.impl.rotary is not None
        turn = self.turn[0][: len(positions)], self.turn[1][: len(positions)]
        for buffer, angles in zip(turn, self.impl.rotary.cos_sin(by), strict=True):
            buffer.copy_(angles)
        return turn


class LambdaImpl(AttentionImpl[LambdaMetadata]):
    """A layer.

    view, key_turn, rotary: set by `take_over`, before the first forward; rotary is None for a model with
    ALiBi.
    """

    view: View
    key_turn: Turn
    rotary: Rotary | None

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ):
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.alibi_slopes, self.logits_soft_cap = alibi_slopes, logits_soft_cap or 0.0
        self.sinks = sinks
        self.kv_cache_dtype, self.attn_type = kv_cache_dtype, attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name

    def take_over(self, geometry: Geometry, rotary: Rotary | None, device: torch.device) -> None:
        self.rotary = rotary
        slopes = (
            None
            if self.alibi_slopes is None
            else torch.tensor(self.alibi_slopes, dtype=torch.float32, device=device)
        )
        rotary_dim, is_neox = (0, True) if rotary is None else (rotary.rotary_dim, rotary.neox)
        self.view = View(geometry, rotary_dim, is_neox, slopes, self.logits_soft_cap, self.sinks)
        by = self.view.key_turn()
        self.key_turn = None
        if by is not None:
            assert rotary is not None
            self.key_turn = rotary.cos_sin(by.to(device))

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: LambdaMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query, output [tokens, heads, head_size]; keys and values of the step are in the cache already."""
        if attn_metadata is None:  # profiling run
            return output.fill_(0)
        key_cache, value_cache = self._caches(kv_cache)
        k_scale, v_scale = layer._k_scale_float, layer._v_scale_float
        if (decodes := attn_metadata.decodes) is not None:
            rows = len(decodes.seq_lens)
            lambda_decode(
                query[:rows],
                key_cache,
                value_cache,
                decodes.block_table,
                decodes.seq_lens,
                decodes.turn,
                self.key_turn,
                self.view,
                self.scale,
                output[:rows],
                attn_metadata.workspace,
                decodes.splits,
                k_scale,
                v_scale,
                branch=self._further_keys(query[:rows], key_cache, value_cache, attn_metadata),
            )
        if (chunks := attn_metadata.chunks) is not None:
            tokens = slice(chunks.first_token, attn_metadata.num_actual_tokens)
            lambda_attention(
                query[tokens],
                key_cache,
                value_cache,
                chunks.block_table,
                chunks.seq_lens,
                chunks.query_start_loc,
                chunks.max_query_len,
                chunks.turn,
                self.key_turn,
                self.view,
                self.scale,
                output[tokens],
                k_scale,
                v_scale,
            )
        return output

    def _further_keys(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, metadata: AttentionMetadata
    ) -> tuple[Tensor, Tensor] | None:
        """What decodes see beside first tokens and window, as `branch` of `lambda_decode`; here nothing."""
        return None

    def do_kv_cache_update(
        self, layer: AttentionLayer, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """As vLLM's FlashAttention backend: slots of -1 are padding."""
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, -1)
        ops.reshape_and_cache_flash(
            key, value, keys, values, slot_mapping, self.kv_cache_dtype, layer._k_scale, layer._v_scale
        )

    def _caches(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [blocks, block_size, kv_heads, head_size] of vLLM's [blocks, kv_heads, block_size,
        2 * head_size].
        """
        if is_quantized_kv_cache(self.kv_cache_dtype):
            kv_cache = kv_cache.view(current_platform.fp8_dtype())
        key_cache, value_cache = kv_cache.transpose(1, 2).split(self.head_size, -1)
        return key_cache, value_cache


def taken_over(site: LayerSite, geometry: Geometry) -> LambdaImpl:
    """The layer that vLLM made with our backend, which now has its view."""
    impl = site.layer.impl
    assert isinstance(impl, LambdaImpl)
    impl.take_over(geometry, site.rotary, site.device)
    return impl
