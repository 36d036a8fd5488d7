"""The weights of an adapter into vLLM's LoRA layers, by one launch for all of them.

An adapter of less than the layers' largest rank lies in some of the columns of their B. torch copies such
views one by one, hundreds of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 4096  # of a program


@dataclass(frozen=True)
class PaddedCopies:
    """Copies of matrices into larger ones of another dtype, whose other elements become 0.

    All tensors are views of memory that stays where it is.

    table: int64 [matrices, 6]: addresses of source and target, rows and columns of both.
    parts: Of the largest target, each for a program.
    """

    table: Tensor
    parts: int
    source_dtype: torch.dtype
    target_dtype: torch.dtype

    @classmethod
    def of(cls, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> "PaddedCopies":
        """sources, targets: contiguous matrices, each of one dtype; no source larger than its target.

        Raises ValueError for others.
        """
        for source, target in zip(sources, targets, strict=True):
            fits = all(n <= m for n, m in zip(source.shape, target.shape, strict=True))
            if not (fits and source.is_contiguous() and target.is_contiguous()):
                raise ValueError(
                    f"{tuple(source.shape)} {source.stride()} is not copied into "
                    f"{tuple(target.shape)} {target.stride()}"
                )
        rows = [
            (s.data_ptr(), t.data_ptr(), *s.shape, *t.shape) for s, t in zip(sources, targets, strict=True)
        ]
        parts = triton.cdiv(max(t.numel() for t in targets), ELEMENTS)
        table = torch.tensor(rows, dtype=torch.int64).to(targets[0].device)
        return cls(table, parts, sources[0].dtype, targets[0].dtype)

    def copy(self) -> None:
        """Do all of them."""
        types = {"SOURCE": _TYPES[self.source_dtype], "TARGET": _TYPES[self.target_dtype]}
        _copy_padded[(self.parts, len(self.table))](self.table, **types, ELEMENTS=ELEMENTS, num_warps=8)


_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _copy_padded(table, SOURCE: tl.constexpr, TARGET: tl.constexpr, ELEMENTS: tl.constexpr):
    entry = table + tl.program_id(1).to(tl.int64) * 6
    source = tl.load(entry).to(tl.pointer_type(SOURCE))
    target = tl.load(entry + 1).to(tl.pointer_type(TARGET))
    source_rows, source_columns = tl.load(entry + 2), tl.load(entry + 3)
    rows, columns = tl.load(entry + 4), tl.load(entry + 5)
    place = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    row, column = place // columns, place % columns
    there = (row < source_rows) & (column < source_columns)
    values = tl.load(source + row * source_columns + column, mask=there, other=0.0)
    tl.store(target + place, values.to(TARGET), mask=row < rows)
