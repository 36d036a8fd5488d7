"""Two tensor-parallel ranks on the CPU: each has its own heads, its own pool and its own scratch blocks."""

from pathlib import Path

import pytest
from conftest_engine import generate, logprobs_of, prompt, running, tokens_of, two_ranks
from reference_model import ReferenceLlama

from vllm_longctx.geometry import Geometry


def test_two_ranks_equal_the_reference(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = {"n_global": 10, "n_local": 64, "distance_ceiling": 64}
    with running(tiny_llama, attention, **two_ranks(monkeypatch)) as llm:
        outputs = generate(llm, [prompt(n, seed=9) for n in (63, 64, 65, 300)], 40, prompt_logprobs=0)
    reference = ReferenceLlama(tiny_llama)
    for output in outputs:
        expected = reference.token_logprobs(tokens_of(output), Geometry(10, 64, 64))
        assert (logprobs_of(output) - expected).abs().max() <= 1e-4
