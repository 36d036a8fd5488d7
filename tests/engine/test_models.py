"""The matrix of `docs/models.md`: every architecture with every method, on random weights.

What the engine says is compared with transformers' own model in float64, with our geometry as its attention.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM
from vllm.model_executor.models.transformers.base import Base

from tests.support.architectures import ARCHITECTURES, Checkpoint, made
from tests.support.engines import generate, logprobs_of, prompt, running_here, tokens_of
from tests.support.hf_oracle import Oracle
from tests.support.matrix import COLUMNS, METHODS, REFUSED, TEMP_LORA
from tests.support.model_table import record
from tests.support.temp_lora_engine import STEPPED, asked, assert_equal, replayed

WRITTEN = 20
TOLERANCE = 1e-4
# Two keys whose scores differ by less are equally good to float32; which of them a lookup takes, shows.
TIE = 1e-5
# Of the other methods, `make test` runs what differs in their layers.
SOME = ("Llama", "Gemma 2", "Gemma 3", "Cohere 2", "SmolLM3", "gpt-oss", "Falcon, ALiBi")
Made = Callable[[str], tuple[Checkpoint, Oracle]]


def cells(*columns: str) -> pytest.MarkDecorator:
    """Row by row, so that a row's oracle is made once."""
    found = []
    for row in ARCHITECTURES:
        for column in columns:
            quick = (row, column) not in REFUSED and (column == "lm_infinite" or row in SOME)
            marks = () if quick and column not in ("vLLM", TEMP_LORA) else pytest.mark.slow
            found.append(pytest.param(row, column, id=f"{row}, {column}", marks=marks))
    return pytest.mark.parametrize(("row", "column"), found)


@pytest.fixture(scope="module", autouse=True)
def _classes_stay_transformers() -> Iterator[None]:
    """vLLM decorates the classes of transformers' that it runs, to compile them, which no engine here does:
    what remains would be asked for an engine's config when the oracle uses them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Base, "_decorate_for_torch_compile", lambda _: None)
        yield


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Made:
    last: dict[str, tuple[Checkpoint, Oracle]] = {}

    def of(row: str) -> tuple[Checkpoint, Oracle]:
        if row not in last:
            last.clear()
            checkpoint = made(ARCHITECTURES[row], tmp_path_factory.mktemp("model"))
            last[row] = checkpoint, Oracle(ARCHITECTURES[row], checkpoint.transformers)
        return last[row]

    return of


@cells(*METHODS)
def test_the_engine_equals_transformers(row: str, column: str, made_once: Made) -> None:
    """Log-probabilities of prompts, and of what is written, which is what the oracle would write."""
    checkpoint, oracle = made_once(row)
    architecture, method = ARCHITECTURES[row], METHODS[column]
    attention = method.attention(architecture)
    if (row, column) in REFUSED:
        refuses(row, column, checkpoint, attention)
        return
    options = {"prompt_logprobs": 0} if method.scores_prompts else {}
    with running_here(checkpoint.served, attention) as llm:
        outputs = generate(llm, [prompt(n) for n in method.lengths], WRITTEN, **options)
    differences = []
    for length, output in zip(method.lengths, outputs, strict=True):
        ids = tokens_of(output)
        expected = oracle.logprobs(ids, method.seen(architecture, length))[:-1]
        if min(oracle.margins, default=1.0) < TIE:
            continue
        of_ids = expected.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
        got = logprobs_of(output)
        differences.append(float((got - of_ids[-len(got) :]).abs().max()))
        assert (expected.max(-1).values - of_ids)[-WRITTEN:].max() <= 2 * TOLERANCE
    assert len(differences) >= len(outputs) - 1
    record(row, column, max(differences))
    assert max(differences) <= TOLERANCE
