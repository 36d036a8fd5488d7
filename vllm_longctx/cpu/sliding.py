"""Λ attention in vLLM's CPU engine: a metadata builder and an implementation around the stock CPU kernel.

A step's queries go one of two ways, decided once per step for all layers of a metadata builder. Decodes, and
those of prompts still inside the window, take one call of vLLM's own kernel over compact tables
(`kernels.tables`, `kernels.scratch`). Prompts past it take `kernels.tiles`; so do decodes past it where there
are no scratch blocks for them (`ScratchLayout.plan`). Layers without first tokens always take the kernel.

Where a request has chosen what it sees, those of its queries that see their whole text take the kernel, in a
call of their own, and the others tiles.
"""

import functools
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_longctx.cpu.kernels.scratch import Scratch, as_kernel_caches, extend, packed_order, unpack
from vllm_longctx.cpu.kernels.tables import KernelTables, ScratchLayout, kernel_tables, next_tables
from vllm_longctx.cpu.kernels.tiles import ChunkPlan, attend_chunk, plan_chunk
from vllm_longctx.cpu.rows import StepRows
from vllm_longctx.engine.layers import LayerSite, TakenOver
from vllm_longctx.geometry import Geometry, RequestView
from vllm_longctx.models.properties import model_dtype
from vllm_longctx.rotary import Rotary


@dataclass(frozen=True)
class KernelPart:
    """Requests served by the stock kernel. tokens [n]: their rows in the step, or None for all of them.

    sliding_window: Entries of its table that a query sees; -1 for all.
    """

    tokens: Tensor | None
    query_start_loc: Tensor
    tables: KernelTables
    sliding_window: int
    scheduler_metadata: Tensor


@dataclass(frozen=True)
class ChunkPart:
    """A request's queries past its window.

    context_blocks cover the window before, from `context_skip` tokens into them on.
    """

    tokens: slice
    plan: ChunkPlan
    context_blocks: Tensor
    context_skip: int
    first_blocks: Tensor
    n_global: int


@dataclass(frozen=True)
class LambdaMetadata:
    num_actual_tokens: int
    kernels: list[KernelPart]
    chunks: list[ChunkPart]


class LambdaBackend(CPUAttentionBackend):
    """vLLM's CPU backend with Λ geometry."""

    @staticmethod
    def get_impl_cls() -> type["LambdaImpl"]:
        return LambdaImpl

    @staticmethod
    def get_builder_cls() -> type["LambdaMetadataBuilder"]:
        return LambdaMetadataBuilder

    @classmethod
    def make_layer(cls, site: LayerSite) -> "LambdaImpl":
        return LambdaImpl.over(site)


class LambdaMetadataBuilder(CPUAttentionMetadataBuilder):
    rows: StepRows

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._last_tables: KernelTables | None = None
        layers = vllm_config.compilation_config.static_forward_context
        self.layers = [layers[name] for name in layer_names]
        self.impl: LambdaImpl = self.layers[0].impl
        self.geometry = self.impl.geometry
        self.places = packed_order(self.block_size, self.head_dim, kv_cache_spec.dtype, self.isa)
        for layer in self.layers:
            layer.impl.places = self.places

    @functools.cached_property
    def scratch(self) -> Scratch:
        """Built in the first step, when the KV cache is there."""
        layout, blocks = self.impl.scratch, self.impl.layer_blocks
        caches = [layer.kv_cache for layer in self.layers]
        first = min(caches, key=Tensor.storage_offset)
        offsets = [cache.storage_offset() - first.storage_offset() for cache in caches]
        if any(offset % first.stride(0) for offset in offsets):
            raise RuntimeError(
                "layers of a KV cache group do not begin where a block does; vLLM's layout changed"
            )
        layer_first = [offset // first.stride(0) for offset in offsets]
        for layer, cache in zip(self.layers, caches, strict=True):
            layer.impl.kernel_cache = as_kernel_caches(extend(cache, blocks))
        whole = extend(first, max(layer_first) + blocks)
        n_global = self.geometry.n_global
        return Scratch(layout, whole, layer_first, n_global, self.places, self.impl.rotary, self.isa)

    def build(  # type: ignore[override]  # what it returns is read by LambdaImpl alone
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LambdaMetadata:
        m = common_attn_metadata
        self.scratch.forget_written(m.slot_mapping)
        starts, seq_lens, table = m.query_start_loc, m.seq_lens, m.block_table_tensor
        query_lens, views = starts.diff(), {} if self.impl.has_own_window else self.rows.views
        own = list(views)
        alike = np.ones(len(seq_lens), np.bool_)
        alike[own] = False
        tiled = self._needs_tiles(seq_lens.numpy(), query_lens.numpy(), alike)
        if not tiled.any() and not own:
            kernels = [self._kernel_part(None, starts, table, seq_lens, query_lens)]
        else:
            inside = self._inside(seq_lens, query_lens)
            lens = torch.where(torch.from_numpy(tiled), inside, query_lens) * torch.from_numpy(alike)
            kernels = self._kernel_part_of(lens, starts, table, seq_lens, query_lens)
        if own:
            lens = torch.zeros_like(query_lens)
            plain = [row for row, view in views.items() if view.n_global is None]
            lens[own] = inside[own]
            lens[plain] = query_lens[plain]
            kernels += self._kernel_part_of(lens, starts, table, seq_lens, query_lens, whole=True)
            tiled[own] = (lens < query_lens)[own]
        chunks = [self._chunk(r, starts, seq_lens, table, views.get(r)) for r in tiled.nonzero()[0].tolist()]
        return LambdaMetadata(m.num_actual_tokens, kernels, chunks)

    def _needs_tiles(
        self, seq_lens: NDArray[np.int32], query_lens: NDArray[np.int32], alike: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """[rows]: requests with queries past their window that one row of a table cannot describe.

        alike [rows]: those that have the layer's geometry; others are left out.
        """
        if self.geometry.n_global == 0:  # the kernel masks everything before the window by itself
            return np.zeros(len(seq_lens), np.bool_)
        assert self.geometry.n_local is not None
        past = (seq_lens > self.geometry.n_local) & alike
        tiled = past & (query_lens > 1)
        return past if int((past & ~tiled).sum()) > self.scratch.layout.rows else tiled

    def _inside(self, seq_lens: Tensor, query_lens: Tensor) -> Tensor:
        """[rows]: how many of the queries are still inside the window."""
        assert self.geometry.n_local is not None
        return torch.minimum((self.geometry.n_local - seq_lens + query_lens).clamp_min(0), query_lens)

    def _kernel_part_of(
        self,
        lens: Tensor,
        starts: Tensor,
        table: Tensor,
        seq_lens: Tensor,
        query_lens: Tensor,
        whole: bool = False,
    ) -> list[KernelPart]:
        """The first lens [rows] queries of each request; nothing if there are none.

        whole: They see their whole text.
        """
        rows = lens.nonzero().flatten()
        if len(rows) == 0:
            return []
        context, lens = (seq_lens - query_lens)[rows], lens[rows].int()
        own_starts = torch.cat((starts.new_zeros(1), lens.cumsum(0, dtype=torch.int32)))
        tokens = torch.repeat_interleave(starts[rows] - own_starts[:-1], lens) + torch.arange(
            int(own_starts[-1])
        )
        ends = context + lens
        if not whole:
            return [self._kernel_part(tokens, own_starts, table[rows], ends, lens)]
        table = table[rows, : cdiv(int(ends.max()), self.block_size)].contiguous()
        return [self._part(tokens, own_starts, KernelTables(table, ends, None), -1)]

    def _kernel_part(
        self, tokens: Tensor | None, starts: Tensor, table: Tensor, seq_lens: Tensor, query_lens: Tensor
    ) -> KernelPart:
        tables = self._last_tables and next_tables(self._last_tables, table, seq_lens, query_lens)
        if tables is None:
            tables = kernel_tables(
                self.geometry, self.block_size, self.scratch.layout, table, seq_lens, query_lens
            )
        self._last_tables = tables
        if tables.moves is not None:
            self.scratch.fill(tables.moves)
        return self._part(tokens, starts, tables, self.window_size)

    def _part(
        self, tokens: Tensor | None, starts: Tensor, tables: KernelTables, sliding_window: int
    ) -> KernelPart:
        scheduler_metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(tables.seq_lens),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            seq_lens=tables.seq_lens,
            dtype=model_dtype(self.vllm_config.model_config),
            query_start_loc=starts,
            causal=True,
            sliding_window_size=sliding_window,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        return KernelPart(tokens, starts, tables, sliding_window, scheduler_metadata)

    def _chunk(
        self, row: int, starts: Tensor, seq_lens: Tensor, table: Tensor, view: RequestView | None = None
    ) -> ChunkPart:
        """The queries of a request that are past the window. view: What it has chosen to see."""
        n_local, bs = self.geometry.n_local, self.block_size
        geometry, window_starts = self.geometry, None
        assert n_local is not None
        begin, end = int(starts[row]), int(starts[row + 1])
        context = max(int(seq_lens[row]) - (end - begin), n_local)
        begin = end - (int(seq_lens[row]) - context)
        window_start = context - n_local + 1
        if view is not None:
            geometry = view.geometry(geometry)
            if view.turns:
                queries = torch.arange(context, context + end - begin)
                window_starts = view.window_start(queries, n_local)
        return ChunkPart(
            tokens=slice(begin, end),
            plan=plan_chunk(geometry, context, end - begin, self.impl.alibi_slopes, window_starts),
            context_blocks=table[row, window_start // bs : cdiv(context, bs)].long(),
            context_skip=window_start % bs,
            first_blocks=table[row, : cdiv(geometry.n_global, bs)].long(),
            n_global=geometry.n_global,
        )


class LambdaImpl(TakenOver, CPUAttentionBackendImpl):
    """A stock CPU attention layer taken over after the weights are loaded.

    The metadata builder sets what is known later.

    has_own_window: The window is the model's, so no request has another one.
    places: `packed_order`.
    scratch: Of its KV cache group.
    layer_blocks: Of a layer's KV cache, with the scratch blocks of all groups.
    kernel_cache: Keys and values as the kernel takes them, scratch blocks included.
    """

    alibi_slopes: Tensor | None  # type: ignore[assignment]  # vLLM makes it of the list that it is given
    geometry: Geometry
    has_own_window: bool
    rotary: Rotary | None
    places: tuple[Tensor, Tensor]
    scratch: ScratchLayout
    layer_blocks: int
    kernel_cache: tuple[Tensor, Tensor]

    @classmethod
    def over(cls, site: LayerSite, **own: Any) -> Self:
        geometry = site.geometry
        if geometry.n_local is None:
            raise RuntimeError(f"{site.name}: a sliding layer needs a window")
        own |= {"geometry": geometry, "has_own_window": site.window is not None, "rotary": site.rotary}
        made = cls.of(site.layer.impl, **own)
        made.sliding_window = (
            geometry.n_global + geometry.n_local
        )  # what a compact table shows; the builder reads it too
        return made

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: LambdaMetadata | None,  # type: ignore[override]  # of LambdaMetadataBuilder, which these layers have
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """As `CPUAttentionBackendImpl.forward`; keys and values of the step are in the cache already."""
        if attn_metadata is None:  # profiling run
            return output
        for part in attn_metadata.kernels:
            self._kernel(part, query[: attn_metadata.num_actual_tokens], output)
        for chunk in attn_metadata.chunks:
            rows = chunk.tokens
            output[rows] = attend_chunk(
                chunk.plan,
                query[rows],
                key[rows],
                value[rows],
                context=self._read(
                    kv_cache, chunk.context_blocks, chunk.context_skip, chunk.plan.n_local - 1
                ),
                first=self._read(kv_cache, chunk.first_blocks, 0, chunk.n_global),
                rotary=self.rotary,
                scale=self.scale,
                further=self._further(query[rows], kv_cache, chunk),
                soft_cap=self.logits_soft_cap,
                sinks=self.sinks,
            )
        return output

    def _further(self, query: Tensor, kv_cache: Tensor, chunk: ChunkPart) -> tuple[Tensor, Tensor] | None:
        """Scores [T, heads, k], capped, and values [T, heads, k, d] of keys beside those of Λ attention;
        here there are none.
        """
        return None

    def _kernel(self, part: KernelPart, query: Tensor, output: Tensor) -> None:
        key_cache, value_cache = self.kernel_cache
        sinks = self.sinks
        if sinks is not None and sinks.dtype == torch.float16:
            sinks = sinks.float()  # the kernel takes bfloat16 or float32
        whole_step = part.tokens is None
        query = query if whole_step else query[part.tokens]
        out = output[: len(query)] if whole_step else torch.empty_like(query)
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=out,
            query_start_loc=part.query_start_loc,
            seq_lens=part.tables.seq_lens,
            scale=self.scale,
            causal=True,
            alibi_slopes=self.alibi_slopes,
            sliding_window=part.sliding_window,
            block_table=part.tables.block_table,
            softcap=self.logits_soft_cap,
            scheduler_metadata=part.scheduler_metadata,
            s_aux=sinks,
        )
        if not whole_step:
            output[part.tokens] = out

    def _read(self, kv_cache: Tensor, blocks: Tensor, skip: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [length, kv_heads, head_size] from `skip` tokens into the first of `blocks` on."""
        keys, values = unpack(kv_cache[blocks], self.places)
        return keys[skip : skip + length], values[skip : skip + length]
