"""Adapter weights in memory shared by the trainer, the scheduler and the workers.

The memory is an anonymous file: nothing is on disk, pages exist once written, and all is gone with the last process that
holds it. Each slot has two banks, so that one version can be read while the next is written. A trainer and a worker on one GPU
may keep the weights in memory there; then only the banks' headers, which say what is valid, are in the file.
"""

import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

Weights = Mapping[str, tuple[Tensor, Tensor]]
HEADER_BYTES = 64  # int64: owner, version, rank (0: nothing valid in this bank), number of writes so far


class StaleSlot(Exception):
    """A bank does not hold, or while it was read no longer held, the version that was asked for."""


class Slots:
    """Per module a bank holds float32 A [rank, in] and B [out, rank], B already multiplied by alpha / rank.

    modules: Of each module the (in, out) features.
    device_memory: uint8 [`size`], where the weights are instead of in the file.
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
        if os.fstat(fd).st_size != size:
            raise ValueError(f"the slots are {os.fstat(fd).st_size} bytes, but this model, rank and number make {size}")
        self._fd: int | None = fd
        self._map = mmap.mmap(fd, size)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._weights = self._bytes if device_memory is None else device_memory
        if len(self._weights) != size:
            raise ValueError(
                f"the slots' device memory is {len(self._weights)} bytes, but this model, rank and number make {size}"
            )

    @staticmethod
    def size(modules: Mapping[str, tuple[int, int]], max_rank: int, num_slots: int) -> int:
        """Bytes of all banks."""
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
        """The slots of another process of the same user, by their `path`; `create`'s arguments must be given again."""
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC), modules, max_rank, num_slots, device_memory)

    @property
    def path(self) -> str:
        """Opens these slots in any process, as long as this one has not closed them."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def write(self, slot: int, bank: int, owner: int, version: int, weights: Weights) -> None:
        """Raises ValueError if the weights are not one pair for each module, all of one rank up to max_rank."""
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
        if self._weights.is_cuda:  # nobody may see the header before the GPU has done the copies
            torch.cuda.current_stream(self._weights.device).synchronize()
        header[0], header[1], header[3] = owner, version, header[3] + 1
        header[2] = rank

    @contextmanager
    def read(self, slot: int, bank: int, owner: int, version: int) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Views into the memory, to be copied inside the `with`. Raises as `holding` does."""
        with self.holding(slot, bank, owner, version) as rank:
            yield self.views(slot, bank, rank)

    @contextmanager
    def holding(self, slot: int, bank: int, owner: int, version: int) -> Iterator[int]:
        """The rank of what the bank holds, whose `views` are to be copied inside the `with`.

        Raises StaleSlot if the bank holds anything else, at the end of the `with` too: then the copy is worth nothing. Copies
        of device memory may still be under way then: whoever writes this bank again must know that they were made.
        """
        header = self._header(slot, bank)
        before = header.tolist()
        if before[:2] != [owner, version] or before[2] == 0:
            raise StaleSlot(f"slot {slot} bank {bank} holds {before[:3]}, not owner {owner} version {version}")
        yield before[2]
        if header.tolist() != before:
            raise StaleSlot(f"slot {slot} bank {bank} was written while it was read")

    def clear(self, slot: int) -> None:
        """Both banks read as zeros, hold no version, and their memory is given back; of device memory, hold no version."""
        self._map.madvise(mmap.MADV_REMOVE, self._begin(slot, 0), 2 * self._bank_bytes)

    def close(self) -> None:
        """The memory stays mapped while views of it are held."""
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
        """Where a bank has weights of this rank, whether it holds any or not: always the same memory."""
        floats = self._weights[self._begin(slot, bank) :][: self._bank_bytes].view(torch.float32)
        views = {}
        for name, (inputs, outputs) in self.modules.items():
            a, b = floats[self._offsets[name] // 4 :][: rank * (inputs + outputs)].split([rank * inputs, rank * outputs])
            views[name] = (a.view(rank, inputs), b.view(outputs, rank))
        return views


def _layout(modules: Mapping[str, tuple[int, int]], max_rank: int) -> tuple[dict[str, int], int]:
    """Where each module's weights begin in a bank, and the bank's length, in bytes."""
    offsets, end = {}, HEADER_BYTES
    for name, features in sorted(modules.items()):
        offsets[name] = end
        end += -(-4 * max_rank * sum(features) // 64) * 64
    return offsets, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
