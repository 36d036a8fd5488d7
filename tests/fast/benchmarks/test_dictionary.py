"""The dictionary lookup's task, and that a model of two layers begins to learn it at once."""

import dictionary
import pytest
import torch

from vllm_longctx.training.data import Batch
from vllm_longctx.training.trainer import Recipe

LANGUAGE = dictionary.Language()


def test_questions_ask_for_facts_of_their_own_dictionary() -> None:
    known, asked = LANGUAGE.task(3, 40, 5, torch.Generator().manual_seed(0))
    assert known.shape == (3, 120) and asked.shape == (3, 15)
    targets = LANGUAGE.answers(asked)
    for row in range(3):
        facts = {tuple(fact[:2]): fact[2] for fact in known[row].view(40, 3).tolist()}
        assert len(facts) == 40
        for first, second, value in asked[row].view(5, 3).tolist():
            assert facts[first, second] == value and first < 256 <= second < 512 <= value
    assert (
        (targets[:, 1::3] == asked[:, 2::3]).all()
        and (targets[:, 0::3] == -100).all()
        and (targets[:, 2::3] == -100).all()
    )


@pytest.mark.slow
def test_lookups_are_learnt_in_a_few_steps(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dictionary, "TOKENS", 768)
    trainer = dictionary.train(Recipe((1,), 12, 60, False, 2, 8, (1, 2), 2e-3), [4], "test")
    known, questions = LANGUAGE.task(64, 4, 4, torch.Generator().manual_seed(9))
    targets = torch.stack([torch.full_like(known, -100), LANGUAGE.answers(questions)], 1)
    batch = Batch(torch.stack([known, questions], 1), targets)
    assert trainer.validate([batch], documents=1)["memory"] < 1.4 < 4.1  # ln 4, ln 64
    assert trainer.memory.mem_layers == [1]
