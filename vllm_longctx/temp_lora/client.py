"""The engine's end of the trainer process: starts it, supervises it, sends jobs and receives reports."""

import contextlib
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
import zmq
from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_longctx.config import DEFAULT_CACHE_DIR_GIB, LongContextError
from vllm_longctx.processes import SOCKETS
from vllm_longctx.settings import Adaptation, TrainerSettings, active_settings
from vllm_longctx.temp_lora import base_model
from vllm_longctx.temp_lora import messages as m
from vllm_longctx.temp_lora.shared_weights import SharedWeights, shared_by_engine, skeleton
from vllm_longctx.temp_lora.slots import Slots
from vllm_longctx.temp_lora.training_memory import Shape, free_bytes

logger = init_logger("vllm.longctx")

SOCKET_PATH_BYTES = 107  # of a Unix socket, on Linux
POLL_INTERVAL = 0.5  # seconds, where the kernel does not tell that a process has ended


def trainer_client(
    vllm_config: VllmConfig,
    settings: Adaptation,
    shared: SharedWeights | None,
) -> "TrainerClient":
    """The client of an engine, not started yet.

    shared: What the engine's worker shares with a trainer on its GPU. None where the trainer loads its own
        weights.
    """
    model, trainer = vllm_config.model_config, settings.trainer
    loads_weights = shared is None and trainer.address is None
    dtype = str(base_model.trainer_dtype(model, trainer)).removeprefix("torch.")
    options = m.Options(
        **{**m.shared_fields(m.Options, trainer), "address": trainer.address or "", "dtype": dtype},
        model=model.model,
        config=base_model.resolved_config(model),
        weights=base_model.weight_files(vllm_config) if loads_weights else [],
        shares=shared is not None,
        adapters_root=settings.adapters_root,
        parent=os.getpid(),
    )
    directory, limit = settings.cache_dir, settings.cache_dir_gib or DEFAULT_CACHE_DIR_GIB
    return TrainerClient(
        options,
        trainer,
        max_rank=settings.max_rank,
        num_slots=settings.slots,
        probe=base_model.probe(model, settings),
        training=training_need(vllm_config, settings),
        cache_files=None if directory is None else m.CacheFiles(directory, int(limit * 2**30)),
        share=None if shared is None else shared.message,
    )


@dataclass(frozen=True)
class TrainingNeed:
    """What training needs beside the model's weights.

    bytes: Of its device's memory.
    sizes: The settings that decide it, with their values, for messages.
    cache_bytes: Of the host's memory, for versions that are remembered. On the CPU `bytes` has them, too.
    """

    bytes: int
    sizes: str
    cache_bytes: int = 0


NOTHING = TrainingNeed(0, "adaptation.slots")
HOST_KV = "VLLM_CPU_KVCACHE_SPACE, kv_cache_memory_bytes, gpu_memory_utilization"


def training_need(vllm_config: VllmConfig, settings: Adaptation) -> TrainingNeed:
    rank = "rank" if settings.rank == settings.max_rank else "max_rank"
    names = ["block_tokens", "train_context_tokens", "slots", rank]
    *most, last = (f"adaptation.{name} = {getattr(settings, name)}" for name in names)
    shape = Shape.of(base_model.trained_model(vllm_config, settings.trainer))
    cache = shape.cache_bytes(settings)
    if settings.trainer.device == "cpu" and cache >= 1 << 30:  # less is not worth naming
        most.insert(0, f"adaptation.cache_gib = {cache / 2**30:g}")
    return TrainingNeed(shape.training_bytes(settings), f"{', '.join(most)} or {last}", cache)


def trainer_bytes(vllm_config: VllmConfig, device: torch.device) -> int:
    """What the trainer will take of the memory of this worker's device."""
    settings = active_settings(vllm_config).temp_lora
    if settings.trainer.address is not None or torch.device(settings.trainer.device) != device:
        return 0
    model = base_model.trained_model(vllm_config, settings.trainer)
    shares = vllm_config.instance_id in shared_by_engine
    weights = 0 if shares else model.num_parameters() * model.dtype.itemsize
    return weights + Shape.of(model).training_bytes(settings)


class TrainerClient:
    """Starts, supervises and ends one trainer process at a time, or joins one that runs already.

    options: What a trainer process is started with. A new process gets an address of its own.
    trainer: Time limits and restarts. With an address, the trainer there is joined and not restarted.
    max_rank: Largest rank of an adapter in a slot.
    num_slots: Number of slots in the shared memory.
    probe: Token ids of the text of which `messages.Ready` has the log-probabilities.
    training: What a trainer needs beside the model's weights.
    cache_files: Where it keeps versions on disk. None for nowhere.
    share: Makes the message by which a new process uses the engine's weights. None where it loads its own.

    modules: Names of the linear layers that adapters adapt. None for all that the trainer has.
    slots: The shared memory of the slots. None until the trainer is ready. The caller may clear slots.
    process_id: Of the trainer process. None while there is none, or it is joined.
    """

    def __init__(
        self,
        options: m.Options,
        trainer: TrainerSettings,
        *,
        max_rank: int,
        num_slots: int,
        probe: Sequence[int] = (),
        training: TrainingNeed = NOTHING,
        cache_files: m.CacheFiles | None = None,
        share: Callable[[], m.Share] | None = None,
    ):
        self.modules: Sequence[str] | None = None
        self.slots: Slots | None = None
        self.probe = list(probe)
        self._options, self._trainer = options, trainer
        self._training, self._cache_files, self._share = training, cache_files, share
        self._mismatch: Callable[[m.Ready], str | None] = lambda ready: None
        self._ready_report: m.Ready | None = None
        self._reason: str | None = None
        self._joins = trainer.address is not None
        self._max_rank, self._num_slots = max_rank, num_slots
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: str | None = None
        self._reports: list[m.Report] = []
        self._queued: list[m.Job] = []  # until the trainer is ready
        self._ready = self._ended = False
        self._unanswered: deque[int] = deque()  # owners of jobs to be answered, in the order sent
        self._active_at = 0.0  # `time.monotonic` of the last report, or of the job that ended an idle time
        self._failures = 0
        self._start_at: float | None = None

    @property
    def process_id(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start loading the model.

        Returns at once. Raises LongContextError if memory is too small for the model.
        """
        if self._joins:
            self._connect(self._options.address)
        else:
            check_memory(self._options, self._training)
            self._spawn()

    def wait_until_ready(self, mismatch: Callable[[m.Ready], str | None]) -> None:
        """Block until the trainer is ready. Raises LongContextError if it will never be.

        mismatch: Says how its model differs from the engine's; None if they are the same. Asked again after
            each restart.
        """
        self._mismatch = mismatch
        if self._ready_report is not None and (reason := mismatch(self._ready_report)) is not None:
            self._end(reason)
        while self._ready_report is None and not self._ended:
            time.sleep(0.02)
            self._receive()
            self._supervise()
        if self._ended:
            raise LongContextError(f"longctx.adaptation: the trainer {self._reason}")

    def send(self, job: m.Job) -> None:
        """Send a job; never blocks.

        Before the trainer is ready, jobs are queued. After m.Dead they are discarded.
        """
        if self._ended:
            return
        if self._socket is None or not self._ready:
            self._queued.append(job)
            return
        if isinstance(job, m.ANSWERED):
            if not self._unanswered:
                self._active_at = time.monotonic()
            self._unanswered.append(job.owner)
        self._socket.send(m.encode(job), zmq.NOBLOCK)

    def probe_adapter(self, job: m.Probe) -> list[float]:
        """Have a random adapter made, and block until it is in its slot, before any other job.

        Returns the log-probabilities of the job's text with it. Raises LongContextError if it fails.
        """
        self.send(job)
        remembered: list[m.Report] = []  # on disk, since another engine
        while True:
            reports = self.poll()
            remembered += [report for report in reports if isinstance(report, m.Kept)]
            for report in reports:
                match report:
                    case m.Probed():
                        self._reports[:0] = remembered
                        return report.logprobs
                    case m.Failed() | m.Dead():
                        raise LongContextError(f"longctx.adaptation: no adapter works: {report.reason}")
                    case m.Restarted():
                        raise LongContextError("longctx.adaptation: the trainer died over its first adapter")
                    case _:
                        pass
            self.wait(0.1)

    def poll(self) -> list[m.Report]:
        """All reports since the last call, in order; never blocks.

        Call it often: it is what notices that a trainer ended.

        After m.Restarted, send m.Resume, or m.Begin before the first version, for every adapter that is still
        needed, and the m.Train and m.Save that are not answered yet. m.Dead is the last report.
        """
        self._receive()
        # Reports of an ended trainer are returned before it is replaced: jobs that follow from them must not
        # reach the next one.
        if not self._reports:
            self._supervise()
        reports, self._reports = self._reports, []
        return reports

    def wait(self, seconds: float = math.inf, wakes: Iterable[int] = ()) -> None:
        """Block until `poll` has something to do: a report, a trainer that ended or hangs, or one to start.

        seconds: The longest time to wait.
        wakes: Files. Data in one of them ends the wait, too.
        """
        if self._reports:
            return
        poller = zmq.Poller()
        for file in wakes:
            poller.register(file, zmq.POLLIN)
        if self._socket is not None:
            poller.register(self._socket, zmq.POLLIN)
        with contextlib.ExitStack() as stack:
            if self._process is not None:
                try:
                    ended = os.pidfd_open(self._process.pid)
                except OSError:  # a sandbox without it
                    seconds = min(seconds, POLL_INTERVAL)
                else:
                    stack.callback(os.close, ended)
                    poller.register(ended, zmq.POLLIN)
            seconds = min(seconds, max(self._next_check - time.monotonic(), 0.0))
            poller.poll(None if seconds == math.inf else math.ceil(1000 * seconds))

    @property
    def _next_check(self) -> float:
        """When `_supervise` has something to do if nothing happens before, as `time.monotonic`."""
        if self._start_at is not None:
            return self._start_at
        if self._socket is not None and not self._ready:
            return self._active_at + self._trainer.start_timeout_s
        if self._socket is not None and self._unanswered:
            return self._active_at + self._trainer.timeout_s
        return math.inf

    def close(self) -> None:
        """End the trainer, or leave it if it was joined.

        Afterwards there is no process, file or memory of it.
        """
        if self._joins and self._socket is not None:
            self._socket.send(m.encode(m.Leave()), zmq.NOBLOCK)
        # A save may be in progress, or versions go to disk. vLLM gives its engine core 5 s for the whole
        # shutdown.
        is_writing = bool(self._unanswered) or self._cache_files is not None
        self._end_process(grace_s=3.0 if is_writing else 0.0)
        self._disconnect(linger_ms=1000 if self._joins else 0)
        self._context.term()
        self._ended = True
        if self.slots is not None:
            self.slots.close()

    def _spawn(self) -> None:
        """Start a process.

        Each has a socket of its own, so that no report of an ended one comes after m.Restarted.
        """
        self._directory = tempfile.mkdtemp(prefix="trainer-", dir=os.environ.get(SOCKETS))
        path = f"{self._directory}/trainer"
        if len(os.fsencode(path)) > SOCKET_PATH_BYTES:
            self._remove_directory()
            raise LongContextError(
                f"longctx.adaptation: the path of the trainer's socket, {path}, would have more than "
                f"{SOCKET_PATH_BYTES} bytes; set TMPDIR to a shorter one"
            )
        options = msgspec.structs.replace(self._options, address=f"ipc://{path}")
        command = [sys.executable, "-m", "vllm_longctx.trainer.sidecar"]
        # A lower priority than the engine's, if the GPU runs under MPS. Without it processes have no
        # priorities.
        environment = {"CUDA_MPS_CLIENT_PRIORITY": "1", **os.environ}
        # A file, since a pipe could be full, and every user can read a command line.
        options_file = Path(self._directory, "options")
        options_file.write_bytes(msgspec.json.encode(options))
        with options_file.open("rb") as stdin:
            # A new session, so that Ctrl-C at a terminal reaches the engine only.
            self._process = subprocess.Popen(command, stdin=stdin, start_new_session=True, env=environment)
        self._connect(options.address)

    def _connect(self, address: str) -> None:
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(0)
        self._socket.linger = 0
        self._socket.connect(address)
        if self._share is not None:
            self._socket.send(m.encode(self._share()))
        root, cache_bytes = self._options.adapters_root, self._training.cache_bytes
        join = m.Join(self.probe, root, cache_bytes, self._cache_files)
        self._socket.send(m.encode(join))
        self._ready, self._start_at = False, None
        self._unanswered.clear()
        self._active_at = time.monotonic()

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
            except msgspec.MsgspecError as e:  # a joined trainer may have another version
                self._end(f"says what this engine does not understand: {e}")
                return
            if isinstance(report, m.Lost):
                self._end(report.reason)
                return
            self._active_at = time.monotonic()
            if isinstance(report, m.ANSWERS):
                if self._unanswered:
                    self._unanswered.popleft()
                if isinstance(report, m.Trained | m.Saved):
                    self._failures = 0
            elif isinstance(report, m.Unable):
                (self._end if self._ready_report is None else self._restart)(report.reason)
                return
            elif isinstance(report, m.Ready):
                if (reason := self._missing(report) or self._mismatch(report)) is not None:
                    self._end(reason)
                    return
                self._accept(report)
            self._reports.append(report)

    def _missing(self, ready: m.Ready) -> str | None:
        """Which linear layers the trainer lacks; None if it has all."""
        missing = sorted(set(self.modules or ()) - ready.modules.keys())
        return f"has {ready.about}, which has no linear layer {', '.join(missing[:3])}" if missing else None

    def _accept(self, ready: m.Ready) -> None:
        """The trainer is ready: open the slots and send the queued jobs."""
        self._ready_report = ready
        # The socket is connected and needs no name. So nothing is left if all processes are killed.
        self._remove_directory()
        names = list(ready.modules) if self.modules is None else list(self.modules)
        if self.slots is None:
            modules = {name: ready.modules[name] for name in names}
            self.slots = Slots.create(modules, self._max_rank, self._num_slots)
        self._ready = True
        self.send(m.OpenSlots(self.slots.path, self._max_rank, self._num_slots, names))
        queued, self._queued = self._queued, []
        for job in queued:
            self.send(job)

    def _supervise(self) -> None:
        """Notice a trainer that has ended or hangs, and start the next one when its delay is over."""
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
        elif not self._ready and now - self._active_at > self._trainer.start_timeout_s:
            where = f"at {self._options.address} " if self._joins else ""
            reason = f"{where}was not ready after {self._trainer.start_timeout_s:g} s"
            if self.slots is None:
                more = "if its model takes longer to load, allow it more (adaptation.trainer.start_timeout_s)"
                self._end(f"{reason}; {more}")
            else:  # one before it was ready in time, so this one hangs
                self._restart(reason)
        elif self._unanswered and now - self._active_at > self._trainer.timeout_s:
            self._restart(f"took more than {self._trainer.timeout_s:g} s for one job")

    def _restart(self, reason: str) -> None:
        """End the process and start another after a delay, which doubles each time.

        At the limit, end for good.
        """
        if self._joins or self._failures >= self._trainer.max_restarts:
            self._end(reason)
            return
        owner = self._unanswered[0] if self._unanswered else None
        self._stop()
        delay = 0.5 * 2**self._failures
        self._failures += 1
        self._start_at = time.monotonic() + delay
        limit = self._trainer.max_restarts
        logger.warning("longctx: the trainer %s; restart %d of %d", reason, self._failures, limit)
        self._reports.append(m.Restarted(owner))

    def _end(self, reason: str) -> None:
        """There is no trainer from now on."""
        self._stop()
        self._ended, self._reason = True, reason
        logger.error("longctx: the trainer %s; there is no trainer any more", reason)
        self._reports.append(m.Dead(f"the trainer {reason}"))

    def _stop(self) -> None:
        self._end_process()
        self._disconnect()
        self._queued.clear()
        self._unanswered.clear()
        self._ready = False


def check_memory(options: m.Options, training: TrainingNeed) -> None:
    """Raises LongContextError if there is not enough free memory for the trainer.

    It needs memory to train, and for a copy of the checkpoint's weights unless it shares the engine's.

    Called when the engine has its weights and its KV cache.
    """
    dtype = getattr(torch, options.dtype)
    weights = 0 if options.shares else weight_bytes(options.model, dtype, options.config)
    device = torch.device(options.device)
    need, free = weights + training.bytes, free_bytes(device)
    if need <= free:
        return
    on_gpu = device.type == "cuda"
    where = str(device) if on_gpu else "the host"
    less = [] if options.recompute else ["set adaptation.trainer.recompute true"]
    less.append(f"lower {training.sizes}")
    if on_gpu:
        less += ["lower gpu_memory_utilization", "name another GPU in adaptation.trainer.device"]
    else:
        less += [f"give the KV cache less ({HOST_KV})", "set adaptation.trainer.dtype bfloat16"]
    raise LongContextError(
        f"longctx.adaptation: the trainer needs {need / 2**30:.2f} GiB on {where} "
        f"({weights / 2**30:.2f} for its own copy of the {options.dtype} weights of {options.model}, "
        f"{training.bytes / 2**30:.2f} to train), but only {free / 2**30:.2f} GiB are free there; "
        f"{', '.join(less[:-1])}, or {less[-1]}"
    )


def weight_bytes(model: str, dtype: torch.dtype, config: Mapping[str, Any] | None = None) -> int:
    """Bytes of a model's weights in this dtype, as the trainer has them.

    config: A complete Hugging Face config in place of the checkpoint's.
    """
    parameters = skeleton(model, str(dtype).removeprefix("torch."), "sdpa", config).parameters()
    return sum(parameter.numel() for parameter in parameters) * dtype.itemsize
