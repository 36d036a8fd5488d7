"""Whoever of an engine's processes dies first, and when: soon all are gone, with their shared memory and
their sockets.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from server import free_port

from vllm_longctx import BOOKLM

PATIENCE = 60.0  # seconds; measured on two idle cores: see the changelog
SERVER = (
    "--dtype",
    "float32",
    "--enforce-eager",
    "--max-num-seqs",
    "4",
    "--kv-cache-memory-bytes",
    "100000000",
)
TEMP_LORA = ("--longctx-preset", "temp-lora-quality")

pytestmark = pytest.mark.alone


class Family:
    """A program and all processes below it, which it has had so far, with the shared memory that they have
    mapped.
    """

    def __init__(self, command: list[str], temporary: Path, **environment: str):
        self.temporary, self.log = temporary, temporary / "log"
        with self.log.open("w") as out:
            self.program = subprocess.Popen(
                command,
                stdout=out,
                stderr=out,
                env={**os.environ, "TMPDIR": str(temporary), **environment},
                start_new_session=True,
            )
        self.known = {self.program.pid: psutil.Process(self.program.pid)}
        self.shared_memory: set[str] = set()

    def alive(self) -> list[psutil.Process]:
        self.program.poll()
        for process in list(self.known.values()):
            with contextlib.suppress(psutil.Error):
                self.known |= {child.pid: child for child in process.children(recursive=True)}
        alive = []
        for process in self.known.values():
            with contextlib.suppress(psutil.Error, OSError):
                if process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process)
                    maps = Path(f"/proc/{process.pid}/maps").read_text()
                    self.shared_memory |= set(re.findall(r"/dev/shm/(?!sem)\S+", maps))
        return [process for process in alive if process.is_running()]

    def role(self, process: psutil.Process) -> str | None:
        """None for one that is on its way to what it will be."""
        with contextlib.suppress(psutil.Error):
            words = " ".join(process.cmdline())
            roles = {
                "vllm_longctx.trainer.sidecar": "trainer",
                "VLLM::Worker": "worker",
                "EngineCore": "engine core",
            }
            roles |= {
                "resource_tracker": "tracker",
                "VLLM::APIServer": "API server",
                "Coordinator": "coordinator",
            }
            return next((role for part, role in roles.items() if part in words), None)
        return None

    def find(self, role: str) -> psutil.Process | None:
        return next((process for process in self.alive() if self.role(process) == role), None)

    def wait_for(self, what: Callable[[], Any], seconds: float = 300) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := what()):
            assert self.program.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.1)
        return found

    def assert_gone(self) -> None:
        began = time.monotonic()
        while (alive := self.alive()) and time.monotonic() < began + PATIENCE:
            time.sleep(0.2)
        print(f"all gone after {time.monotonic() - began:.1f} s")
        assert not alive, ([(p.pid, p.cmdline()) for p in alive], self.log.read_text()[-3000:])
        assert not [name for name in self.shared_memory if Path(name).exists()]
        left = [
            p
            for p in self.temporary.rglob("*")
            if p.is_socket() or p.name.startswith(("longctx-", "vllm_dist"))
        ]
        assert not left

    def end(self) -> None:
        for process in self.alive():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.program.wait()


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A short path: those of sockets end at 107 bytes."""
    directory = tempfile.mkdtemp(prefix="k")
    yield Path(directory)
    shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def family(command: list[str], temporary: Path, **environment: str) -> Iterator[Family]:
    started = Family(command, temporary, **environment)
    try:
        yield started
    finally:
        started.end()


def vllm(*words: str) -> list[str]:
    return [str(Path(sys.executable).parent / "vllm"), *words]


class Server(Family):
    def __init__(self, temporary: Path, *flags: str, **environment: str):
        self.port = free_port()
        address = ("--host", "127.0.0.1", "--port", str(self.port))
        super().__init__(vllm("serve", BOOKLM, *address, *SERVER, *flags), temporary, **environment)

    def answers(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            url = f"http://127.0.0.1:{self.port}/health"
            return httpx.get(url, timeout=1, verify=False).status_code == 200
        return False

    def keep_busy(self) -> None:
        """A request that adapts, and is at work when this returns."""
        body = {
            "model": BOOKLM,
            "prompt": [5] * 300,
            "max_tokens": 100_000,
            "ignore_eos": True,
            "stream": True,
        }
        options = {"vllm_xargs": {"longctx": json.dumps({"temp_lora": True})}} if self.find("trainer") else {}
        url, began = f"http://127.0.0.1:{self.port}/v1/completions", threading.Event()

        def read() -> None:
            with (
                contextlib.suppress(httpx.HTTPError),
                httpx.stream("POST", url, json=body | options, timeout=300) as answer,
            ):
                for _ in answer.iter_lines():
                    began.set()

        threading.Thread(target=read, daemon=True).start()
        assert began.wait(120), self.log.read_text()[-3000:]


@contextlib.contextmanager
def server(temporary: Path, *flags: str, **environment: str) -> Iterator[Server]:
    started = Server(temporary, *flags, **environment)
    try:
        yield started
    finally:
        started.end()


def test_nothing_is_left_when_the_front_end_is_killed_over_a_request_that_learns(temporary: Path) -> None:
    with server(temporary, *TEMP_LORA) as served:
        served.wait_for(served.answers)
        served.keep_busy()
        assert served.find("trainer") and served.find("worker") and served.alive() and served.shared_memory
        os.kill(served.program.pid, signal.SIGKILL)
        served.assert_gone()


def test_nothing_is_left_when_the_front_end_is_killed_during_a_start(temporary: Path) -> None:
    with server(temporary, *TEMP_LORA) as served:
        served.wait_for(lambda: served.find("worker"))
        os.kill(served.program.pid, signal.SIGKILL)
        served.assert_gone()


PROGRAM = """
import sys, time
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    config = {"longctx": {"preset": sys.argv[1]}}
    llm = LLM(%r, dtype="float32", enforce_eager=True, max_num_seqs=2,
        kv_cache_memory_bytes=10**8, additional_config=config)
    extra_args = {"longctx": {"temp_lora": True}} if sys.argv[1].startswith("temp-lora") else None
    llm.generate(["a b c " * 100], SamplingParams(max_tokens=8, extra_args=extra_args), use_tqdm=False)
    print("written", flush=True)
    %s
"""


def test_a_program_that_ends_has_no_engine_to_kill(temporary: Path) -> None:
    command = [
        sys.executable,
        "-c",
        PROGRAM % (BOOKLM, "llm.llm_engine.engine_core.shutdown(60)"),
        "temp-lora-quality",
    ]
    with family(command, temporary, VLLM_LOGGING_LEVEL="INFO") as program:
        program.wait_for(lambda: "written" in program.log.read_text())
        program.assert_gone()
        assert program.program.returncode == 0
        log = program.log.read_text()
        assert (
            "EngineCore: exiting busy loop" in log
            and "force killing" not in log
            and "sending SIGTERM" not in log
        )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("role", ["engine core", "worker", None])
def test_nothing_is_left_whoever_is_ended_while_serving(
    role: str | None, number: signal.Signals, temporary: Path
) -> None:
    with server(temporary, *TEMP_LORA) as served:
        served.wait_for(served.answers)
        served.keep_busy()
        victim = served.program.pid if role is None else served.wait_for(lambda: served.find(role)).pid
        os.kill(victim, number)
        served.assert_gone()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("phase", ["tracker", "engine core", "worker", "trainer"])
def test_nothing_is_left_of_a_start(phase: str, number: signal.Signals, temporary: Path) -> None:
    with server(temporary, *TEMP_LORA) as served:
        served.wait_for(lambda: served.find(phase))
        os.kill(served.program.pid, number)
        served.assert_gone()


@pytest.mark.slow
@pytest.mark.parametrize("role", ["engine core", "worker"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_start_whose_engine_is_ended(
    role: str, number: signal.Signals, temporary: Path
) -> None:
    with server(temporary, "--longctx-preset", "lm-infinite") as served:
        served.wait_for(lambda: served.find(role)).send_signal(number)
        served.assert_gone()


@pytest.mark.slow
@pytest.mark.parametrize("pause", [0.2, 2.0])
def test_nothing_is_left_after_ctrl_c_twice(pause: float, temporary: Path) -> None:
    with server(temporary, *TEMP_LORA) as served:
        served.wait_for(served.answers)
        served.keep_busy()
        os.killpg(served.program.pid, signal.SIGINT)
        time.sleep(pause)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(served.program.pid, signal.SIGINT)
        served.assert_gone()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_several_api_servers(number: signal.Signals, temporary: Path) -> None:
    with server(temporary, "--longctx-preset", "lm-infinite", "--api-server-count", "2") as served:
        served.wait_for(served.answers)
        os.kill(served.program.pid, number)
        served.assert_gone()


@pytest.mark.slow
def test_nothing_is_left_of_a_start_that_fails_half_way(temporary: Path) -> None:
    """Its trainer is stopped while it starts, so it is never ready, and does not see a SIGTERM."""
    impatient = {
        "preset": "temp-lora-quality",
        "adaptation": {"trainer": {"start_timeout_s": 5, "max_restarts": 0}},
    }
    with server(temporary, "--longctx", json.dumps(impatient)) as served:
        served.wait_for(lambda: served.find("trainer")).send_signal(signal.SIGSTOP)
        served.wait_for(lambda: "was not ready after 5 s" in served.log.read_text())
        served.assert_gone()
        assert served.program.returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["lm-infinite", "temp-lora-quality"])
def test_nothing_is_left_when_a_program_is_killed(preset: str, temporary: Path) -> None:
    with family([sys.executable, "-c", PROGRAM % (BOOKLM, "time.sleep(600)"), preset], temporary) as program:
        program.wait_for(lambda: "written" in program.log.read_text())
        os.kill(program.program.pid, signal.SIGKILL)
        program.assert_gone()
