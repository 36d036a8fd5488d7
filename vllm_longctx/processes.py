"""The processes of an engine end together, whoever dies first, and leave nothing behind.

vLLM's front end ends its processes. If it is killed itself, engine cores, workers and API servers go on for ever; if an engine
core is killed over its workers, shared memory stays. Here each of them looks after the process that started it. This module is
imported before vLLM in a spawned process, so it imports nothing of vLLM's itself.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing import parent_process, resource_tracker
from pathlib import Path
from typing import Any

import psutil

logger = logging.getLogger("vllm.longctx")

LOOK_EVERY = 0.5  # seconds
# Seconds that a process has to end by itself, in which vLLM gives its workers 5.
GRACE = 6.0
# What vLLM starts as processes of their own.
ENGINE_CORE = "vllm.v1.engine.core:EngineCoreProc.run_engine_core"
WORKER = "vllm.v1.executor.multiproc_executor:WorkerProc.worker_main"
API_SERVER = "vllm.v1.utils:run_api_server_worker_proc"
COORDINATOR = "vllm.v1.engine.coordinator:DPCoordinatorProc.run_coordinator"
TARGETS = (ENGINE_CORE, WORKER, API_SERVER, COORDINATOR)

# Where vLLM puts the sockets between its processes; by default among all other temporary files.
SOCKETS = "VLLM_RPC_BASE_PATH"
LONGEST_SOCKET_NAME = 107 - len("/c0ffee00-0000-4000-8000-000000000000")  # of a directory, for the kernel's limit of 107 bytes

_started_by_vllm = False


def end_together() -> None:
    """From now on, processes that vLLM starts from this one end when it does. To be called again for every engine."""
    resource_tracker.ensure_running()  # here, where nobody kills it with an engine core: it removes shared memory of the dead
    _take_directory()
    for path in TARGETS:
        owner, name = _find(path)
        function = getattr(owner, name)
        if not isinstance(function, Watched):
            setattr(owner, name, functools.wraps(function)(Watched(path)))


def _find(path: str) -> tuple[Any, str]:
    module, _, names = path.partition(":")
    *outer, name = names.split(".")
    owner = importlib.import_module(module)
    for part in outer:
        owner = getattr(owner, part)
    return owner, name


class Watched:
    """A main function of vLLM's for a process of its own, in a process that ends when the one that started it does."""

    __wrapped__: Callable[..., Any]

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        # A spawned process reads this before its other arguments, which import vLLM for seconds.
        return _in_spawned_process, (self.path, os.getpid())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        global _started_by_vllm
        owner, name = _find(self.path)
        function = getattr(owner, name)
        if isinstance(function, Watched):  # as it is not yet in a spawned process
            function = function.__wrapped__
        vllm_config = kwargs.get("vllm_config")  # of the others there is none in a process without a configuration of ours
        if vllm_config is not None and not _is_ours(vllm_config):
            _Guard.leave()
            return function(*args, **kwargs)
        _started_by_vllm = True
        parent = parent_process()
        assert parent is not None and parent.pid is not None
        guard = _Guard.of(parent.pid)
        end_together()
        if self.path == ENGINE_CORE:
            assert vllm_config is not None
            guard.heed_signals(GRACE + vllm_config.shutdown_timeout)
        elif self.path == WORKER:
            guard.heed_signals(GRACE)
            kwargs["distributed_init_method"] = _in_directory(kwargs["distributed_init_method"])
        try:
            return (
                function(*args, **kwargs) if self.path in (API_SERVER, COORDINATOR) else _and_leave(function, *args, **kwargs)
            )
        finally:
            remove_directory_of_the_dead()


def _and_leave(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the main function of a process, which then ends as a forked one does.

    A spawned one would first take all of PyTorch apart.
    """
    code = 1

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(leave)  # before others, so it is called behind them
    try:
        result = function(*args, **kwargs)
        code = 0
        return result
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        raise


def _in_spawned_process(path: str, parent: int) -> Watched:
    if os.getpid() != parent:  # else it is only copied
        _Guard.of(parent)
    return Watched(path)


def _is_ours(vllm_config: Any) -> bool:
    from vllm_longctx.config import KEY

    return KEY in (vllm_config.additional_config or {})


class _Guard(threading.Thread):
    """Ends this process when its parent has ended, first as vLLM ends it, after a while by force; the same after a signal."""

    current: "_Guard | None" = None

    def __init__(self, parent: int) -> None:
        super().__init__(name="longctx-guard", daemon=True)
        self._parent, self._process = _running(parent), os.getpid()
        self._read, self._write = socket.socketpair()
        self._read.settimeout(LOOK_EVERY)
        self._write.setblocking(False)
        self._grace = GRACE
        self._left = False

    @classmethod
    def of(cls, parent: int) -> "_Guard":
        """The one of this process; a forked process has none yet."""
        if cls.current is None or cls.current._process != os.getpid():
            cls.current = cls(parent)
            cls.current.start()
        return cls.current

    @classmethod
    def leave(cls) -> None:
        """This process is none of ours."""
        if cls.current is not None and cls.current._process == os.getpid():
            cls.current._left = True

    def heed_signals(self, grace: float) -> None:
        """End by force what has not ended so many seconds after SIGTERM or SIGINT, which vLLM only notes while it starts."""
        self._grace = grace
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))

    def run(self) -> None:
        deadline = None
        while not self._left and (deadline is None or time.monotonic() < deadline):
            signals = b""
            with contextlib.suppress(TimeoutError):
                signals = self._read.recv(64)
            if deadline is not None:
                continue
            if signal.SIGTERM in signals or signal.SIGINT in signals:
                deadline = time.monotonic() + self._grace
            elif not _is_running(self._parent):
                logger.warning("longctx: the process that started this one has ended, so process %d ends", os.getpid())
                deadline = time.monotonic() + GRACE
                os.kill(os.getpid(), signal.SIGTERM)
        if not self._left:
            end_by_force()


def end_without_collecting() -> None:
    """To be called when an engine is shut down: if its process ends with it, nothing is searched for garbage any more.

    vLLM and the interpreter do so several times, each of which takes a process with all of PyTorch in it up to seconds; then
    vLLM loses its patience and kills.
    """
    if _started_by_vllm:
        gc.disable()
        gc.freeze()
        gc.collect = lambda *_, **__: 0
        gc.unfreeze = lambda: None


def end_by_force() -> None:
    """End this process and all below it; only what removes shared memory of the dead lives until it has done so."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if not any("resource_tracker" in word for word in child.cmdline()):
                child.kill()
    remove_directory_of_the_dead()
    os._exit(1)


def _running(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def _is_running(process: psutil.Process | None) -> bool:
    try:
        return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _take_directory() -> None:
    """A directory for the sockets of this process and those that vLLM starts from it, removed at its end."""
    base = Path(os.environ.get(SOCKETS) or tempfile.gettempdir())
    owner = _owner(base)
    if owner == os.getpid() or (owner is not None and _started_by_vllm):
        return
    if owner is not None:  # of another engine's front end, which has started this one for reasons of its own
        base = base.parent
    directory = tempfile.mkdtemp(prefix=f"longctx-{os.getpid()}-", dir=base)
    if len(directory) > LONGEST_SOCKET_NAME:
        os.rmdir(directory)
        return
    os.environ[SOCKETS] = directory
    atexit.register(_remove_own, directory)


def _owner(directory: Path) -> int | None:
    """The process whose directory it is."""
    match = re.fullmatch(r"longctx-(\d+)-\w+", directory.name)
    return None if match is None else int(match[1])


def _remove_own(directory: str) -> None:
    if _owner(Path(directory)) == os.getpid():  # not in a process forked from it
        shutil.rmtree(directory, ignore_errors=True)


def remove_directory_of_the_dead() -> None:
    """Remove the directory of sockets, if the process that should has ended."""
    directory = Path(os.environ.get(SOCKETS, ""))
    owner = _owner(directory)
    if owner is not None and not _is_running(_running(owner)):
        shutil.rmtree(directory, ignore_errors=True)


def _in_directory(init_method: str) -> str:
    """Where PyTorch's processes find each other: a file in the directory, where vLLM has one among all temporary files."""
    directory = os.environ.get(SOCKETS, "")
    if not init_method.startswith("file://") or _owner(Path(directory)) is None:
        return init_method
    return f"file://{directory}/{Path(init_method).name}"
