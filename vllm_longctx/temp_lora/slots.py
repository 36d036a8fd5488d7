"""Adapter slots: weights in memory that the trainer, the scheduler and the workers share.

The memory is an anonymous file. Nothing is on disk, a page takes memory once it is written, and all is freed
with the last process that has the file open. Each slot has two banks, so that one version can be read while
the next is written. A trainer and a worker on one GPU may have the weights in GPU memory. Then the file has
only the banks' headers, which say what is valid.
"""

import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

Weights = Mapping[str, tuple[Tensor, Tensor]]
HEADER_BYTES = 64  # int64: owner, version, rank (0: the bank holds nothing valid), number of writes


class StaleSlot(Exception):
    """A bank does not hold the version that was asked for, or was written while it was read."""


class Slots:
    """Slots of one size.

    Per module a bank holds float32 A [rank, in] and B [out, rank]; B is multiplied by alpha / rank.

    fd: The file. An empty one gets its size; one of another size raises ValueError.
    modules: Of each adapted module, by name, the (in, out) features.
    max_rank: Largest rank that a bank holds.
    num_slots: Number of slots.
    device_memory: GPU memory, uint8 [`size`], for the weights in place of the file.
    """

    def __init__(
        self,
        fd: int,
        modules: Mapping[str, tuple[int, int]],
        max_rank: int,
        num_slots: int,
        device_memory: Tensor | None = None,
    ):
        self.modules, self.max_rank, self.num_slots = dict(sorted(modules.items())), max_rank, num_slots
        self._offsets, self._bank_bytes = _layout(self.modules, max_rank)
        size = self.size(modules, max_rank, num_slots)
        if os.fstat(fd).st_size == 0:
            os.ftruncate(fd, size)
        if (found := os.fstat(fd).st_size) != size:
            raise ValueError(f"the slots are {found} bytes, but this model, rank and number make {size}")
        self._fd: int | None = fd
        self._map = mmap.mmap(fd, size)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._weights = self._bytes if device_memory is None else device_memory
        if (found := len(self._weights)) != size:
            sizes = f"{found} bytes, but this model, rank and number make {size}"
            raise ValueError(f"the slots' device memory is {sizes}")

    @staticmethod
    def size(modules: Mapping[str, tuple[int, int]], max_rank: int, num_slots: int) -> int:
        """Bytes of all banks, headers and padding included."""
        return 2 * num_slots * _layout(modules, max_rank)[1]

    @classmethod
    def create(cls, modules: Mapping[str, tuple[int, int]], max_rank: int, num_slots: int) -> "Slots":
        return cls(os.memfd_create("longctx-slots"), modules, max_rank, num_slots)

    @classmethod
    def open(
        cls,
        path: str,
        modules: Mapping[str, tuple[int, int]],
        max_rank: int,
        num_slots: int,
        device_memory: Tensor | None = None,
    ) -> "Slots":
        """The slots of another process of the same user, by their `path`.

        The other arguments must be those of `create`.
        """
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC), modules, max_rank, num_slots, device_memory)

    @property
    def path(self) -> str:
        """By which `open` finds these slots in another process, until this one closes them."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def write(self, slot: int, bank: int, owner: int, version: int, weights: Weights) -> None:
        """Write a version into a bank. weights: per module A [rank, in] and B [out, rank].

        Raises ValueError if the weights are not one pair for each module, all of one rank up to max_rank.
        """
        if weights.keys() != self.modules.keys():
            raise ValueError(f"weights of {len(weights)} modules for slots of {len(self.modules)}")
        rank = len(next(iter(weights.values()))[0])
        if not 0 < rank <= self.max_rank:
            raise ValueError(f"rank {rank} does not fit into slots of rank 1 to {self.max_rank}")
        header = self._header(slot, bank)
        header[2] = 0
        for name, pair in self.views(slot, bank, rank).items():
            for view, values in zip(pair, weights[name], strict=True):
                if view.shape != values.shape:
                    raise ValueError(f"{name}: {tuple(values.shape)} where {tuple(view.shape)} is expected")
                view.copy_(values)
        if self._weights.is_cuda:  # the header must not be seen before the GPU has done the copies
            torch.cuda.current_stream(self._weights.device).synchronize()
        header[0], header[1], header[3] = owner, version, header[3] + 1
        header[2] = rank

    @contextmanager
    def read(
        self,
        slot: int,
        bank: int,
        owner: int,
        version: int,
    ) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Views of a version's weights, to be copied inside the `with`. Raises as `holding` does."""
        with self.holding(slot, bank, owner, version) as rank:
            yield self.views(slot, bank, rank)

    @contextmanager
    def holding(self, slot: int, bank: int, owner: int, version: int) -> Iterator[int]:
        """The rank of the version that the bank holds. Its `views` are to be copied inside the `with`.

        Raises StaleSlot if the bank holds anything else, also at the end of the `with`: then the copy is
        invalid. Copies of GPU memory may still be in flight after the `with`. The bank may be written again
        only when they are done.
        """
        header = self._header(slot, bank)
        before = header.tolist()
        if before[:2] != [owner, version] or before[2] == 0:
            asked = f"owner {owner} version {version}"
            raise StaleSlot(f"slot {slot} bank {bank} holds {before[:3]}, not {asked}")
        yield before[2]
        if header.tolist() != before:
            raise StaleSlot(f"slot {slot} bank {bank} was written while it was read")

    def clear(self, slot: int) -> None:
        """Both banks hold no version.

        Their pages of the file are freed and read as zeros; GPU memory stays as it is.
        """
        self._map.madvise(mmap.MADV_REMOVE, self._begin(slot, 0), 2 * self._bank_bytes)

    def close(self) -> None:
        """Close the file. The memory stays mapped while there are views of it."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            del self._bytes, self._weights, self._map

    def _begin(self, slot: int, bank: int) -> int:
        if not (0 <= slot < self.num_slots and 0 <= bank < 2):
            raise IndexError(f"slot {slot} bank {bank} of {self.num_slots} slots of 2 banks")
        return (2 * slot + bank) * self._bank_bytes

    def _header(self, slot: int, bank: int) -> Tensor:
        begin = self._begin(slot, bank)
        return self._bytes[begin : begin + HEADER_BYTES].view(torch.int64)

    def views(self, slot: int, bank: int, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Where a bank has weights of this rank, valid or not: per module A [rank, in], B [out, rank]."""
        floats = self._weights[self._begin(slot, bank) :][: self._bank_bytes].view(torch.float32)
        views = {}
        for name, (inputs, outputs) in self.modules.items():
            pair = floats[self._offsets[name] // 4 :][: rank * (inputs + outputs)]
            a, b = pair.split([rank * inputs, rank * outputs])
            views[name] = (a.view(rank, inputs), b.view(outputs, rank))
        return views


def _layout(modules: Mapping[str, tuple[int, int]], max_rank: int) -> tuple[dict[str, int], int]:
    """Where each module's weights begin in a bank, and the size of a bank, in bytes."""
    offsets, end = {}, HEADER_BYTES
    for name, features in sorted(modules.items()):
        offsets[name] = end
        end += -(-4 * max_rank * sum(features) // 64) * 64
    return offsets, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
