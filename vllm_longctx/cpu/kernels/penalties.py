"""Penalties for repetition, in time that does not depend on how much was written.

In every step vLLM counts all tokens of all prompts and outputs anew. Here each token is counted once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from vllm._custom_ops import apply_repetition_penalties
from vllm.v1.sample.metadata import SamplingMetadata

PLACEHOLDER = -1  # of a token that is not known yet; vLLM does not count it


@dataclass
class Written:
    """What one request wrote.

    tokens: vLLM's list, which grows.
    counts: int64 [vocabulary]: how often each of its first `counted` tokens stands there.
    last: The last one of these.
    """

    tokens: list[int]
    counts: Tensor
    counted: int = 0
    last: int | None = None

    def update(self) -> None:
        known = len(self.tokens)
        while known and self.tokens[known - 1] == PLACEHOLDER:
            known -= 1
        # Taken back. A step adds one token, so no more than the last one can have been replaced unseen.
        if known < self.counted or (self.counted and self.tokens[self.counted - 1] != self.last):
            self.counts.zero_()
            self.counted = 0
        new = torch.tensor(self.tokens[self.counted : known], dtype=torch.int64)
        self.counts.scatter_add_(0, new, torch.ones_like(new))
        self.counted, self.last = known, self.tokens[known - 1] if known else None


@dataclass
class Penalties:
    """Of one model runner. `apply` stands for `Sampler.apply_penalties` of vLLM (v1/sample/sampler.py)."""

    _written: dict[int, Written] = field(default_factory=dict)  # by the list's identity
    _prompts: Tensor | None = None
    _in_prompt: Tensor | None = None

    def apply(
        self, logits: Tensor, sampling_metadata: SamplingMetadata, output_token_ids: Sequence[list[int]]
    ) -> Tensor:
        """Change logits [requests, vocabulary] in place, exactly as vLLM would.

        output_token_ids: What each request has written, the same list in each step.
        """
        m, vocabulary = sampling_metadata, logits.shape[1]
        if m.no_penalties:
            self._written, self._prompts, self._in_prompt = {}, None, None
            return logits
        counts = self._count(output_token_ids, vocabulary)
        written = counts > 0
        assert m.prompt_token_ids is not None
        in_prompt = self._found_in(m.prompt_token_ids, vocabulary)
        apply_repetition_penalties(logits, in_prompt, written, m.repetition_penalties)
        logits -= m.frequency_penalties[:, None] * counts
        logits -= m.presence_penalties[:, None] * written
        return logits

    def _count(self, output_token_ids: Sequence[list[int]], vocabulary: int) -> Tensor:
        """int64 [requests, vocabulary]."""
        before, self._written = self._written, {}
        for tokens in output_token_ids:
            known = before.get(id(tokens)) or Written(tokens, torch.zeros(vocabulary, dtype=torch.int64))
            known.update()
            self._written[id(tokens)] = known
        return torch.stack([self._written[id(tokens)].counts for tokens in output_token_ids])

    def _found_in(self, prompts: Tensor, vocabulary: int) -> Tensor:
        """bool [requests, vocabulary], of prompts [requests, tokens] that are padded with `vocabulary`.

        vLLM makes another tensor when the batch changes.
        """
        if self._in_prompt is None or prompts is not self._prompts:
            found = torch.zeros(len(prompts), vocabulary + 1, dtype=torch.bool)
            self._prompts, self._in_prompt = prompts, found.scatter_(1, prompts, True)[:, :vocabulary]
        return self._in_prompt
