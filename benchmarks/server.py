"""A real `vllm serve` in a process of its own, and what its /metrics say."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from vllm_longctx.cli.engine import allow_plugin


@contextmanager
def running_server(model: str, log: Path, *flags: str, patience_s: int = 300) -> Iterator[str]:
    """Its address, once it answers. Raises RuntimeError with the end of its log if it does not start."""
    allow_plugin()
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [
        Path(sys.executable).parent / "vllm",
        "serve",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        *flags,
    ]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ, start_new_session=True)
        try:
            deadline = time.monotonic() + patience_s
            while not _answers(address):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(
                        f"the server did not start; its log ends with\n{log.read_text()[-3000:]}"
                    )
                time.sleep(1)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(60)
            except (
                subprocess.TimeoutExpired
            ):  # as when others spin on its core; its engine must not outlive it
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=1).status_code == 200
    except httpx.TransportError:
        return False


def metrics(address: str) -> dict[str, float]:
    """vLLM's samples by name without the prefix `vllm:`, summed over their labels."""
    values: dict[str, float] = {}
    for line in httpx.get(f"{address}/metrics").text.splitlines():
        if sample := re.match(r"vllm:(\w+)(?:\{.*\})? (\S+)$", line):
            values[sample[1]] = values.get(sample[1], 0.0) + float(sample[2])
    return values
