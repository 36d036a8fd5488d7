"""Focused Transformers in the engine against the dense float64 reference: every lookup, every kind of window
and of step.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from vllm import LLM
from vllm.outputs import RequestOutput

from tests.support.architectures import ARCHITECTURES, made
from tests.support.engines import (
    VOCAB,
    generate,
    logprobs_of,
    metric,
    poison,
    prompt,
    running_here,
    tokens_of,
)
from tests.support.reference_model import Layers, ReferenceLlama, focused, with_top_k
from vllm_longctx.cli.engine import METHODS
from vllm_longctx.cli.passkey import ANSWER_TOKENS, Task, tells, windows
from vllm_longctx.geometry import Geometry, SteppedWindows
from vllm_longctx.training.crossbatch import MemoryModel
from vllm_longctx.training.data import Batch
from vllm_longctx.training.trainer import Recipe, Trainer, load, save

BOOKLM_MEMORY = Path(__file__).parents[2] / "benchmarks" / "booklm-memory"
LENGTHS = [1, 2, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 160, 300, 641]
TOLERANCE = 1e-4
# Two keys whose scores differ by less are equally good to float32; which of them a lookup takes, shows.
TIE = 1e-5


@dataclass(frozen=True)
class Variant:
    windows: SteppedWindows
    mem_layers: list[int]
    attention: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)

    @property
    def section(self) -> dict[str, Any]:
        windows = {"n_local": self.windows.tokens, "last_context_length": self.windows.last_tokens}
        dtype = {"mem_dtype": "float32"} if self.mem_layers else {}
        return {
            "method": "focused",
            "mem_layers": self.mem_layers,
            **dtype,
            **windows,
            **self.attention,
        }

    def seen(self, prompt_length: int) -> Layers:
        positionals = self.attention.get("mem_positionals", True)
        return focused(self.windows, prompt_length, self.mem_layers, positionals, self.attention.get("top_k"))


UNCACHED = {"enable_prefix_caching": False}  # for windows that are no multiple of a block
VARIANTS = {
    "all": Variant(SteppedWindows(64, 32), [1]),
    "compiled": Variant(SteppedWindows(64, 32), [1], engine={"enforce_eager": False}),
    # 66 blocks for more than a dozen requests: they are preempted.
    "windows_across_blocks": Variant(
        SteppedWindows(50, 20),
        [0, 2],
        engine={**UNCACHED, "num_gpu_blocks_override": 66, "max_model_len": 960},
    ),
    "memory_apart": Variant(
        SteppedWindows(64, 32), [1, 2], {"memory_limit_gib": 0.0026}, {"max_model_len": 2048}
    ),
    # Not layer 0: there, equal tokens have equal keys in the memory, and it does not matter which of them is
    # taken.
    "top_k": Variant(
        SteppedWindows(64, 32), [1, 2], {"lookup": "top_k", "top_k": 5}, {"max_model_len": 2048}
    ),
    # Fewer blocks than are always read.
    "blocks": Variant(
        SteppedWindows(50, 20), [1, 2], {"lookup": "blocks", "top_k": 5}, {**UNCACHED, "max_model_len": 2048}
    ),
    "no_positions": Variant(SteppedWindows(128, 40), [0, 1, 2], {"mem_positionals": False}),
    "no_memory": Variant(SteppedWindows(64, 32), []),
}


def test_a_trained_memory_tells_what_no_window_holds() -> None:
    """A checkpoint as it is, with nothing said to vLLM. In benchmarks/README.md it tells 19 of 20."""
    task = Task(AutoTokenizer.from_pretrained(BOOKLM_MEMORY, model_max_length=1 << 60))
    seen = windows(str(BOOKLM_MEMORY), [{"attention": {"method": "focused"}}, METHODS["lm-infinite"]])
    asked = [trial for trial in task.trials(1500, seen, 8, 0) if trial.place == "outside"]
    engine = {"skip_tokenizer_init": False, "max_num_batched_tokens": 2048}
    with running_here(BOOKLM_MEMORY, None, **engine) as llm:
        outputs = generate(llm, [trial.prompt for trial in asked], ANSWER_TOKENS, detokenize=True)
    told = [tells(output.outputs[0].text, trial.key) for output, trial in zip(outputs, asked, strict=True)]
    assert len(told) == 8
    assert sum(told) >= 6


@pytest.mark.slow
@pytest.mark.parametrize("row", ["Qwen3", "GLM-4"])
def test_what_was_trained_is_served_by_its_own_config(row: str, tmp_path: Path) -> None:
    """Another architecture than LongLLaMA's: the user says the method only."""
    model = load(made(ARCHITECTURES[row], tmp_path).transformers)
    recipe = Recipe([1, 3], 64, steps=1, rows=2, schedule=[2], learning_rate=3e-3)
    Trainer(model, recipe).train(Batch(*torch.randint(VOCAB, (2, 2, 2, 64))))
    save(model, None, recipe, tmp_path / "trained", 32, "float32", torch.float32)
    with running_here(tmp_path / "trained", {"method": "focused"}) as llm:
        outputs = generate(llm, [prompt(n) for n in (31, 64, 97, 200)], 40)
    memory = MemoryModel(load(tmp_path / "trained"), [1, 3])
    for output in outputs:
        ids = torch.tensor([tokens_of(output)])
        read = memory.read(ids, SteppedWindows(64, 32), len(output.prompt_token_ids or ()))
        logprobs = torch.cat([logits for _, logits in read], 1).log_softmax(-1)
        expected = logprobs[0, :-1].gather(1, ids[0, 1:, None]).squeeze(1)[-40:]
        assert (logprobs_of(output) - expected).abs().max() <= TOLERANCE


def test_lm_infinite_with_top_k_equals_the_reference(tiny_llama: Path, reference: ReferenceLlama) -> None:
    """66 blocks for more than a dozen requests: the preempted compute again, one token at a time, what they
    wrote.
    """
    attention = {"n_global": 5, "n_local": 50, "top_k": 3, "top_k_from_layer": 1, "top_k_insert_at": 40}
    with running_here(tiny_llama, attention, num_gpu_blocks_override=66, max_model_len=800) as llm:
        poison(llm)
        outputs = generate(llm, [prompt(n) for n in LENGTHS], 70)
        assert metric(llm, "vllm:num_preemptions") > 0
        assert metric(llm, "vllm:kv_cache_usage_perc") == 0
    compared = 0
    for length, output in zip(LENGTHS, outputs, strict=True):
        seen = with_top_k(Geometry(5, 50, 128), length, range(1, 3), 3, 40)
        expected = reference.token_logprobs(tokens_of(output), seen)[-70:]
        if min(reference.margins) >= TIE:
            compared += 1
            assert (logprobs_of(output) - expected).abs().max() <= TOLERANCE
    assert compared >= len(LENGTHS) - 2


@pytest.fixture(
    scope="module",
    params=[name if name != "compiled" else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS],
)
def variant(request: pytest.FixtureRequest) -> Variant:
    return VARIANTS[request.param]


@pytest.fixture(scope="module")
def llm(variant: Variant, tiny_llama: Path) -> Iterator[LLM]:
    with running_here(tiny_llama, variant.section, **variant.engine) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(tiny_llama: Path) -> ReferenceLlama:
    return ReferenceLlama(tiny_llama)


def test_prompts_and_tokens_written_equal_the_reference(
    llm: LLM, variant: Variant, reference: ReferenceLlama
) -> None:
    outputs = generate(llm, [prompt(n) for n in LENGTHS], 70, prompt_logprobs=0)
    differences = [
        difference(reference, variant.seen(n), output) for n, output in zip(LENGTHS, outputs, strict=True)
    ]
    assert sum(d is None for d in differences) <= 2
    assert all(d.max() <= TOLERANCE for d in differences if d is not None)


def test_a_prefix_hit_ends_where_both_prompts_have_a_window(
    llm: LLM, variant: Variant, reference: ReferenceLlama
) -> None:
    text = prompt(900, seed=1)
    generate(llm, [text], 1)
    windows, hits, differences = variant.windows, set(), []
    for cut in (900, 870, 416, 200):
        (output,) = generate(llm, [text[:cut] + prompt(30, seed=cut)], 5)
        differences.append(difference(reference, variant.seen(cut + 30), output))
        hit = output.num_cached_tokens
        assert hit % windows.tokens == 0
        # Where there is no memory, no window need be computed that nobody sees.
        prompts = [900, cut + 30] if variant.mem_layers else [cut + 30]
        assert hit <= min(windows.last_start(n) for n in prompts)
        hits.add(hit)
    assert (max(hits) > 0) == llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
    assert all(d.max() <= TOLERANCE for d in differences if d is not None)


@pytest.mark.slow
@pytest.mark.parametrize(("written", "more"), [(20, 40), (31, 72), (20, 200), (70, 90)])
def test_short_texts_share_their_beginning(
    llm: LLM, variant: Variant, reference: ReferenceLlama, written: int, more: int
) -> None:
    """Before: nothing was hit in prompts shorter than a whole window and the last one, nor behind what a
    short one had written.

    All requests go on until their first windows are memory: those that are hit and those that hit them.
    """
    windows, seed = variant.windows, 100 * written + more
    (first,) = generate(llm, [prompt(windows.last_tokens, seed=seed)], written)
    (again,) = generate(llm, [first.prompt_token_ids], 1)
    turn = tokens_of(first)[:-1] + prompt(more, seed=seed)
    outputs = generate(llm, [turn, first.prompt_token_ids, turn[: windows.last_tokens + 40], turn], 150)
    if not llm.llm_engine.vllm_config.cache_config.enable_prefix_caching:
        assert all(output.num_cached_tokens == 0 for output in [again, *outputs])
        return
    text, window = windows.last_tokens + written - 1, windows.tokens
    for output in outputs:
        length = len(output.prompt_token_ids)
        common = min(text, windows.last_start(length) or length - 1)
        # What was written last in an open window; where that is memory by now, only the prompt, which was
        # read again.
        is_open = min(common, windows.last_tokens if text // window else common) // 32 * 32
        assert output.num_cached_tokens == (common // window * window or is_open)
        seen = difference(reference, variant.seen(length), output)
        assert seen is None or seen.max() <= TOLERANCE


def test_each_request_sees_what_it_has_chosen(llm: LLM, variant: Variant, reference: ReferenceLlama) -> None:
    """All together, beside requests that have chosen nothing; and again, so that what one of them has left in
    the prefix cache would be found by others.
    """
    chosen: list[dict[str, Any]] = [{}, {"attention": "plain"}]
    if variant.mem_layers:
        chosen += [{"lookup": "top_k", "top_k": 9}]
    if variant.attention.get("lookup") == "blocks":
        chosen += [{"top_k": 3}, {"lookup": "all"}]
    asked = [
        (options, n) for options in chosen for n in ((1, 60, 97) if "attention" in options else (97, 300))
    ]
    prompts, choices = [prompt(length, seed=7) for _, length in asked], [options for options, _ in asked]
    compared = 0
    for output, (options, length) in zip(
        [*generate(llm, prompts, 30, choices), *generate(llm, prompts, 30, choices)],
        asked * 2,
        strict=True,
    ):
        changed = {name: value for name, value in options.items() if name != "attention"}
        if options.get("lookup") == "all":
            changed["top_k"] = None
        sees = Variant(variant.windows, variant.mem_layers, {**variant.attention, **changed}).seen(length)
        if "attention" in options:
            positionals = variant.attention.get("mem_positionals", True)
            sees = focused(SteppedWindows(1 << 40, 1 << 40), length, variant.mem_layers, positionals)
        seen = difference(reference, sees, output)
        assert seen is None or seen.max() <= TOLERANCE, (options, length)
        compared += seen is not None
    assert compared >= 2 * len(asked) - 4
    assert metric(llm, "vllm:kv_cache_usage_perc") == 0


def difference(reference: ReferenceLlama, seen: Layers, output: RequestOutput) -> torch.Tensor | None:
    """Of the log-probabilities at hand; None where two keys are equally good."""
    ours = logprobs_of(output)
    expected = reference.token_logprobs(tokens_of(output), seen)[-len(ours) :]
    return (ours - expected).abs() if min(reference.margins, default=1.0) >= TIE else None


def test_together_is_as_alone(llm: LLM) -> None:
    prompts = [prompt(n, seed=2) for n in (600, 40, 129, 64, 300, 65, 1, 500, 96, 410)]
    together = generate(llm, prompts, 30)
    alone = [generate(llm, [p], 30)[0] for p in prompts]
    for a, b in zip(together, alone, strict=True):
        assert tokens_of(a) == tokens_of(b)


@pytest.mark.slow
def test_what_others_left_in_a_block_does_not_matter(
    llm: LLM, variant: Variant, reference: ReferenceLlama
) -> None:
    poison(llm)
    outputs = generate(llm, [prompt(n, seed=6) for n in LENGTHS], 40)
    differences = [
        difference(reference, variant.seen(n), output) for n, output in zip(LENGTHS, outputs, strict=True)
    ]
    assert all(d.max() <= TOLERANCE for d in differences if d is not None)


def test_all_blocks_come_back(llm: LLM, variant: Variant) -> None:
    small = "num_gpu_blocks_override" in variant.engine or "memory_limit_gib" in variant.attention
    tokens = 400 if small else 150  # past a window; where the pool is small, until requests are preempted
    together = generate(llm, [prompt(20, seed=s) for s in range(8)], tokens)
    assert tokens_of(together[-1]) == tokens_of(generate(llm, [prompt(20, seed=7)], tokens)[0])
    assert metric(llm, "vllm:kv_cache_usage_perc") == 0
    if "memory_limit_gib" in variant.attention:
        assert metric(llm, "vllm:longctx_memory_usage_perc") == 0
    assert llm.reset_prefix_cache()
    if small:
        assert metric(llm, "vllm:num_preemptions") > 0
