"""Documents -> batches of their consecutive contexts.

A batch is a function of seed and step: there is no state to save.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Texts to train on.

    tokens: of each document, int64 [length]. first: what every text begins with, if anything.
    """

    names: list[str]
    tokens: list[Tensor]
    first: list[int]

    @classmethod
    def read(cls, directories: Sequence[Path], tokenizer: Any, least_tokens: int) -> "Documents":
        """Every .txt file of the directories.

        Raises ValueError where there is none, or one of less than least_tokens + 1.
        """
        paths = [path for directory in directories for path in sorted(directory.glob("*.txt"))]
        if not paths:
            raise ValueError(
                f"no .txt file in {', '.join(map(str, directories))}: give a document per .txt file"
            )
        tokens = []
        for path in paths:
            ids = tokenizer(path.read_text(encoding="utf-8", errors="replace"), add_special_tokens=False)[
                "input_ids"
            ]
            if len(ids) <= least_tokens:
                raise ValueError(
                    f"{path} has {len(ids):,} tokens, but a document must fill its contexts, "
                    f"{least_tokens:,} tokens and one "
                    "more; join short documents, leave it out, or lower --context-tokens"
                )
            tokens.append(torch.tensor(ids))
        begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        return cls([path.name for path in paths], tokens, [tokenizer.bos_token_id] if begins else [])

    def batch(
        self, seed: int, step: int, rows: int, contexts: int, context_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Inputs and next tokens, int64 [rows, contexts, context_tokens] each: a piece from anywhere of a
        document per row.

        No two rows are of one document, or a row could find in another's memory what it is to predict. A
        document is drawn in proportion to its length. Every row begins as the tokenizer begins a text.
        """
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        lengths = torch.tensor([float(len(t)) for t in self.tokens])
        wanted = contexts * context_tokens + 1 - len(self.first)
        pieces = []
        for number in torch.multinomial(lengths, rows, generator=generator).tolist():
            offset = int(torch.randint(len(self.tokens[number]) - wanted + 1, (), generator=generator))
            piece = self.tokens[number][offset : offset + wanted]
            pieces.append(torch.cat([torch.tensor(self.first, dtype=torch.int64), piece]))
        ids = torch.stack(pieces)
        inputs, targets = (x.unflatten(1, (contexts, context_tokens)) for x in (ids[:, :-1], ids[:, 1:]))
        return inputs, targets

    def fingerprint(self) -> str:
        """Other names, tokens or order, another fingerprint."""
        digest = hashlib.sha256()
        for name, tokens in zip(self.names, self.tokens, strict=True):
            digest.update(name.encode())
            digest.update(tokens.numpy().tobytes())
        return digest.hexdigest()[:16]
