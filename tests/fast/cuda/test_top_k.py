"""LM-Infinite's top-k branch of the GPU engine in models of vLLM's, run as the Model Runner V2 runs them, but
interpreted.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader import get_model_loader
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.request import Request, RequestStatus
from vllm.v1.worker.gpu import attn_utils
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from tests.support.cuda_engine import BLOCK_SIZE, CPU, Inputs, made_layers, metadata_of, places, text, to_cpu
from tests.support.cuda_engine import Engine as WholeEngine
from tests.support.engine_args import create
from tests.support.reference_model import ReferenceLlama, official_top_k, with_top_k
from tests.support.vllm_names import kv_cache_config
from vllm_longctx import reference
from vllm_longctx.config import LongContextError
from vllm_longctx.cuda import top_k_runner
from vllm_longctx.cuda.kernels.decode_lookups import DecodeLookup
from vllm_longctx.cuda.kernels.lambda_decode import decode_workspace
from vllm_longctx.cuda.kernels.lookup import WORKSPACE
from vllm_longctx.cuda.memory import pool_beside_lookups
from vllm_longctx.cuda.runner import runner_class
from vllm_longctx.cuda.sliding import Decodes, LambdaImpl
from vllm_longctx.cuda.top_k import Middles, TopKImpl, TopKMetadata
from vllm_longctx.cuda.top_k_runner import TopKRunner
from vllm_longctx.engine.memory_kv import MiddleSpec
from vllm_longctx.engine.sliding_kv import LambdaSpec
from vllm_longctx.geometry import Geometry, branches, middle_branch
from vllm_longctx.rotary import Rotary, inverse_frequencies
from vllm_longctx.scheduling.memory import AsyncTopKScheduler, TopKScheduler
from vllm_longctx.settings import Lookup, TopK, active_settings

TOP_K = {
    "n_global": 5, "n_local": 24, "distance_ceiling": 24,
    "top_k": 3, "top_k_from_layer": 1, "top_k_to_layer": 2, "top_k_insert_at": 20,
}  # fmt: skip


def configure(model: Path, attention: dict[str, Any] = TOP_K, **kwargs: Any) -> VllmConfig:
    return create(model, {"longctx": {"attention": attention}}, max_num_seqs=4, **kwargs)


class Engine:
    """A checkpoint that vLLM has loaded as for CUDA, and the parts of vLLM around it; what only the device
    can do is done here.

    texts: token ids of each request. prompts: how many of them are its prompt.
    """

    def __init__(
        self,
        path: Path,
        attention: dict[str, Any],
        texts: dict[str, list[int]],
        prompts: dict[str, int],
        monkeypatch: pytest.MonkeyPatch,
    ):
        self.texts, self.prompts, self.computed = texts, prompts, dict.fromkeys(prompts, 0)
        self.inputs = Inputs()
        self.graph: dict[str, Any] | None = None
        self.config = config = to_cpu(
            configure(
                path,
                attention,
                dtype="float32",
                block_size=BLOCK_SIZE,
                max_num_batched_tokens=512,
                enforce_eager=True,
                compilation_config={"mode": 0, "custom_ops": ["none"]},
            )
        )
        with set_current_vllm_config(config):
            self.model = get_model_loader(config.load_config).load_model(
                vllm_config=config, model_config=config.model_config
            )
        sites, rows = made_layers(self.model, config)
        self.layers: dict[str, Any] = config.compilation_config.static_forward_context
        specs = attn_utils.get_kv_cache_spec(config)
        top_k_layers = active_settings(config).top_k.layers
        assert [i for i, spec in enumerate(specs.values()) if isinstance(spec, MiddleSpec)] == list(
            top_k_layers
        )
        assert sum(isinstance(spec, LambdaSpec) for spec in specs.values()) == len(specs) - len(top_k_layers)
        self.kv_cache_config = kv_cache_config(config, specs, self.layers.values(), 1 << 25)
        self.attn_groups, self.support, sizes = attn_utils.init_attn_backend(
            self.kv_cache_config, config, CPU
        )
        every = [group for groups in self.attn_groups for group in groups]
        attn_utils.init_kv_cache(self.layers, self.kv_cache_config, CPU, sizes, config, attn_groups=every)
        for layer in self.layers.values():
            layer.kv_cache.fill_(torch.nan)
        columns = max(len(text) for text in texts.values()) // BLOCK_SIZE + 1
        shape = len(self.kv_cache_config.kv_cache_groups), len(prompts), columns
        free = torch.randperm(self.kv_cache_config.num_blocks - 1).int() + 1
        self.tables, self.free = free[: np.prod(shape)].view(shape), free[np.prod(shape) :]

        self.runner = runner = TopKRunner.__new__(TopKRunner)
        runner.device, runner.attn_groups = CPU, self.attn_groups
        runner.req_states = SimpleNamespace(
            prompt_len=SimpleNamespace(np=np.array(list(prompts.values()), dtype=np.int32))
        )
        runner.block_tables = SimpleNamespace(input_block_tables=list(self.tables))
        monkeypatch.setattr(GPUModelRunner, "prepare_attn", lambda self, batch: batch.attn)
        runner.kv_cache_config = self.kv_cache_config
        runner.begin(sites, rows)
        runner.bind_kv_cache()

    def step(self, tokens: dict[str, int], padding: int = 0) -> dict[str, Tensor]:
        """Computes so many tokens of each request, decodes first as vLLM orders them; log-probabilities
        behind each.

        padding: so many rows without a request follow, of decodes. Their layers are as a CUDA graph runs
        them: the second and later times with the metadata of the first time.
        """
        names, lens = list(tokens), list(tokens.values())
        rows = [list(self.prompts).index(name) for name in names]
        first = [self.computed[n] for n in names]
        ends = [f + n for f, n in zip(first, lens, strict=True)]
        self.computed.update(zip(names, ends, strict=True))
        count = sum(lens)
        tables = [table[rows] for table in self.tables]
        positions, slots = places(first, ends, tables)
        if padding:
            tables = [self.inputs(f"table {i}", F.pad(t, (0, 0, 0, padding))) for i, t in enumerate(tables)]
            positions, slots = F.pad(positions, (0, padding)), F.pad(slots, (0, padding), value=-1)
        batch = SimpleNamespace(
            req_ids=names,
            num_computed_tokens_np=np.array(first, dtype=np.int32),
            idx_mapping_np=np.array(rows),
            attn=(tables, slots),
        )
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
        self.looked_up = {
            name for name, of_layer in metadata.items() if getattr(of_layer, "middles", None) is not None
        }
        by_layer = attn_utils.build_slot_mappings_by_layer(slots, self.kv_cache_config)
        ids = torch.tensor(
            [i for n, f, e in zip(names, first, ends, strict=True) for i in self.texts[n][f:e]]
            + [0] * padding
        )
        with (
            torch.inference_mode(),
            set_forward_context(metadata, self.config, num_tokens=len(ids), slot_mapping=by_layer),
        ):
            logits = self.model.compute_logits(self.model(ids, positions))[:count]
        return dict(zip(names, logits.double().log_softmax(-1).split(lens), strict=True))

    def preempt(self, name: str) -> None:
        """The request computes again from its first token on, in other blocks; those that it had are
        anybody's.
        """
        row = list(self.prompts).index(name)
        columns = self.tables.shape[2]
        for table in self.tables:
            table[row], self.free = self.free[:columns], self.free[columns:]
        self.computed[name] = 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, kernels are not interpreted")
@pytest.mark.usefixtures("one_rank", "gpu", "no_gpu_memory", "one_tile", "stock_cache_update", "one_thread")
def test_requests_that_write_see_the_best_keys_of_their_middle(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long and short prompts, chunks beside decodes, middles that are empty, too small, just enough; one is
    preempted. A step of decodes is replayed for other requests in its rows.
    """
    monkeypatch.setattr(top_k_runner, "WORKSPACE", 4 * 2 * 32 * 7)  # seven keys are turned back at once
    prompts = {"long": 40, "short": 6, "middling": 31}
    texts = {name: torch.randint(3, 512, (length + 12,)).tolist() for name, length in prompts.items()}
    engine = Engine(tiny_llama, TOP_K, texts, prompts, monkeypatch)
    assert engine.support.min_cg_support == AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reference, expected = ReferenceLlama(tiny_llama), {}
    for name, length in prompts.items():
        seen = with_top_k(Geometry(5, 24, 24), length, range(1, 2), 3, 20)
        expected[name] = reference.logprobs(texts[name], seen)
        assert min(reference.margins) > 1e-5  # no two keys are equally good

    def check(tokens: dict[str, int], padding: int = 0) -> None:
        for name, ours in engine.step(tokens, padding).items():
            end = engine.computed[name]
            torch.testing.assert_close(ours, expected[name][end - tokens[name] : end], atol=1e-4, rtol=0)

    check({"long": 30})
    check({"short": 5, "long": 8})
    check({"long": 1, "middling": 30})  # its last token but one: it does not write yet
    assert not engine.looked_up
    check({"long": 1, "short": 1, "middling": 1}, padding=1)
    assert engine.looked_up == {"model.layers.1.self_attn.attn"}
    for _ in range(2):
        check({"middling": 1, "long": 1, "short": 1}, padding=1)
    engine.preempt("long")
    check({"short": 1, "long": 39})
    for _ in range(4):
        check({"long": 1})


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, kernels are not interpreted")
@pytest.mark.usefixtures("one_rank", "gpu", "host", "stock_cache_update", "one_thread")
def test_the_middle_grows_with_a_step_under_way(small_llama: Path) -> None:
    """Of requests that write, one of them preempted meanwhile; one ends by a token with its next step
    computed, one at once.
    """
    pool = {"num_gpu_blocks_override": 12, "max_num_batched_tokens": 40, "max_model_len": 80}
    engine = WholeEngine(
        small_llama, {"attention": TOP_K}, TopKRunner, [TopKScheduler, AsyncTopKScheduler], 1, **pool
    )
    seen = {}

    def add(name: str, prompt: list[int], new: int, **params: Any) -> Request:
        seen[name] = with_top_k(Geometry(5, 24, 24), len(prompt), range(1, 2), 3, 20)
        return engine.add(name, prompt, max_tokens=new, **params)

    with set_current_vllm_config(engine.config):
        first = add("first", text(31), 9)
        add("one", text(5), 1)
        other = add("other", text(28), 12)
        while engine.scheduler.has_requests() or engine.under_way:
            engine.step()
            if first.num_output_tokens == 5 and "ends" not in seen:
                stop = first.output_token_ids[1]
                ends = add("ends", [*first.prompt_token_ids], 9, stop_token_ids=[stop])
    for name, layers in seen.items():
        engine.check(name, layers)
    assert min(engine.reference.margins) > 1e-5
    assert engine.stale == {"other"} and other.num_preemptions
    assert engine.in_vain == {"ends"} and ends.status == RequestStatus.FINISHED_STOPPED
    assert engine.is_empty()


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, kernels are not interpreted")
@pytest.mark.usefixtures("one_rank", "gpu", "no_gpu_memory", "one_tile", "stock_cache_update", "one_thread")
def test_it_is_the_official_code(goldens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says behind a prompt of 160 tokens, of which 22 stand between first tokens and window."""
    case = goldens / "lminf_topk"
    p = json.loads((case / "case.json").read_text())
    ids, rows = np.load(case / "input_ids.npy").flatten().tolist(), np.load(case / "logprobs.npy")
    length = 160
    expected = torch.from_numpy(rows[np.load(case / "prefix_lengths.npy").tolist().index(length)])
    engine = Engine(
        goldens / "models" / "llama", official_top_k(p), {"": ids[:length]}, {"": length}, monkeypatch
    )
    engine.step({"": length - 1})
    assert (engine.step({"": 1})[""][-1] - expected).abs().max() <= 1e-4


@pytest.mark.usefixtures("one_thread")
def test_a_decode_joins_its_middle_under_a_cap_with_sinks() -> None:
    """The sinks, which are in the output of Λ attention and its log-sum-exps, are counted once."""
    heads, kv_heads, d, scale, cap = 4, 2, 32, 0.25, 2.0
    geometry, top_k, length = Geometry(5, 24, 30), TopK(3, 20, range(1)), 60
    rotary, sinks = Rotary(d, d, True, inverse_frequencies(d, {})), torch.tensor([0.0, 3.0, -9.0, 9.0])
    query, (key, value) = torch.randn(1, heads, d), torch.randn(2, length, kv_heads, d)
    at, keys = torch.tensor([length - 1]), torch.arange(length)
    seen = [*branches(geometry, at, keys), middle_branch(geometry, at, keys, top_k.k, top_k.insert_at, 0)]
    expected = reference.attention(query, key, value, seen, scale, rotary, soft_cap=cap, sinks=sinks)

    stock = LambdaImpl(heads, d, scale, kv_heads, logits_soft_cap=cap, sinks=sinks)
    stock.take_over(geometry, rotary, CPU)
    impl = TopKImpl.of(stock, top_k=top_k)
    end = length - 24
    by = torch.where((keys >= 5) & (keys < end), 0, keys)  # the middle is un-rotated
    text = torch.cat((rotary.turn(key, by[:, None]), value), -1)
    cache = F.pad(text, (0, 0, 0, 0, 0, 4)).view(4, BLOCK_SIZE, kv_heads, 2 * d).transpose(1, 2)
    table, lens = torch.arange(4).int()[None], torch.tensor([length]).int()
    decodes = Decodes(table, lens, rotary.cos_sin(impl.view.query_turn(at)), 2)
    ends = torch.tensor([end]).int()
    layer = SimpleNamespace(_k_scale_float=1.0, _v_scale_float=1.0)
    for longest in (None, end):  # in a graph, and where lookups are too large for one
        middles = Middles(
            DecodeLookup(table, ends * 0 + 5, ends, 1, longest, None), *rotary.cos_sin(top_k.insert_at - at)
        )
        metadata = TopKMetadata(1, decodes, None, decode_workspace(1, heads, d, 2, CPU), middles)
        output = impl.forward(
            layer, rotary.turn(query, at[:, None]), key, value, cache, metadata, torch.empty(1, heads, d)
        )
        torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("gpu")
def test_engine_arguments_of_the_top_k_branch_on_cuda(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(tiny_llama)
    assert config.use_v2_model_runner and config.scheduler_config.async_scheduling
    assert config.scheduler_config.get_scheduler_cls() is AsyncTopKScheduler
    assert configure(tiny_llama, async_scheduling=False).scheduler_config.get_scheduler_cls() is TopKScheduler
    assert pool_beside_lookups(1 << 36, Lookup(3, None), 2) == (1 << 36) - 4 * 8 * WORKSPACE
    mode = active_settings(config).mode
    assert runner_class(mode, config) is TopKRunner
    with pytest.raises(RuntimeError, match=r"longctx cannot run mode top-k on vLLM's .*gpu_model_runner"):
        runner_class(mode, SimpleNamespace(use_v2_model_runner=False))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("kwargs", "v2", "message"),
    [
        (
            {"kv_cache_dtype": "fp8"},
            True,
            "attention.top_k does not run on CUDA with this setting: kv_cache_dtype = 'fp8'; leave",
        ),
        (
            {"ubatch_size": 2, "all2all_backend": "deepep_low_latency"},
            True,
            "with this setting: microbatches are on; leave",
        ),
        ({}, False, "with this setting: the Model Runner V1 is chosen; leave VLLM_USE_V2_MODEL_RUNNER out"),
        ({"block_size": 48}, True, "setting: block_size = 48; with attention.top_k give a power of two"),
    ],
)
def test_what_the_top_k_branch_cannot_do_on_cuda_is_refused(
    kwargs: dict[str, Any], v2: bool, message: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(v2)))
    with pytest.raises(LongContextError, match=message):
        configure(tiny_llama, **kwargs)
