"""The rule of a lookup: which keys of a memory win, how keys are compared, and how they join a layer's other
keys.

Both platforms follow it, each in its own way (`cpu.kernels.retrieval`, `cuda.kernels.lookup`). Every query
head attends to the k keys with the highest inner products (Memorizing Transformers, arXiv 2203.08913, section
3.1; Focused Transformer, arXiv 2307.03170, section 3.1). Of equal products the earlier key wins. To read few
blocks, each block has a summary: its keys in 7 bits with one step for the block. The bound that it gives says
which blocks are read.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from vllm.utils.math_utils import cdiv

from vllm_longctx.geometry import Geometry

SHARE = 0.1  # of a memory's blocks, read by default
SCANNED = 128  # blocks: so many are read in less time than it takes to choose among them
LEVELS = 63  # of a key's code: products of two codes add up in 16 bits on CPUs without VNNI
LOW = 0xFFFFFFFF  # the bits of a packed key that hold its place


@dataclass(frozen=True)
class ClosedWindow:
    """Tokens of a request that become memory: positions start .. end - 1.

    origin: The position from which their rotation is counted.
    blocks: int64 or int32 [n], from the one that holds `start` on.
    """

    origin: int
    start: int
    end: int
    blocks: Tensor


class LeftBehind:
    """Which keys of each request no sliding window sees any more, step by step.

    Each key is left behind once. So a step has no more of them than the step before had tokens, also the one
    in which a long prompt begins to write.

    n_global: First tokens, which are never left behind.
    n_local: Tokens of a window.
    """

    def __init__(self, n_global: int, n_local: int):
        self.n_global, self.n_local = n_global, n_local
        self._ends: dict[str, int] = {}

    @classmethod
    def of(cls, geometry: Geometry) -> Self:
        assert geometry.n_local is not None
        return cls(geometry.n_global, geometry.n_local)

    def take(self, request_id: str, position: int) -> tuple[int, int]:
        """The keys, first and end, that are left behind in the step that begins at `position`.

        A request that begins anew, at position 0, has none behind.
        """
        end = max(position + 1 - self.n_local, self.n_global)
        start = self._ends.get(request_id, self.n_global)
        self._ends[request_id] = end
        return min(start, end), end

    def forget(self, request_ids: Iterable[str]) -> None:
        """Requests have ended."""
        for request_id in request_ids:
            self._ends.pop(request_id, None)


def covering(table: Tensor, start: int, end: int, block_size: int) -> Tensor:
    """The blocks of a request's table [blocks] that hold positions start .. end - 1."""
    return table[start // block_size : cdiv(end, block_size)]


def weigh(lse: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax over a branch and further keys.

    lse: The branch's log-sum-exp [T, heads]. scores: Of the further keys [T, heads, S].
    Returns the weights of the keys [T, heads, S] and of the branch [T, heads, 1].
    """
    total = torch.logaddexp(lse, scores.logsumexp(-1)).unsqueeze(-1)
    return (scores - total).exp(), (lse.unsqueeze(-1) - total).exp()


def pack(scores: Tensor, places: Tensor) -> Tensor:
    """float32 scores and places below 2^32 as int64 in one order: by score, the higher first, then the
    earlier place.
    """
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: no -0.0
    return (_ordered_bits(bits).long() << 32) + (LOW - places)


def score_of(packed: Tensor) -> Tensor:
    return _ordered_bits((packed >> 32).int()).view(torch.float32)


def place_of(packed: Tensor) -> Tensor:
    return LOW - (packed & LOW)


def _ordered_bits(bits: Tensor) -> Tensor:
    """Bits of floats as integers in the floats' order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
