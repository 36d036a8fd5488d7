"""The engine's end of the trainer process: starts it, watches over it, never waits for it unless told to."""

import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch
import zmq
from vllm.logger import init_logger

from vllm_longctx.config import LongContextError
from vllm_longctx.processes import SOCKETS
from vllm_longctx.settings import TrainerSettings
from vllm_longctx.temp_lora import messages as m
from vllm_longctx.temp_lora.shared_weights import skeleton
from vllm_longctx.temp_lora.slots import Slots
from vllm_longctx.temp_lora.training_memory import free_bytes

logger = init_logger("vllm.longctx")

SOCKET_PATH_BYTES = 107  # of a Unix socket, on Linux


class TrainerClient:
    """The engine's side of its trainer process.

    options: What a trainer process is started with; the address is chosen for each process, unless it is joined.
    trainer: How it is watched over. One with an address runs already; it is joined and not watched over.
    max_rank, num_slots: Of the shared memory.
    probe: Token ids of the text of which `messages.Ready` has the log-probabilities.
    training_bytes: What a trainer on a GPU needs beside the model's weights.
    share: Makes the message for each new process by which it uses the engine's weights; None where it loads its own.

    slots: None until the trainer is ready; the caller may clear slots. process_id: None while there is no process of our own.
    """

    def __init__(
        self,
        options: m.Options,
        trainer: TrainerSettings,
        *,
        max_rank: int,
        num_slots: int,
        probe: Sequence[int] = (),
        training_bytes: int = 0,
        share: Callable[[], m.Share] | None = None,
    ):
        self.slots: Slots | None = None
        self.probe = list(probe)
        self._options, self._trainer = options, trainer
        self._training_bytes, self._share = training_bytes, share
        self._fault: Callable[[m.Ready], str | None] = lambda ready: None
        self._ready_report: m.Ready | None = None
        self._reason: str | None = None
        self._joins = trainer.address is not None
        self._max_rank, self._num_slots = max_rank, num_slots
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: str | None = None
        self._reports: list[m.Report] = []
        self._held: list[m.Job] = []  # until the trainer is ready
        self._ready = self._ended = False
        self._unanswered: deque[int] = deque()  # owners of the jobs to be answered, in order
        self._since = 0.0  # the trainer's last sign of life, or when it got something to do
        self._failures = 0
        self._start_at: float | None = None

    @property
    def process_id(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Returns at once; the model is loaded meanwhile. Raises LongContextError if memory is too small for it."""
        if self._joins:
            self._connect(self._options.address)
        else:
            check_memory(self._options, self._training_bytes)
            self._spawn()

    def wait_until_ready(self, fault: Callable[[m.Ready], str | None]) -> None:
        """Block until the trainer is ready. fault: says what is wrong with its model, also when it comes back from a restart.

        Raises LongContextError if there will be no trainer.
        """
        self._fault = fault
        if self._ready_report is not None and (reason := fault(self._ready_report)) is not None:
            self._die(reason)
        while self._ready_report is None and not self._ended:
            time.sleep(0.02)
            self._receive()
            self._supervise()
        if self._ended:
            raise LongContextError(f"longctx.adaptation: the trainer {self._reason}")

    def send(self, job: m.Job) -> None:
        """Never blocks. What is sent before the trainer is ready is held; what is sent after m.Dead is dropped."""
        if self._ended:
            return
        if self._socket is None or not self._ready:
            self._held.append(job)
            return
        if isinstance(job, m.ANSWERED):
            if not self._unanswered:
                self._since = time.monotonic()
            self._unanswered.append(job.owner)
        self._socket.send(m.encode(job), zmq.NOBLOCK)

    def poll(self) -> list[m.Report]:
        """Never blocks. All reports since the last call, in order; call it often, since it is what notices a dead trainer.

        On m.Restarted: send m.Resume, or m.Begin before the first version, for every adapter that is still needed, and the
        training and saving not yet answered. m.Dead is the last there will be.
        """
        self._receive()
        # The last words of one that is gone come before m.Restarted: else what they make the caller send would go to the next.
        if not self._reports:
            self._supervise()
        reports, self._reports = self._reports, []
        return reports

    def wait(self, seconds: float) -> None:
        """Block until `poll` has a message of the trainer's, but not longer than this."""
        if self._reports:
            return
        if self._socket is None:
            time.sleep(seconds)
        else:
            self._socket.poll(math.ceil(1000 * seconds))

    def close(self) -> None:
        """End the trainer, or leave it if it was joined. Nothing is left of it: no process, file or memory."""
        if self._joins and self._socket is not None:
            self._socket.send(m.encode(m.Leave()), zmq.NOBLOCK)
        # An adapter may be being saved; vLLM gives its engine core 5 s for all of its shutdown.
        self._end_process(grace_s=3.0 if self._unanswered else 0.0)
        self._disconnect(linger_ms=1000 if self._joins else 0)
        self._context.term()
        self._ended = True
        if self.slots is not None:
            self.slots.close()

    def _spawn(self) -> None:
        """Each process has its own socket, so that nothing a dead one said can be heard after m.Restarted."""
        self._directory = tempfile.mkdtemp(prefix="trainer-", dir=os.environ.get(SOCKETS))
        path = f"{self._directory}/trainer"
        if len(os.fsencode(path)) > SOCKET_PATH_BYTES:
            self._remove_directory()
            raise LongContextError(
                f"longctx.adaptation: the path of the trainer's socket, {path}, would have more than {SOCKET_PATH_BYTES} "
                "bytes; set TMPDIR to a shorter one"
            )
        options = msgspec.structs.replace(self._options, address=f"ipc://{path}")
        command = [sys.executable, "-m", "vllm_longctx.trainer.sidecar"]
        # Below the engine's, if the GPU runs under MPS; without it there are no priorities between processes.
        environment = {"CUDA_MPS_CLIENT_PRIORITY": "1", **os.environ}
        told = Path(self._directory, "options")  # a file, since a pipe could be full, and a command line is everybody's to read
        told.write_bytes(msgspec.json.encode(options))
        with told.open("rb") as stdin:
            # a session of its own: Ctrl-C at a terminal is the engine's to handle
            self._process = subprocess.Popen(command, stdin=stdin, start_new_session=True, env=environment)
        self._connect(options.address)

    def _connect(self, address: str) -> None:
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(0)
        self._socket.linger = 0
        self._socket.connect(address)
        if self._share is not None:
            self._socket.send(m.encode(self._share()))
        self._socket.send(m.encode(m.Join(self.probe, self._options.adapters_root)))
        self._ready, self._start_at = False, None
        self._unanswered.clear()
        self._since = time.monotonic()

    def _disconnect(self, linger_ms: int = 0) -> None:
        if self._socket is not None:
            self._socket.close(linger_ms)
            self._socket = None
        self._remove_directory()

    def _remove_directory(self) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _end_process(self, grace_s: float = 0.0) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _receive(self) -> None:
        while self._socket is not None:
            try:
                report = m.decode_report(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            except msgspec.MsgspecError as e:  # a joined one may be of another version
                self._die(f"says what this engine does not understand: {e}")
                return
            if isinstance(report, m.Lost):
                self._die(report.reason)
                return
            self._since = time.monotonic()
            if isinstance(report, m.ANSWERS):
                if self._unanswered:
                    self._unanswered.popleft()
                if isinstance(report, m.Trained | m.Saved):
                    self._failures = 0
            elif isinstance(report, m.Unable):
                (self._die if self._ready_report is None else self._restart)(report.reason)
                return
            elif isinstance(report, m.Ready):
                if (reason := self._fault(report)) is not None:
                    self._die(reason)
                    return
                self._open(report)
            self._reports.append(report)

    def _open(self, ready: m.Ready) -> None:
        self._ready_report = ready
        self._remove_directory()  # connected: its name is not needed any more, so nothing is left even if all is killed now
        if self.slots is None:
            self.slots = Slots.create(ready.modules, self._max_rank, self._num_slots)
        self._ready = True
        self.send(m.OpenSlots(self.slots.path, self._max_rank, self._num_slots))
        held, self._held = self._held, []
        for job in held:
            self.send(job)

    def _supervise(self) -> None:
        now = time.monotonic()
        if self._start_at is not None and now >= self._start_at:
            try:
                self._spawn()
            except OSError as e:
                self._restart(f"could not be started: {e}")
        if self._socket is None:
            return
        code = None if self._process is None else self._process.poll()
        if code is not None:
            self._restart(f"ended with code {code}")
        elif not self._ready and now - self._since > self._trainer.start_timeout_s:
            where = f"at {self._options.address} " if self._joins else ""
            reason = f"{where}was not ready after {self._trainer.start_timeout_s:g} s"
            if self.slots is None:
                more = "if its model takes longer to load, allow it more (adaptation.trainer.start_timeout_s)"
                self._die(f"{reason}; {more}")
            else:  # one before it was, so the time is enough and this one hangs
                self._restart(reason)
        elif self._unanswered and now - self._since > self._trainer.timeout_s:
            self._restart(f"took more than {self._trainer.timeout_s:g} s for one job")

    def _restart(self, reason: str) -> None:
        if self._joins or self._failures >= self._trainer.max_restarts:
            self._die(reason)
            return
        owner = self._unanswered[0] if self._unanswered else None
        self._stop()
        delay = 0.5 * 2**self._failures
        self._failures += 1
        self._start_at = time.monotonic() + delay
        logger.warning("longctx: the trainer %s; restart %d of %d", reason, self._failures, self._trainer.max_restarts)
        self._reports.append(m.Restarted(owner))

    def _die(self, reason: str) -> None:
        self._stop()
        self._ended, self._reason = True, reason
        logger.error("longctx: the trainer %s; there is no trainer any more", reason)
        self._reports.append(m.Dead(f"the trainer {reason}"))

    def _stop(self) -> None:
        self._end_process()
        self._disconnect()
        self._held.clear()
        self._unanswered.clear()
        self._ready = False


def check_memory(options: m.Options, training_bytes: int) -> None:
    """Raises LongContextError if the free memory does not hold what the trainer needs.

    That is, of the host a second copy of the checkpoint's weights; of a GPU what training needs, too.
    """
    weights = 0 if options.shares else weight_bytes(options.model, getattr(torch, options.dtype), options.config)
    device = torch.device(options.device)
    if device.type == "cuda":
        need, free = weights + training_bytes, free_bytes(device)
        if need > free:
            raise LongContextError(
                f"longctx.adaptation: the trainer needs {need / 2**30:.2f} GiB on {device} ({weights / 2**30:.2f} for its own "
                f"copy of the {options.dtype} weights of {options.model}, {training_bytes / 2**30:.2f} to train), but only "
                f"{free / 2**30:.2f} GiB are free there; lower gpu_memory_utilization, adaptation.slots, adaptation.rank or "
                "adaptation.block_tokens, or name another GPU in adaptation.trainer.device"
            )
        return
    free = psutil.virtual_memory().available
    if weights > free:
        raise LongContextError(
            f"longctx.adaptation: the trainer needs {weights / 2**30:.2f} GiB for its own copy of the {options.dtype} weights "
            f"of {options.model}, but only {free / 2**30:.2f} GiB of memory are free; use a smaller model, dtype bfloat16 or a "
            "smaller VLLM_CPU_KVCACHE_SPACE, or leave adaptation out"
        )


def weight_bytes(model: str, dtype: torch.dtype, config: Mapping[str, Any] | None = None) -> int:
    """Of a model's weights in this dtype, as the trainer holds them. config: in place of the checkpoint's."""
    parameters = skeleton(model, str(dtype).removeprefix("torch."), "sdpa", config).parameters()
    return sum(parameter.numel() for parameter in parameters) * dtype.itemsize
