"""What memory layers are told, on every platform."""

from dataclasses import dataclass

from torch import Tensor

from vllm_longctx.cpu.kernels.tables import cdiv


@dataclass(frozen=True)
class Lookup:
    """A query attends to the memory's best top_k keys. share: of the blocks that are read for that; None for exactly these."""

    top_k: int
    share: float | None


@dataclass(frozen=True)
class TopK:
    """LM-Infinite's top-k branch of a layer: the k best keys between first tokens and window, seen at distance insert_at."""

    k: int
    insert_at: int


@dataclass(frozen=True)
class ClosedWindow:
    """Tokens of a request that become memory: positions start .. end - 1. blocks [n]: from the one that holds `start` on.

    origin: the position from which their rotation is counted.
    """

    origin: int
    start: int
    end: int
    blocks: Tensor


def covering(table: Tensor, start: int, end: int, block_size: int) -> Tensor:
    """The blocks of a request's table [blocks] that hold positions start .. end - 1."""
    return table[start // block_size : cdiv(end, block_size)]
