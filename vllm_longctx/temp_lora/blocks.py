"""Blocks, versions and passes of Temp-LoRA: pure functions of positions.

Blocks are text blocks here, except in `kv_block`.

Symbols: o = first position that belongs to a block, D = `block_tokens`, s = window start,
W = `window_tokens`, X = `context_tokens`, k = `keep_first`. Block b covers the input positions
o + (b-1)·D .. o + b·D - 1. Its targets are the tokens one position further on. Version v is the adapter
after training on blocks 1..v. Version 0 is untrained.

Source: Temp-LoRA (arXiv 2401.11504, sections 3.1 and 3.2).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vllm_longctx.config import KVPolicy, Learn, UpdateMode


@dataclass(frozen=True)
class Blocks:
    """Where a request's blocks lie and which version computes each.

    origin: First position that belongs to a block (o).
    block_tokens: Size of a block (D), in tokens.
    update_mode: `cascaded` computes a block with the version before it; `parallel` with one older still.
    last_version: The last one; None if every block is trained.
    """

    origin: int
    block_tokens: int
    update_mode: UpdateMode
    last_version: int | None = None

    @classmethod
    def of_prompt(
        cls,
        prompt_tokens: int,
        block_tokens: int,
        update_mode: UpdateMode,
        learn: Learn,
    ) -> "Blocks":
        origin = prompt_tokens - 1 if learn == "output" else 0
        last = (prompt_tokens - 1) // block_tokens if learn == "prompt" else None
        return cls(origin, block_tokens, update_mode, last)

    def block_of(self, position: int) -> int:
        """The block, from 1 on, to which an input position belongs; 0 before the first."""
        return 0 if position < self.origin else (position - self.origin) // self.block_tokens + 1

    def version_of(self, position: int) -> int:
        """The version that computes this position."""
        version = max(self.block_of(position) - self._behind, 0)
        return version if self.last_version is None else min(version, self.last_version)

    def first_position_of(self, version: int) -> int:
        """The first position that this version computes; the version is one of `version_of`, and not 0."""
        return self.origin + (version + self._behind - 1) * self.block_tokens

    @property
    def _behind(self) -> int:
        """Blocks between a block and the version that computes it."""
        return 1 if self.update_mode == "cascaded" else 2

    def starts_block(self, position: int) -> bool:
        return position >= self.origin and (position - self.origin) % self.block_tokens == 0

    def renews(self, position: int) -> bool:
        """Whether another version computes the block that starts here, if it is not one of the first two."""
        block = self.block_of(position)
        is_trained = self.last_version is None or block - self._behind <= self.last_version
        return block > 1 and self.starts_block(position) and is_trained

    def end_of_block(self, position: int) -> int:
        """First position behind the block of `position`; the origin for one before the first block."""
        return self.origin + self.block_of(position) * self.block_tokens

    def targets(self, block: int) -> range:
        """Indices into the text of the tokens on which `block` is trained."""
        first = self.origin + (block - 1) * self.block_tokens + 1
        return range(first, first + self.block_tokens)


@dataclass(frozen=True)
class PassStart:
    """Where a pass begins. Nothing that was computed before it matters from there on.

    position: The first new position.
    start: Of its window.
    version: The one that computes it from its first position on.
    """

    position: int
    start: int
    version: int


@dataclass(frozen=True)
class Start:
    """Where a request may begin: inside of a pass, if what comes before is cached.

    begun: The pass.
    version: The one that computes what comes next.
    earliest, latest: Positions from and up to which that version may go on; what is before them in the pass
        is cached. Where the pass begins with the version, it may be computed from its first token on, too.
    """

    begun: PassStart
    version: int
    earliest: int
    latest: int


@dataclass(frozen=True)
class Window:
    """A stepped window under a KV policy. Sizes in tokens.

    policy: When a new pass begins: with a full window (`reuse`), with each block, too (`recompute`), or never
        (`keep`).
    window_tokens: The most keys of a pass (W).
    context_tokens: Tokens before its first new position that a new pass computes again (X).
    keep_first: First tokens of the text that every pass keeps (k).
    kv_block: Tokens of a KV block. Windows start at a multiple of it.
    """

    policy: KVPolicy
    window_tokens: int
    context_tokens: int
    keep_first: int
    kv_block: int

    def live_tokens(self, start: int, position: int) -> int:
        """Keys before the query at `position`, in a pass whose window starts at `start`."""
        return position - start + (self.keep_first if start else 0)

    def next_start(self, start: int, position: int, blocks: Blocks) -> int | None:
        """Start of the window of the new pass that must begin before `position` is computed.

        None for no new pass.
        """
        full = self.live_tokens(start, position) >= self.window_tokens
        renews = self.policy == "recompute" and blocks.renews(position)
        return None if self.policy == "keep" or not (full or renews) else self.start_at(position)

    def start_at(self, position: int) -> int:
        """Start of the window of a pass that begins at `position`."""
        return max(position - self.context_tokens, 0) // self.kv_block * self.kv_block

    def passes(self, blocks: Blocks, end: int) -> Iterator[PassStart]:
        """All passes after the first that begin before the position `end`."""
        position = start = 0
        while self.policy != "keep":
            position = min(self.last_position(start), blocks.end_of_block(position))
            if position >= end:
                return
            new = self.next_start(start, position, blocks)
            if new is not None:
                start = new
                yield PassStart(position, start, blocks.version_of(position))

    def last_position(self, start: int) -> int:
        """First position that does not fit into the pass."""
        return start + self.window_tokens - (self.keep_first if start else 0)

    def first_computed(self, start: int) -> int:
        """First position that a pass computes. Its kept first tokens stand before the start of its window."""
        return start - self.keep_first if start else 0


def example(text: Sequence[int], targets: range, train_context_tokens: int, bos: int | None) -> list[int]:
    """The tokens that a block is trained on: [BOS | the tokens before the first target | the targets].

    BOS is there only if the text begins with it and the context does not reach back to it. The loss is on the
    targets.

    text: All token ids of the request.
    targets: Indices into the text.
    train_context_tokens: Tokens before the first target, at most.
    bos: The model's token that begins a text, if it has one.
    """
    begin = max(targets.start - train_context_tokens, 0)
    head = [bos] if bos is not None and begin > 0 and text[0] == bos else []
    return [*head, *text[begin : targets.stop]]
