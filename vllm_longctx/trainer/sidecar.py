"""The trainer process.

    python -m vllm_longctx.trainer.sidecar '{"address": "ipc:///tmp/trainer", "model": ..., ...}'

Without an argument it reads its options from standard input. It loads its own copy of the model, unless it
can use the weights of an engine on its GPU. (On a CPU an engine packs its weights for inference.) It works
for one engine at a time, one job after the other. A job that fails is answered, whatever the reason. It does
not end the process, unless it was an error of the GPU.
"""

import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import msgspec
import torch
import zmq
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from vllm_longctx.temp_lora import messages as m
from vllm_longctx.temp_lora import shared_weights as shared
from vllm_longctx.temp_lora.slots import Slots
from vllm_longctx.trainer import attention
from vllm_longctx.trainer.trainer import Trainer
from vllm_longctx.trainer.version_cache import VersionCache
from vllm_longctx.trainer.version_files import VersionFiles, trained_by

IDLE_MS = 1000  # without a job, before versions are written to disk
NICENESS = 10  # the engine and the front end have priority, but the trainer still gets a share


class Sidecar:
    """Does the jobs that come over a socket.

    trainer: The model and its adapters.
    socket: A bound ROUTER socket, on which each engine has an identity.
    adapters_root: Directory of saved adapters. None where only an engine may name one.
    device_slots: GPU memory of the slots, uint8. None where the weights are in the shared memory.
    duty_cycle: Share of the time in which to train.
    about: What was loaded, in words.
    """

    def __init__(
        self,
        trainer: Trainer,
        socket: zmq.Socket[bytes],
        adapters_root: str | None,
        device_slots: torch.Tensor | None = None,
        duty_cycle: float = 1.0,
        about: str = "",
    ):
        self._trainer, self._socket, self._adapters_root, self._about = trainer, socket, adapters_root, about
        self._device_slots, self._duty_cycle = device_slots, duty_cycle
        self._slots: Slots | None = None
        self._cache = VersionCache()
        self._engine: bytes | None = None
        self._jobs: deque[tuple[bytes, m.Job]] = deque()

    def serve(self) -> None:
        while True:
            self.serve_one()

    def serve_one(self) -> None:
        """Do the next job; wait for one if there is none."""
        self._wait_for_job()
        engine, job = self._jobs.popleft()
        if isinstance(job, m.Join):
            self._change_engine(engine, job)
        elif engine != self._engine:
            self._send(m.Lost("was restarted or works for another engine"), engine)
        else:
            try:
                self._do(job)
            except torch.AcceleratorError:  # no job can succeed any more; the engine starts another process
                raise
            except Exception as e:
                self._send(failure_report(job, f"{type(e).__name__}: {e}"))

    def _wait_for_job(self) -> None:
        """Meanwhile write versions to disk, and look for those of other trainers."""
        self._receive()
        while not self._jobs:
            # Never without an end: a signal that comes just before the wait is handled after it.
            if not self._socket.poll(IDLE_MS):
                self._cache.write_next()
                self._find_versions()
            self._receive()

    def _find_versions(self) -> None:
        """Say which versions on disk have come or gone."""
        if self._cache.files is None:
            return
        new, gone = self._cache.files.refresh()
        left = [address for address in gone if not self._cache.holds(address)]
        for address in new:
            self._send(m.Kept(address, []))
        if left:
            self._send(m.Kept(left[0], left))

    def keep_versions(self) -> None:
        """Write to disk what ought to be there, as far as it can be written."""
        while self._cache.write_next():
            pass

    def _receive(self) -> None:
        """Queue all jobs sent so far."""
        while True:
            try:
                engine, payload = self._socket.recv_multipart(zmq.NOBLOCK)
                job = m.decode_job(payload)
            except zmq.Again:
                return
            except msgspec.MsgspecError as e:
                self._send(m.Lost(f"does not understand this engine: {e}"), engine)
                continue
            if isinstance(job, m.Join):
                self._jobs.clear()
            self._jobs.append((engine, job))

    def _change_engine(self, engine: bytes | None, join: m.Join | None = None) -> None:
        """Drop what belongs to the engine so far, and answer the Join of the next one, if there is one."""
        if engine is not None and self._engine not in (None, engine):
            self._send(m.Lost("works for another engine now, which has joined it"))
        self._trainer.drop_all()
        self._close_slots()
        self.keep_versions()
        self._cache = VersionCache() if join is None else self._new_cache(join)
        self._engine = engine
        if join is not None:
            self._adapters_root = join.adapters_root or self._adapters_root
            try:
                self._send(m.Ready(self._trainer.linear, self._trainer.logprobs(join.probe), self._about))
            except ValueError as e:
                self._send(m.Unable(f"has {self._about}, and {e}"))
            self._find_versions()

    def _new_cache(self, join: m.Join) -> VersionCache:
        given, files = join.cache_files, None
        if given is not None:
            files = VersionFiles(Path(given.directory), given.max_bytes, trained_by(self._trainer.device))
        return VersionCache(join.cache_bytes, files)

    def _do(self, job: m.Job) -> None:
        trainer = self._trainer
        match job:
            case m.OpenSlots():
                self._close_slots()
                trainer.adapt(trainer.linear if job.modules is None else job.modules)
                sizes = trainer.modules, job.max_rank, job.num_slots
                self._slots = Slots.open(job.path, *sizes, self._device_slots)
            case m.Probe():
                trainer.begin(job.owner, job.recipe)
                try:
                    trainer.randomize(job.owner)
                    self._open_slots().write(job.slot, 0, job.owner, 0, trainer.weights(job.owner))
                    logprobs = trainer.logprobs(job.tokens, job.owner)
                finally:
                    trainer.drop(job.owner)
                self._send(m.Probed(job.owner, logprobs))
            case m.Begin() | m.Resume():
                slots, rank, content, version = self._open_slots(), job.recipe.rank, b"", 0
                if rank > slots.max_rank:
                    raise ValueError(f"rank {rank} is more than the server's slots hold ({slots.max_rank})")
                trainer.begin(job.owner, job.recipe)
                try:
                    if isinstance(job, m.Resume):
                        with slots.read(job.slot, job.bank, job.owner, job.version) as weights:
                            trainer.load(job.owner, weights)
                    elif job.start_from is not None:
                        path = m.adapter_path(self._adapters_root, job.start_from)
                        number, address = job.goes_on or (0, None)
                        version = number * trainer.load_directory(job.owner, path, address)
                        content = trainer.content(job.owner)
                        slots.write(job.slot, 0, job.owner, version, trainer.weights(job.owner))
                except BaseException:
                    trainer.drop(job.owner)
                    raise
                self._send(m.Began(job.owner, content, version))
            case m.Recall():
                self._recall(job, self._open_slots())
            case m.Train():
                self._train(job, self._open_slots())
            case m.Save():
                path = m.adapter_path(self._adapters_root, job.name)
                trainer.save(job.owner, path, job.position, job.chain)
                self._send(m.Saved(job.owner, job.name))
            case m.Drop():
                trainer.drop(job.owner)
            case m.Leave():
                self._change_engine(None)
            case m.Share() | m.Join():
                pass  # taken where they come in

    def _recall(self, job: m.Recall, slots: Slots) -> None:
        version = 0
        if not self._is_dropped(job.owner):
            version = next((v for v, address in job.versions if self._restore(job.owner, address)), 0)
        if version:
            slots.write(job.slot, job.bank, job.owner, version, self._trainer.weights(job.owner))
        self._send(m.Recalled(job.owner, version))

    def _restore(self, owner: int, address: bytes | None) -> bool:
        """Make an adapter the version with this address. False if that is not remembered."""
        state = self._cache.get(address)
        if address is None or state is None:
            return False
        try:
            self._trainer.restore(owner, state)
        except ValueError as e:  # a stranger's, on disk
            self._cache.forget(address, str(e))
            return False
        return True

    def _train(self, job: m.Train, slots: Slots) -> None:
        begin = time.perf_counter()
        losses: list[float] = []
        is_remembered = False
        if not self._is_dropped(job.owner):
            self._send(m.Started(job.owner, job.version))
            is_remembered = self._restore(job.owner, job.address)
            if not is_remembered:
                losses = self._trainer.train(job.owner, job.version, job.tokens, job.num_targets)
        if self._is_dropped(job.owner):  # its slot may be cleared, or belong to another request
            raise ValueError(f"owner {job.owner} was dropped")
        slots.write(job.slot, job.bank, job.owner, job.version, self._trainer.weights(job.owner))
        seconds = time.perf_counter() - begin
        self._send(m.Trained(job.owner, job.slot, job.bank, job.version, losses, seconds))
        if is_remembered:
            self._cache.use(job.owner, job.uses)
        elif job.address is not None and self._cache.limit:
            self._keep(job, job.address)
        time.sleep(seconds * (1 / self._duty_cycle - 1))

    def _keep(self, job: m.Train, address: bytes) -> None:
        try:
            gone = self._cache.put(address, self._trainer.state(job.owner), job.owner, job.uses)
        except (MemoryError, RuntimeError):  # no memory is left: who needs the version trains it again
            return
        self._send(m.Kept(address, gone))

    def _is_dropped(self, owner: int) -> bool:
        """Whether an adapter is not needed any more: a job that waits drops it, or changes the engine."""
        self._receive()
        jobs = [job for _, job in self._jobs]
        return any(isinstance(job, m.Join | m.Leave) or job == m.Drop(owner) for job in jobs)

    def _open_slots(self) -> Slots:
        if self._slots is None:
            raise RuntimeError("the slots are not open")
        return self._slots

    def _close_slots(self) -> None:
        if self._slots is not None:
            self._slots.close()
            self._slots = None

    def _send(self, report: m.Report, engine: bytes | None = None) -> None:
        self._socket.send_multipart([engine or self._engine or b"", m.encode(report)])


def failure_report(job: m.Job, reason: str) -> m.Report:
    """The answer to a job that failed."""
    match job:
        case m.Save():
            return m.SaveFailed(job.owner, job.name, reason)
        case m.Train() | m.Resume():
            return m.Failed(job.owner, job.version, reason)
        case m.Begin() | m.Probe() | m.Recall():
            return m.Failed(job.owner, 0, reason)
        case _:
            return m.Lost(f"failed: {reason}")


def exit_with_parent(parent: int, directory: Path) -> None:
    """End this process when its parent has ended, and remove the directory of its socket.

    By polling: the kernel's signal (PR_SET_PDEATHSIG) comes when the parent's thread that started this
    process ends.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    while directory.exists():  # again, if the main thread has bound its socket in between
        shutil.rmtree(directory, ignore_errors=True)
    os._exit(0)


def make_sidecar(options: m.Options, socket: zmq.Socket[bytes]) -> Sidecar:
    """With the model on its device: the engine's own weights, if it shares them, or another copy."""
    device, slots = torch.device(options.device), None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if options.dtype != "float32":
            # Else the float32 adapters would take as long as the model. TF32 has bfloat16's exponent.
            torch.set_float32_matmul_precision("high")
    if options.attention == "xformers":
        attention.register()
    if options.shares:
        share = m.decode_job(socket.recv_multipart()[1])
        assert isinstance(share, m.Share)
        weights = {name: shared.attach(tensor, device) for name, tensor in share.weights.items()}
        skeleton = shared.skeleton(options.model, options.dtype, options.attention, options.config)
        model = shared.fill(skeleton, weights)
        slots = shared.attach(share.slots, device)
    else:
        model = load(options).to(device)  # type: ignore[arg-type]  # transformers' decorator loses self
    model.name_or_path = options.model  # saved adapters name it as their base model
    revision = f" (revision {options.revision})" if options.revision else ""
    about = f"{options.model}{revision} in {options.dtype}"
    trainer = Trainer(model, options.recompute)
    return Sidecar(trainer, socket, options.adapters_root, slots, options.duty_cycle, about)


def load(options: m.Options) -> PreTrainedModel:
    """Load a copy of the model. Raises ValueError if the files do not have all of its weights."""
    made: Any = AutoModelForCausalLM
    revision = options.revision or "main"
    if options.config is not None:
        made = shared.model_class(options.config)
        config = made.config_class.from_dict(options.config)
    else:
        config = AutoConfig.from_pretrained(options.model, revision=revision)
    settings: dict[str, Any] = {
        "config": config,
        "dtype": options.dtype,
        "attn_implementation": shared.attention_implementation(options.attention, config),
        "output_loading_info": True,
    }
    if options.weights:
        weights: dict[str, torch.Tensor] = {}
        for path in options.weights:
            if path.endswith(".safetensors"):
                weights |= load_file(path)
            else:
                weights |= torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        model, found = made.from_pretrained(None, state_dict=weights, **settings)
    else:
        model, found = made.from_pretrained(options.model, revision=revision, **settings)
    if missing := sorted(found["missing_keys"]):  # transformers would initialize them at random
        raise ValueError(f"the weights of {options.model} lack {', '.join(missing[:3])}")
    return model


def report_load_failure(socket: zmq.Socket[bytes], reason: str) -> None:
    """Answer the engine that waits for a model which could not be loaded.

    An engine that joins later gets no answer.
    """
    while socket.poll(1000):
        engine, payload = socket.recv_multipart()
        if isinstance(m.decode_job(payload), m.Join):
            socket.send_multipart([engine, m.encode(m.Unable(f"could not load its model: {reason}"))])
            socket.close(linger=1000)
            return


def main() -> None:
    given = sys.stdin.buffer.read() if len(sys.argv) < 2 else sys.argv[1]
    options = msgspec.json.decode(given, type=m.Options)
    for number in (signal.SIGINT, signal.SIGTERM):
        # By an exception, so that its files are removed, also those of a save in progress.
        signal.signal(number, lambda *_: sys.exit())
    path = Path(options.address.removeprefix("ipc://"))
    if options.parent is not None:
        threading.Thread(target=exit_with_parent, args=(options.parent, path.parent), daemon=True).start()
    if options.cpus is not None:
        os.sched_setaffinity(0, options.cpus)
    os.nice(NICENESS)
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    try:
        with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
            socket.set_hwm(0)
            socket.linger = 0
            socket.bind(options.address)
            try:
                sidecar = make_sidecar(options, socket)
            except Exception as e:
                report_load_failure(socket, f"{type(e).__name__}: {e}")
                raise
            try:
                sidecar.serve()
            finally:
                sidecar.keep_versions()
    finally:
        path.unlink(missing_ok=True)  # ZeroMQ leaves it


if __name__ == "__main__":
    main()
