"""Memory layers and stepped windows of the GPU engine, run as the Model Runner V2 runs them, but interpreted
on CPU tensors.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import Request, RequestStatus
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from tests.support.cuda_engine import Engine as WholeEngine
from tests.support.cuda_engine import text
from tests.support.reference_model import focused
from tests.support.window_layers import BLOCK_SIZE, FOCUSED, LOOKUPS, Engine, configure
from vllm_longctx.cli.doctor import decode_graphs
from vllm_longctx.config import LongContextError
from vllm_longctx.cuda.kernels.lookup import WORKSPACE, Summaries
from vllm_longctx.cuda.memory import MemoryBackend, close_window, pool_beside_lookups
from vllm_longctx.cuda.memory_runner import MemoryRunner
from vllm_longctx.cuda.rows import StepRows
from vllm_longctx.engine.lookup import ClosedWindow
from vllm_longctx.geometry import SteppedWindows
from vllm_longctx.rotary import Rotary, inverse_frequencies
from vllm_longctx.scheduling.memory import AsyncMemoryScheduler, MemoryScheduler
from vllm_longctx.settings import Lookup, active_settings


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, kernels are not interpreted")
@pytest.mark.usefixtures("gpu", "stock_cache_update", "one_thread", "sorted_by_numpy")
@pytest.mark.parametrize(
    ("attention", "scores"),
    [*((a, {}) for a in LOOKUPS), (LOOKUPS[1], {"soft_cap": 2.0, "sinks": torch.tensor([1.0, -3.0])})],
    ids=["all", "top_k", "blocks", "top_k, soft cap and sinks"],
)
def test_windows_become_memory(
    attention: dict[str, Any], scores: dict[str, Any], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts of different lengths in chunks, one beside the other's decodes; both write past their last
    window.
    """
    config = configure(tiny, attention, block_size=BLOCK_SIZE, dtype="float32", max_num_batched_tokens=64)
    engine = Engine(config, monkeypatch, {"a": 31, "b": 9}, 45, **scores)
    assert engine.support.min_cg_support == AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    # Windows of a begin at 0, 12, 20, 32; those of b at 0, 12.
    steps = [{"a": 12}, {"b": 9, "a": 8}, *[{"b": 1, "a": n} for n in (11, 1, 1, 1)]]
    for tokens in steps:
        padding = 1 if max(tokens.values()) == 1 else 0  # decodes are replayed, with a row without a request
        for name, outputs in engine.step(tokens, padding).items():
            for layer, output in enumerate(outputs):
                expected, margin = engine.expected(name, tokens[name], layer, attention.get("top_k"))
                assert margin > 1e-5
                torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
    assert engine.open == {"a": 32, "b": 12}
    if "lookup" not in attention:  # a CUDA graph of decodes replays over what each step writes in place
        (builder,) = [
            group.get_metadata_builder()
            for n, (group,) in enumerate(engine.attn_groups)
            if n != engine.memory_group
        ]
        names = ("block_table_tensor", "seq_lens", "query_start_loc")
        m: Any = SimpleNamespace(
            num_reqs=2,
            num_actual_tokens=2,
            max_query_len=1,
            query_start_loc_cpu=torch.arange(3),
            **{n: torch.zeros(3) for n in names},
        )
        assert builder.build(0, m).num_decodes == 2
        assert builder.build(0, m).starts.data_ptr() == engine.runner.rows.starts.data_ptr()
        assert engine.runner.rows.starts.tolist() == [12, 32, 0, 0]
    if attention.get("lookup") != "blocks":
        return
    layer = engine.layers[1].attn
    kept, keys = layer.impl.summaries, layer.impl._caches(layer.kv_cache)[0]
    for row, closed in enumerate(engine.open.values()):
        filled = (closed - torch.arange(0, closed, BLOCK_SIZE)).clamp_max(BLOCK_SIZE)
        blocks = engine.tables[engine.memory_group][row, : len(filled)].long()
        anew = Summaries.like(keys)
        anew.summarise(keys, blocks, filled)
        assert anew.steps[blocks].all()
        assert torch.equal(kept.codes[blocks], anew.codes[blocks]) and torch.equal(
            kept.steps[blocks], anew.steps[blocks]
        )


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, kernels are not interpreted")
@pytest.mark.usefixtures("one_rank", "gpu", "host", "stock_cache_update", "one_thread")
def test_windows_end_with_a_step_under_way(small_llama: Path) -> None:
    """So it is preempted, too; found in the prefix cache by the step behind; a request ends whose next step
    is computed.
    """
    windows, attention = SteppedWindows(16, 11), LOOKUPS[2]
    section = {"attention": {**FOCUSED, "n_local": windows.tokens, **attention}}
    pool = {"num_gpu_blocks_override": 12, "max_num_batched_tokens": 40, "max_model_len": 80}
    engine = WholeEngine(
        small_llama, section, MemoryRunner, [MemoryScheduler, AsyncMemoryScheduler], 1, **pool
    )
    seen = {}

    def add(name: str, prompt: list[int], new: int, **params: Any) -> Request:
        seen[name] = focused(windows, len(prompt), [1], best=attention["top_k"])
        return engine.add(name, prompt, max_tokens=new, **params)

    with set_current_vllm_config(engine.config):
        first = add("first", text(40), 9)
        engine.step()
        engine.step()
        add("again", [*first.prompt_token_ids], 4, prompt_logprobs=None)
        add("one", text(5), 1)
        other = add("other", text(9), 16)
        while engine.scheduler.has_requests() or engine.under_way:
            engine.step()
            if first.num_output_tokens == 5 and "ends" not in seen:
                stop = first.output_token_ids[3]
                ends = add("ends", [*first.prompt_token_ids], 9, stop_token_ids=[stop], prompt_logprobs=None)
    assert engine.stale == {"other", "ends"} and other.num_preemptions
    assert engine.in_vain == {"ends"} and ends.status == RequestStatus.FINISHED_STOPPED
    assert [engine.outputs[name][0].prefill_stats.num_cached_tokens for name in ("again", "ends")] == [
        BLOCK_SIZE
    ] * 2
    for name, layers in seen.items():
        engine.check(name, layers)
    assert engine.is_empty()


@pytest.mark.parametrize("steps_ahead", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, kernels are not interpreted")
@pytest.mark.usefixtures("one_rank", "gpu", "host", "stock_cache_update", "one_thread")
def test_a_first_window_is_shared_while_it_is_open(steps_ahead: int, small_llama: Path) -> None:
    """Who is hit in it has copies of the memory layers' blocks: both requests close that window, in place."""
    windows, attention = SteppedWindows(32, 24), LOOKUPS[2]
    section = {
        "attention": {
            **FOCUSED,
            "n_local": windows.tokens,
            "last_context_length": windows.last_tokens,
            **attention,
        }
    }
    sizes = {"num_gpu_blocks_override": 40, "max_num_batched_tokens": 40, "max_model_len": 80}
    schedulers = [MemoryScheduler, AsyncMemoryScheduler]
    engine = WholeEngine(small_llama, section, MemoryRunner, schedulers, steps_ahead, **sizes)
    with set_current_vllm_config(engine.config):
        first = engine.add("first", text(20), max_tokens=16)
        while first.num_output_tokens < 8:
            engine.step()
        beginning = list(first.all_token_ids)[:27]
        engine.add("turn", [*beginning, *text(25)], max_tokens=5, prompt_logprobs=None)
        engine.add("again", beginning[:20], max_tokens=15, prompt_logprobs=None)
        while engine.scheduler.has_requests() or engine.under_way:
            engine.step()
    assert [engine.outputs[name][0].prefill_stats.num_cached_tokens for name in ("turn", "again")] == [
        BLOCK_SIZE
    ] * 2
    for name, request in engine.requests.items():
        engine.check(name, focused(windows, request.num_prompt_tokens, [1], best=attention["top_k"]))
    assert engine.is_empty()


@pytest.mark.parametrize(
    ("mem_dtype", "turned"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)]
)
def test_a_closed_window_is_turned_back_and_rounded(mem_dtype: torch.dtype, turned: bool) -> None:
    """From inside a block on, and nothing else changes; a layer without positions is rounded only."""
    rotary = Rotary(16, 16, True, inverse_frequencies(16, {}))
    cache = (
        torch.randn(6, 2, BLOCK_SIZE, 32).transpose(1, 2).contiguous().transpose(1, 2)
    )  # heads inside tokens, as vLLM may
    blocks, start, end, origin = torch.tensor([4, 1, 3], dtype=torch.int32), 21, 50, 18
    keys, values = torch.randn(2, end - start, 2, 16)
    flat = torch.arange(start, end) - start // BLOCK_SIZE * BLOCK_SIZE
    where = blocks.long()[flat // BLOCK_SIZE], slice(None), flat % BLOCK_SIZE
    by = torch.arange(start - origin, end - origin)[:, None]
    cache[where] = torch.cat((rotary.turn(keys, by) if turned else keys, values), -1)
    expected = cache.clone()
    expected[where] = torch.cat((keys, values), -1).to(mem_dtype).float()
    close_window(cache, ClosedWindow(origin, start, end, blocks), rotary if turned else None, mem_dtype)
    tolerance = (
        1e-5 if mem_dtype == torch.float32 else 2**-8
    )  # turning back errs by float32's last bits, which may round on
    torch.testing.assert_close(cache, expected, atol=1e-5, rtol=tolerance)
    untouched = torch.ones(6, BLOCK_SIZE, dtype=torch.bool)
    untouched[where[0], where[2]] = False
    assert torch.equal(cache.transpose(1, 2)[untouched], expected.transpose(1, 2)[untouched])


def test_the_pool_leaves_room_for_lookups() -> None:
    total = 60 << 30
    assert pool_beside_lookups(total, None, 2) == total
    assert pool_beside_lookups(total, Lookup(64, None), 2) == total - 4 * 8 * WORKSPACE
    pool = pool_beside_lookups(total, Lookup(64, 0.1), 2)
    block = 2 * 2 * 8 * 32 * 128  # bytes of a bfloat16 block of 32 tokens, 8 KV heads of 128
    summaries = pool // block * (8 * 32 * 128 + 4 * 8)
    assert 0.98 * total < pool + summaries + 4 * 8 * WORKSPACE <= total


def test_vllms_own_warm_up_steps_have_no_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    runner: Any = MemoryRunner.__new__(MemoryRunner)
    runner.model_state = SimpleNamespace(window_positions=torch.full((4,), 7))
    runner.rows, runner.device = StepRows(4, torch.device("cpu")), torch.device("cpu")
    runner.rows.starts.fill_(1)
    monkeypatch.setattr(GPUModelRunner, "prepare_inputs", lambda self, output, batch: batch)
    batch = SimpleNamespace(
        req_ids=["warm"],
        positions=torch.arange(5, 8),
        num_tokens=2,
        num_tokens_after_padding=3,
        num_scheduled_tokens=np.array([2]),
    )
    runner.prepare_inputs(SimpleNamespace(), batch)
    assert runner.model_state.window_positions.tolist() == [5, 6, 0, 7]
    assert runner.rows.starts.tolist() == [0, 0, 0, 0]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("attention", "kwargs", "v2", "message"),
    [
        (
            {},
            {"kv_cache_dtype": "fp8"},
            True,
            "not run on CUDA with this setting: kv_cache_dtype = 'fp8'; leave it at 'auto'",
        ),
        (
            {},
            {"ubatch_size": 2, "all2all_backend": "deepep_low_latency"},
            True,
            "with this setting: microbatches are on; leave enable_dbo and ubatch_size out",
        ),
        (
            {},
            {},
            False,
            "with this setting: the Model Runner V1 is chosen; leave VLLM_USE_V2_MODEL_RUNNER out",
        ),
        (
            LOOKUPS[1],
            {"block_size": 48},
            True,
            "setting: block_size = 48; with attention.lookup give a power of two",
        ),
    ],
)
def test_what_focused_cannot_do_on_cuda_is_refused(
    attention: dict[str, Any],
    kwargs: dict[str, Any],
    v2: bool,
    message: str,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(v2)))
    with pytest.raises(LongContextError, match=message):
        configure(tiny, attention, **kwargs)


@pytest.mark.usefixtures("gpu")
def test_graphs_hold_lookups_that_are_not_too_large(tiny: Path) -> None:
    """The metadata builder says so to vLLM, and doctor to users."""
    larger = {"lookup": "top_k", "top_k": 1025}
    for attention, support, shown in (
        *((attention, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, "full") for attention in LOOKUPS),
        (larger, AttentionCGSupport.NEVER, "of attention.top_k = 1025; lower it"),
    ):
        config = configure(tiny, attention)
        settings = active_settings(config)
        assert decode_graphs(config, settings).endswith(shown)
        builder = MemoryBackend.for_settings(settings).get_builder_cls()
        spec = FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=16, dtype=torch.float32)
        assert builder.get_cudagraph_support(config, spec) == support


@pytest.mark.usefixtures("gpu")
def test_engine_arguments_of_focused_on_cuda(tiny: Path) -> None:
    config = configure(tiny, LOOKUPS[0], block_size=48)
    assert config.use_v2_model_runner and config.scheduler_config.async_scheduling
    assert config.scheduler_config.get_scheduler_cls() is AsyncMemoryScheduler
    config = configure(tiny, LOOKUPS[0], async_scheduling=False)
    assert (
        config.scheduler_config.get_scheduler_cls() is MemoryScheduler and config.max_concurrent_batches == 1
    )
