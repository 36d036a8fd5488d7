"""The engine against the outputs of the official LM-Infinite code."""

import json
from pathlib import Path

import numpy as np
from conftest_engine import generate, logprobs_of, running


def test_lm_infinite_llama(goldens: Path) -> None:
    case = goldens / "lminf_llama_a"
    parameters = json.loads((case / "case.json").read_text())
    ids = np.load(case / "input_ids.npy").flatten().tolist()
    attention = {
        "n_global": parameters["global_branch"],
        "n_local": parameters["local_branch"],
        "distance_ceiling": parameters["limit_distance"],
    }
    with running(goldens / parameters["model"], attention) as llm:
        (output,) = generate(llm, [ids], 1, prompt_logprobs=0)
    ours = logprobs_of(output)[: len(ids) - 1].numpy()
    assert np.abs(ours - np.load(case / "logprobs.npy").flatten()).max() <= 1e-3
