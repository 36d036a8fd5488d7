"""Penalties are vLLM's, bit by bit, whatever happens to a batch between steps."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.utils.torch_utils import make_tensor_with_pad
from vllm.v1.sample.ops.penalties import apply_all_penalties

from vllm_longctx.cpu.kernels.penalties import Penalties

VOCABULARY = 40


class Batch:
    """Requests with penalties of their own, as vLLM's model runner keeps them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)
        self.requests: list[tuple[list[int], list[int], list[float]]] = []
        self.metadata: Any = None

    def join(self, written: int = 0) -> None:
        prompt = self.random.choices(range(VOCABULARY), k=self.random.randint(1, 9))
        penalties = [self.random.choice((0.0, 0.7, -1.5)) for _ in range(2)] + [
            self.random.choice((1.0, 1.3, 0.6))
        ]
        tokens = self.random.choices(range(VOCABULARY), k=written)
        self.requests.append((prompt, tokens, penalties))
        self.change()

    def change(self) -> None:
        self.random.shuffle(self.requests)
        presence, frequency, repetition = (
            torch.tensor(values)
            for values in zip(*(penalties for *_, penalties in self.requests), strict=True)
        )
        self.metadata = SimpleNamespace(
            no_penalties=False,
            prompt_token_ids=make_tensor_with_pad(
                [prompt for prompt, *_ in self.requests], pad=VOCABULARY, device="cpu", dtype=torch.int64
            ),
            presence_penalties=presence,
            frequency_penalties=frequency,
            repetition_penalties=repetition,
        )

    def check(self, penalties: Penalties) -> None:
        m, outputs = self.metadata, [tokens for _, tokens, _ in self.requests]
        logits = torch.randn(len(outputs), VOCABULARY, generator=self.torch)
        expected = apply_all_penalties(
            logits.clone(),
            m.prompt_token_ids,
            m.presence_penalties,
            m.frequency_penalties,
            m.repetition_penalties,
            outputs,
        )
        assert torch.equal(penalties.apply(logits, m, outputs), expected)


@pytest.mark.parametrize("seed", range(20))
def test_they_are_vllms_in_each_step(seed: int) -> None:
    batch, penalties = Batch(seed), Penalties()
    batch.join(), batch.join(written=5)
    for _ in range(40):
        event = batch.random.random()
        if event < 0.1:
            batch.join(written=batch.random.choice((0, 0, 30)))
        elif event < 0.2 and len(batch.requests) > 1:
            batch.requests.pop()
            batch.change()
        elif event < 0.3:  # rolled back, or rejected drafts
            del batch.requests[0][1][-2:]
        for _, tokens, _ in batch.requests:
            if tokens and tokens[-1] == -1:  # the step before has ended
                tokens[-1] = batch.random.randrange(VOCABULARY)
            tokens.append(-1 if event > 0.6 else batch.random.randrange(VOCABULARY))
        batch.check(penalties)


def test_without_penalties_nothing_is_kept() -> None:
    batch, penalties = Batch(0), Penalties()
    batch.join(written=3)
    batch.check(penalties)
    logits = torch.zeros(1, VOCABULARY)
    assert penalties.apply(logits, SimpleNamespace(no_penalties=True), [[1]]) is logits  # type: ignore[arg-type]
    assert penalties == Penalties()
    batch.check(penalties)
