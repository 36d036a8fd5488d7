"""Two tensor-parallel ranks on the CPU: each has its own heads, its own pool and its own scratch blocks."""

import os
from pathlib import Path

import pytest
from conftest_engine import generate, logprobs_of, prompt, running, tokens_of
from reference_model import ReferenceLlama

from vllm_longctx.geometry import Geometry


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores")
def test_two_ranks_equal_the_reference(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, *_ = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{first}|{second}")
    attention = {"n_global": 10, "n_local": 64, "distance_ceiling": 64}
    with running(tiny_llama, attention, tensor_parallel_size=2) as llm:
        outputs = generate(llm, [prompt(n, seed=9) for n in (63, 64, 65, 300)], 40, prompt_logprobs=0)
    reference = ReferenceLlama(tiny_llama)
    for output in outputs:
        expected = reference.token_logprobs(tokens_of(output), Geometry(10, 64, 64))
        assert (logprobs_of(output) - expected).abs().max() <= 1e-4
