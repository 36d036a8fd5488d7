"""Guards of processes, on processes without an engine; with one: tests/engine/test_processes.py."""

import asyncio
import functools
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import zmq
from vllm.v1.engine import utils

from vllm_longctx import processes
from vllm_longctx.processes import SOCKETS, WatchedMain
from vllm_longctx.seams import SEAMS

# A process that notes SIGTERM and goes on, as vLLM's engine core does while it starts, with a process of its
# own below it.
GUARDED = """
import os, signal, subprocess, sys, time
from vllm_longctx import processes

def note(*_): print("noted", flush=True)

processes.GRACE = 1.0
assert not {"vllm", "torch"} & set(sys.modules)
if os.fork() == 0:
    signal.signal(signal.SIGTERM, note)
    guard = processes._Watchdog.of(os.getppid())
    guard.enforce_signals(1.0)
    print(os.getpid(), subprocess.Popen(["sleep", "600"]).pid, flush=True)
    while True: time.sleep(0.1)
time.sleep(600)
"""


def is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("victim", ["parent", "itself"])
def test_a_guarded_process_ends_with_all_below_it(victim: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", GUARDED], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        family = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(family) == 2 and not any(map(is_gone, family))
        os.kill(
            parent.pid if victim == "parent" else family[0].pid,
            signal.SIGKILL if victim == "parent" else signal.SIGTERM,
        )
        assert parent.stdout.readline() == "noted\n"  # first it is asked
        deadline = time.monotonic() + 60
        while not all(map(is_gone, family)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert all(map(is_gone, family))
    finally:
        parent.kill()
        parent.wait()


def terminate(*_: Any) -> None:
    raise KeyboardInterrupt("terminated")


@pytest.fixture
def vllm_serves(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SIGTERM is handled as while `vllm serve` starts."""
    monkeypatch.setattr(terminate, "__module__", "vllm.entrypoints.launchers.api_server.entry")
    of_term = signal.signal(signal.SIGTERM, terminate)
    of_int = signal.signal(signal.SIGINT, signal.default_int_handler)  # for which asyncio puts its own
    yield
    signal.signal(signal.SIGTERM, of_term)
    signal.signal(signal.SIGINT, of_int)


@pytest.mark.usefixtures("vllm_serves")
def test_ctrl_c_ends_a_start_of_vllm_serve_as_sigterm_does() -> None:
    """asyncio's own handler would cancel a task that does not wait for anything."""

    async def start() -> None:
        processes.interrupt_start()
        with pytest.raises(KeyboardInterrupt, match="terminated"):
            signal.raise_signal(signal.SIGINT)

    asyncio.run(start())


@pytest.mark.usefixtures("vllm_serves")
def test_a_start_that_was_cancelled_before_ends_at_once() -> None:
    ended = []

    async def start() -> None:
        signal.raise_signal(signal.SIGINT)
        try:
            processes.interrupt_start()
        except KeyboardInterrupt:
            ended.append(True)

    with pytest.raises(KeyboardInterrupt):  # asyncio's, for a task that was cancelled by Ctrl-C
        asyncio.run(start())
    assert ended


def test_an_interrupt_is_not_swallowed_while_engine_cores_are_awaited(short: Path) -> None:
    for _ in range(2):
        processes._do_not_swallow_interrupts()
        with (
            pytest.raises(KeyboardInterrupt, match="now"),
            utils.zmq_socket_ctx(f"ipc://{short}/handshake", zmq.ROUTER, bind=True) as handshake,
        ):
            raise KeyboardInterrupt("now")
        assert handshake.closed
    with utils.zmq_socket_ctx(f"ipc://{short}/handshake", zmq.ROUTER, bind=True) as handshake:
        pass
    assert handshake.closed


def test_ctrl_c_stays_a_programs_own() -> None:
    async def start() -> bool:
        before = signal.getsignal(signal.SIGINT)
        processes.interrupt_start()
        return signal.getsignal(signal.SIGINT) is before

    assert asyncio.run(start())


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="k") as directory:
        yield Path(directory)


def test_sockets_have_a_directory_of_their_process(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SOCKETS, str(short))
    processes._make_socket_directory()
    directory = Path(os.environ[SOCKETS])
    assert directory.parent == short and directory.name.startswith(f"longctx-{os.getpid()}-")
    processes._make_socket_directory()
    assert Path(os.environ[SOCKETS]) == directory
    assert directory.is_dir()
    assert processes._in_directory("file:///tmp/vllm_dist_ab") == f"file://{directory}/vllm_dist_ab"
    assert processes._in_directory("tcp://127.0.0.1:1") == "tcp://127.0.0.1:1"


def test_the_directory_of_another_engine_is_not_shared(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    of_another = short / f"longctx-{ended.pid}-abcdefgh"
    of_another.mkdir()
    (of_another / "socket").touch()
    monkeypatch.setenv(SOCKETS, str(of_another))
    processes._make_socket_directory()
    assert Path(os.environ[SOCKETS]).parent == short and os.environ[SOCKETS] != str(of_another)
    monkeypatch.setenv(SOCKETS, str(of_another))
    monkeypatch.setattr(processes, "_started_by_vllm", True)
    processes._make_socket_directory()
    assert os.environ[SOCKETS] == str(of_another)  # it is that of its front end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_directory_of_sockets_goes_with_its_process(number: signal.Signals, short: Path) -> None:
    """Also with one that is killed before it has started any other."""
    program = """
import os, time
from vllm_longctx import processes
processes._make_socket_directory()
open(os.path.join(os.environ[processes.SOCKETS], "socket"), "w").close()
print("made", flush=True)
time.sleep(600)
"""
    owner = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, SOCKETS: str(short)},
    )
    assert owner.stdout is not None and owner.stdout.readline() == "made\n"
    (directory,) = short.iterdir()
    assert [file.name for file in directory.iterdir()] == ["socket"]
    os.kill(owner.pid, number)
    owner.wait()
    deadline = time.monotonic() + 60
    while directory.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not directory.exists()


def test_a_path_too_long_for_sockets_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / ("x" * 70)
    base.mkdir()
    monkeypatch.setenv(SOCKETS, str(base))
    processes._make_socket_directory()
    assert os.environ[SOCKETS] == str(base) and not list(base.iterdir())


class Stock:
    calls: list[Any] = []  # noqa: RUF012

    @staticmethod
    def main(**kwargs: Any) -> str:
        Stock.calls.append(kwargs)
        return "done"


def test_an_engine_without_a_configuration_of_ours_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"{__name__}:Stock.main"
    owner, name = processes._find(path)
    monkeypatch.setattr(owner, name, functools.wraps(getattr(owner, name))(WatchedMain(path)))
    stock = SimpleNamespace(additional_config={"other": 1})
    assert not processes._has_longctx(stock)  # imports vLLM, which sets variables
    environment = dict(os.environ)
    assert owner.main(vllm_config=stock) == "done" and owner.calls[-1] == {"vllm_config": stock}
    assert processes._Watchdog.current is None and os.environ == environment


def test_what_processes_run_travels_by_its_name_and_is_replaced_once() -> None:
    processes.end_together()
    targets = []
    for path in processes.TARGETS:
        owner, name = processes._find(path)
        targets.append(getattr(owner, name))
        assert isinstance(targets[-1], WatchedMain) and not isinstance(targets[-1].__wrapped__, WatchedMain)
    assert resource_tracker._resource_tracker._pid is not None
    processes.end_together()
    assert [getattr(*processes._find(path)) for path in processes.TARGETS] == targets
    assert pickle.loads(pickle.dumps(targets[0])).path == targets[0].path
    assert all(
        seam.present() for seam in SEAMS if seam.where == "processes.py"
    )  # also where they are replaced
    assert processes._Watchdog.current is None  # nothing watches over the process that starts the others
