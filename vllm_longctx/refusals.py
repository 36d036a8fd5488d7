"""A LongContextError in the engine core's process reaches the process that started it.

vLLM's front end learns only that a process ended, and says "See root cause above". Here the engine core
writes the message to an anonymous file of the front end's. The file is gone when the front end is.
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
def reported(vllm_config: VllmConfig) -> Iterator[None]:
    """Report a LongContextError to the process that waits for this engine core, if that is another one.

    It is raised again.
    """
    try:
        yield
    except LongContextError as e:
        path = getattr(vllm_config, ATTRIBUTE, None)
        if path is not None:
            with contextlib.suppress(OSError), open(path, "w") as file:
                file.write(str(e))
        raise


def raise_in_front_end() -> None:
    """Have vLLM's front end raise the LongContextError with which a starting engine core ended."""
    from vllm.v1.engine.utils import CoreEngineProcManager

    init, finished_procs = CoreEngineProcManager.__init__, CoreEngineProcManager.finished_procs
    if hasattr(init, "__wrapped__"):
        return

    files: weakref.WeakKeyDictionary[CoreEngineProcManager, int] = (
        weakref.WeakKeyDictionary()
    )  # their descriptors

    @functools.wraps(init)
    def init_with_file(self: CoreEngineProcManager, *args: Any, **kwargs: Any) -> None:
        vllm_config = inspect.signature(init).bind(self, *args, **kwargs).arguments["vllm_config"]
        files[self] = file = os.memfd_create("longctx-refusal")
        weakref.finalize(self, os.close, file)
        setattr(vllm_config, ATTRIBUTE, f"/proc/{os.getpid()}/fd/{file}")
        init(self, *args, **kwargs)

    @functools.wraps(finished_procs)
    def finished_or_raise(self: CoreEngineProcManager) -> dict[str, int]:
        if size := os.fstat(files[self]).st_size:  # also of a process that has not quite ended
            raise LongContextError(os.pread(files[self], size, 0).decode())
        return finished_procs(self)

    CoreEngineProcManager.__init__ = init_with_file  # type: ignore[method-assign]  # a seam
    CoreEngineProcManager.finished_procs = finished_or_raise  # type: ignore[method-assign]  # a seam
