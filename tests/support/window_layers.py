"""Two layers of a model with memory, and the parts of vLLM's GPU engine around them, on CPU tensors."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.v1.worker.gpu import attn_utils
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from tests.support.cuda_engine import Inputs, made_layers, metadata_of, places
from tests.support.engine_args import create
from tests.support.vllm_names import kv_cache_config
from vllm_longctx import reference
from vllm_longctx.cuda.memory_runner import MemoryRunner
from vllm_longctx.engine.memory_kv import MemorySpec, WindowSpec
from vllm_longctx.engine.step import RequestWindow, StepInfo
from vllm_longctx.geometry import SteppedWindows, local_branch, memory_branch
from vllm_longctx.rotary import Rotary, inverse_frequencies
from vllm_longctx.settings import active_settings

BLOCK_SIZE, SCALE, WINDOWS = 16, 0.25, SteppedWindows(tokens=12, last_tokens=11)
FOCUSED = {
    "method": "focused",
    "n_local": 12,
    "last_context_length": 11,
    "mem_layers": [1],
    "mem_dtype": "float32",
}
LOOKUPS: list[dict[str, Any]] = [
    {"mem_positionals": False},
    {"lookup": "top_k", "top_k": 3},
    {"lookup": "blocks", "top_k": 3},
]


def configure(model: Path, attention: dict[str, Any], **kwargs: Any) -> VllmConfig:
    attention = {**FOCUSED, **attention}
    caching = attention["n_local"] % BLOCK_SIZE == 0
    return create(
        model, {"longctx": {"attention": attention}}, max_num_seqs=4, enable_prefix_caching=caching, **kwargs
    )


class SelfAttention(nn.Module):
    """As vLLM's decoder layers have it: a rotary module beside the attention."""

    def __init__(self, config: VllmConfig, prefix: str, soft_cap: float):
        super().__init__()
        model = config.model_config
        self.heads = (
            model.get_num_attention_heads(config.parallel_config),
            model.get_num_kv_heads(config.parallel_config),
        )
        self.head_size = model.get_head_size()
        self.rotary_emb = get_rope(self.head_size, 512, True, model.hf_config.rope_parameters, torch.float32)
        heads, kv_heads = self.heads
        self.attn = Attention(
            heads,
            self.head_size,
            SCALE,
            kv_heads,
            cache_config=config.cache_config,
            prefix=f"{prefix}.attn",
            logits_soft_cap=soft_cap or None,
        )

    def forward(self, positions: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = self.rotary_emb(positions, q.flatten(1), k.flatten(1))
        return self.attn(q, k, v.flatten(1)).unflatten(1, (-1, self.head_size))


class Engine:
    """Two layers and the parts of vLLM around them; what the device alone can do is done here by hand.

    texts: by request and layer, un-rotated queries, keys and values [tokens, heads, head_size]. prompts:
        their lengths.
    """

    def __init__(
        self,
        config: VllmConfig,
        monkeypatch: pytest.MonkeyPatch,
        prompts: dict[str, int],
        length: int,
        soft_cap: float = 0.0,
        sinks: Tensor | None = None,
    ):
        self.scores: dict[str, Any] = {"soft_cap": soft_cap, "sinks": sinks}
        self.config, self.prompts, self.computed = config, prompts, dict.fromkeys(prompts, 0)
        self.open = dict.fromkeys(prompts, 0)
        self.inputs = Inputs()
        self.graph: dict[str, Any] | None = None
        with set_current_vllm_config(config):
            self.layers = nn.ModuleList(SelfAttention(config, str(i), soft_cap) for i in range(2))
        for layer in self.layers:
            layer.attn.impl.sinks = sinks
        heads, kv_heads = self.layers[0].heads
        d = self.layers[0].head_size
        some = [torch.randn(16, n, d) for n in (heads, kv_heads, kv_heads)]
        sites, rows = made_layers(
            self.layers, config, lambda positions: [layer(positions, *some) for layer in self.layers]
        )
        self.texts = {
            name: [[torch.randn(length, n, d) for n in (heads, kv_heads, kv_heads)] for _ in self.layers]
            for name in prompts
        }
        specs = attn_utils.get_kv_cache_spec(config)
        assert [type(spec) for spec in specs.values()] == [WindowSpec, MemorySpec]
        self.kv_cache_config = kv_cache_config(config, specs, [layer.attn for layer in self.layers], 1 << 24)
        self.attn_groups, self.support, sizes = attn_utils.init_attn_backend(
            self.kv_cache_config, config, torch.device("cpu")
        )
        by_group = [group.kv_cache_spec for group in self.kv_cache_config.kv_cache_groups]
        self.memory_group = [isinstance(spec, MemorySpec) for spec in by_group].index(True)
        context = config.compilation_config.static_forward_context
        attn_utils.init_kv_cache(
            context,
            self.kv_cache_config,
            torch.device("cpu"),
            sizes,
            config,
            attn_groups=[g for gs in self.attn_groups for g in gs],
        )
        for layer in self.layers:
            layer.attn.kv_cache.fill_(torch.nan)
        # Each request's blocks in each group: the groups share the pool.
        columns = -(-length // BLOCK_SIZE)
        free = torch.randperm(self.kv_cache_config.num_blocks - 1)[: 2 * len(prompts) * columns] + 1
        self.tables = free.view(2, len(prompts), columns).int()

        runner = MemoryRunner.__new__(MemoryRunner)
        state = DefaultModelState.__new__(DefaultModelState)
        state.rope_state = None
        for name, value in {
            "vllm_config": config,
            "compilation_config": config.compilation_config,
            "max_num_reqs": 4,
            "device": torch.device("cpu"),
            "attn_groups": self.attn_groups,
            "kv_cache_config": self.kv_cache_config,
            "block_tables": SimpleNamespace(input_block_tables=list(self.tables)),
            "model": self.layers,
            "model_state": state,
            "input_buffers": SimpleNamespace(positions=torch.zeros(64, dtype=torch.int64)),
        }.items():
            setattr(runner, name, value)
        runner.begin(sites, rows)
        runner.bind_kv_cache()
        self.runner = runner
        monkeypatch.setattr(GPUModelRunner, "prepare_inputs", lambda self, output, batch: batch)
        monkeypatch.setattr(GPUModelRunner, "prepare_attn", lambda self, batch: batch.attn)

    def step(self, tokens: dict[str, int], padding: int = 0) -> dict[str, list[Tensor]]:
        """Computes so many tokens of each request, decodes first as vLLM orders them; the layers' outputs.

        padding: so many rows without a request follow, of decodes. Their layers are as a CUDA graph runs
        them: the second and later times with the metadata of the first time.
        """
        names, lens = list(tokens), list(tokens.values())
        first = [self.computed[n] for n in names]
        ends = [f + n for f, n in zip(first, lens, strict=True)]
        starts = [WINDOWS.start(f, self.prompts[n]) for f, n in zip(first, names, strict=True)]
        windows = {}
        for name, f, end, start in zip(names, first, ends, starts, strict=True):
            assert end <= WINDOWS.end(f, self.prompts[name])
            windows[name] = RequestWindow(start, self.open[name] if self.open[name] != start else None)
            self.open[name], self.computed[name] = start, end
        rows = [list(self.prompts).index(name) for name in names]
        tables = [table[rows] for table in self.tables]
        positions, slots = places(first, ends, tables)
        count = len(positions)
        if padding:
            tables = [self.inputs(f"table {i}", F.pad(t, (0, 0, 0, padding))) for i, t in enumerate(tables)]
            positions, slots = F.pad(positions, (0, padding)), F.pad(slots, (0, padding), value=-1)
        batch = SimpleNamespace(
            req_ids=names,
            positions=positions,
            num_tokens=count,
            num_tokens_after_padding=count + padding,
            num_scheduled_tokens=np.array(lens),
            attn=(tables, slots),
        )
        self.runner.step = StepInfo(windows=windows)
        self.runner.prepare_inputs(SimpleNamespace(), batch)
        tables, slots = self.runner.prepare_attn(batch)
        metadata = metadata_of(
            self.attn_groups,
            self.kv_cache_config,
            first + [0] * padding,
            ends + [0] * padding,
            tables,
            slots,
            positions,
            self.inputs if padding else None,
        )
        if padding:
            metadata = self.graph = self.graph or metadata
        seen = self.runner.model_state.prepare_inputs(batch, None)["positions"]
        assert torch.equal(
            positions[:count], torch.cat([torch.arange(f, e) for f, e in zip(first, ends, strict=True)])
        )
        by_layer = attn_utils.build_slot_mappings_by_layer(slots, self.kv_cache_config)
        outputs = []
        with set_forward_context(metadata, self.config, num_tokens=count, slot_mapping=by_layer):
            for number, layer in enumerate(self.layers):
                parts = [
                    [t[f:e] for t in self.texts[n][number]]
                    for n, f, e in zip(names, first, ends, strict=True)
                ]
                inputs = [F.pad(torch.cat(x), (0, 0, 0, 0, 0, padding)) for x in zip(*parts, strict=True)]
                outputs.append(layer(seen, *inputs)[:count].split(lens))
        return {name: [x[i] for x in outputs] for i, name in enumerate(names)}

    def expected(self, name: str, new: int, layer: int, best: int | None) -> tuple[Tensor, float]:
        """The dense float64 reference for the last `new` tokens computed, and the smallest margin of a choice
        of keys.
        """
        end = self.computed[name]
        q, k, v = (t[:end] for t in self.texts[name][layer])
        queries, keys = torch.arange(end - new, end), torch.arange(end)
        start = torch.tensor([WINDOWS.start(int(i), self.prompts[name]) for i in queries])
        sees = [local_branch(queries, keys, start)]
        if layer == 1:
            sees.append(memory_branch(queries, keys, start, best))
        margins: list[float] = []
        rotary = None
        if layer == 0 or active_settings(self.config).memory.has_positions:
            rotary = Rotary(
                q.shape[2], q.shape[2], True, inverse_frequencies(q.shape[2], {"rope_theta": 10000.0})
            )
        expected = reference.attention(q[-new:], k, v, sees, SCALE, rotary, margins=margins, **self.scores)
        return expected, min(margins, default=1.0)
