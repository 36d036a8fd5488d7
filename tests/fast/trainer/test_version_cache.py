"""Versions that the trainer remembers: what it takes from memory is what it would have trained."""

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from transformers import AutoModelForCausalLM

from vllm_longctx.temp_lora import messages as m
from vllm_longctx.temp_lora.slots import Slots
from vllm_longctx.trainer import sidecar
from vllm_longctx.trainer.sidecar import Sidecar
from vllm_longctx.trainer.trainer import State, Trainer
from vllm_longctx.trainer.version_cache import VersionCache
from vllm_longctx.trainer.version_files import VersionFiles, trained_by

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = m.Recipe(rank=4, alpha=8, dropout=0.1, learning_rate=1e-2, warmup_blocks=0)


def state(floats: int) -> State:
    return State([torch.zeros(floats)], [], torch.zeros(0, dtype=torch.uint8))


def tokens(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(20) for _ in range(40)]


@pytest.fixture(scope="module")
def trainer(tiny_llama: Path) -> Trainer:
    return Trainer(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32))


@pytest.fixture(autouse=True)
def _forget_adapters(trainer: Trainer) -> Iterator[None]:
    yield
    trainer.drop_all()


def test_the_least_recently_used_goes_first() -> None:
    cache = VersionCache(limit=12 * 4)
    for name in (b"a", b"b", b"c"):
        assert cache.put(name, state(4), 1, [name]) == []
    assert cache.get(b"a") is not None and cache.get(None) is None and cache.get(b"x") is None
    assert cache.put(b"d", state(4), 1, [b"d"]) == [b"b"]
    assert cache.put(b"e", state(8), 1, [b"e", b"c", b"x"]) == [b"a", b"d"]
    assert cache.get(b"c") is not None and cache.get(b"e") is not None
    assert cache.put(b"f", state(4), 1, [b"f", b"e", b"c"]) == [b"f"], "the others are more useful"


def test_what_is_too_large_costs_nothing_else() -> None:
    cache = VersionCache(limit=12 * 4)
    cache.put(b"a", state(12), 1, [])
    assert cache.put(b"b", state(13), 1, []) == [b"b"]
    assert cache.get(b"a") is not None
    assert VersionCache().put(b"a", state(1), 1, []) == [b"a"]


def test_training_goes_on_from_a_state_as_from_the_adapter_itself(trainer: Trainer) -> None:
    """Its weights, AdamW's moments and what dropout draws; and a state that is used stays what it was."""
    trainer.begin(1, RECIPE)
    trainer.train(1, 1, tokens(1), 16)
    kept = trainer.state(1)
    losses = [trainer.train(1, version, tokens(version), 16) for version in (2, 3)]
    for owner in (2, 3):
        trainer.begin(owner, RECIPE)
        trainer.train(owner, 1, tokens(9), 16)
        trainer.restore(owner, kept)
        assert [trainer.train(owner, v, tokens(v), 16) for v in (2, 3)] == losses
        for one, other in zip(trainer.state(1).weights, trainer.state(owner).weights, strict=True):
            assert torch.equal(one, other)
        assert trainer.content(owner) == trainer.content(1)
    assert kept.nbytes == 3 * sum(w.nbytes for w in kept.weights) + 4 * len(kept.weights) + kept.rng.nbytes


def test_a_state_of_other_shapes_is_refused_and_changes_nothing(trainer: Trainer) -> None:
    trainer.begin(1, RECIPE)
    trainer.begin(2, m.Recipe(rank=2))
    trainer.train(1, 1, tokens(1), 16)
    before = trainer.content(2)
    with pytest.raises(ValueError, match="other shapes"):
        trainer.restore(2, trainer.state(1))
    assert trainer.content(2) == before


class Engine:
    """The engine's end of a trainer in this process."""

    def __init__(self, trainer: Trainer, cache_bytes: int, cache_files: m.CacheFiles | None = None):
        self.context = zmq.Context()
        router, self.socket = self.context.socket(zmq.ROUTER), self.context.socket(zmq.DEALER)
        router.bind("inproc://trainer")
        self.socket.connect("inproc://trainer")
        self.router, self.sidecar = router, Sidecar(trainer, router, None)
        self.slots = Slots.create(trainer.modules, 8, 3)
        join = m.Join(cache_bytes=cache_bytes, cache_files=cache_files)
        self.told = self.ask(join, m.OpenSlots(self.slots.path, 8, 3))[1:]

    def close(self) -> None:
        self.slots.close()
        for socket in (self.socket, self.router):
            socket.close(linger=0)
        self.context.term()

    def ask(self, *jobs: m.Job) -> list[Any]:
        reports = []
        for job in jobs:
            self.socket.send(m.encode(job))
            self.sidecar.serve_one()
            while self.socket.poll(0):
                reports.append(m.decode_report(self.socket.recv()))
        return reports

    def train(self, owner: int, version: int, text: int, address: bytes | None) -> list[Any]:
        uses = [] if address is None else [address]
        job = m.Train(owner, owner, version % 2, version, tokens(text), 16, address, uses)
        return self.ask(job)[1:]  # without Started

    def read(self, owner: int, version: int) -> list[torch.Tensor]:
        with self.slots.read(owner, version % 2, owner, version) as views:
            return [tensor.clone() for pair in views.values() for tensor in pair]


@pytest.fixture
def engine(trainer: Trainer, request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = Engine(trainer, getattr(request, "param", 1 << 30))
    yield engine
    engine.close()


def test_a_block_is_trained_once_for_all_texts_that_begin_alike(engine: Engine) -> None:
    for owner in (0, 1, 2):
        engine.ask(m.Begin(owner, owner, RECIPE))
    first, kept = engine.train(0, 1, 1, b"1")
    assert first.losses and kept == m.Kept(b"1", [])
    second, kept = engine.train(0, 2, 2, b"2")
    (again,) = engine.train(1, 1, 1, b"1")
    assert again.losses == [] and (again.owner, again.version, again.bank) == (1, 1, 1)
    trained, kept = engine.train(1, 2, 2, b"another name, to have it trained")
    assert trained.losses == second.losses
    assert all(map(torch.equal, engine.read(0, 2), engine.read(1, 2)))
    (trained,) = engine.train(2, 1, 1, None)
    assert trained.losses == first.losses, "without a name nothing is looked up"


def test_the_first_version_that_is_remembered_is_recalled(engine: Engine) -> None:
    engine.ask(m.Begin(0, 0, RECIPE))
    for version in (1, 2, 3):
        engine.train(0, version, version, bytes([version]))
    engine.ask(m.Begin(1, 1, RECIPE), m.Begin(2, 2, RECIPE))
    assert engine.ask(m.Recall(1, 1, 0, [(7, b"7"), (2, b"\2"), (1, b"\1")])) == [m.Recalled(1, 2)]
    trained, _ = engine.train(1, 3, 3, b"another name")
    assert all(map(torch.equal, engine.read(0, 3), engine.read(1, 3))) and trained.losses
    assert engine.ask(m.Recall(2, 2, 0, [(7, b"7")])) == [m.Recalled(2, 0)]
    trained, _ = engine.train(2, 1, 1, b"a third name")
    assert trained.losses, "after a miss it is as it was"


@pytest.mark.parametrize("engine", [1000], indirect=True)
def test_a_cache_smaller_than_a_version_only_misses(engine: Engine) -> None:
    engine.ask(m.Begin(0, 0, RECIPE), m.Begin(1, 1, RECIPE))
    trained, kept = engine.train(0, 1, 1, b"1")
    assert kept == m.Kept(b"1", [b"1"])
    again, _ = engine.train(1, 1, 1, b"1")
    assert again.losses == trained.losses
    assert engine.ask(m.Recall(1, 1, 0, [(1, b"1")])) == [m.Recalled(1, 0)]


def test_no_memory_to_keep_a_version_is_only_a_miss(
    engine: Engine, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def state(owner: int) -> State:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    engine.ask(m.Begin(0, 0, RECIPE))
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "state", state)
        (trained,) = engine.train(0, 1, 1, b"1")
    assert trained.losses
    trained, kept = engine.train(0, 2, 2, b"2")
    assert trained.losses and kept == m.Kept(b"2", [])


def test_another_engine_finds_nothing(engine: Engine) -> None:
    engine.ask(m.Begin(0, 0, RECIPE))
    engine.train(0, 1, 1, b"1")
    engine.ask(m.Join(cache_bytes=1 << 30), m.OpenSlots(engine.slots.path, 8, 3), m.Begin(0, 0, RECIPE))
    assert engine.ask(m.Recall(0, 0, 0, [(1, b"1")])) == [m.Recalled(0, 0)]


def test_versions_on_disk_are_those_of_another_engine_too(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written while there is no job, found at the start and later, and trained anew once damaged."""
    monkeypatch.setattr(sidecar, "IDLE_MS", 1)
    one, other = (Engine(trainer, 1 << 30, m.CacheFiles(str(tmp_path), 1 << 30)) for _ in range(2))
    assert one.told == other.told == []
    one.ask(m.Begin(0, 0, RECIPE))
    losses = [one.train(0, 1, 1, b"1" * 32)[0].losses, one.train(0, 2, 2, b"2" * 32)[0].losses]
    original = one.read(0, 2)
    for engine in (one, other):  # both work for nobody else meanwhile
        threading.Timer(0.2, engine.socket.send, [m.encode(m.Drop(9))]).start()
        engine.sidecar.serve_one()
    assert m.decode_report(other.socket.recv()) == m.Kept(b"2" * 32, []), "the one that the text needs"
    trainer.drop_all()
    other.ask(m.Begin(0, 0, RECIPE))
    assert other.ask(m.Recall(0, 0, 0, [(2, b"2" * 32), (1, b"1" * 32)])) == [m.Recalled(0, 2)]
    assert all(map(torch.equal, other.read(0, 2), original))
    third = Engine(trainer, 1 << 30, m.CacheFiles(str(tmp_path), 1 << 30))
    assert third.told == [m.Kept(b"2" * 32, [])]
    third.ask(m.Begin(0, 0, RECIPE))
    assert third.train(0, 1, 1, b"1" * 32)[0].losses == losses[0]
    (found,) = third.train(0, 2, 2, b"2" * 32)
    assert found.losses == [] and all(map(torch.equal, third.read(0, 2), original))
    for engine in (one, other, third):
        engine.close()


@pytest.mark.parametrize("damaged", [False, True])
def test_an_engine_that_joins_again_finds_what_was_learned(
    trainer: Trainer, tmp_path: Path, damaged: bool
) -> None:
    files = m.CacheFiles(str(tmp_path), 1 << 30)
    engine = Engine(trainer, 1 << 30, files)
    engine.ask(m.Begin(0, 0, RECIPE))
    (trained, _) = engine.train(0, 1, 1, b"1" * 32)
    before = engine.read(0, 1)
    engine.ask(m.Leave())
    (entry,) = tmp_path.iterdir()
    if damaged:
        (entry / "version.safetensors").write_bytes(b"")
    reports = engine.ask(
        m.Join(cache_bytes=1 << 30, cache_files=files),
        m.OpenSlots(engine.slots.path, 8, 3),
        m.Begin(0, 0, RECIPE),
    )
    assert m.Kept(b"1" * 32, []) in reports
    again = engine.train(0, 1, 1, b"1" * 32)[0]
    assert again.losses == (trained.losses if damaged else [])
    assert all(map(torch.equal, engine.read(0, 1), before))
    engine.close()


def test_a_version_of_a_stranger_is_trained_anew(trainer: Trainer, tmp_path: Path) -> None:
    """Its name, trainer and checksum are right, its shapes are not."""
    made = VersionFiles(tmp_path, 1 << 30, trained_by(trainer.device))
    made.put(b"1" * 32, state(8))
    engine = Engine(trainer, 1 << 30, m.CacheFiles(str(tmp_path), 1 << 30))
    engine.ask(m.Begin(0, 0, RECIPE))
    assert engine.ask(m.Recall(0, 0, 0, [(1, b"1" * 32)])) == [m.Recalled(0, 0)]
    assert list(tmp_path.iterdir()) == []
    assert engine.train(0, 1, 1, b"1" * 32)[0].losses
    engine.close()
