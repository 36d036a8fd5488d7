"""One attention layer of the CPU engine, made as the worker makes it, and the parts of vLLM around it."""

from collections.abc import Mapping
from copy import copy
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.utils.math_utils import cdiv
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backend import CommonAttentionMetadata

from tests.support.engine_args import create
from vllm_longctx import reference
from vllm_longctx.cpu.kernels.tables import ScratchLayout
from vllm_longctx.cpu.memory import close_window
from vllm_longctx.cpu.rows import StepRows, WindowRow
from vllm_longctx.cpu.sliding import LambdaImpl
from vllm_longctx.engine.kv_cache import layer_spec
from vllm_longctx.engine.layers import LayerSite, engine_backend
from vllm_longctx.engine.lookup import ClosedWindow, covering
from vllm_longctx.geometry import Branch, RequestView
from vllm_longctx.modes import BACKENDS, Role, load
from vllm_longctx.rotary import Rotary, inverse_frequencies
from vllm_longctx.settings import Lookup, active_settings

HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE, SCALE = 4, 2, 32, 32, 0.25
SOFT_CAP, SINKS = 2.0, torch.tensor([0.0, 3.0, -9.0, 9.0])
ROTARY = Rotary(HEAD_SIZE, HEAD_SIZE, True, inverse_frequencies(HEAD_SIZE, {"rope_theta": 50.0}))
CPU = torch.device("cpu")


class Engine:
    """texts: of each request the length, at which random queries, keys and values are made, un-rotated.

    number: the layer's in the model, by which it has a role.
    """

    def __init__(
        self,
        model: Path,
        attention: dict[str, Any],
        texts: dict[str, int],
        number: int = 0,
        dtype: torch.dtype = torch.float32,
        soft_cap: float = 0.0,
        sinks: Tensor | None = None,
    ):
        self.dtype, self.soft_cap = dtype, soft_cap
        self.sinks = None if sinks is None else sinks.to(dtype)
        config = create(
            model,
            {"longctx": {"attention": attention}},
            dtype=dtype,
            block_size=BLOCK_SIZE,
            max_num_seqs=2,
            enable_prefix_caching=False,
        )
        self.settings, name = active_settings(config), f"model.layers.{number}.self_attn.attn"
        with set_current_vllm_config(config), set_default_torch_dtype(dtype):
            self.layer: Any = Attention(
                HEADS,
                HEAD_SIZE,
                SCALE,
                KV_HEADS,
                cache_config=config.cache_config,
                prefix=name,
                logits_soft_cap=soft_cap or None,
                sinks=self.sinks,
            )
        role = self.settings.role(number, has_window=False)
        backend = load(f"cpu.{BACKENDS[role]}")
        self.site = LayerSite(
            name=name,
            layer=self.layer,
            stock=copy(self.layer.impl),
            role=role,
            window=None,
            rotary=ROTARY,
            settings=self.settings,
            device=CPU,
        )
        self.layer.impl = backend.make_layer(self.site)
        self.rows = StepRows()
        self.rows.rotaries = [ROTARY]
        make_spec = partial(layer_spec, self.settings.mode.layers[role], vllm_config=config)
        self.layer.attn_backend = engine_backend(backend, self.rows, make_spec, 0)

        columns = cdiv(max(texts.values()), BLOCK_SIZE)
        free = (1 + torch.randperm(len(texts) * columns)).int()
        self.tables = dict(zip(texts, free.split(columns), strict=True))
        config.cache_config.num_gpu_blocks = blocks = 1 + len(free)
        layout = ScratchLayout(blocks, 0, 0)
        if role == Role.SLIDING:
            seqs = config.scheduler_config.max_num_seqs
            layout = ScratchLayout.plan(self.site.geometry, BLOCK_SIZE, blocks, seqs)
        everything = blocks + layout.num_blocks
        if isinstance(self.layer.impl, LambdaImpl):
            self.layer.impl.scratch, self.layer.impl.layer_blocks = layout, everything
        cache = torch.zeros(everything, KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE, dtype=dtype)
        self.layer.kv_cache = cache[:blocks]
        builder = self.layer.attn_backend.get_builder_cls()
        self.builder = builder(self.layer.get_kv_cache_spec(config), [name], config, CPU)
        if role == Role.MEMORY:
            self.layer.impl.bind_kv_cache(self.layer.kv_cache, self.builder.isa)
        self.texts = {
            request: [torch.randn(length, n, HEAD_SIZE).to(dtype) for n in (HEADS, KV_HEADS, KV_HEADS)]
            for request, length in texts.items()
        }
        self.computed = dict.fromkeys(texts, 0)

    def step(
        self,
        tokens: dict[str, int],
        starts: dict[str, int] | None = None,
        writing: bool = False,
        views: Mapping[str, RequestView] = MappingProxyType({}),
        lookups: Mapping[str, Lookup | None] = MappingProxyType({}),
    ) -> dict[str, Tensor]:
        """Computes so many tokens of each request; the outputs [tokens, heads, head_size].

        starts: of the requests' windows, from which positions are counted; 0 by default. writing: whether
        all requests write. views, lookups: of requests that have chosen them.
        """
        names, lens = list(tokens), list(tokens.values())
        ends = [self.computed[name] + new for name, new in tokens.items()]
        positions = torch.cat([torch.arange(end - new, end) for end, new in zip(ends, lens, strict=True)])
        row = torch.repeat_interleave(torch.arange(len(names)), torch.tensor(lens))
        tables = torch.stack([self.tables[name] for name in names])
        slots = tables[row, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
        first = torch.tensor([(starts or {}).get(name, 0) for name in names])
        self.rows.views = {r: views[name] for r, name in enumerate(names) if name in views}
        own = self.settings.memory.lookup if self.settings.attention.mem_layers else None
        self.rows.windows = tuple(
            WindowRow(r, start, lookups.get(names[r], own)) for r, start in enumerate(first.tolist()) if start
        )
        self.rows.writing = frozenset(range(len(names)) if writing else ())
        begins = torch.tensor([0, *lens]).cumsum(0).int()
        metadata = self.builder.build(
            0,
            CommonAttentionMetadata(
                query_start_loc=begins,
                query_start_loc_cpu=begins,
                seq_lens=torch.tensor(ends, dtype=torch.int32),
                num_reqs=len(names),
                num_actual_tokens=len(slots),
                max_query_len=max(lens),
                max_seq_len=max(ends),
                block_table_tensor=tables,
                slot_mapping=slots,
            ),
        )
        parts = [
            [x[end - new : end] for x in self.texts[name]]
            for name, new, end in zip(names, lens, ends, strict=True)
        ]
        q, k, v = (torch.cat(x) for x in zip(*parts, strict=True))
        q, k = (ROTARY.turn(x, (positions - first[row])[:, None]) for x in (q, k))
        cache, output = self.layer.kv_cache, torch.full_like(q, torch.nan)
        self.layer.impl.do_kv_cache_update(self.layer, k, v, cache, slots)
        self.layer.impl.forward(self.layer, q, k, v, cache, metadata, output)
        self.computed.update(zip(names, ends, strict=True))
        return dict(zip(names, output.split(lens), strict=True))

    def unrotate(self, name: str, start: int, end: int, origin: int = 0) -> None:
        """Positions start .. end - 1 become memory, whose rotation was counted from `origin`."""
        closed = ClosedWindow(origin, start, end, covering(self.tables[name], start, end, BLOCK_SIZE))
        close_window(self.layer.kv_cache, closed, ROTARY, self.dtype, self.builder.isa)
        if self.site.role == Role.MEMORY:
            self.layer.impl.summarise(closed)

    def error(self, name: str, output: Tensor, branches: list[Branch]) -> float:
        """Of the last tokens computed, against the dense float64 reference.

        branches: of these queries, and of all keys computed.
        """
        q, k, v = (x[: self.computed[name]] for x in self.texts[name])
        margins: list[float] = []
        expected = reference.attention(
            q[-len(output) :],
            k,
            v,
            branches,
            SCALE,
            ROTARY,
            margins=margins,
            soft_cap=self.soft_cap,
            sinks=self.sinks,
        )
        assert min(margins, default=1.0) > 1e-5  # no two keys are equally good
        return float((output.double() - expected).abs().max())
