"""A refusal in the engine core's process reaches whoever started it.

vLLM's front end learns only that a process ended, and says "See root cause above". Here the reason goes through an anonymous
file of the front end's, which is gone with it.
"""

import contextlib
import functools
import inspect
import os
import weakref
from collections.abc import Iterator
from typing import Any

from vllm.config import VllmConfig

from vllm_longctx.config import LongContextError

ATTRIBUTE = "longctx_refusal"  # of a VllmConfig: the path of that file


@contextlib.contextmanager
def told(vllm_config: VllmConfig) -> Iterator[None]:
    """Pass a LongContextError on to the process that waits for this engine core, if it is another one."""
    try:
        yield
    except LongContextError as e:
        path = getattr(vllm_config, ATTRIBUTE, None)
        if path is not None:
            with contextlib.suppress(OSError), open(path, "w") as file:
                file.write(str(e))
        raise


def listen() -> None:
    """Have vLLM's front end raise the LongContextError of an engine core that ended with one while it was started."""
    from vllm.v1.engine.utils import CoreEngineProcManager

    init, finished_procs = CoreEngineProcManager.__init__, CoreEngineProcManager.finished_procs
    if hasattr(init, "__wrapped__"):
        return

    files: weakref.WeakKeyDictionary[CoreEngineProcManager, int] = weakref.WeakKeyDictionary()  # their descriptors

    @functools.wraps(init)
    def init_listening(self: CoreEngineProcManager, *args: Any, **kwargs: Any) -> None:
        vllm_config = inspect.signature(init).bind(self, *args, **kwargs).arguments["vllm_config"]
        files[self] = file = os.memfd_create("longctx-refusal")
        weakref.finalize(self, os.close, file)
        setattr(vllm_config, ATTRIBUTE, f"/proc/{os.getpid()}/fd/{file}")
        init(self, *args, **kwargs)

    @functools.wraps(finished_procs)
    def finished_or_refused(self: CoreEngineProcManager) -> dict[str, int]:
        if size := os.fstat(files[self]).st_size:  # also of a process that is not quite gone yet
            raise LongContextError(os.pread(files[self], size, 0).decode())
        return finished_procs(self)

    CoreEngineProcManager.__init__ = init_listening  # type: ignore[method-assign]  # a seam
    CoreEngineProcManager.finished_procs = finished_or_refused  # type: ignore[method-assign]  # a seam
