"""The engine against the outputs of the official LM-Infinite code, on one rank and on two."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.engines import generate, logprobs_of, running, running_here
from tests.support.reference_model import official_top_k


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=[pytest.mark.slow, pytest.mark.alone])])
@pytest.mark.parametrize("name", ["lminf_llama_a", "lminf_gptj", "lminf_mpt"])
def test_lm_infinite(name: str, ranks: int, goldens: Path, request: pytest.FixtureRequest) -> None:
    case = goldens / name
    parameters = json.loads((case / "case.json").read_text())
    ids = np.load(case / "input_ids.npy").flatten().tolist()
    greedy = np.load(path).flatten().tolist() if (path := case / "greedy_tokens.npy").exists() else []
    attention = {
        "n_global": parameters["global_branch"],
        "n_local": parameters["local_branch"],
        "distance_ceiling": parameters["limit_distance"],
    }
    if ranks == 2:
        request.getfixturevalue("two_cores")
    start = running if ranks == 2 else running_here
    with start(goldens / parameters["model"], attention, tensor_parallel_size=ranks) as llm:
        (scored,) = generate(llm, [ids], max(len(greedy), 1), prompt_logprobs=0)
    ours = logprobs_of(scored)[: len(ids) - 1].numpy()
    assert np.abs(ours - np.load(case / "logprobs.npy").flatten()).max() <= 1e-3
    assert not greedy or list(scored.outputs[0].token_ids) == greedy


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=[pytest.mark.slow, pytest.mark.alone])])
def test_longllama(ranks: int, goldens: Path, request: pytest.FixtureRequest) -> None:
    """Two requests at once, in chunks that end elsewhere than the windows do; no configuration but the
    checkpoint's own.
    """
    cases = [goldens / "longllama_a", goldens / "longllama_generate"]
    if ranks == 2:
        request.getfixturevalue("two_cores")
    prompts = [np.load(case / "input_ids.npy").flatten().tolist() for case in cases]
    greedy = np.load(cases[1] / "greedy_tokens.npy").flatten().tolist()
    settings = {"tensor_parallel_size": ranks, "max_num_batched_tokens": 200}
    start = running if ranks == 2 else running_here
    with start(goldens / "models" / "longllama", None, **settings) as llm:
        scored = generate(llm, prompts, len(greedy), prompt_logprobs=0)
    for case, ids, output in zip(cases, prompts, scored, strict=True):
        ours = logprobs_of(output)[: len(ids) - 1].numpy()
        assert np.abs(ours - np.load(case / "logprobs.npy").flatten()).max() <= 1e-3
    assert list(scored[1].outputs[0].token_ids) == greedy
    written = logprobs_of(scored[1])[len(prompts[1]) - 1 :].numpy()
    assert np.abs(written - np.load(cases[1] / "greedy_logprobs.npy").flatten()).max() <= 1e-3


def test_lm_infinite_with_top_k(goldens: Path) -> None:
    case = goldens / "lminf_topk"
    p = json.loads((case / "case.json").read_text())
    ids = np.load(case / "input_ids.npy").flatten().tolist()
    lengths, rows = np.load(case / "prefix_lengths.npy").tolist(), np.load(case / "logprobs.npy")
    greedy = np.load(case / "greedy_tokens.npy").flatten().tolist()
    vocab = rows.shape[1]
    with running_here(
        goldens / "models" / "llama", official_top_k(p), max_logprobs=vocab, max_model_len=2048
    ) as llm:
        outputs = generate(llm, [ids[:n] for n in lengths], 1, logprobs=vocab)
        (written,) = generate(llm, [ids], len(greedy))
    for output, row in zip(outputs, rows, strict=True):
        (first,) = output.outputs[0].logprobs
        assert max(abs(first[token].logprob - row[token]) for token in range(vocab)) <= 1e-3
    assert list(written.outputs[0].token_ids) == greedy
    assert (
        np.abs(logprobs_of(written).numpy() - np.load(case / "greedy_logprobs.npy").flatten()).max() <= 1e-3
    )
