import gc
import multiprocessing
import os

import pytest
import torch

from vllm_longctx.temp_lora.slots import Slots, StaleSlot

MODULES = {"q": (24, 40), "down": (100, 8)}


def random_weights(rank: int, scale: float = 1.0) -> dict:
    return {
        n: (scale * torch.randn(rank, inputs), scale * torch.randn(out, rank))
        for n, (inputs, out) in MODULES.items()
    }


def assert_holds(slots: Slots, slot: int, bank: int, owner: int, version: int, weights: dict) -> None:
    with slots.read(slot, bank, owner, version) as views:
        assert views.keys() == weights.keys()
        for name, pair in views.items():
            assert all(torch.equal(x, y) for x, y in zip(pair, weights[name], strict=True))


@pytest.fixture(params=["in the file", "in device memory"])
def slots(request: pytest.FixtureRequest):
    slots = Slots.create(MODULES, max_rank=8, num_slots=3)
    if request.param == "in device memory":
        memory = torch.zeros(Slots.size(MODULES, 8, 3), dtype=torch.uint8)
        opened = Slots.open(slots.path, MODULES, 8, 3, memory)
        yield opened
        assert not slots.views(1, 1, 8)["q"][0].any(), "the file has headers only"
        opened.close()
    else:
        yield slots
    slots.close()


def test_every_bank_keeps_its_own(slots: Slots):
    written = {}
    for slot in range(3):
        for bank in range(2):
            written[slot, bank] = random_weights(rank=1 + 2 * slot + bank)
            slots.write(slot, bank, 10 + slot, bank, written[slot, bank])
    for (slot, bank), weights in written.items():
        assert_holds(slots, slot, bank, 10 + slot, bank, weights)


def double_version_2(path: str) -> None:
    slots = Slots.open(path, MODULES, 8, 3)
    with slots.read(1, 0, 5, 2) as views:
        doubled = {name: (2 * a, 2 * b) for name, (a, b) in views.items()}
    slots.write(1, 1, 5, 3, doubled)


def test_other_processes_see_the_same_memory():
    slots = Slots.create(MODULES, max_rank=8, num_slots=3)
    weights = random_weights(8)
    slots.write(1, 0, 5, 2, weights)
    other = multiprocessing.get_context("fork").Process(target=double_version_2, args=(slots.path,))
    other.start()
    other.join()
    assert other.exitcode == 0
    assert_holds(slots, 1, 1, 5, 3, {name: (2 * a, 2 * b) for name, (a, b) in weights.items()})
    slots.close()


def test_only_the_version_asked_for_is_read(slots: Slots):
    def read(owner: int, version: int) -> None:
        with slots.read(0, 0, owner, version):
            pass

    with pytest.raises(StaleSlot):
        read(0, 0)
    slots.write(0, 0, 5, 2, random_weights(4))
    read(5, 2)
    for owner, version in [(5, 1), (5, 3), (4, 2), (0, 0)]:
        with pytest.raises(StaleSlot, match=rf"holds \[5, 2, 4\], not owner {owner} version {version}"):
            read(owner, version)


@pytest.mark.parametrize("version", [3, 2], ids=["next version", "same version again"])
def test_a_write_during_a_read_is_noticed(slots: Slots, version: int):
    slots.write(0, 0, 5, 2, random_weights(4))
    with pytest.raises(StaleSlot, match="while it was read"), slots.read(0, 0, 5, 2):
        slots.write(0, 0, 5, version, random_weights(4))


def test_an_unfinished_write_is_not_read(slots: Slots):
    slots.write(0, 0, 5, 2, random_weights(4))
    torn = random_weights(4)
    torn["q"] = (torn["q"][0], torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"q: \(1, 4\) where \(40, 4\) is expected"):
        slots.write(0, 0, 5, 2, torn)
    with pytest.raises(StaleSlot), slots.read(0, 0, 5, 2):
        pass


def test_what_one_clears_no_other_reads():
    """The scheduler clears; the worker and the trainer have the device memory."""
    scheduler = Slots.create(MODULES, 8, 3)
    memory = torch.zeros(Slots.size(MODULES, 8, 3), dtype=torch.uint8)
    trainer, worker = (Slots.open(scheduler.path, MODULES, 8, 3, memory) for _ in range(2))
    weights = random_weights(8)
    trainer.write(2, 1, 5, 1, weights)
    assert_holds(worker, 2, 1, 5, 1, weights)
    scheduler.clear(2)
    with pytest.raises(StaleSlot), worker.read(2, 1, 5, 1):
        pass
    with pytest.raises(
        ValueError, match=f"device memory is {len(memory) - 1} bytes, but this model, rank and number make"
    ):
        Slots.open(scheduler.path, MODULES, 8, 3, memory[1:])
    for one in (worker, trainer, scheduler):
        one.close()


def test_clear_leaves_zeros_and_gives_memory_back():
    slots = Slots.create({"big": (1024, 1024)}, max_rank=64, num_slots=2)
    for slot in range(2):
        slots.write(slot, 0, 5, 1, {"big": (torch.ones(64, 1024), torch.ones(1024, 64))})
    with slots.read(0, 0, 5, 1) as views:
        pair = views["big"]
    used = os.stat(slots.path).st_blocks
    slots.clear(0)
    assert os.stat(slots.path).st_blocks <= 0.6 * used
    assert not pair[0].any() and not pair[1].any()
    with pytest.raises(StaleSlot), slots.read(0, 0, 5, 1):
        pass
    with slots.read(1, 0, 5, 1) as views:
        assert (views["big"][0] == 1).all()
    slots.close()


@pytest.mark.parametrize("rank", [0, 9])
def test_ranks_must_fit(slots: Slots, rank: int):
    with pytest.raises(ValueError, match=f"rank {rank} does not fit into slots of rank 1 to 8"):
        slots.write(0, 0, 5, 2, random_weights(rank))


def test_slots_modules_and_sizes_must_exist(slots: Slots):
    with pytest.raises(IndexError, match="slot 3 bank 0"):
        slots.write(3, 0, 5, 2, random_weights(4))
    with pytest.raises(ValueError, match="weights of 1 modules for slots of 2"):
        slots.write(0, 0, 5, 2, {"q": random_weights(4)["q"]})
    with pytest.raises(ValueError, match="this model, rank and number make"):
        Slots.open(slots.path, MODULES, 16, 3)


def test_close_leaves_no_open_file():
    gc.collect()
    before = os.listdir("/proc/self/fd")
    slots = Slots.create(MODULES, 8, 3)
    other = Slots.open(slots.path, MODULES, 8, 3)
    slots.write(0, 0, 5, 2, random_weights(4))
    assert_holds(other, 0, 0, 5, 2, {n: (a.clone(), b.clone()) for n, (a, b) in slots.views(0, 0, 4).items()})
    for one in (slots, other):
        one.close()
        one.close()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == len(before)
