"""LoRA in vLLM's CPU engine: work per run of rows that share an adapter."""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from vllm_longctx.engine.lora import SlotLoRAManager

# Which rows have which adapter: (index in the layers, rows), or where every adapter has one row, all indices
# and all rows.
Rows = list[tuple[int | slice | Tensor, slice | Tensor]]


def rows_by_adapter(indices: Tensor) -> Rows:
    """indices: int64 [rows], -1 where a row has no adapter."""
    runs, lengths = (t.tolist() for t in torch.unique_consecutive(indices, return_counts=True))
    ends = list(accumulate(lengths))
    found = [(index, end - n, end) for index, n, end in zip(runs, lengths, ends, strict=True) if index >= 0]
    if len(found) > 1 and all(end - begin == 1 for _, begin, end in found):
        of_rows, rows, _ = zip(*sorted(found), strict=True)
        return [(slice_or_tensor(of_rows), slice_or_tensor(rows))]
    return [(index, slice(begin, end)) for index, begin, end in found]


def slice_or_tensor(numbers: Sequence[int]) -> slice | Tensor:
    """A slice if they follow each other: then nothing is copied."""
    first, end = numbers[0], numbers[-1] + 1
    return slice(first, end) if list(numbers) == list(range(first, end)) else torch.tensor(numbers)


def times(x: Tensor, weights: Tensor, index: int | slice | Tensor) -> Tensor:
    """x [rows, in] W^T [rows, out], with weights [adapters, 1, out, in]; index: of all rows, or of each."""
    w, x = weights[index, 0], x.to(weights.dtype)
    # A row times a matrix takes half the time of a matrix times a column.
    return torch.mm(x, w.T) if isinstance(index, int) else torch.bmm(x.unsqueeze(1), w.mT).squeeze(1)


def add(y: Tensor, rows: slice | Tensor, added: Tensor, scale: float = 1.0) -> None:
    """y [.., out], of which the first columns [rows, added's out] get what is added, times `scale`."""
    y = y[:, : added.shape[-1]]
    if isinstance(rows, slice):
        y[rows].add_(added.to(y.dtype), alpha=scale)
    else:
        y.index_add_(0, rows, added.to(y.dtype), alpha=scale)


def add_product(
    y: Tensor,
    x: Tensor,
    rows: slice | Tensor,
    a: Tensor,
    b: Tensor,
    index: int | slice | Tensor,
    scale: float,
) -> None:
    """y [.., out]: its rows += scale * x [rows, in] A^T B^T.

    a [adapters, 1, rank, in], b [adapters, 1, out, rank]; index: as of `times`.

    In as few operations as can be: a step has hundreds of these, and for a few rows each costs its start.
    """
    if isinstance(index, int) and isinstance(rows, slice) and x.dtype == a.dtype == y.dtype:
        y[rows].addmm_(torch.mm(x, a[index, 0].T), b[index, 0, : y.shape[-1]].T, alpha=scale)
    else:
        add(y, rows, times(times(x, a, index), b, index)[:, : y.shape[-1]], scale)


class SegmentedPunica(PunicaWrapperCPU):
    """vLLM's, with work per run of rows that share an adapter, and none for rows without one.

    The stock operators gather an adapter's weights for every token, and take index -1, no adapter, to be the
    last one: its output leaks into requests that have none (vLLM pull requests 48421, 49656).
    """

    by_token: Rows
    by_sample: Rows
    scored: (
        Tensor | None
    )  # hidden states [tokens, hidden] while prompts are scored: logits are then of rows of these

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        super().update_metadata(*args, **kwargs)
        self.by_token, self.by_sample = (
            rows_by_adapter(self.token_lora_indices),
            rows_by_adapter(self.sampler_indices),
        )

    def add_shrink(
        self, y: Any, x: Tensor, lora_a_stacked: tuple[Tensor, ...], scale: float, **kwargs: Any
    ) -> None:
        """y [T, rank] += scale * x [T, in] A^T per run and slice; A [loras, 1, rank, in]."""
        x = x.view(-1, x.shape[-1])
        for part, a in zip(y, lora_a_stacked, strict=True):
            for index, rows in self.by_token:
                add(part, rows, times(x[rows], a, index), scale)

    def add_expand(
        self,
        y: Tensor,
        x: Any,
        lora_b_stacked: tuple[Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y [T, out] += x [T, rank] B^T per run and slice, from column `offset_start` on; B [loras, 1, out,
        rank].
        """
        assert add_inputs
        y, offset = y.view(-1, y.shape[-1]), offset_start
        for part, b, size in zip(x, lora_b_stacked, output_slices, strict=True):
            for index, rows in self.by_token:
                add(y[:, offset:], rows, times(part[rows], b, index)[:, :size])
            offset += size

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """y [T, out] += scale * x [T, in] A^T B^T per run and slice; A [loras, 1, rank, in], B [loras, 1,
        out, rank].
        """
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        for index, rows in self.by_token:
            offset, x_rows = 0, x[rows]
            for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                add_product(y[:, offset : offset + size], x_rows, rows, a, b, index, scale)
                offset += size

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """y [T, hidden] += x [T, rank] B^T per run; x: the tokens' rows of A, of any adapter for a token
        without one.
        """
        self.add_expand(y, (x,), (lora_b_stacked,), (lora_b_stacked.shape[-2],), add_inputs=add_inputs)

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        **kwargs: Any,
    ) -> None:
        """y [rows, vocab] += scale * x [rows, hidden] A^T B^T per run: a row for each token sampled, or
        scored.
        """
        rows_of = self.by_sample
        if self.scored is not None:
            first = (x.data_ptr() - self.scored.data_ptr()) // (self.scored.stride(0) * self.scored.itemsize)
            rows_of = rows_by_adapter(self.token_lora_indices[first : first + len(x)])
        size = min(y.shape[-1], lora_b_stacked.shape[-2])
        for index, rows in rows_of:
            add_product(y[:, :size], x[rows], rows, lora_a_stacked, lora_b_stacked, index, scale)


class SegmentedLoRAManager(SlotLoRAManager):
    def create_lora_manager(self, model: nn.Module, vllm_config: VllmConfig) -> Any:
        wrapped = super().create_lora_manager(model, vllm_config)
        for wrapper in self.wrappers():
            assert type(wrapper) is PunicaWrapperCPU
            wrapper.__class__ = (
                SegmentedPunica  # vLLM names its class in the code, and layers hold the object
            )
            assert isinstance(wrapper, SegmentedPunica)
            wrapper.by_token, wrapper.by_sample, wrapper.scored = [], [], None
        return wrapped

    def wrappers(self) -> Iterable[Any]:
        return self._adapter_manager.punica_wrapper_mapping.values()
