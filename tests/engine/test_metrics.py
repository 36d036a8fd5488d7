"""The metrics of long requests, step by step, against numbers counted here from the request alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm import LLM, SamplingParams
from vllm.inputs import tokens_input
from vllm.utils.math_utils import cdiv

from tests.support.engines import generate, metric, prompt, running_here

TRAINED, N_GLOBAL, N_LOCAL, CHUNK, BLOCK = 128, 10, 64, 128, 32
ATTENTION = {"n_global": N_GLOBAL, "n_local": N_LOCAL, "distance_ceiling": 100}
LIVE, FREED = "vllm:longctx_live_kv_blocks", "vllm:longctx_freed_kv_blocks"
REQUESTS, TOKENS = "vllm:longctx_num_requests_past_trained", "vllm:longctx_tokens_past_trained"


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[LLM]:
    with running_here(tiny_llama, ATTENTION, max_num_batched_tokens=CHUNK) as llm:
        yield llm


def steps(prompt_tokens: int, written: int) -> Iterator[tuple[int, int]]:
    """(tokens computed before, after) each step of a lone request; the last token written is never
    computed.
    """
    computed = 0
    while computed < prompt_tokens + written - 1:
        after = min(computed + CHUNK, prompt_tokens) if computed < prompt_tokens else computed + 1
        yield computed, after
        computed = after


def gap(computed: int) -> int:
    """Blocks between the first tokens and the window of the query that comes after `computed` tokens."""
    return max((computed - N_LOCAL + 1) // BLOCK - cdiv(N_GLOBAL, BLOCK), 0)


def selection_steps(llm: LLM) -> tuple[int, float]:
    (histogram,) = [m for m in llm.get_metrics() if m.name == "vllm:longctx_selection_time_seconds"]
    return histogram.count, histogram.sum


def test_each_step_of_a_long_request_is_counted(llm: LLM) -> None:
    names = (LIVE, FREED, REQUESTS, TOKENS)
    expected = [
        (cdiv(after, BLOCK) - gap(before), gap(before), after > TRAINED, max(after - TRAINED, 0))
        for before, after in steps(600, 40)
    ]
    expected[-1] = (0, expected[-1][1], 0, expected[-1][3])  # finished: nothing runs, nothing is held
    assert expected[:5] == [
        (4, 0, False, 0),
        (7, 1, True, 128),
        (7, 5, True, 256),
        (7, 9, True, 384),
        (6, 13, True, 472),
    ]
    assert expected[-1] == (0, 16, 0, 511)

    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, detokenize=False)
    llm.llm_engine.add_request("long", tokens_input(prompt(600, seed=7)), params)
    found = []
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        found.append(tuple(metric(llm, name) for name in names))
    assert found == expected
    count, seconds = selection_steps(llm)
    assert count == len(expected) == 44 and 0 < seconds < 44


def test_only_what_is_computed_counts_when_requests_share_a_prefix_and_a_batch(llm: LLM) -> None:
    text = prompt(400, seed=8)
    before = metric(llm, TOKENS)
    (first,) = generate(llm, [text], 1)
    assert first.num_cached_tokens == 0 and metric(llm, TOKENS) - before == 400 - TRAINED
    before = metric(llm, TOKENS)
    hit, short, long = generate(llm, [text, prompt(100, seed=8), prompt(300, seed=8)], 20)
    assert hit.num_cached_tokens > TRAINED and (short.num_cached_tokens, long.num_cached_tokens) == (0, 0)
    assert metric(llm, TOKENS) - before == (419 - hit.num_cached_tokens) + 0 + (319 - TRAINED)
    assert (metric(llm, LIVE), metric(llm, REQUESTS), metric(llm, "vllm:kv_cache_usage_perc")) == (0, 0, 0)


def test_the_configuration_is_exported(llm: LLM) -> None:
    (info,) = [m for m in llm.get_metrics() if m.name == "vllm:longctx_config_info"]
    assert (info.value, info.labels) == (
        1,
        {
            "engine": "0",
            "method": "lm_infinite",
            "trained_length": "128",
            "n_global": "10",
            "n_local": "64",
            "distance_ceiling": "100",
            "distances": "relative",
        },
    )
