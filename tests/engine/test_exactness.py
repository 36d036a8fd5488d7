"""The engine against the dense float64 reference: every kind of step, over geometries that exercise every
path.

Requests of all lengths run together: prompts are cut into chunks of 128 tokens, decodes and chunks share
steps, a token generated past the window takes the compact table, and the lengths sit on every edge of a
window and of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM

from tests.support.engines import (
    generate,
    logprobs_of,
    metric,
    poison,
    prompt,
    running,
    running_here,
    tokens_of,
)
from tests.support.reference_model import Layers, ReferenceLlama, alike, in_whole_turns
from vllm_longctx.geometry import Geometry
from vllm_longctx.serving import app

LENGTHS = [1, 2, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 160, 300, 641]
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Variant:
    attention: dict[str, Any]
    geometry: Geometry
    engine: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    "lm_infinite": Variant(
        {"n_global": 10, "n_local": 64, "distance_ceiling": 64, "max_n_global": 40}, Geometry(10, 64, 64)
    ),
    "compiled": Variant(
        {"n_global": 10, "n_local": 64, "distance_ceiling": 64},
        Geometry(10, 64, 64),
        {"enforce_eager": False},
    ),
    "ceiling_above_window": Variant(
        {"n_global": 5, "n_local": 50, "distance_ceiling": 100}, Geometry(5, 50, 100)
    ),
    "ceiling_below_window": Variant(
        {"n_global": 5, "n_local": 64, "distance_ceiling": 20}, Geometry(5, 64, 20)
    ),
    "streaming": Variant(
        {"method": "streaming", "n_global": 4, "n_local": 60, "max_n_global": 40},
        Geometry(4, 60, distances="in_cache"),
    ),
    "window_below_a_block": Variant(
        {"n_global": 3, "n_local": 20, "distance_ceiling": 20}, Geometry(3, 20, 20)
    ),
    "no_first_tokens": Variant({"n_global": 0, "n_local": 45}, Geometry(0, 45)),
    "first_tokens_over_blocks": Variant({"n_global": 40, "n_local": 64}, Geometry(40, 64, 128)),
}


# All tests of a variant share an engine. `make test` runs most of them over three variants only.
EVERY = pytest.mark.parametrize("variant", VARIANTS, indirect=True, scope="module")
THREE = ("lm_infinite", "streaming", "first_tokens_over_blocks")
SOME = pytest.mark.parametrize(
    "variant",
    [name if name in THREE else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS],
    indirect=True,
    scope="module",
)


@pytest.fixture(scope="module")
def variant(request: pytest.FixtureRequest) -> Variant:
    return VARIANTS[request.param]


@pytest.fixture(scope="module")
def llm(variant: Variant, tiny_llama: Path) -> Iterator[LLM]:
    with running_here(tiny_llama, variant.attention, **variant.engine) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(tiny_llama: Path) -> ReferenceLlama:
    return ReferenceLlama(tiny_llama)


@EVERY
def test_prompts_and_tokens_written_equal_the_reference(
    llm: LLM, variant: Variant, reference: ReferenceLlama
) -> None:
    outputs = generate(llm, [prompt(n) for n in LENGTHS], 40, prompt_logprobs=0)
    worst = 0.0
    for output in outputs:
        expected = reference.token_logprobs(tokens_of(output), variant.geometry)
        worst = max(worst, float((logprobs_of(output) - expected).abs().max()))
    assert worst <= TOLERANCE


@EVERY
def test_a_prefix_hit_over_a_freed_middle_changes_nothing(
    llm: LLM, variant: Variant, reference: ReferenceLlama
) -> None:
    text = prompt(416, seed=1)
    generate(llm, [text], 1)
    for cut in (416, 415, 385, 384, 200):
        (output,) = generate(llm, [text[:cut] + prompt(30, seed=cut)], 5)
        expected = reference.token_logprobs(tokens_of(output), variant.geometry)[-5:]
        assert (logprobs_of(output) - expected).abs().max() <= TOLERANCE
        if cut > 384:  # the end of the first request's text is what it still held
            assert output.num_cached_tokens == cut // 32 * 32


@SOME
def test_a_turn_is_written_again_from_the_cache(
    llm: LLM, reference: ReferenceLlama, variant: Variant
) -> None:
    """Before: once an answer was written, other long texts pushed out the window at its prompt's end
    first.
    """
    text = prompt(900, seed=8)
    (first,) = generate(llm, [text], 100)
    generate(llm, [prompt(1500, seed=s) for s in range(80, 85)], 20)  # more than the pool holds
    for end, cached in ((text, 896), (text[:-20] + prompt(30, seed=9), 864)):
        (again,) = generate(llm, [end], 20)
        assert again.num_cached_tokens == cached
        expected = reference.token_logprobs(tokens_of(again), variant.geometry)[-20:]
        assert (logprobs_of(again) - expected).abs().max() <= TOLERANCE
        assert end != text or again.outputs[0].token_ids == first.outputs[0].token_ids[:20]


@SOME
def test_together_is_as_alone(llm: LLM) -> None:
    prompts = [prompt(n, seed=2) for n in (600, 40, 129, 64, 300, 65, 1, 500, 96, 410)]
    together = generate(llm, prompts, 30)
    alone = [generate(llm, [p], 30)[0] for p in prompts]
    for a, b in zip(together, alone, strict=True):
        assert tokens_of(a) == tokens_of(b)


@pytest.mark.parametrize("variant", ["lm_infinite", "streaming"], indirect=True, scope="module")
def test_each_request_sees_what_it_has_chosen(
    llm: LLM, variant: Variant, reference: ReferenceLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All together, in a pool where some are preempted, beside requests that have chosen nothing."""
    turns = (20, 33, 90, 100, 141, 290, 301)
    monkeypatch.setattr(app, "turns_of_prompt", lambda prompt, *_: [t for t in turns if t < len(prompt)])
    engine, written = variant.geometry, 30
    chosen: list[tuple[dict[str, Any], Geometry, tuple[int, ...], list[int]]] = [
        ({}, engine, (), [97, 300]),
        ({"attention": "plain"}, Geometry(), (), [1, 60, 70, 97]),
        ({"n_global": 40}, replace(engine, n_global=40), (), [40, 97, 300, 641]),
        ({"n_global": 0}, replace(engine, n_global=0), (), [65, 129]),
        ({"drop": "turns"}, replace(engine, n_global=20), turns, [30, 97, 160, 300, 430]),
    ]
    asked = [(choice, length) for choice in chosen for length in choice[-1]]
    prompts, options = [prompt(n, seed=7) for _, n in asked], [options for (options, *_), _ in asked]
    together = generate(llm, prompts, written, options, prompt_logprobs=0)
    for ((_, geometry, begun, _), _), output in zip(asked, together, strict=True):
        expected = reference.token_logprobs(tokens_of(output), in_whole_turns(geometry, begun))
        assert (logprobs_of(output) - expected).abs().max() <= TOLERANCE
    alone = [
        generate(llm, [p], written, [own], prompt_logprobs=0)[0]
        for p, own in zip(prompts, options, strict=True)
    ]
    assert [tokens_of(a) for a in alone] == [tokens_of(t) for t in together]
    assert metric(llm, "vllm:kv_cache_usage_perc") == 0


@pytest.mark.parametrize("variant", ["lm_infinite", "streaming"], indirect=True, scope="module")
def test_a_hit_is_of_those_who_have_chosen_the_same(
    llm: LLM, variant: Variant, reference: ReferenceLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One text under every choice, one after another, each twice. The second ends in another way."""
    turns = (20, 33, 90, 141, 290, 301, 370)
    monkeypatch.setattr(app, "turns_of_prompt", lambda prompt, *_: [t for t in turns if t < len(prompt)])
    engine, text = variant.geometry, prompt(416, seed=21)
    chosen: list[tuple[dict[str, Any], Layers, int]] = [
        ({}, alike(engine), 400),
        ({"n_global": 40}, alike(replace(engine, n_global=40)), 400),
        ({"n_global": 0}, alike(replace(engine, n_global=0)), 400),
        ({"drop": "turns"}, in_whole_turns(replace(engine, n_global=20), turns), 400),
        ({"attention": "plain"}, alike(Geometry()), 100),
    ]
    for options, seen, common in chosen:
        (first,) = generate(llm, [text[: common + 10]], 5, [options])
        (again,) = generate(llm, [text[:common] + prompt(15, seed=22)], 5, [options])
        assert (first.num_cached_tokens, again.num_cached_tokens) == (0, common // 32 * 32), options
        for output in (first, again):
            expected = reference.token_logprobs(tokens_of(output), seen)[-5:]
            assert (logprobs_of(output) - expected).abs().max() <= TOLERANCE, options


@pytest.mark.slow
def test_drafts_change_nothing(tiny_llama: Path, reference: ReferenceLlama) -> None:
    """Speculative decoding: several queries of a request past its window in a step, of which some are void.

    Texts that repeat themselves, so that drafts are right at times; one of a request that has chosen what it
    sees. In processes of its own: what proposes drafts imports numba, beside which vLLM starts no other
    engine.
    """
    variant = VARIANTS["lm_infinite"]
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    texts = [(prompt(40, seed=n) * 20)[:n] for n in (50, 64, 97, 300, 641)]
    more = {"extra_args": {"longctx": {"n_global": 40}}}
    with running(tiny_llama, variant.attention, speculative_config=drafts) as llm:
        seen = [(output, variant.geometry) for output in generate(llm, texts, 150, prompt_logprobs=0)]
        seen += [(output, Geometry(40, 64, 64)) for output in generate(llm, texts, 40, **more)]
        drafted, accepted = (
            metric(llm, f"vllm:spec_decode_num_{kind}_tokens") for kind in ("draft", "accepted")
        )
        assert metric(llm, "vllm:kv_cache_usage_perc") == 0
    assert 0 < accepted < drafted
    for output, geometry in seen:
        ours = logprobs_of(output)
        expected = reference.token_logprobs(tokens_of(output), geometry)[-len(ours) :]
        assert (ours - expected).abs().max() <= TOLERANCE


@pytest.mark.slow
def test_a_request_that_no_pool_holds_ends_with_the_reason(tiny_llama: Path) -> None:
    attention = {"n_global": 10, "n_local": 16}
    asked = {"extra_args": {"longctx": {"attention": "plain"}}}
    small = {"num_gpu_blocks_override": 4, "max_num_batched_tokens": 8, "max_num_seqs": 2}
    with running_here(tiny_llama, attention, **small) as llm:
        assert len(generate(llm, [prompt(50)], 9, **asked)[0].outputs[0].token_ids) == 9
        (ended,) = generate(llm, [prompt(90)], 9, **asked)
        assert ended.outputs[0].finish_reason == "error"
        assert "needs 4 KV blocks" in str(ended.outputs[0].stop_reason)
        assert len(generate(llm, [prompt(200)], 9)[0].outputs[0].token_ids) == 9


@SOME
def test_a_seed_gives_the_same_tokens_however_its_prompt_is_cut(llm: LLM) -> None:
    """In the crowd the prompts are cut elsewhere than alone, and chunks share steps with other requests'
    decodes.
    """

    def sample(prompts: list[list[int]]) -> list[list[int]]:
        return [tokens_of(o) for o in generate(llm, prompts, 20, temperature=1.0, seed=11)]

    prompts = [prompt(n, seed=5) for n in (300, 17, 450, 129)]
    assert sample(prompts) == [sample([p])[0] for p in prompts]


@SOME
def test_what_others_left_in_a_block_does_not_matter(llm: LLM) -> None:
    """Before: stock's kernel let NaN in unused slots of a request's last block into its output, and scratch
    blocks kept it.
    """
    prompts = [prompt(n, seed=6) for n in LENGTHS]
    llm.reset_prefix_cache()
    before = generate(llm, prompts, 40)
    poison(llm)
    for clean, poisoned in zip(before, generate(llm, prompts, 40), strict=True):
        assert tokens_of(clean) == tokens_of(poisoned)
        assert (logprobs_of(clean) - logprobs_of(poisoned)).abs().max() <= TOLERANCE


@SOME
def test_all_blocks_come_back(llm: LLM) -> None:
    generate(llm, [prompt(700, seed=3)] * 3, 5)
    assert metric(llm, "vllm:kv_cache_usage_perc") == 0
    assert llm.reset_prefix_cache()


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("kv_policy", ["reuse", "recompute"])
def test_what_others_left_does_not_matter_to_stepped_windows(tiny_llama: Path, kv_policy: str) -> None:
    """Of requests that learn (here nothing, in several passes), beside one that does not."""
    adaptation = {"rank": 4, "block_tokens": 32, "kv_policy": kv_policy, "trainer": {"timeout_s": 20.0}}
    prompts = [prompt(n, seed=6) for n in LENGTHS]
    options = {"extra_args": {"longctx": {"temp_lora": True, "epochs": 0}}}
    with running_here(tiny_llama, {"method": "none"}, adaptation=adaptation) as llm:
        before = generate(llm, prompts, 40, **options) + generate(llm, prompts[:10], 20)
        poison(llm, **options)
        after = generate(llm, prompts, 40, **options) + generate(llm, prompts[:10], 20)
    for clean, poisoned in zip(before, after, strict=True):
        assert tokens_of(clean) == tokens_of(poisoned)
        assert (logprobs_of(clean) - logprobs_of(poisoned)).abs().max() <= TOLERANCE


def test_the_reference_tells_wrong_geometries_apart(reference: ReferenceLlama) -> None:
    """The tolerance means something: one token more or less in the window moves log-probabilities by far
    more.
    """
    ids, right = prompt(300), Geometry(10, 64, 64)
    base = reference.token_logprobs(ids, right)
    for wrong in (Geometry(10, 65, 64), Geometry(9, 64, 64), Geometry(10, 64, 63), Geometry(10, 64, None)):
        assert (reference.token_logprobs(ids, wrong) - base).abs().max() > 100 * TOLERANCE
    assert torch.isfinite(base).all()
