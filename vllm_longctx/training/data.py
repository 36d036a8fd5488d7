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
from torch.nn.functional import pad

IGNORED = -100  # torch's


@dataclass(frozen=True)
class Batch:
    """Pieces of documents, a row each.

    inputs, targets: int64 [rows, contexts, tokens], the tokens of a row and those that follow them. A target
    of `IGNORED` does not count. lengths: int64 [rows], how many inputs are of the document; padding follows,
    whose targets do not count. None where all rows are full.
    """

    inputs: Tensor
    targets: Tensor
    lengths: Tensor | None = None

    @property
    def counts(self) -> Tensor:
        """Targets of each context of a row: int64 [contexts]."""
        return (self.targets != IGNORED).sum((0, 2))


@dataclass(frozen=True)
class Documents:
    """Texts to train on.

    tokens: of each document, int64 [length]. first: what every text begins with, if anything.
    """

    names: list[str]
    tokens: list[Tensor]
    first: list[int]

    @classmethod
    def read(cls, directories: Sequence[Path], tokenizer: Any, context_tokens: int) -> "Documents":
        """Every .txt file of the directories.

        Raises ValueError where there is none, one of them has nothing to predict, or none is longer than a
        context: no memory would ever be seen.
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
            if len(ids) < 2:
                raise ValueError(f"{path} has {len(ids)} tokens: nothing to predict; leave it out")
            tokens.append(torch.tensor(ids))
        if (longest := max(map(len, tokens))) <= context_tokens:
            raise ValueError(
                f"the longest document has {longest:,} tokens, no more than a context of {context_tokens:,}: "
                "nothing would be in a memory; join documents, or lower --context-tokens"
            )
        begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        return cls([path.name for path in paths], tokens, [tokenizer.bos_token_id] if begins else [])

    def batch(self, seed: int, step: int, rows: int, contexts: int, context_tokens: int) -> Batch:
        """A piece from anywhere of a document per row; all of a document that is no longer, and padding.

        No two rows are of one document, or a row could find in another's memory what it is to predict. A
        document is drawn in proportion to its length. Every row begins as the tokenizer begins a text.

        The official code fills a row with the next document instead, and takes both as one.
        """
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        lengths = torch.tensor([float(len(t)) for t in self.tokens])
        size = contexts * context_tokens
        wanted = size + 1 - len(self.first)
        pieces = []
        for number in torch.multinomial(lengths, rows, generator=generator).tolist():
            document = self.tokens[number]
            offset = int(torch.randint(max(len(document) - wanted, 0) + 1, (), generator=generator))
            piece = document[offset : offset + wanted]
            pieces.append(torch.cat([torch.tensor(self.first, dtype=torch.int64), piece]))
        known = torch.tensor([len(piece) - 1 for piece in pieces])
        inputs = torch.stack([pad(piece[:-1], (0, size + 1 - len(piece))) for piece in pieces])
        targets = torch.stack([pad(piece[1:], (0, size + 1 - len(piece)), value=IGNORED) for piece in pieces])
        shape = (contexts, context_tokens)
        is_full = bool((known == size).all())
        return Batch(inputs.unflatten(1, shape), targets.unflatten(1, shape), None if is_full else known)

    def fingerprint(self) -> str:
        """Other names, tokens or order, another fingerprint."""
        digest = hashlib.sha256()
        for name, tokens in zip(self.names, self.tokens, strict=True):
            digest.update(name.encode())
            digest.update(tokens.numpy().tobytes())
        return digest.hexdigest()[:16]
