"""The GPU engine's attention backend, run as vLLM runs it, but interpreted, on CPU tensors."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.config import CompilationConfig, CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader import get_model_loader
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.worker.gpu import attn_utils
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from tests.support.cuda_engine import Engine as WholeEngine
from tests.support.cuda_engine import made_layers
from tests.support.engine_args import create
from tests.support.reference_model import ReferenceLlama, alike
from tests.support.vllm_names import kv_cache_config
from vllm_longctx import reference
from vllm_longctx.config import LongContextError
from vllm_longctx.cuda import sliding as cuda
from vllm_longctx.cuda import worker as worker_cuda
from vllm_longctx.cuda.runner import LongContextRunner
from vllm_longctx.cuda.sliding import LambdaBackend, LambdaImpl, LambdaMetadata, LambdaMetadataBuilder
from vllm_longctx.engine.sliding_kv import LambdaSpec
from vllm_longctx.geometry import Geometry, alibi_slopes, branches
from vllm_longctx.rotary import Rotary, inverse_frequencies
from vllm_longctx.scheduling.scheduler import AsyncLongContextScheduler, LongContextScheduler

HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE, SCALE = 4, 2, 32, 16, 0.25
MAX_SEQS, MAX_TOKENS, MAX_LEN = 4, 64, 256
LAMBDA = Geometry(n_global=5, n_local=24, distance_ceiling=30)
CPU, META = torch.device("cpu"), torch.device("meta")
DEVICE = (
    torch.device("cuda") if torch.cuda.is_available() else CPU
)  # kernels are compiled there, interpreted here


def rotary_of(alibi: bool) -> Rotary | None:
    return None if alibi else Rotary(HEAD_SIZE, HEAD_SIZE, True, inverse_frequencies(HEAD_SIZE, {}))


@dataclass
class Engine:
    """One layer and vLLM's persistent inputs (v1/worker/gpu/input_batch.py, block_table.py), on `device`.

    texts: un-rotated queries, keys and values of each request's tokens, [tokens, heads, head_size] each.
    """

    geometry: Geometry = LAMBDA
    alibi: bool = False
    device: torch.device = DEVICE
    kv_cache_dtype: str = "auto"
    soft_cap: float = 0.0
    sinks: Tensor | None = None
    texts: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    computed: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rotary = rotary_of(self.alibi)
        if self.rotary is not None:
            self.rotary.to(self.device)
        slopes = alibi_slopes(HEADS).tolist() if self.alibi else None
        self.impl = LambdaImpl(
            HEADS,
            HEAD_SIZE,
            SCALE,
            KV_HEADS,
            slopes,
            kv_cache_dtype=self.kv_cache_dtype,
            logits_soft_cap=self.soft_cap or None,
            sinks=None if self.sinks is None else self.sinks.to(self.device),
        )
        self.impl.take_over(self.geometry, self.rotary, self.device)
        config = SimpleNamespace(
            compilation_config=SimpleNamespace(
                static_forward_context={"layer": SimpleNamespace(impl=self.impl)}
            ),
            scheduler_config=SimpleNamespace(max_num_seqs=MAX_SEQS, max_num_batched_tokens=MAX_TOKENS),
            model_config=SimpleNamespace(max_model_len=MAX_LEN),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        )
        self.builder = LambdaMetadataBuilder(None, ["layer"], config, self.device)
        self.layer = SimpleNamespace(_k_scale=None, _v_scale=None, _k_scale_float=1.0, _v_scale_float=1.0)
        ints = {"dtype": torch.int32, "device": self.device}
        self.starts, self.seq_lens = torch.zeros(MAX_SEQS + 1, **ints), torch.zeros(MAX_SEQS, **ints)
        self.positions = torch.zeros(MAX_TOKENS, dtype=torch.int64, device=self.device)
        self.table = torch.zeros(MAX_SEQS, MAX_LEN // BLOCK_SIZE, **ints)
        num_blocks = 1 + len(self.texts) * MAX_LEN // BLOCK_SIZE
        # What nobody wrote is NaN, as are freed blocks and the null block: whoever reads them shows it.
        self.nan = torch.nan if self.kv_cache_dtype == "auto" else 0x7F  # float8's
        dtype = torch.float32 if self.kv_cache_dtype == "auto" else torch.uint8
        shape = num_blocks, KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE
        self.cache = torch.full(shape, self.nan, dtype=dtype, device=self.device)
        self.free = list(range(1, num_blocks))
        self.computed, self.tables = dict.fromkeys(self.texts, 0), {name: [] for name in self.texts}

    def metadata(self, lens: list[int], rows: int) -> CommonAttentionMetadata:
        """Of the persistent inputs, as `build_attn_metadata` makes it: `rows` with padding, those of a CUDA
        graph.
        """
        starts = torch.tensor([0, *lens]).cumsum(0).to(torch.int32)
        starts = torch.cat((starts, starts[-1:].expand(rows - len(lens))))
        tokens = rows if rows > len(lens) else int(starts[-1])
        return CommonAttentionMetadata(
            query_start_loc=self.starts[: rows + 1],
            query_start_loc_cpu=starts,
            seq_lens=self.seq_lens[:rows],
            num_reqs=rows,
            num_actual_tokens=tokens,
            max_query_len=max(lens),
            max_seq_len=MAX_LEN,
            block_table_tensor=self.table[:rows],
            slot_mapping=torch.full((tokens,), -1),
            positions=self.positions,
        )

    def capture(self, rows: int) -> LambdaMetadata:
        """Metadata of a CUDA graph of `rows` decodes, on dummy inputs."""
        self.starts[: rows + 1] = torch.arange(rows + 1, device=self.device)
        self.seq_lens[:rows] = 1
        self.table.zero_()
        return self.builder.build_for_cudagraph_capture(self.metadata([1] * rows, rows))

    def step(
        self, tokens: dict[str, int], replay: LambdaMetadata | None = None, rows: int = 0
    ) -> dict[str, Tensor]:
        """Computes so many tokens of each request, decodes first as vLLM orders them; the outputs [tokens,
        heads, head_size].

        replay: forward with what a graph of `rows` rows captured, while the step's own metadata is built and
            thrown away.
        """
        names, lens = list(tokens), list(tokens.values())
        slots = []
        self.seq_lens.zero_()
        self.table.zero_()
        for row, (name, new) in enumerate(tokens.items()):
            first, end = self.computed[name], self.computed[name] + new
            table = self.tables[name]
            while len(table) * BLOCK_SIZE < end:
                table.append(self.free.pop())
            self.seq_lens[row] = end
            self.table[row, : len(table)] = torch.tensor(table, device=self.device)
            slots += [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(first, end)]
            self.computed[name] = end
        count = len(slots)
        self.starts[: len(lens) + 1] = torch.tensor([0, *lens], device=self.device).cumsum(0)
        self.starts[len(lens) + 1 :] = count
        positions = torch.cat([torch.arange(self.computed[n] - tokens[n], self.computed[n]) for n in names])
        self.positions[:count] = positions.to(self.device)
        m = self.metadata(lens, rows or len(lens))
        metadata = self.builder.build(0, m)

        padded = m.num_actual_tokens
        q, k, v = (
            torch.zeros(padded, heads, HEAD_SIZE, device=self.device) for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        for x, whole in zip((q, k, v), zip(*(self.texts[n] for n in names), strict=True), strict=True):
            new = [
                t[self.computed[n] - tokens[n] : self.computed[n]] for t, n in zip(whole, names, strict=True)
            ]
            x[:count] = torch.cat(new).to(self.device)
        if self.rotary is not None:
            flat_q, flat_k = self.rotary(self.positions[:padded], q.flatten(1), k.flatten(1))
            q, k = flat_q.view_as(q), flat_k.view_as(k)
        slot_mapping = torch.tensor(slots + [-1] * (padded - count), device=self.device)
        self.impl.do_kv_cache_update(self.layer, k, v, self.cache, slot_mapping)
        output = torch.empty_like(q)
        self.impl.forward(self.layer, q, k, v, self.cache, replay or metadata, output)
        self._free_the_middle(names)
        return dict(zip(names, output[:count].cpu().split(lens), strict=True))

    def _free_the_middle(self, names: list[str]) -> None:
        for name in names:
            first_blocks = -(-self.geometry.n_global // BLOCK_SIZE)
            end = max(self.computed[name] - self.geometry.n_local + 1, 0) // BLOCK_SIZE
            for block in range(first_blocks, end):
                self.cache[self.tables[name][block]] = self.nan
                self.tables[name][block] = 0

    def expected(self, name: str, new: int) -> Tensor:
        """The dense float64 reference for the last `new` tokens computed."""
        end = self.computed[name]
        q, k, v = (t[:end] for t in self.texts[name])
        queries, keys = torch.arange(end - new, end), torch.arange(end)
        seen = branches(self.geometry, queries, keys)
        slopes = alibi_slopes(HEADS) if self.alibi else None
        own = {"soft_cap": self.soft_cap, "sinks": self.sinks}
        return reference.attention(q[-new:], k, v, seen, SCALE, rotary_of(self.alibi), slopes, **own)


def text(length: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(length, heads, HEAD_SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return q, k, v


@pytest.mark.usefixtures("stock_cache_update", "one_thread")
@pytest.mark.parametrize(
    ("geometry", "own"),
    [
        (LAMBDA, {}),
        (Geometry(5, 24, None, "in_cache"), {}),
        (LAMBDA, {"alibi": True}),
        (LAMBDA, {"soft_cap": 2.0, "sinks": torch.tensor([0.0, 3.0, -9.0, 9.0])}),
        (Geometry(0, 24), {"soft_cap": 2.0, "sinks": torch.tensor([0.0, 3.0, -9.0, 9.0])}),
    ],
    ids=["relative", "in_cache", "alibi", "soft cap and sinks", "own window"],
)
def test_steps_of_two_requests_attend_as_the_reference(geometry: Geometry, own: dict[str, Any]) -> None:
    """Chunks of a prompt, decodes beside them, decodes alone, and decodes in a padded CUDA graph."""
    engine = Engine(geometry, texts={"a": text(120), "b": text(120)}, **own)
    graph = engine.capture(rows=3)

    def check(tokens: dict[str, int], **kwargs: Any) -> None:
        for name, output in engine.step(tokens, **kwargs).items():
            torch.testing.assert_close(
                output.double(), engine.expected(name, tokens[name]), atol=1e-5, rtol=1e-5
            )

    check({"a": 48})
    check({"a": 1, "b": 20})
    check({"b": 30, "a": 34})
    for _ in range(2):
        check({"b": 1, "a": 1})
        check({"b": 1, "a": 1}, replay=graph, rows=3)
    check({"a": 1}, replay=graph, rows=3)


@pytest.mark.usefixtures("stock_cache_update", "one_thread")
def test_a_float8_cache_is_read_as_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a float32 cache of the same, already rounded, keys and values."""
    texts = {"a": text(60)}
    rounded, fp8 = Engine(texts=texts), Engine(texts=texts, kv_cache_dtype="fp8")
    monkeypatch.setattr(current_platform, "fp8_dtype", lambda: torch.float8_e4m3fn, raising=False)
    update = rounded.impl.do_kv_cache_update

    def update_rounded(layer: Any, key: Tensor, value: Tensor, *args: Any) -> None:
        update(layer, *(t.to(torch.float8_e4m3fn).float() for t in (key, value)), *args)

    monkeypatch.setattr(rounded.impl, "do_kv_cache_update", update_rounded)
    for tokens in (50, 1):
        torch.testing.assert_close(fp8.step({"a": tokens}), rounded.step({"a": tokens}))
    assert not torch.allclose(rounded.step({"a": 1})["a"].double(), rounded.expected("a", 1), atol=1e-4)


def test_the_worker_takes_over_once_the_weights_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(worker_cuda.Worker, "load_model", lambda self, **kwargs: done.append(kwargs))
    worker = object.__new__(worker_cuda.LongContextWorker)
    worker.settings, worker.vllm_config = SimpleNamespace(mode=SimpleNamespace(adapts=False)), None
    worker.rank = 1
    worker.model_runner = SimpleNamespace(
        get_model=lambda: "model",
        begin=lambda *args: done.append(args),
        leave_out_adapters=lambda tokens: done.append("base model"),
    )
    worker.new_rows, worker.make_layers = lambda: "rows", lambda *args: done.append(args) or "sites"
    worker.load_model(load_dummy_weights=False)
    assert done == [{"load_dummy_weights": False}, "base model", ("model", "rows"), ("sites", "rows")]


@pytest.mark.parametrize(
    "geometry", [LAMBDA, Geometry(5, 24, None, "in_cache")], ids=["relative", "in_cache"]
)
@pytest.mark.parametrize("lens", [[1, 1, 1], [1, 1, 9], [7]], ids=["decodes", "mixed", "chunk"])
def test_nothing_waits_for_the_device(
    geometry: Geometry, lens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, whose tensors have no values to wait for."""
    engine = Engine(geometry, device=META)
    called = []
    for kernel in ("lambda_decode", "lambda_attention"):
        monkeypatch.setattr(cuda, kernel, lambda *args, name=kernel, **kwargs: called.append(name))
    metadata = engine.builder.build(0, engine.metadata(lens, len(lens)))
    q, k = (torch.empty(sum(lens), heads * HEAD_SIZE, device=META) for heads in (HEADS, KV_HEADS))
    assert engine.rotary is not None
    q, k = engine.rotary(engine.positions[: sum(lens)], q, k)
    assert k is not None
    q, k = q.view(-1, HEADS, HEAD_SIZE), k.view(-1, KV_HEADS, HEAD_SIZE)
    engine.impl.forward(engine.layer, q, k, k, engine.cache, metadata, torch.empty_like(q))
    assert called == [
        name for name, used in (("lambda_decode", 1 in lens), ("lambda_attention", max(lens) > 1)) if used
    ]


def test_a_profiling_run_has_no_metadata() -> None:
    engine = Engine()
    output = torch.full((3, HEADS, HEAD_SIZE), torch.nan, device=DEVICE)
    assert (
        engine.impl.forward(engine.layer, output, output, output, engine.cache, None, output).count_nonzero()
        == 0
    )


@pytest.mark.parametrize("position", [5, 1_000_003, 2**31 - 64])
def test_exact_angles_in_one_graph(position: int) -> None:
    """Without a break, which would be a place where the host waits; at any position the same as in eager
    mode.
    """
    rotary = Rotary(32, 16, False, inverse_frequencies(16, {})).to(DEVICE)
    positions = torch.arange(position, position + 3, device=DEVICE)
    query, key = torch.randn(3, 4 * 32, device=DEVICE), torch.randn(3, 2 * 32, device=DEVICE)
    compiled = torch.compile(rotary, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(compiled(positions, query, key), rotary(positions, query, key), strict=True):
        assert torch.equal(ours, eager)


def test_it_declares_cuda_graphs_of_decodes() -> None:
    support = LambdaMetadataBuilder.get_cudagraph_support(None, None)
    assert support == AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    default = CompilationConfig(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE)
    mode = default.resolve_cudagraph_mode_and_sizes(support, "LambdaBackend", use_v2_model_runner=True)
    assert mode == CUDAGraphMode.FULL_AND_PIECEWISE


SUPPORTED = {
    "head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 32, "use_mla": False,
    "has_sink": False, "use_sparse": False, "use_mm_prefix": False, "use_per_head_quant_scales": False,
    "attn_type": "decoder",
    "device_capability": DeviceCapability(8, 0),
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"device_capability": DeviceCapability(9, 0), "kv_cache_dtype": "fp8"}, None),
        ({"head_size": 512}, "head_size not supported"),
        ({"dtype": torch.float64}, "dtype not supported"),
        (
            {"device_capability": DeviceCapability(9, 0), "kv_cache_dtype": "fp8_e5m2"},
            "kv_cache_dtype not supported",
        ),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype fp8 needs compute capability 8.9"),
        ({"block_size": 24}, "block_size not supported"),
        ({"device_capability": DeviceCapability(7, 5)}, "compute capability not supported"),
        ({"attn_type": "encoder"}, "attention type encoder not supported"),
        ({"has_sink": True}, None),
        ({"has_sliding_window": True}, None),
        ({"use_mla": True}, "MLA not supported"),
        ({"use_dcp": True}, "DCP not supported"),
    ],
)
def test_vllm_hears_what_the_backend_cannot_do(change: dict[str, Any], reason: str | None) -> None:
    assert LambdaBackend.validate_configuration(**{**SUPPORTED, **change}) == (
        [] if reason is None else [reason]
    )


@dataclass
class Loaded:
    """A checkpoint that vLLM has loaded as for CUDA, but to the CPU."""

    config: VllmConfig
    model: nn.Module

    @property
    def layers(self) -> dict[str, Any]:
        return self.config.compilation_config.static_forward_context


@pytest.fixture
def loaded(one_rank: None, gpu: type, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda: 0)
    config = create(
        tiny_llama,
        {"longctx": {"attention": {"n_local": 24, "n_global": 5, "distance_ceiling": 30}}},
        dtype="float32",
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=20,
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=MAX_TOKENS,
        enforce_eager=True,
        compilation_config={"mode": 0, "custom_ops": ["none"]},
    )
    config.device_config.device, config.load_config.device, config.load_config.load_format = (
        CPU,
        "cpu",
        "auto",
    )
    with set_current_vllm_config(config):
        model = get_model_loader(config.load_config).load_model(
            vllm_config=config, model_config=config.model_config
        )
    return Loaded(config, model)


@pytest.mark.usefixtures("stock_cache_update", "one_thread")
def test_a_model_of_vllms_gives_the_references_log_probabilities(loaded: Loaded, tiny_llama: Path) -> None:
    """Model, weights, KV specs, pool, builders, metadata by vLLM's code (v1/worker/gpu/attn_utils.py): two
    chunks, a decode.
    """
    config, layers = loaded.config, loaded.layers
    made_layers(loaded.model, config)
    assert sum(isinstance(module, Rotary) for module in loaded.model.modules()) == 1  # shared by all layers
    specs = attn_utils.get_kv_cache_spec(config)
    assert all(isinstance(spec, LambdaSpec) for spec in specs.values())
    kv_cache = kv_cache_config(config, specs, layers.values(), 1 << 30)
    attn_groups, support, block_sizes = attn_utils.init_attn_backend(kv_cache, config, CPU)
    assert support.min_cg_support == AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    attn_utils.init_kv_cache(layers, kv_cache, CPU, block_sizes, config, attn_groups=attn_groups[0])

    ids = torch.randint(3, 512, (80,))
    table = torch.arange(1, 1 + len(ids) // BLOCK_SIZE, dtype=torch.int32)[None]
    expected = ReferenceLlama(tiny_llama).logprobs(ids.tolist(), LAMBDA)
    for first, end in ((0, 50), (50, 79), (79, 80)):
        positions, starts = torch.arange(first, end), torch.tensor([0, end - first], dtype=torch.int32)
        slots = table[0, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
        metadata = attn_utils.build_attn_metadata(
            attn_groups,
            num_reqs=1,
            num_tokens=end - first,
            query_start_loc_gpu=starts,
            query_start_loc_cpu=starts,
            max_query_len=end - first,
            seq_lens=torch.tensor([end], dtype=torch.int32),
            max_seq_len=end,
            block_tables=[table],
            slot_mappings=slots[None],
            kv_cache_config=kv_cache,
            positions=positions,
        )
        by_layer = attn_utils.build_slot_mappings_by_layer(slots[None], kv_cache)
        with (
            torch.inference_mode(),
            set_forward_context(metadata, config, num_tokens=end - first, slot_mapping=by_layer),
        ):
            logits = loaded.model.compute_logits(loaded.model(ids[first:end], positions))
        ours = logits.double().log_softmax(-1)
        torch.testing.assert_close(ours, expected[first:end], atol=1e-4, rtol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, kernels are not interpreted")
@pytest.mark.usefixtures("one_rank", "gpu", "host", "stock_cache_update", "one_thread")
def test_model_runner_v2_keeps_the_first_tokens_in_its_block_tables(tiny_llama: Path) -> None:
    """vLLM 0.33 has it take out what a sliding window has left behind."""
    engine = WholeEngine(
        tiny_llama,
        {"attention": {"n_local": 24, "n_global": 5, "distance_ceiling": 30}},
        type("Runner", (LongContextRunner, GPUModelRunner), {}),
        [LongContextScheduler, AsyncLongContextScheduler],
        1,
        max_num_batched_tokens=40,
    )
    with set_current_vllm_config(engine.config):
        engine.add("long", torch.randint(3, 512, (70,)).tolist(), max_tokens=4)
        engine.add("short", torch.randint(3, 512, (20,)).tolist(), max_tokens=4)
        engine.run()
    for name in ("long", "short"):
        engine.check(name, alike(LAMBDA))
    assert engine.is_empty()


def test_a_layer_of_another_backend_is_not_taken_over(loaded: Loaded) -> None:
    next(iter(loaded.layers.values())).impl = SimpleNamespace()
    with pytest.raises(
        LongContextError, match=r"layer model.layers.0.self_attn.attn: vLLM gave it SimpleNamespace"
    ):
        made_layers(loaded.model, loaded.config)
