"""Temp-LoRA through the engine, against the independent replay of `temp_lora_replay`: greedy, float32, no
dropout.
"""

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from vllm import LLM, SamplingParams
from vllm.inputs import tokens_input
from vllm.outputs import RequestOutput

from tests.support.engines import generate, logprobs_of, metric, prompt, running, sidecars, tokens_of
from tests.support.temp_lora_engine import (
    RECIPE,
    STEPPED,
    asked,
    assert_equal,
    assert_follows,
    replayed,
    written_together,
)
from tests.support.temp_lora_replay import Focused, Lambda, Options, replay

SLOTS = 4

# (prompt tokens, tokens written, options): prompts inside and past the window, blocks on and off KV blocks
# and chunk ends.
STEPPED_CASES: list[tuple[int, int, dict[str, Any]]] = [
    (50, 120, {}),
    (300, 60, {}),
    (40, 200, {"kv_policy": "recompute"}),
    (200, 90, {"update_mode": "parallel"}),
    (33, 150, {"train_on_prompt": False}),
    (90, 100, {"block_tokens": 48, "kv_policy": "recompute", "update_mode": "parallel"}),
    (10, 100, {"block_tokens": 20, "rank": 4, "adapter_seed": 3}),
    (1, 80, {"epochs": 3, "learning_rate": 1e-3}),
    (129, 1, {"context_tokens": 95}),
    (260, 33, {"epochs": 0}),
    (90, 80, {"learn": "prompt"}),
    (97, 80, {"learn": "prompt", "kv_policy": "recompute", "update_mode": "parallel"}),
]
KEEP_CASES: list[tuple[int, int, dict[str, Any]]] = [
    (50, 90, {}),
    (300, 40, {}),
    (200, 60, {"update_mode": "parallel"}),
    (33, 70, {"train_on_prompt": False}),
    (1, 40, {"rank": 4}),
    (97, 40, {"learn": "prompt"}),
]

pytestmark = pytest.mark.trainer


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def stepped(tiny_llama: Path, adapters: Path) -> Iterator[LLM]:
    adaptation = {**STEPPED, "slots": SLOTS, "adapters_root": str(adapters), "trainer": {"timeout_s": 20.0}}
    with running(tiny_llama, {"method": "none"}, adaptation=adaptation) as llm:
        yield llm


def test_a_crowd_writes_what_the_replay_writes(stepped: LLM, tiny_llama: Path) -> None:
    """More requests than slots, beside some that do not adapt; then each of these alone, and others alone."""
    others: list[tuple[int, int, dict[str, Any] | None]] = [(30, 60, None), (77, 50, None)]
    outputs = written_together(stepped, [*STEPPED_CASES, *others])
    assert metric(stepped, "vllm:longctx_trainer_restarts") == 0
    for seed, (case, output) in enumerate(zip(STEPPED_CASES, outputs, strict=False)):
        assert_equal(output, replayed(tiny_llama, seed, case, STEPPED))
    plain = {"epochs": 0, "kv_policy": "reuse"}  # no adapter, all inside the window: the model as it is
    for seed, (case, output) in enumerate(
        zip(others, outputs[len(STEPPED_CASES) :], strict=True), len(STEPPED_CASES)
    ):
        expected = replayed(tiny_llama, seed, (case[0], case[1], plain), STEPPED)
        assert list(output.outputs[0].token_ids) == expected.tokens
    alone = generate(stepped, [prompt(50, 0)], 120, **asked({}))[0]
    assert tokens_of(alone) == tokens_of(outputs[0])
    assert metric(stepped, "vllm:longctx_adapter_slots_in_use") == 0
    assert metric(stepped, "vllm:longctx_blocks_trained") > 40


def test_blocks_and_slots_come_back(stepped: LLM) -> None:
    generate(stepped, [prompt(200)], 40, **asked({}))
    assert metric(stepped, "vllm:kv_cache_usage_perc") == 0
    assert metric(stepped, "vllm:longctx_versions_behind") == 0


def test_kv_of_an_adapter_is_found_by_those_with_its_versions_only(stepped: LLM) -> None:
    """The same prompt again, not adapting, by the same recipe, and by another one."""
    text = prompt(96, 5)
    first = generate(stepped, [text], 20)[0]
    learned = generate(stepped, [text], 40, **asked({}))[0]
    again = generate(stepped, [text], 20)[0]
    alike = generate(stepped, [text], 40, **asked({}))[0]
    other = generate(stepped, [text], 40, **asked({"learning_rate": 1e-3}))[0]
    assert tokens_of(first) == tokens_of(again)
    assert tokens_of(learned) == tokens_of(alike)
    assert alike.num_cached_tokens and other.num_cached_tokens == 0


def test_seeds_penalties_and_samples_do_not_depend_on_the_crowd(stepped: LLM) -> None:
    kwargs = {
        "temperature": 1.0,
        "seed": 11,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "n": 2,
        **asked({}),
    }
    alone = generate(stepped, [prompt(70, 3)], 110, **kwargs)[0]
    crowd = generate(stepped, [prompt(70, 3), prompt(150, 4), prompt(20, 5)], 110, **kwargs)[0]
    assert [list(o.token_ids) for o in alone.outputs] == [list(o.token_ids) for o in crowd.outputs]
    assert len({tuple(o.token_ids) for o in alone.outputs}) == 2
    assert all(len(o.token_ids) == 110 for o in alone.outputs)


def test_an_adapter_is_saved_and_gone_on_with(stepped: LLM, tiny_llama: Path, adapters: Path) -> None:
    output = generate(stepped, [prompt(100, 8)], 60, **asked({"save_as": "book"}))[0]
    expected = replay(
        tiny_llama, prompt(100, 8), 60, Options(**{k: v for k, v in STEPPED.items() if k != "dropout"})
    )
    assert list(output.outputs[0].token_ids) == expected.tokens
    saved = load_file(adapters / "book" / "adapter_model.safetensors")
    for module, (a, b) in expected.adapter.items():
        torch.testing.assert_close(saved[f"base_model.model.{module}.lora_A.weight"], a, rtol=0, atol=1e-5)
        torch.testing.assert_close(saved[f"base_model.model.{module}.lora_B.weight"], b, rtol=0, atol=1e-5)
    later = generate(stepped, [prompt(80, 9)], 60, **asked({"start_from": "book"}))[0]
    options = Options(**{k: v for k, v in STEPPED.items() if k != "dropout"}, start_from=adapters / "book")
    assert list(later.outputs[0].token_ids) == replay(tiny_llama, prompt(80, 9), 60, options).tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rank": 9},
            r"longctx.rank = 9 is beyond this server's limit; give at most 8 \(adaptation.max_rank\)",
        ),
        ({"epochs": 99}, r"longctx.epochs = 99 is beyond this server's limit"),
        ({"block_tokens": 4}, r"longctx.block_tokens = 4 .* at least 16 \(adaptation.min_block_tokens\)"),
        ({"context_tokens": 120}, r"adaptation.context_tokens = 120 leaves no room .* give at most 95"),
        (
            {"train_context_tokens": 100},
            r"train_context_tokens \+ .* = 133, but the model was trained on 128 tokens",
        ),
        ({"kv_policy": "keep"}, r"kv_policy = 'keep', but attention.method none takes reuse or recompute"),
        ({"save_as": "../book"}, r"longctx.save_as = '../book'"),
        ({"start_from": "nobody"}, r"start_from = 'nobody': there is no such adapter"),
        ({"blocks": 3}, r"unknown key 'blocks'; did you mean 'block_tokens'\?"),
        ({"rank": "8"}, r"longctx.rank = '8'"),
    ],
)
def test_a_bad_option_is_refused_by_name(stepped: LLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(stepped, [prompt(20)], 5, **asked(options))


def test_what_does_not_adapt_ends_where_the_model_was_trained_to_end(stepped: LLM) -> None:
    for limit in (28, 29, 40):
        written = generate(stepped, [prompt(100)], limit)[0].outputs[0]
        assert len(written.token_ids) == 28 and written.finish_reason == "length"
    with pytest.raises(
        ValueError, match=r"maximum context length is 128 tokens.* this request does not adapt"
    ):
        generate(stepped, [prompt(128)], 1)


def steps_until(llm: LLM, done: Callable[[], bool], seconds: float = 60) -> list[RequestOutput]:
    outputs, deadline = [], time.monotonic() + seconds
    while llm.llm_engine.has_unfinished_requests() and not done():
        outputs += llm.llm_engine.step()
        assert time.monotonic() < deadline
    return outputs


def add(llm: LLM, name: str, length: int, tokens: int, **options: Any) -> None:
    params = SamplingParams(
        max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, **asked(options)
    )
    llm.llm_engine.add_request(name, tokens_input(prompt(length, 1)), params)


@pytest.mark.parametrize("fault", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_trainer_that_dies_or_hangs_costs_no_token(stepped: LLM, fault: signal.Signals) -> None:
    restarts = metric(stepped, "vllm:longctx_trainer_restarts")
    seen: list[RequestOutput] = []
    for number in range(SLOTS + 1):
        add(stepped, f"{fault}-{number}", 40 + number, 150)  # other texts: one text is trained once for all
    trained = metric(stepped, "vllm:longctx_blocks_trained")
    seen += steps_until(stepped, lambda: metric(stepped, "vllm:longctx_blocks_trained") > trained + 2)
    (sidecar,) = sidecars()
    sidecar.send_signal(fault)
    seen += steps_until(stepped, lambda: False, 120)
    finished = [o for o in seen if o.finished]
    assert len(finished) == SLOTS + 1
    assert all(
        len(o.outputs[0].token_ids) == 150 and o.outputs[0].finish_reason == "length" for o in finished
    )
    assert metric(stepped, "vllm:longctx_trainer_restarts") == restarts + 1
    assert metric(stepped, "vllm:longctx_adapter_slots_in_use") == 0
    assert metric(stepped, "vllm:kv_cache_usage_perc") == 0


def test_a_request_that_leaves_while_it_is_held_gives_everything_back(stepped: LLM) -> None:
    (sidecar,) = sidecars()
    sidecar.suspend()
    add(stepped, "leaves", 40, 100)
    add(stepped, "stays", 20, 40)
    steps_until(stepped, lambda: metric(stepped, "vllm:longctx_num_requests_held") == 2)
    idle = metric(stepped, "vllm:longctx_idle_steps")
    time.sleep(3)  # an engine that spins takes many steps meanwhile, and its output waits to be read
    stepped.llm_engine.abort_request(["leaves"])
    steps_until(stepped, lambda: metric(stepped, "vllm:longctx_num_requests_held") == 1)
    assert metric(stepped, "vllm:longctx_idle_steps") - idle <= 6
    sidecar.resume()
    (output,) = (o for o in steps_until(stepped, lambda: False) if o.finished)
    assert len(output.outputs[0].token_ids) == 40
    assert metric(stepped, "vllm:longctx_adapter_slots_in_use") == 0
    assert metric(stepped, "vllm:kv_cache_usage_perc") == 0


def test_a_recipe_that_diverges_never_reaches_a_slot(stepped: LLM) -> None:
    output = generate(stepped, [prompt(60)], 100, **asked({"learning_rate": 1.0, "epochs": 8}))[0]
    assert len(output.outputs[0].token_ids) == 100
    assert logprobs_of(output).isfinite().all()


def test_over_lambda_attention_in_a_full_pool_and_shut_down_while_held_and_saving(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """24 blocks, of which a request may hold 8: those that do not adapt are preempted, those that adapt are
    not.
    """
    attention = {"method": "lm_infinite", "n_global": 10, "n_local": 64, "distance_ceiling": 64}
    of_others = sidecars()
    adaptation = {**RECIPE, "slots": 2, "adapters_root": str(tmp_path / "adapters")}
    with running(tiny_llama, attention, adaptation, num_gpu_blocks_override=24) as llm:
        others: list[tuple[int, int, dict[str, Any] | None]] = [(10, 200, None)] * 6
        outputs = written_together(llm, [*others, *KEEP_CASES])
        assert metric(llm, "vllm:num_preemptions") > 0
        base = keeps(Lambda(10, 64, 64))
        for seed, (case, output) in enumerate(
            zip(KEEP_CASES, outputs[len(others) :], strict=True), len(others)
        ):
            assert_equal(output, replayed(tiny_llama, seed, case, base))
        for seed, output in enumerate(outputs[: len(others)]):
            assert tokens_of(generate(llm, [prompt(10, seed)], 200)[0]) == tokens_of(output)
        (sidecar,) = (p for p in sidecars() if p not in of_others)
        sidecar.suspend()
        add(llm, "held", 40, 100)
        add(llm, "saves", 10, 3, save_as="book")
        waiting = "vllm:longctx_num_requests_held", "vllm:longctx_num_requests_saving"
        steps_until(llm, lambda: [metric(llm, name) for name in waiting] == [1, 1])
    assert not psutil.wait_procs([sidecar], timeout=20)[1]


def keeps(seen: Lambda | Focused) -> dict[str, Any]:
    return {**RECIPE, "kv_policy": "keep", "attention": seen}


def in_a_crowd(
    llm: LLM, others: list[tuple[int, int, dict[str, Any] | None]]
) -> Iterator[list[RequestOutput]]:
    """What KEEP_CASES write greedily, then sampled. Beside others, which write what they write alone."""
    for sampling in ({}, {"temperature": 1.0, "seed": 11}):
        outputs = written_together(llm, [*others, *KEEP_CASES], **sampling)
        for seed, (length, tokens, _) in enumerate(others):
            alone = generate(llm, [prompt(length, seed)], tokens, **sampling)[0]
            assert tokens_of(alone) == tokens_of(outputs[seed])
        assert metric(llm, "vllm:kv_cache_usage_perc") == 0
        yield outputs[len(others) :]


def assert_all_follow(outputs: list[RequestOutput], model: Path, seen: Lambda | Focused) -> None:
    for (_, _, options), output in zip(KEEP_CASES, outputs, strict=True):
        assert_follows(output, model, {**keeps(seen), **options})


@pytest.mark.slow
def test_over_the_top_k_branch(tiny_llama: Path) -> None:
    """Keys of the middle stay as the version computed them that was due. In a pool in which those that do not
    adapt are preempted.
    """
    section = {"n_global": 5, "n_local": 50, "top_k": 3, "top_k_from_layer": 1, "top_k_insert_at": 40}
    adaptation = {**RECIPE, "slots": 2, "trainer": {"timeout_s": 20.0}}
    seen = Lambda(5, 50, 128, top_k=3, top_k_from_layer=1, top_k_insert_at=40)
    others: list[tuple[int, int, dict[str, Any] | None]] = [(10, 150, None)] * 4
    small = {"num_gpu_blocks_override": 60, "max_model_len": 600}
    with running(tiny_llama, section, adaptation, **small) as llm:
        greedy, sampled = in_a_crowd(llm, others)
        assert metric(llm, "vllm:num_preemptions") > 0
    for seed, (case, output) in enumerate(zip(KEEP_CASES, greedy, strict=True), len(others)):
        assert_equal(output, replayed(tiny_llama, seed, case, keeps(seen)))
    assert_all_follow(sampled, tiny_llama, seen)


FOCUSED_SECTION = {
    "method": "focused",
    "mem_layers": [1],
    "mem_dtype": "float32",
    "n_local": 64,
    "last_context_length": 32,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "top_k"),
    [
        ({}, None),
        ({"lookup": "top_k", "top_k": 5}, 5),
        ({"lookup": "blocks", "top_k": 5}, 5),  # fewer blocks than are always read
        ({"memory_limit_gib": 0.0005}, None),
        ({"mem_layers": [], "mem_dtype": None}, None),
    ],
    ids=["all", "top_k", "blocks", "memory_apart", "no_memory"],
)
def test_over_a_memory(tiny_llama: Path, more: dict[str, Any], top_k: int | None) -> None:
    """Keys of closed windows stay as the version computed them that was due. In a pool in which those that do
    not adapt are preempted.
    """
    adaptation = {**RECIPE, "slots": 2, "trainer": {"timeout_s": 20.0}}
    others: list[tuple[int, int, dict[str, Any] | None]] = [(10, 150, None)] * 4
    small = {"num_gpu_blocks_override": 45, "max_model_len": 600}
    section = {**FOCUSED_SECTION, **more}
    seen = Focused(64, 32, tuple(section["mem_layers"]), top_k)
    with running(tiny_llama, section, adaptation, **small) as llm:
        for outputs in in_a_crowd(llm, others):
            assert_all_follow(outputs, tiny_llama, seen)
        # Windows alone leave room for all.
        assert not section["mem_layers"] or metric(llm, "vllm:num_preemptions") > 0
