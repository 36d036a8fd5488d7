"""Who gets a step's tokens: our schedulers over vLLM's, one step at a time, with a worker that computes
nothing.
"""

from collections import deque
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from tests.support.engine_args import create
from tests.support.scheduler_steps import BUDGET, Steps
from vllm_longctx.engine.sliding_kv import LambdaSpec
from vllm_longctx.geometry import Geometry
from vllm_longctx.scheduling import temp_lora as temp_lora
from vllm_longctx.scheduling.scheduler import AsyncLongContextScheduler, shares_of

LONG = 200_000
FOCUSED = {
    "attention": {
        "method": "focused",
        "mem_layers": [1],
        "n_local": 4096,
        "last_context_length": 64,
        "allow_beyond_trained": True,
    }
}
TOP_K = {"attention": {"top_k": 3}}


KINDS = pytest.mark.parametrize("section", [None, FOCUSED, TOP_K], ids=["lambda", "focused", "top_k"])
AHEAD = pytest.mark.parametrize("steps_ahead", [0, 1])


@KINDS
@AHEAD
def test_a_short_request_does_not_wait_for_a_long_prompt(
    section: dict[str, Any] | None, steps_ahead: int
) -> None:
    """Before: 196 steps, all of the long prompt's."""
    core = Steps(section, steps_ahead)
    core.ask("long", LONG)
    core.steps(3)
    core.ask("short", 32)
    first = next(step for step in core.steps(2 + steps_ahead) if "short" in step)
    assert first["short"] == (31 if section is TOP_K else 32)
    assert first["long"] >= BUDGET - 33


@KINDS
@AHEAD
def test_a_stream_gets_a_token_in_every_step(section: dict[str, Any] | None, steps_ahead: int) -> None:
    """Whoever came first: the long prompt stands before the stream in vLLM's list when it came first."""
    core = Steps(section, steps_ahead)
    core.ask("long", LONG)
    core.steps(2)
    core.ask("stream", 32)
    core.steps(6)
    for step in core.steps(100):
        assert step["stream"] == 1
        assert step["long"] >= BUDGET - 1 or section is FOCUSED  # whose steps end with windows


@pytest.mark.parametrize("section", [None, TOP_K], ids=["lambda", "top_k"])
@AHEAD
def test_long_prompts_share(section: dict[str, Any] | None, steps_ahead: int) -> None:
    core = Steps(section, steps_ahead)
    for number in range(3):
        core.ask(f"{number}", LONG)
        core.steps(5)
    read = {name: sum(step[name] for step in core.steps(20)) for name in core.requests}
    assert len(set(read.values())) == 1
    assert sum(read.values()) >= 20 * (BUDGET - 2)


def test_alone_a_long_prompt_has_the_whole_step() -> None:
    core = Steps()
    core.ask("long", 10 * BUDGET)
    assert core.steps(10) == [{"long": BUDGET}] * 10
    assert core.steps(5) == [{"long": 1}] * 5


def test_a_full_house_costs_a_long_prompt_no_token() -> None:
    """No seat is free, so nobody who waits can come in."""
    core = Steps(max_num_seqs=2)
    core.ask("long", LONG)
    core.ask("stream", 32)
    core.steps(3)
    core.ask("waiting", 5000)
    assert core.steps(10) == [{"long": BUDGET - 1, "stream": 1}] * 10


def test_who_finds_no_room_costs_a_long_prompt_one_token() -> None:
    """The pool is full: a place in the step is kept, so that who waits comes in as soon as there is room."""
    section = {"attention": {"n_local": 64, "n_global": 0}}
    core = Steps(section, num_blocks=40)  # one long request may hold 35
    core.ask("long", 20 * BUDGET, max_tokens=1)
    core.steps(2)
    core.ask("waiting", LONG)
    core.steps(1)
    for step in core.steps(16):
        assert step["long"] >= BUDGET - 1
        assert "waiting" not in step
    assert any("waiting" in step for step in core.steps(5))


def test_turns_that_a_client_names_itself_are_not_read() -> None:
    """The front end sets them, beside `drop` only. Else they may be anything."""
    core = Steps({"attention": {"n_local": 64, "max_n_global": 16}})
    given = {"longctx": {"n_global": 12}, "longctx_turns": 5}
    core.scheduler.add_request(core.make("odd", [5] * 200, given, max_tokens=5))
    assert core.steps(1) == [{"odd": 200}]


def test_several_short_requests_come_in_at_once() -> None:
    core = Steps()
    core.ask("long", LONG)
    core.steps(2)
    for number in range(6):
        core.ask(f"{number}", 20)
    (step,) = core.steps(1)
    assert step == {"long": BUDGET - 120, **{f"{n}": 20 for n in range(6)}}


@AHEAD
def test_who_waits_for_the_trainer_has_no_share(steps_ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that learn are held until a block is trained, here for ever; up to then they share like any
    other.
    """
    monkeypatch.setattr(temp_lora, "limit_reader_sleep", lambda **kwargs: None)
    monkeypatch.setattr(temp_lora, "trainer_client", lambda *args: MagicMock(poll=lambda: [], slots=None))
    section = {
        "adaptation": {"rank": 4, "block_tokens": 200, "min_block_tokens": 16, "train_context_tokens": 0}
    }
    core = Steps(section, steps_ahead)
    core.ask("plain", LONG)
    core.ask("learns", LONG, options={"temp_lora": True})
    core.ask("other learns", LONG, options={"temp_lora": True})
    steps = core.steps(20)
    assert {step.get("learns") for step in steps} == {200, None}
    assert steps[-10:] == [{"plain": BUDGET}] * 10
    core.ask("short", 32)
    assert any(step.get("short") == 32 for step in core.steps(2 + steps_ahead))


def test_the_users_own_threshold_stays() -> None:
    core = Steps(long_prefill_token_threshold=BUDGET)
    core.ask("long", LONG)
    core.steps(2)
    core.ask("short", 32)
    assert core.steps(5) == [{"long": BUDGET}] * 5  # as stock vLLM
    core = Steps(long_prefill_token_threshold=100)
    core.ask("long", LONG)
    core.ask("other", LONG)
    assert core.steps(5) == [{"long": 100, "other": 100}] * 5


def test_urgent_requests_come_first() -> None:
    """Under vLLM's priority policy a share is one among equals; whoever is less urgent gets what they leave,
    but goes on.
    """
    core = Steps(scheduling_policy="priority")
    core.ask("later", LONG, priority=5)
    core.ask("stream", 20, priority=5)
    core.steps(3)
    core.ask("urgent", LONG, priority=0)
    assert core.steps(4)[1:] == [{"later": 1, "stream": 1, "urgent": BUDGET - 2}] * 3
    core.ask("urgent as well", LONG, priority=0)
    assert core.steps(4)[1:] == [{"later": 1, "stream": 1, "urgent": 511, "urgent as well": 511}] * 3


def test_of_many_long_prompts_those_that_came_first_go_on() -> None:
    """In equal parts of a step their chunks would be so small that each token costs more; nobody stands
    still.
    """
    core = Steps(max_num_seqs=32)
    for number in range(20):
        core.ask(f"{number}", LONG)
    core.steps(3)
    for step in core.steps(5):
        assert len(step) == 20 and sum(step.values()) == BUDGET
        assert [step[f"{n}"] for n in range(3)] == [257] * 3
    core.ask("short", 32)
    (step,) = core.steps(1)
    assert step["short"] == 32


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 3000), max_size=12), st.integers(0, 2000), st.integers(0, 300))
def test_shares_are_the_largest_that_fit(demands: list[int], budget: int, least: int) -> None:
    wanted = {f"{number}": wants for number, wants in enumerate(demands)}
    shares = shares_of(wanted, budget, least)
    assert sum(shares.values()) <= budget and shares.keys() == wanted.keys()
    assert all(0 <= shares[name] <= wants for name, wants in wanted.items())
    unmet = [name for name, wants in wanted.items() if shares[name] < wants]
    if not unmet:
        return
    assert sum(shares.values()) > budget - len(wanted) or min(shares[name] for name in unmet) == least
    largest = max(shares.values())
    if all(shares[name] == largest for name in unmet):
        assert largest >= least or len(unmet) == 1 or budget == 0
    else:  # too many: of those that want the least that a share is, or more, the first get it
        full = [name for name in wanted if wanted[name] >= least]
        assert [shares[name] for name in full] == sorted((shares[name] for name in full), reverse=True)


def test_a_step_ahead_of_the_device_no_block_it_reads_is_freed(gpu: type) -> None:
    """The async scheduler through a prompt past the window and decodes: at each time two steps are in
    flight.
    """
    n_local, prompt, new = 64, 500, 40
    attention = {"n_local": n_local, "n_global": 16}
    vllm_config = create(
        additional_config={"longctx": {"attention": attention}},
        max_num_batched_tokens=96,
        num_gpu_blocks_override=20,
        enable_prefix_caching=False,
    )
    vllm_config.cache_config.num_gpu_blocks = 20
    full = FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=8, dtype=torch.float32)
    spec = LambdaSpec.from_attention_spec(full, Geometry(16, n_local, n_local))
    scheduler = AsyncLongContextScheduler(
        vllm_config,
        KVCacheConfig(20, [], [KVCacheGroupSpec(["layer"], spec)]),
        MagicMock(),
        32,
        log_stats=True,
    )
    request = Request("r", [1] * prompt, SamplingParams(max_tokens=new, ignore_eos=True), None)
    scheduler.add_request(request)
    in_flight: deque[tuple[SchedulerOutput, list[int]]] = deque()
    held, freed = [], 0
    while scheduler.requests:
        first = request.num_computed_tokens
        if (step := scheduler.schedule()).total_num_scheduled_tokens:
            table = scheduler.kv_cache_manager.coordinator.single_type_managers[0].req_to_blocks["r"]
            end = first + step.num_scheduled_tokens["r"]
            seen = {0, *range(max(first - n_local + 1, 0) // 32, (end - 1) // 32 + 1)}
            in_flight.append((step, [7] if end >= prompt else []))
            assert not any(table[block].is_null for block in seen)
            held.append(sum(not block.is_null for block in table))
        if len(in_flight) == 2 or not step.total_num_scheduled_tokens:
            done, sampled = in_flight.popleft()
            outputs = scheduler.update_from_output(done, ModelRunnerOutput(["r"], {"r": 0}, [sampled]))
            freed += sum(
                o.scheduler_stats.kv_connector_stats["longctx"]["freed_blocks"] for o in outputs.values()
            )
    assert request.num_output_tokens == new
    assert max(held) <= spec.max_admission_blocks_per_request(vllm_config.max_in_flight_tokens, 1 << 20)
    assert held[-1] <= 1 + n_local // 32 + 2
    assert freed >= (prompt + new - n_local) // 32 - 2
