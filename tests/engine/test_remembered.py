"""What was learned is remembered: a text that begins like an earlier one says what it says in an engine that
remembers nothing of it, and is not trained again.

Cold runs have a `cache_salt` of their own. Greedy and seeded, float32, with dropout.
"""

import functools
import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.outputs import RequestOutput
from vllm.v1.core.kv_cache_utils import hash_block_tokens

from tests.support.engines import logprobs_of, metric, prompt, running_here, sidecars, wait_until
from tests.support.temp_lora_engine import RECIPE, STEPPED
from vllm_longctx.scheduling import request_pass

TRAINED, REMEMBERED = "vllm:longctx_blocks_trained", "vllm:longctx_blocks_remembered"
COMPUTED = "vllm:longctx_adapted_tokens"
MORE = {"dropout": 0.1, "slots": 4, "cache_gib": 0.25}
TEXT = prompt(230, 17)
# With windows of 128 tokens of which 64 are computed again, passes of `reuse` begin at these positions, and
# first compute the text's first token in place of another one. KV blocks are counted from there.
PASSES = {0: 0, 128: 63, 191: 95, 223: 127}
KV_BLOCK = 32
LENGTHS = (230, 225, 224, 223, 192, 191, 129, 128, 20)
STEPPED_MODES = [
    {"kv_policy": policy, "update_mode": mode}
    for policy in ("reuse", "recompute")
    for mode in ("cascaded", "parallel")
]

pytestmark = pytest.mark.trainer


@dataclass(frozen=True)
class Case:
    """A prompt, and what is asked for it."""

    prompt: list[int]
    options: dict[str, Any]
    params: dict[str, Any]


def changed(at: int) -> list[int]:
    return [*TEXT[:at], TEXT[at] ^ 1, *TEXT[at + 1 :]]


def cases(options: dict[str, Any]) -> list[Case]:
    """Prompts that end at every kind of boundary, and some that differ in one token."""
    prompts = [TEXT[:length] for length in LENGTHS]
    prompts += [changed(at) for at in (224, 223, 130, 40)] + [[*TEXT, *prompt(20, 3)]]
    greedy = [Case(p, options, {"temperature": 0}) for p in prompts]
    seeded = {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.1}
    scored = {"temperature": 0, "prompt_logprobs": 0}
    return [*greedy, Case(TEXT, options, seeded), Case(TEXT, options, scored)]


salts = itertools.count()


def write(llm: LLM, cases: list[Case], cold: bool, tokens: int = 20) -> list[RequestOutput]:
    """All at once. cold: nothing that any other request has learned is used."""
    prompts: list[Any] = [
        {"prompt_token_ids": case.prompt} | ({"cache_salt": f"{next(salts)}"} if cold else {})
        for case in cases
    ]
    usual = {"max_tokens": tokens, "logprobs": 0, "ignore_eos": True, "detokenize": False}
    params = [
        SamplingParams(**usual, **case.params, extra_args={"longctx": {"temp_lora": True, **case.options}})
        for case in cases
    ]
    return llm.generate(prompts, params, use_tqdm=False)


def assert_equal(one: RequestOutput, other: RequestOutput) -> None:
    assert one.outputs[0].token_ids == other.outputs[0].token_ids
    torch.testing.assert_close(logprobs_of(one), logprobs_of(other), rtol=0, atol=1e-5)


def versions_of(case: Case, output: RequestOutput) -> int:
    """The version that computed the last token which was computed."""
    blocks = (len(case.prompt) + len(output.outputs[0].token_ids) - 2) // 32
    return blocks - (case.options.get("update_mode") == "parallel")


@pytest.fixture(scope="module")
def stepped(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    adaptation = {**STEPPED, **MORE, "adapters_root": str(tmp_path_factory.mktemp("adapters"))}
    with running_here(tiny_llama, {"method": "none"}, adaptation) as llm:
        yield llm


@pytest.mark.parametrize(
    "options",
    [pytest.param(o, marks=[pytest.mark.slow] * (o["update_mode"] == "parallel")) for o in STEPPED_MODES],
    ids=lambda options: "-".join(options.values()),
)
def test_stepped_windows_say_what_they_say_when_they_learn_it_anew(
    stepped: LLM, options: dict[str, Any]
) -> None:
    """The text is read once. What follows begins inside of its last pass, and learns only what is new."""
    asked = cases(options)
    write(stepped, [Case(TEXT, options, {"temperature": 0})], cold=False, tokens=30)
    trained, remembered = metric(stepped, TRAINED), metric(stepped, REMEMBERED)
    warm = write(stepped, asked, cold=False)
    trained, remembered = metric(stepped, TRAINED) - trained, metric(stepped, REMEMBERED) - remembered
    needed = sum(map(versions_of, asked, warm))
    if options["update_mode"] == "cascaded":  # else more may be trained than anything is computed with
        assert trained + remembered == needed
    assert trained < needed / 3
    before = metric(stepped, TRAINED)
    cold = write(stepped, asked, cold=True)
    assert metric(stepped, TRAINED) - before >= needed
    for case, one, other in zip(asked, warm, cold, strict=True):
        assert_equal(one, other)
        assert other.num_cached_tokens == 0
        same = next((i for i, (a, b) in enumerate(zip(case.prompt, TEXT, strict=False)) if a != b), 1 << 30)
        if options == STEPPED_MODES[0] and "prompt_logprobs" not in case.params:
            last = min(same, len(case.prompt) - 1)
            first = max(first for at, first in PASSES.items() if at <= last)
            assert one.num_cached_tokens == first + (last - first) // KV_BLOCK * KV_BLOCK
    assert warm[-1].num_cached_tokens == 0, "a prompt that is scored is computed from its first token on"


def test_other_recipes_share_nothing(stepped: LLM) -> None:
    case = Case(TEXT[:100], {}, {"temperature": 0})
    write(stepped, [case], cold=False)
    for options in ({"adapter_seed": 7}, {"learning_rate": 3e-3}, {"rank": 4}, {"epochs": 1}):
        remembered = metric(stepped, REMEMBERED)
        write(stepped, [Case(TEXT[:100], options, {"temperature": 0})], cold=False)
        assert metric(stepped, REMEMBERED) == remembered
    remembered = metric(stepped, REMEMBERED)
    write(stepped, [case], cold=False)
    assert metric(stepped, REMEMBERED) == remembered + 3


def test_several_answers_to_one_prompt_read_it_once(stepped: LLM) -> None:
    """At once. What one of them has computed the others take up."""
    text = prompt(200, 21)
    case = Case(text, {}, {"temperature": 0.0})
    computed = metric(stepped, COMPUTED)
    (cold,) = write(stepped, [case], cold=True, tokens=4)
    trained, alone = metric(stepped, TRAINED), metric(stepped, COMPUTED) - computed
    together = write(stepped, [case] * 4, cold=False, tokens=4)
    assert metric(stepped, TRAINED) == trained + 6
    assert metric(stepped, COMPUTED) - computed - alone < 1.5 * alone
    (again,) = write(stepped, [case], cold=False, tokens=4)
    assert again.kv_transfer_params == {"longctx": {"blocks_remembered": 6}}
    for one in (*together, again):
        assert_equal(one, cold)


def test_a_chat_learns_what_is_new_only(stepped: LLM) -> None:
    """Each turn sends all that was said before."""
    text = prompt(100, 22)
    for turn in range(4):
        trained = metric(stepped, TRAINED)
        (warm,) = write(stepped, [Case(text, {}, {"temperature": 0})], cold=False, tokens=40)
        new = (len(text) + 39) // 32 - (0 if turn == 0 else (len(text) - 31) // 32)
        assert metric(stepped, TRAINED) - trained == new
        (cold,) = write(stepped, [Case(text, {}, {"temperature": 0})], cold=True, tokens=40)
        assert_equal(warm, cold)
        text = [*text, *warm.outputs[0].token_ids, *prompt(30, turn)]


def test_many_questions_about_one_text_learn_it_once(stepped: LLM) -> None:
    """And who learns nothing is computed as with the saved adapter of the text."""
    greedy = {"temperature": 0.0}
    text = prompt(230, 23)
    write(stepped, [Case(text, {"learn": "prompt", "save_as": "text"}, greedy)], cold=False)
    questions = [[*text[:225], *prompt(10, seed)] for seed in (1, 2, 3)]
    trained, remembered = metric(stepped, TRAINED), metric(stepped, REMEMBERED)
    asked = [Case(question, {"learn": "prompt"}, greedy) for question in questions]
    for one, other in zip(write(stepped, asked, False, 50), write(stepped, asked, True, 50), strict=True):
        assert_equal(one, other)
    assert metric(stepped, REMEMBERED) == remembered + 3 * 7 and metric(stepped, TRAINED) == trained + 3 * 7
    remembered = metric(stepped, REMEMBERED)
    none = [Case(question, {"learn": "none"}, greedy) for question in questions]
    saved = [Case(question, {"start_from": "text", "epochs": 0}, greedy) for question in questions]
    for one, other in zip(write(stepped, none, False, 50), write(stepped, saved, False, 50), strict=True):
        assert_equal(one, other)
        assert (one.num_cached_tokens or 0) >= 127 and other.num_cached_tokens == 0
    assert metric(stepped, REMEMBERED) == remembered + 3 * 7
    untrained = [Case(question, {"epochs": 0}, greedy) for question in questions]
    for one, other in zip(write(stepped, none, True, 50), write(stepped, untrained, False, 50), strict=True):
        assert_equal(one, other)
    assert metric(stepped, TRAINED) == trained + 3 * 7


def test_saved_adapters_are_begun_with_by_what_they_are(stepped: LLM) -> None:
    """Of two saved under one name, in turn, each is another start."""
    for seed in (1, 2):
        write(stepped, [Case(prompt(80, seed), {"save_as": "book"}, {"temperature": 0})], cold=False)
        case = Case(TEXT, {"start_from": "book"}, {"temperature": 0})
        trained = metric(stepped, TRAINED)
        first = write(stepped, [case], cold=False)[0]
        assert metric(stepped, TRAINED) == trained + 7
        again, cold = write(stepped, [case], cold=False)[0], write(stepped, [case], cold=True)[0]
        assert metric(stepped, TRAINED) == trained + 14
        assert_equal(first, again)
        assert_equal(first, cold)
        assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 223)


@pytest.fixture(scope="module")
def sliding(tiny_llama: Path) -> Iterator[LLM]:
    attention = {"method": "lm_infinite", "n_global": 10, "n_local": 64, "distance_ceiling": 64}
    with running_here(tiny_llama, attention, {**RECIPE, **MORE}) as llm:
        yield llm


@pytest.mark.parametrize("mode", ["cascaded", pytest.param("parallel", marks=pytest.mark.slow)])
def test_sliding_windows_begin_where_all_that_they_see_is_cached(sliding: LLM, mode: str) -> None:
    asked = cases({"update_mode": mode})[::3]
    write(sliding, [Case(TEXT, {"update_mode": mode}, {"temperature": 0})], cold=False, tokens=30)
    trained = metric(sliding, TRAINED)
    warm = write(sliding, asked, cold=False)
    assert metric(sliding, TRAINED) - trained < sum(map(versions_of, asked, warm)) / 3
    for case, one, other in zip(asked, warm, write(sliding, asked, cold=True), strict=True):
        assert_equal(one, other)
        assert other.num_cached_tokens == 0
        same = next((i for i, (a, b) in enumerate(zip(case.prompt, TEXT, strict=False)) if a != b), 1 << 30)
        if "prompt_logprobs" not in case.params:
            assert one.num_cached_tokens == min(same, len(case.prompt) - 1) // KV_BLOCK * KV_BLOCK


def test_kv_whose_names_leave_out_the_version_is_found_out(
    sliding: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then a text is computed over KV of other versions, and says other words."""

    def hash_block(function: Any, parent: Any, tokens: Any, keys: Any) -> Any:
        return hash_block_tokens(function, parent, tokens)

    monkeypatch.setattr(request_pass, "hash_block_tokens", hash_block)
    text, greedy = prompt(230, 31), {"temperature": 0.0}
    write(sliding, [Case(text, {}, greedy)], cold=False)
    case = Case(text, {"learning_rate": 2e-2}, greedy)
    (poisoned,) = write(sliding, [case], cold=False)
    monkeypatch.undo()
    (right,) = write(sliding, [case], cold=True)
    assert poisoned.num_cached_tokens
    with pytest.raises(AssertionError):
        assert_equal(poisoned, right)


def on_disk(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if not path.name.startswith(".")}


def remembered(output: RequestOutput) -> int:
    return int(((output.kv_transfer_params or {}).get("longctx") or {}).get("blocks_remembered", 0))


@pytest.mark.slow
def test_engines_share_what_they_have_learned(tiny_llama: Path, tmp_path: Path) -> None:
    """Two at once, and one after them. What is damaged meanwhile is trained again, and all say the same."""
    adaptation = {**STEPPED, **MORE, "cache_dir": str(tmp_path)}
    case, longer = Case(TEXT, {}, {"temperature": 0}), Case([*TEXT, *prompt(60, 5)], {}, {"temperature": 0})
    here = functools.partial(running_here, tiny_llama, {"method": "none"}, adaptation)
    with here() as one, here() as other:
        (first,) = write(one, [case], cold=False)
        assert remembered(first) == 0
        time.sleep(8)  # in which the one writes its versions, and the other one finds them
        (second,) = write(other, [case], cold=False)
        assert_equal(first, second)
        assert remembered(second) >= 6 and second.num_cached_tokens
        (more,) = write(other, [longer], cold=False)
        (cold,) = write(one, [longer], cold=True)
        assert_equal(more, cold)
    kept = on_disk(tmp_path)
    assert len(kept) < 12, "not every version"
    with here() as third:
        (again,) = write(third, [longer], cold=False)
        assert_equal(again, cold)
        assert remembered(again) >= 8 and again.num_cached_tokens
    for path in tmp_path.rglob("version.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    with here() as fourth:
        (anew,) = write(fourth, [longer], cold=False)
        assert_equal(anew, cold)
        assert remembered(anew) == 0


@pytest.mark.slow
def test_a_trainer_killed_while_it_writes_a_version_costs_only_that(tiny_llama: Path, tmp_path: Path) -> None:
    """Its memory is so small that each version goes to disk as the next one comes."""
    adaptation = {**STEPPED, **MORE, "cache_dir": str(tmp_path), "cache_gib": 0.0015}
    texts = [Case(prompt(230, seed), {}, {"temperature": 0}) for seed in (40, 41)]
    with running_here(tiny_llama, {"method": "none"}, adaptation) as llm:
        killed = threading.Event()

        def kill() -> None:
            while not killed.is_set():
                if any(path.name.startswith(".writing-") for path in tmp_path.iterdir()):
                    for process in sidecars():
                        process.kill()
                        killed.set()
                time.sleep(0.001)

        thread = threading.Thread(target=kill)
        thread.start()
        write(llm, texts, cold=False)
        wait_until(killed.is_set, 60)
        thread.join()
        warm = write(llm, texts, cold=False)
        for one, other in zip(warm, write(llm, texts, cold=True), strict=True):
            assert_equal(one, other)
    with running_here(tiny_llama, {"method": "none"}, adaptation) as llm:
        for one, other in zip(write(llm, texts, cold=False), warm, strict=True):
            assert_equal(one, other)
