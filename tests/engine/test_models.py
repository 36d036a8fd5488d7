"""The matrix of `docs/models.md`: every architecture with every method, on random weights.

What the engine says is compared with transformers' own model in float64, with our geometry as its attention.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.models.transformers.base import Base

from tests.support.architectures import ARCHITECTURES, Checkpoint, made
from tests.support.engines import generate, logprobs_of, prompt, running_here, tokens_of
from tests.support.hf_oracle import Oracle
from tests.support.matrix import METHODS, REFUSED, TEMP_LORA, TOLERANCE, attention_of
from tests.support.model_table import record
from tests.support.temp_lora_engine import STEPPED, assert_equal, replayed, written_together

WRITTEN = 20
# Two keys whose scores differ by less are equally good to float32; which of them a lookup takes, shows.
TIE = 1e-5
# The rows of which `make test` runs every method: each has layers that no other one of them has.
WHOLE = ("Llama", "Gemma 2", "Gemma 3", "Cohere 2", "SmolLM3", "gpt-oss", "BLOOM")
Making = Callable[[str, int], tuple[Checkpoint, Oracle]]


def cells(*columns: str) -> pytest.MarkDecorator:
    found = []
    for row in ARCHITECTURES:
        for column in columns:
            is_whole = row in WHOLE and column not in ("vLLM", TEMP_LORA)
            quick = (is_whole or column == "lm_infinite") and (row, column) not in REFUSED
            marks = () if quick else (pytest.mark.slow,)
            found.append(pytest.param(row, column, id=f"{row}, {column}", marks=marks))
    return pytest.mark.parametrize(("row", "column"), found)


@pytest.fixture(scope="module", autouse=True)
def _classes_stay_transformers() -> Iterator[None]:
    """vLLM decorates the classes of transformers' that it runs, to compile them, which no engine here does.

    Decorated, they ask for an engine's config wherever they are used, so also in the oracle.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Base, "_decorate_for_torch_compile", lambda _: None)
        yield


@pytest.fixture(scope="module")
def making(tmp_path_factory: pytest.TempPathFactory) -> Making:
    """A row's checkpoint, made once, and an oracle for it."""
    checkpoints: dict[str, Checkpoint] = {}

    def of(row: str, longest: int) -> tuple[Checkpoint, Oracle]:
        if row not in checkpoints:
            checkpoints[row] = made(ARCHITECTURES[row], tmp_path_factory.mktemp("model"))
        return checkpoints[row], Oracle(ARCHITECTURES[row], checkpoints[row].transformers, longest)

    return of


def refuses(row: str, column: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(ValueError, match=REFUSED[row, column]), running_here(*args, **kwargs):
        pass
    cleanup_dist_env_and_memory()  # an engine that does not start leaves its process groups to the next one
    record(row, column, REFUSED[row, column])


@cells(*METHODS)
def test_the_engine_equals_transformers(row: str, column: str, making: Making) -> None:
    """Log-probabilities of prompts and of what is written, which is what the oracle would write."""
    architecture, method = ARCHITECTURES[row], METHODS[column]
    checkpoint, oracle = making(row, method.longest)
    engine = checkpoint.served, attention_of(architecture, method)
    lengths = {"max_model_len": method.max_model_len}
    if (row, column) in REFUSED:
        refuses(row, column, *engine, **lengths)
        return
    options = {"prompt_logprobs": 0} if method.scores_prompts else {}
    with running_here(*engine, **lengths) as llm:
        outputs = generate(llm, [prompt(n) for n in method.lengths], WRITTEN, **options)
    differences = []
    for length, output in zip(method.lengths, outputs, strict=True):
        ids, got = tokens_of(output), logprobs_of(output)
        seen = method.seen(architecture, length), method.seen_by_own(architecture, length)
        expected = oracle.logprobs(ids, *seen)[:-1]
        if min(oracle.margins, default=TIE) < TIE:
            continue
        of_ids = expected.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
        differences.append(float((got - of_ids[-len(got) :]).abs().max()))
        assert (expected.max(-1).values - of_ids)[-WRITTEN:].max() <= 2 * TOLERANCE
    assert max(differences) <= TOLERANCE
    assert len(differences) >= len(outputs) - 1
    record(row, column, max(differences))


@cells(TEMP_LORA)
def test_what_a_request_learns_equals_the_replay(row: str, column: str, making: Making) -> None:
    """Past the window, in two passes, with two blocks trained."""
    checkpoint, _ = making(row, STEPPED["window_tokens"])
    adaptation = {**STEPPED, "slots": 2, "trainer": {"timeout_s": 20.0}}
    engine = checkpoint.served, {"method": "none"}, adaptation
    if (row, column) in REFUSED:
        refuses(row, column, *engine)
        return
    case = 70, 90, {}
    with running_here(*engine) as llm:
        (output,) = written_together(llm, [case])
    expected = replayed(checkpoint.transformers, 0, case, STEPPED)
    assert_equal(output, expected)
    want = torch.tensor(expected.prompt_logprobs + expected.logprobs, dtype=torch.float64)
    record(row, column, float((logprobs_of(output) - want).abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("row", ["Qwen3", "Gemma 3", "MPT"])
def test_compiled_models_equal_transformers(row: str, making: Making) -> None:
    method = METHODS["lm_infinite"]
    checkpoint, oracle = making(row, method.longest)
    attention = attention_of(ARCHITECTURES[row], method)
    with running_here(checkpoint.served, attention, enforce_eager=False) as llm:
        outputs = generate(llm, [prompt(n) for n in method.lengths], WRITTEN, prompt_logprobs=0)
    for length, output in zip(method.lengths, outputs, strict=True):
        ids = tokens_of(output)
        expected = oracle.logprobs(ids, method.seen(ARCHITECTURES[row], length))[:-1]
        of_ids = expected.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
        assert (logprobs_of(output) - of_ids).abs().max() <= TOLERANCE
