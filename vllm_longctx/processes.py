"""The processes of an engine end together, whichever ends first, and leave no file or shared memory behind.

vLLM's front end ends its processes. But if it is killed, engine cores, workers and API servers go on for
ever. If an engine core is killed, its workers' shared memory stays. Here each process has a watchdog, which
ends it when its parent has ended. A spawned process imports this module before vLLM, so nothing of vLLM is
imported here.
"""

import asyncio
import atexit
import contextlib
import functools
import gc
import importlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import parent_process, resource_tracker
from pathlib import Path
from typing import Any

import psutil

logger = logging.getLogger("vllm.longctx")

POLL_INTERVAL = 0.5  # seconds
# Seconds that a process has to end by itself. vLLM gives its workers 5 of them.
GRACE = 6.0
# Main functions of the processes that vLLM starts.
ENGINE_CORE = "vllm.v1.engine.core:EngineCoreProc.run_engine_core"
WORKER = "vllm.v1.executor.multiproc_executor:WorkerProc.worker_main"
API_SERVER = "vllm.v1.utils:run_api_server_worker_proc"
COORDINATOR = "vllm.v1.engine.coordinator:DPCoordinatorProc.run_coordinator"
TARGETS = (ENGINE_CORE, WORKER, API_SERVER, COORDINATOR)

# Environment variable: the directory of the sockets between vLLM's processes. By default that of all
# temporary files.
SOCKETS = "VLLM_RPC_BASE_PATH"
# Longest path of that directory, in bytes: Linux allows 107 for a socket's path.
MAX_DIRECTORY_BYTES = 107 - len("/c0ffee00-0000-4000-8000-000000000000")

_started_by_vllm = False
# Their pipes stay open as long as this process lives.
_removers: "list[subprocess.Popen[bytes]]" = []


def end_together() -> None:
    """From now on, processes that vLLM starts from this one end when it does. Call it for every engine."""
    # It removes the shared memory of processes that were killed. Started here, it is not killed with an
    # engine core.
    resource_tracker.ensure_running()
    _make_socket_directory()
    _do_not_swallow_interrupts()
    for path in TARGETS:
        owner, name = _find(path)
        function = getattr(owner, name)
        if not isinstance(function, WatchedMain):
            setattr(owner, name, functools.wraps(function)(WatchedMain(path)))


def _do_not_swallow_interrupts() -> None:
    """Have Ctrl-C, and SIGTERM to `vllm serve`, end a front end that waits for its engine cores.

    vLLM's context manager of the socket where they say hello suppresses KeyboardInterrupt. The start goes on.
    """
    utils = importlib.import_module("vllm.v1.engine.utils")
    socket_context = utils.zmq_socket_ctx
    if socket_context.__module__ == __name__:
        return

    @contextlib.contextmanager
    def raising(*args: Any, **kwargs: Any) -> Iterator[Any]:
        interrupt = None
        with socket_context(*args, **kwargs) as handshake:
            try:
                yield handshake
            except KeyboardInterrupt as e:
                interrupt = e
        if interrupt is not None:
            raise interrupt

    raising.__wrapped__ = socket_context  # type: ignore[attr-defined]  # whose parameters it has
    utils.zmq_socket_ctx = raising  # type: ignore[attr-defined]  # a seam


def interrupt_start() -> None:
    """Have Ctrl-C end a start of `vllm serve` at once, as SIGTERM does. Call it when a start begins.

    At the first one, asyncio cancels the task that serves, but a start never waits for what could be
    cancelled. vLLM replaces both handlers once it serves.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        return
    if (getattr(handler, "__module__", None) or "").startswith("vllm.entrypoints."):
        signal.signal(signal.SIGINT, handler)
        with contextlib.suppress(RuntimeError):  # no event loop
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise KeyboardInterrupt


def _find(path: str) -> tuple[Any, str]:
    module, _, names = path.partition(":")
    *outer, name = names.split(".")
    owner = importlib.import_module(module)
    for part in outer:
        owner = getattr(owner, part)
    return owner, name


class WatchedMain:
    """In place of a main function of vLLM's: runs it in a process with a watchdog.

    path: "module:name.of.function".
    """

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
        if isinstance(function, WatchedMain):  # not replaced yet in a spawned process
            function = function.__wrapped__
        # Functions without it are replaced only in processes with a longctx configuration.
        vllm_config = kwargs.get("vllm_config")
        if vllm_config is not None and not _has_longctx(vllm_config):
            _Watchdog.stop()
            _started_by_vllm = False
            return function(*args, **kwargs)
        _started_by_vllm = True
        parent = parent_process()
        assert parent is not None and parent.pid is not None
        watchdog = _Watchdog.of(parent.pid)
        end_together()
        if self.path == ENGINE_CORE:
            assert vllm_config is not None
            watchdog.enforce_signals(GRACE + vllm_config.shutdown_timeout)
        elif self.path == WORKER:
            watchdog.enforce_signals(GRACE)
            kwargs["distributed_init_method"] = _in_directory(kwargs["distributed_init_method"])
        if self.path in (API_SERVER, COORDINATOR):
            return function(*args, **kwargs)
        return _run_and_exit(function, *args, **kwargs)


def _run_and_exit(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a process's main function, and end the process without the interpreter's teardown.

    Forked processes end like this. In spawned ones the teardown of PyTorch takes seconds.
    """
    code = 1

    def exit_now() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(exit_now)  # first, so that it is called last
    try:
        result = function(*args, **kwargs)
        code = 0
        return result
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        raise


def _in_spawned_process(path: str, parent: int) -> WatchedMain:
    global _started_by_vllm
    if os.getpid() != parent:  # else it was pickled and unpickled in one process
        _started_by_vllm = True
        _Watchdog.of(parent)
    return WatchedMain(path)


def is_started_by_vllm() -> bool:
    """Whether this is an engine core, a worker or an API server that a process with a configuration started.

    A spawned process knows it once it has read its main function, which comes before its arguments.
    `multiprocessing.parent_process` tells it only later.
    """
    return _started_by_vllm


def _has_longctx(vllm_config: Any) -> bool:
    from vllm_longctx.config import KEY

    return KEY in (vllm_config.additional_config or {})


class _Watchdog(threading.Thread):
    """Ends this process when its parent has ended: by SIGTERM, as vLLM does, then by force.

    Before it uses force, it waits for a grace period. It does so, too, when the process has got a signal.

    parent: Process id.
    """

    current: "_Watchdog | None" = None

    def __init__(self, parent: int) -> None:
        super().__init__(name="longctx-watchdog", daemon=True)
        self._parent, self._process = _running(parent), os.getpid()
        self._read, self._write = socket.socketpair()
        self._read.settimeout(POLL_INTERVAL)
        self._write.setblocking(False)
        self._grace = GRACE
        self._stopped = False

    @classmethod
    def of(cls, parent: int) -> "_Watchdog":
        """This process's watchdog, started if there is none.

        A forked process does not inherit its parent's.
        """
        if cls.current is None or cls.current._process != os.getpid():
            cls.current = cls(parent)
            cls.current.start()
        return cls.current

    @classmethod
    def stop(cls) -> None:
        """Stop this process's watchdog: its engine does not run longctx."""
        if cls.current is not None and cls.current._process == os.getpid():
            cls.current._stopped = True

    def enforce_signals(self, grace: float) -> None:
        """End this process by force if it has not ended `grace` seconds after SIGTERM or SIGINT.

        While vLLM starts, its handlers only note a signal.
        """
        self._grace = grace
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))

    def run(self) -> None:
        deadline = None
        while not self._stopped and (deadline is None or time.monotonic() < deadline):
            signals = b""
            with contextlib.suppress(TimeoutError):
                signals = self._read.recv(64)
            if deadline is not None:
                continue
            if signal.SIGTERM in signals or signal.SIGINT in signals:
                deadline = time.monotonic() + self._grace
            elif not _is_running(self._parent):
                text = "longctx: the process that started this one has ended, so process %d ends"
                logger.warning(text, os.getpid())
                deadline = time.monotonic() + GRACE
                os.kill(os.getpid(), signal.SIGTERM)
        if not self._stopped:
            end_by_force()


def end_without_collecting() -> None:
    """Turn garbage collection off for good when an engine is shut down, if its process ends with it.

    vLLM and the interpreter collect garbage several times then. With all of PyTorch loaded, each time takes
    up to seconds, and vLLM kills the process in between.
    """
    if _started_by_vllm:
        gc.disable()
        gc.freeze()
        gc.collect = lambda *_, **__: 0
        gc.unfreeze = lambda: None


def end_by_force() -> None:
    """Kill all processes below this one, and end this one.

    The resource tracker is left to remove the shared memory of the others, and then ends by itself.
    """
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if not any("resource_tracker" in word for word in child.cmdline()):
                child.kill()
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


def _make_socket_directory() -> None:
    """Make a directory for the sockets of this process and those that vLLM starts from it.

    It is removed when this one has ended.
    """
    base = Path(os.environ.get(SOCKETS) or tempfile.gettempdir())
    owner = _owner(base)
    if owner == os.getpid() or (owner is not None and _started_by_vllm):
        return
    if owner is not None:  # of another engine's front end, which has started this process
        base = base.parent
    directory = tempfile.mkdtemp(prefix=f"longctx-{os.getpid()}-", dir=base)
    if len(directory) > MAX_DIRECTORY_BYTES:
        os.rmdir(directory)
        return
    os.environ[SOCKETS] = directory
    _removers.append(_remove_afterwards(directory))


def _remove_afterwards(directory: str) -> "subprocess.Popen[bytes]":
    """Start a shell that removes a directory once this process has ended, and its forked ones.

    Only another process can do it after a SIGKILL. Before vLLM starts one, there is none. The shell waits at
    the end of a pipe, in a session of its own, so that Ctrl-C at a terminal does not reach it.
    """
    # Once more, since a process that is ending may have made a file meanwhile.
    script = 'read _; rm -rf -- "$0" || { sleep 1; rm -rf -- "$0"; }'
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        ["/bin/sh", "-c", script, directory],
        stdin=subprocess.PIPE,
        stdout=quiet,
        stderr=quiet,
        start_new_session=True,
    )


def _owner(directory: Path) -> int | None:
    """Id of the process that made this directory. None if it is no such directory."""
    match = re.fullmatch(r"longctx-(\d+)-\w+", directory.name)
    return None if match is None else int(match[1])


def _in_directory(init_method: str) -> str:
    """PyTorch's init method for a worker's process group, with its file in the directory of sockets."""
    directory = os.environ.get(SOCKETS, "")
    if not init_method.startswith("file://") or _owner(Path(directory)) is None:
        return init_method
    return f"file://{directory}/{Path(init_method).name}"
