import gc
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch
import zmq
from transformers import AutoModelForCausalLM

from tests.support.trainer_client import TIMEOUT_S, client_of, hear
from vllm_longctx.config import LongContextError
from vllm_longctx.processes import SOCKETS
from vllm_longctx.temp_lora import messages as m
from vllm_longctx.temp_lora.client import TrainerClient
from vllm_longctx.temp_lora.slots import Slots, StaleSlot
from vllm_longctx.trainer import sidecar
from vllm_longctx.trainer.sidecar import Sidecar
from vllm_longctx.trainer.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = m.Recipe(rank=4, alpha=8, dropout=0.1, learning_rate=1e-2, warmup_blocks=0)
POISON = 511  # its embedding is NaN


def tokens(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(20) for _ in range(40)]


def ask(client: TrainerClient, job):
    client.send(job)
    return hear(client, *m.ANSWERS, m.Dead)[-1]


def read(client: TrainerClient, slot: int, bank: int, owner: int, version: int) -> dict:
    with client.slots.read(slot, bank, owner, version) as views:
        return {name: (a.clone(), b.clone()) for name, (a, b) in views.items()}


def assert_equal(one, other) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_until(condition) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("poisoned")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.model.embed_tokens.weight.data[POISON] = float("nan")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def started(checkpoint: Path, adapters: Path):
    client = client_of(checkpoint, adapters_root=adapters, timeout_s=60.0)
    client.start()
    client.send(m.Begin(1, 0, RECIPE))  # held until the model is loaded
    client.send(m.Train(1, 0, 1, 1, tokens(1), 16))
    assert client.slots is None
    reports = hear(client, m.Trained, m.Failed)
    assert [type(report) for report in reports] == [m.Ready, m.Began, m.Started, m.Trained]
    client.send(m.Drop(1))
    yield client
    client.close()


@pytest.fixture
def client(started: TrainerClient):
    yield started
    for owner in range(1, 10):
        started.send(m.Drop(owner))
    for slot in range(3):
        started.slots.clear(slot)


def test_versions_in_the_slots_are_the_trainers(client: TrainerClient, tiny_llama: Path):
    trainer = Trainer(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32))
    client.send(m.Begin(1, 2, RECIPE))
    trainer.begin(1, RECIPE)
    for version in (1, 2, 3):
        client.send(m.Train(1, 2, version % 2, version, tokens(version), 16))
        trained = hear(client, m.Trained)[-1]
        assert trained.losses == pytest.approx(trainer.train(1, version, tokens(version), 16), abs=1e-5)
        assert (trained.owner, trained.slot, trained.bank, trained.version) == (1, 2, version % 2, version)
        assert 0 < trained.seconds < TIMEOUT_S
        assert_equal(read(client, 2, version % 2, 1, version), trainer.weights(1))
    with pytest.raises(StaleSlot):
        read(client, 2, 1, 1, 1)


def test_a_probe_is_computed_with_the_adapter_in_the_slot(client: TrainerClient, tiny_llama: Path):
    trainer = Trainer(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32))
    trainer.begin(1, RECIPE)
    trainer.randomize(1)
    logprobs = client.probe_adapter(m.Probe(1, 2, RECIPE, tokens(1)))
    assert logprobs == pytest.approx(trainer.logprobs(tokens(1), 1), abs=1e-4)
    assert_equal(read(client, 2, 0, 1, 0), trainer.weights(1))
    too_large = m.msgspec.structs.replace(RECIPE, rank=9)
    with pytest.raises(LongContextError, match="no adapter works: ValueError: rank 9 does not fit"):
        client.probe_adapter(m.Probe(1, 2, too_large, tokens(1)))
    assert ask(client, m.Begin(1, 2, RECIPE)) == m.Began(1), "a probe leaves no adapter behind"


def test_a_failed_block_is_answered_and_the_next_one_trains(client: TrainerClient):
    client.send(m.Begin(1, 0, RECIPE))
    client.send(m.Train(1, 0, 1, 1, tokens(1), 16))
    hear(client, m.Trained)
    version_1 = read(client, 0, 1, 1, 1)
    failed = ask(client, m.Train(1, 0, 0, 2, [POISON, *tokens(2)], 16))
    assert failed == m.Failed(1, 2, "NotFinite: the loss is nan")
    assert_equal(read(client, 0, 1, 1, 1), version_1)
    assert isinstance(ask(client, m.Train(1, 0, 0, 3, tokens(3), 16)), m.Trained)
    read(client, 0, 0, 1, 3)


@pytest.mark.parametrize(
    ("job", "version", "reason"),
    [
        (m.Begin(5, 0, RECIPE, start_from="nothing"), 0, "there is no adapter 'nothing'"),
        (m.Begin(5, 0, RECIPE, start_from="../etc"), 0, "adapter name '../etc'"),
        (m.Begin(5, 0, m.Recipe(rank=9)), 0, "rank 9 is more than the server's slots hold (8)"),
        (m.Begin(5, 7, RECIPE), None, ""),
        (m.Resume(5, 0, 1, 3, RECIPE), 3, "StaleSlot"),
        (m.Train(6, 0, 1, 1, [1, 2, 3], 1), 1, "owner 6 has no adapter"),
        (m.Train(6, 0, 1, 1, [1, 2, 999], 1), 1, "owner 6 has no adapter"),
    ],
)
def test_jobs_that_cannot_be_done_are_answered(client: TrainerClient, job, version: int | None, reason: str):
    answer = ask(client, job)
    if version is None:
        assert answer == m.Began(job.owner)
        answer = ask(client, m.Train(job.owner, 7, 1, 1, tokens(1), 16))
        assert answer == m.Failed(job.owner, 1, "IndexError: slot 7 bank 1 of 3 slots of 2 banks")
        return
    assert isinstance(answer, m.Failed) and (answer.owner, answer.version) == (job.owner, version)
    assert reason in answer.reason
    assert ask(client, m.Begin(5, 0, RECIPE)) == m.Began(5), "nothing of the failed one must be left"


def test_tokens_outside_the_vocabulary_are_answered(client: TrainerClient):
    client.send(m.Begin(1, 0, RECIPE))
    client.send(m.Train(1, 0, 1, 1, [1, 2, 9999, 4], 2))
    assert "out of range" in hear(client, m.Failed)[-1].reason


def test_a_saved_adapter_is_another_requests_start(client: TrainerClient, adapters: Path):
    client.send(m.Begin(1, 0, RECIPE))
    client.send(m.Train(1, 0, 1, 1, tokens(1), 16))
    client.send(m.Save(1, "mine", 41))
    assert hear(client, m.Saved, m.SaveFailed)[-1] == m.Saved(1, "mine")
    assert json.loads((adapters / "mine" / "longctx.json").read_text())["position"] == 41
    began = ask(client, m.Begin(2, 1, RECIPE, start_from="mine"))
    assert began == m.Began(2, began.content, version=0) and began.content
    assert_equal(read(client, 1, 0, 2, 0), read(client, 0, 1, 1, 1))
    client.send(m.Save(9, "none", 1))
    assert hear(client, m.SaveFailed)[-1] == m.SaveFailed(9, "none", "ValueError: owner 9 has no adapter")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/etc", "a/b", ".hidden", "-x", "a\n", "a\0", "ü", "x" * 129]
)
def test_names_of_adapters_are_no_paths(tmp_path: Path, name: str):
    with pytest.raises(ValueError, match="adapter name"):
        m.adapter_path(str(tmp_path), name)


def test_names_of_adapters():
    assert m.adapter_path("/root", "War-and_Peace.2") == Path("/root/War-and_Peace.2")
    with pytest.raises(ValueError, match="has no adapters_root; set it"):
        m.adapter_path(None, "x")


def test_dropped_training_is_not_done(client: TrainerClient):
    client.send(m.Begin(1, 0, RECIPE))
    client.send(m.Begin(2, 1, RECIPE))
    for version in range(1, 9):
        client.send(m.Train(1, 0, version % 2, version, tokens(version), 16))
    client.send(m.Drop(1))
    client.send(m.Train(2, 1, 1, 1, tokens(1), 16))
    reports = hear(client, m.Trained)
    while reports[-1].owner == 1:  # those that were done before the Drop came
        reports += hear(client, m.Trained)
    dropped = [r for r in reports if isinstance(r, m.Failed)]
    assert dropped and {(r.owner, r.reason) for r in dropped} == {(1, "ValueError: owner 1 was dropped")}
    assert len([r for r in reports if isinstance(r, m.ANSWERS) and r.owner == 1]) == 1 + 8


class ExhaustedTrainer(Trainer):
    def train(self, *args):
        raise MemoryError


def test_running_out_of_memory_is_answered(tiny_llama: Path):
    trainer = ExhaustedTrainer(AutoModelForCausalLM.from_pretrained(tiny_llama))
    slots = Slots.create(trainer.modules, 8, 1)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as engine:
        router.bind("inproc://trainer")
        engine.connect("inproc://trainer")
        sidecar = Sidecar(trainer, router, None)
        for job in [
            m.Join(),
            m.OpenSlots(slots.path, 8, 1),
            m.Begin(1, 0, RECIPE),
            m.Train(1, 0, 1, 1, tokens(1), 16),
        ]:
            engine.send(m.encode(job))
            sidecar.serve_one()
        reports = [m.decode_report(engine.recv()) for _ in range(4)]
        assert reports[1:] == [m.Began(1), m.Started(1, 1), m.Failed(1, 1, "MemoryError: ")]
        engine.send(b"\xc1")
        engine.send(m.encode(m.Drop(1)))
        sidecar.serve_one()
        assert "does not understand this engine" in m.decode_report(engine.recv()).reason
    slots.close()


@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGSTOP],
    ids=["killed", "hangs"],
)
def test_a_trainer_that_fails_while_training_is_replaced(
    client: TrainerClient, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
):
    client.send(m.Begin(1, 0, RECIPE))
    client.send(m.Train(1, 0, 1, 1, tokens(1), 16))
    hear(client, m.Trained)
    version_1, old = read(client, 0, 1, 1, 1), client.process_id
    client.send(m.Train(1, 0, 0, 2, tokens(2) * 100, 2000))
    hear(client, m.Started)
    os.kill(old, number)
    if number == signal.SIGSTOP:
        monkeypatch.setattr(client, "_trainer", client._trainer.model_copy(update={"timeout_s": 0.5}))
    assert hear(client, m.Restarted) == [m.Restarted(1)]
    monkeypatch.undo()
    assert is_gone(old)
    assert_equal(read(client, 0, 1, 1, 1), version_1)
    client.send(m.Resume(1, 0, 1, 1, RECIPE))
    client.send(m.Train(1, 0, 0, 2, tokens(2), 16))
    assert [type(r) for r in hear(client, m.Trained)] == [m.Ready, m.Began, m.Started, m.Trained]
    assert client.process_id != old
    moved = (
        read(client, 0, 0, 1, 2)["model.layers.0.mlp.up_proj"][1] - version_1["model.layers.0.mlp.up_proj"][1]
    )
    assert 0 < moved.abs().max() < 0.1, "training goes on from version 1"


@pytest.mark.slow
def test_the_last_words_of_a_trainer_come_before_its_restart(client: TrainerClient):
    """What they make the engine send must not go to the next trainer, which knows nothing yet."""
    client.send(m.Begin(1, 0, RECIPE))
    client.send(m.Train(1, 0, 1, 1, tokens(1), 16))

    def trained() -> bool:
        try:
            read(client, 0, 1, 1, 1)
        except StaleSlot:
            return False
        return True

    wait_until(trained)
    time.sleep(0.5)  # it says so right afterwards
    os.kill(client.process_id, signal.SIGKILL)
    wait_until(lambda pid=client.process_id: is_gone(pid))
    heard = client.poll()
    assert heard and not any(isinstance(report, m.Restarted) for report in heard)
    client.send(m.Train(1, 0, 0, 2, tokens(2), 16))
    assert hear(client, m.Restarted) == [m.Restarted(1)]
    client.send(m.Resume(1, 0, 1, 1, RECIPE))
    client.send(m.Train(1, 0, 0, 2, tokens(2), 16))
    assert [type(r) for r in hear(client, m.Trained, m.Failed)] == [m.Ready, m.Began, m.Started, m.Trained]


def test_a_trainer_that_cannot_be_started_again_does_not_end_the_engine(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    client = client_of(checkpoint, max_restarts=2)
    client.start()
    os.kill(client.process_id, signal.SIGKILL)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vllm_longctx.temp_lora.client.tempfile.mkdtemp", full)
    reports = hear(client, m.Dead)
    assert reports[:-1] == [m.Restarted()] * 2 and "could not be started: [Errno 28]" in reports[-1].reason
    client.close()


def test_a_trainer_that_is_not_understood_is_the_end(tmp_path: Path):
    address = f"ipc://{tmp_path}/trainer"
    client = client_of("none", address=address)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(address)
        client.start()
        engine, _ = router.recv_multipart()
        router.send_multipart([engine, b"\xc1"])
        (dead,) = hear(client, m.Dead)
    assert "says what this engine does not understand" in dead.reason
    client.close()


def test_too_many_restarts_are_the_end(checkpoint: Path):
    client = client_of(checkpoint, max_restarts=1)
    client.start()
    os.kill(client.process_id, signal.SIGKILL)
    assert hear(client, m.Restarted, m.Dead) == [m.Restarted()]
    client.send(m.Begin(1, 0, RECIPE))
    wait_until(lambda: client.poll() == [] and client.process_id is not None)
    os.kill(client.process_id, signal.SIGKILL)
    assert hear(client, m.Restarted, m.Dead) == [m.Dead("the trainer ended with code -9")]
    client.send(m.Drop(1))
    assert client.poll() == []
    client.close()


def test_a_start_that_takes_too_long_is_the_end(checkpoint: Path):
    client = client_of(checkpoint, start_timeout_s=0.1)
    client.start()
    pid = client.process_id
    (dead,) = hear(client, m.Dead)
    assert "was not ready after 0.1 s; if its model takes longer to load, allow it more" in dead.reason
    assert is_gone(pid)
    client.close()


@pytest.mark.slow
def test_a_restart_that_hangs_is_restarted(checkpoint: Path):
    client = client_of(checkpoint, start_timeout_s=60.0)
    client.start()
    hear(client, m.Ready)
    os.kill(client.process_id, signal.SIGKILL)
    assert hear(client, m.Restarted, m.Dead) == [m.Restarted()]
    wait_until(lambda: client.poll() == [] and client.process_id is not None)
    os.kill(hung := client.process_id, signal.SIGSTOP)
    client._trainer = client._trainer.model_copy(update={"start_timeout_s": 0.1})
    assert hear(client, m.Restarted, m.Dead) == [m.Restarted()]
    assert is_gone(hung)
    client._trainer = client._trainer.model_copy(update={"start_timeout_s": 60.0})
    assert hear(client, m.Ready)
    client.close()


def run_engine(checkpoint: Path, connection) -> None:
    client = client_of(checkpoint)
    client.start()
    connection.send((client.process_id, client._directory))
    hear(client, m.Ready)
    connection.send("ready")
    signal.pause()


@pytest.mark.parametrize("loaded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_trainer_ends_with_its_engine(checkpoint: Path, loaded: bool):
    context = multiprocessing.get_context("fork")  # what is imported need not be imported again
    ours, theirs = context.Pipe()
    engine = context.Process(target=run_engine, args=(checkpoint, theirs))
    engine.start()
    trainer, directory = ours.recv()
    assert os.stat(directory).st_mode & 0o777 == 0o700
    if loaded:
        assert ours.poll(TIMEOUT_S)
        assert not os.path.exists(directory), "both killed at once could not remove it any more"
    engine.kill()
    engine.join()
    wait_until(lambda: is_gone(trainer) and not os.path.exists(directory))


@pytest.mark.parametrize("loaded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_close_leaves_nothing(checkpoint: Path, loaded: bool):
    gc.collect()
    files = len(os.listdir("/proc/self/fd"))
    client = client_of(checkpoint)
    client.start()
    pid, directory = client.process_id, client._directory
    if loaded:
        hear(client, m.Ready)
    client.close()
    client.close()
    gc.collect()
    assert is_gone(pid) and not os.path.exists(directory)
    assert len(os.listdir("/proc/self/fd")) == files
    assert client.poll() == []


@pytest.mark.slow
def test_engines_can_join_a_running_trainer(checkpoint: Path, tmp_path: Path):
    address = f"ipc://{tmp_path}/trainer"
    options = json.dumps({"address": address, "model": str(checkpoint), "dtype": "float32"})
    trainer = subprocess.Popen([sys.executable, "-m", "vllm_longctx.trainer.sidecar", options])
    first, second = (client_of(checkpoint, address=address, timeout_s=5.0) for _ in range(2))
    first.start()
    first.send(m.Begin(1, 0, RECIPE))
    assert [type(r) for r in hear(first, m.Began)] == [m.Ready, m.Began]

    second.start()  # takes over; the same owner's number is another adapter
    second.send(m.Begin(1, 0, RECIPE))
    assert hear(first, m.Dead) == [m.Dead("the trainer works for another engine now, which has joined it")]
    second.send(m.Train(1, 0, 1, 1, tokens(1), 16))
    assert [type(r) for r in hear(second, m.Trained)] == [m.Ready, m.Began, m.Started, m.Trained]
    first.close()

    second.close()
    third = client_of(checkpoint, address=address, timeout_s=1.0)
    third.start()
    hear(third, m.Ready)
    trainer.send_signal(signal.SIGSTOP)
    third.send(m.Begin(1, 0, RECIPE))
    assert hear(third, m.Dead) == [m.Dead("the trainer took more than 1 s for one job")]
    third.close()
    trainer.send_signal(signal.SIGCONT)
    trainer.terminate()
    assert trainer.wait(TIMEOUT_S) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_was_learned_outlives_trainers(checkpoint: Path, tmp_path: Path):
    """One that is ended writes it, as does one that is killed later than a moment after it has trained."""
    addresses = [bytes([n]) * 32 for n in range(4)]

    def train(client: TrainerClient, *versions: int) -> list[bool]:
        """Whether each was trained, not remembered."""
        client.send(m.Begin(1, 0, RECIPE))
        for v in versions:
            address = addresses[v]
            client.send(m.Train(1, 0, v % 2, v, tokens(v), 16, address, [address]))
        reports: list = []
        while sum(isinstance(report, m.Trained) for report in reports) < len(versions):
            reports += hear(client, m.Trained)
        if reports[-1].losses:
            hear(client, m.Kept)
        client.send(m.Drop(1))
        return [bool(report.losses) for report in reports if isinstance(report, m.Trained)]

    def start() -> TrainerClient:
        client = client_of(checkpoint, cache_files=m.CacheFiles(str(tmp_path), 1 << 30))
        client.start()
        return client

    client = start()
    assert train(client, 1, 2) == [True, True]
    client.close()
    assert len(list(tmp_path.iterdir())) == 1
    client = start()
    assert m.Kept(addresses[2], []) in hear(client, m.Kept)
    assert train(client, 1, 2, 3) == [True, False, True]
    wait_until(lambda: sum(not path.name.startswith(".") for path in tmp_path.iterdir()) == 2)  # whole ones
    os.kill(client.process_id, signal.SIGKILL)
    assert m.Restarted() in hear(client, m.Restarted)
    found = hear(client, m.Kept)
    found += hear(client, m.Kept)
    assert {r.address for r in found if isinstance(r, m.Kept)} == {addresses[2], addresses[3]}
    assert train(client, 1, 2, 3) == [True, False, False]
    client.close()


def test_too_little_memory_is_an_error_before_the_start(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 2**20})())
    client = client_of(checkpoint)
    with pytest.raises(
        LongContextError, match=r"needs 0\.00 GiB .*float32 .* or set adaptation.trainer.dtype bfloat16"
    ):
        client.start()
    assert client.process_id is None
    client.close()


def test_an_error_of_the_gpu_ends_the_process(tiny_llama: Path):
    """Nothing works in a process after one; the client starts another."""

    class BrokenTrainer(Trainer):
        def begin(self, *args):
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700)

    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as engine:
        router.bind("inproc://trainer")
        engine.connect("inproc://trainer")
        trainer = BrokenTrainer(AutoModelForCausalLM.from_pretrained(tiny_llama))
        sidecar, slots = Sidecar(trainer, router, None), Slots.create(trainer.modules, 8, 1)
        for job in [m.Join(), m.OpenSlots(slots.path, 8, 1)]:
            engine.send(m.encode(job))
            sidecar.serve_one()
        engine.send(m.encode(m.Begin(1, 0, RECIPE)))
        with pytest.raises(torch.AcceleratorError):
            sidecar.serve_one()
    slots.close()


def test_a_duty_cycle_is_kept_behind_every_block(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as engine:
        router.bind("inproc://trainer")
        engine.connect("inproc://trainer")
        trainer = Trainer(AutoModelForCausalLM.from_pretrained(tiny_llama))
        sidecar, slots = Sidecar(trainer, router, None, duty_cycle=0.25), Slots.create(trainer.modules, 8, 1)
        for job in [
            m.Join(),
            m.OpenSlots(slots.path, 8, 1),
            m.Begin(1, 0, RECIPE),
            m.Train(1, 0, 1, 1, tokens(1), 16),
        ]:
            engine.send(m.encode(job))
            sidecar.serve_one()
        trained = [m.decode_report(engine.recv()) for _ in range(4)][-1]
    assert pauses == pytest.approx([3 * trained.seconds])
    slots.close()


def test_a_socket_bound_while_its_directory_is_removed_goes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    directory, rmtree, calls = tmp_path / "longctx", shutil.rmtree, []
    directory.mkdir()

    def beside_a_bind(path: Path, **kwargs) -> None:
        calls.append(path)
        if len(calls) == 1:
            (path / "trainer").touch()  # after the directory was listed, so that it cannot be removed
        else:
            rmtree(path, **kwargs)

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(sidecar.shutil, "rmtree", beside_a_bind)
    monkeypatch.setattr(sidecar.os, "_exit", leave)
    with pytest.raises(SystemExit):
        sidecar.exit_with_parent(-1, directory)
    assert not directory.exists()


def test_what_the_trainer_is_told_is_on_no_command_line(client: TrainerClient, checkpoint: Path):
    assert psutil.Process(client.process_id).cmdline()[1:] == ["-m", "vllm_longctx.trainer.sidecar"]


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_the_start_with_its_reason(checkpoint: Path, tmp_path: Path):
    shutil.copytree(checkpoint, tmp_path / "model")
    client = client_of(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"nothing")
    client.start()
    pid = client.process_id
    with pytest.raises(LongContextError, match=r"the trainer could not load its model: \w+: .*header"):
        client.wait_until_ready(lambda ready: None)
    assert is_gone(pid) and isinstance(client.poll()[-1], m.Dead)
    client.close()


@pytest.mark.slow
def test_a_model_is_compared_at_the_start_and_after_a_restart(checkpoint: Path, tiny_llama: Path):
    probe = tokens(1)
    client = client_of(checkpoint, probe=probe)
    client.start()
    heard: list[m.Ready] = []
    client.wait_until_ready(lambda ready: heard.append(ready) if not heard else f"is another: {ready.about}")
    expected = Trainer(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)).logprobs(probe)
    assert heard[0].logprobs == pytest.approx(expected, abs=1e-5)
    assert [type(report) for report in client.poll()] == [m.Ready]
    os.kill(client.process_id, signal.SIGKILL)
    assert hear(client, m.Dead)[-1] == m.Dead(f"the trainer is another: {checkpoint} in float32")
    client.close()
    with pytest.raises(LongContextError, match="the trainer is another"):
        client.wait_until_ready(lambda ready: None)


def test_a_joined_trainer_is_compared_and_saves_where_the_engine_says(tiny_llama: Path, tmp_path: Path):
    """Its vocabulary is another: on a GPU such a token would end the process."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as engine:
        router.bind("inproc://trainer")
        engine.connect("inproc://trainer")
        trainer = Trainer(AutoModelForCausalLM.from_pretrained(tiny_llama))
        sidecar, slots = Sidecar(trainer, router, None, about="MODEL"), Slots.create(trainer.modules, 8, 1)
        for job in [m.Join([1, 2, 512]), m.Join([1, 2, 511], str(tmp_path)), m.OpenSlots(slots.path, 8, 1)]:
            engine.send(m.encode(job))
            sidecar.serve_one()
        for job in [m.Begin(1, 0, RECIPE), m.Save(1, "mine", 3)]:
            engine.send(m.encode(job))
            sidecar.serve_one()
        reports = [m.decode_report(engine.recv()) for _ in range(4)]
    assert reports[0] == m.Unable("has MODEL, and a token is out of range: the model has 0 to 511")
    assert reports[1].logprobs == trainer.logprobs([1, 2, 511]) and len(reports[1].logprobs) == 2
    assert reports[2:] == [m.Began(1), m.Saved(1, "mine")] and (tmp_path / "mine").is_dir()
    slots.close()


def test_the_engine_says_which_layers_are_adapted(tiny_llama: Path):
    names = ["model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"]
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as engine:
        router.bind("inproc://trainer")
        engine.connect("inproc://trainer")
        trainer = Trainer(AutoModelForCausalLM.from_pretrained(tiny_llama))
        modules = {name: trainer.linear[name] for name in names}
        sidecar, slots = Sidecar(trainer, router, None), Slots.create(modules, 8, 1)
        jobs = [m.Probe(1, 0, RECIPE, tokens(1)), m.OpenSlots(slots.path, 8, 1, names), m.Begin(1, 0, RECIPE)]
        for job in [m.Join(), *jobs, m.Train(1, 0, 1, 1, tokens(1), 16)]:
            engine.send(m.encode(job))
            sidecar.serve_one()
        reports = [m.decode_report(engine.recv()) for _ in range(5)]
    assert len(reports[0].modules) == 21 and reports[0].modules.items() > modules.items()
    assert reports[1] == m.Failed(1, 0, "RuntimeError: the slots are not open")
    with slots.read(0, 1, 1, 1) as weights:
        assert weights.keys() == set(names) and all(b.any() for _, b in weights.values())
    slots.close()


def test_a_joined_trainer_without_a_layer_of_the_engines_is_refused(tmp_path: Path):
    address = f"ipc://{tmp_path}/trainer"
    client = client_of("MODEL", address=address)
    client.modules = ["model.layers.0.up_proj", "model.layers.1.up_proj"]
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(address)
        client.start()
        engine, _ = router.recv_multipart()
        ready = m.Ready({"model.layers.0.up_proj": (8, 16)}, about="OTHER in float32")
        router.send_multipart([engine, m.encode(ready)])
        with pytest.raises(
            LongContextError, match=r"has OTHER in float32, which has no linear layer model.layers.1.up_proj"
        ):
            client.wait_until_ready(lambda ready: None)
        client.close()


def test_nobody_at_an_address_ends_the_start(tmp_path: Path):
    address = f"ipc://{tmp_path}/nobody"
    client = client_of("MODEL", address=address, start_timeout_s=0.3)
    client.start()
    message = (
        rf"the trainer at {address} was not ready after 0.3 s; .* \(adaptation.trainer.start_timeout_s\)"
    )
    with pytest.raises(LongContextError, match=message):
        client.wait_until_ready(lambda ready: None)
    client.close()


def test_a_socket_whose_path_is_too_long_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (long := tmp_path / ("x" * 90)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.delenv(SOCKETS, raising=False)  # an engine of this process may have taken a directory
    client = client_of(checkpoint)
    with pytest.raises(
        LongContextError, match=r"would have more than 107 bytes; set TMPDIR to a shorter one"
    ):
        client.start()
    client.close()
    assert not any(long.iterdir())


def test_a_trainer_started_by_hand_takes_another_config(tiny_llama: Path):
    config = json.loads((tiny_llama / "config.json").read_text()) | {"rms_norm_eps": 0.25}
    model = sidecar.load(m.Options(address="", model=str(tiny_llama), dtype="float32", config=config))
    assert model.model.norm.variance_epsilon == 0.25
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
