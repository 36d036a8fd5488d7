"""How an engine core and its workers wait for each other's messages while a trainer shares the machine."""

import contextlib
import functools
import os
import queue
from typing import TYPE_CHECKING, Any

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

if TYPE_CHECKING:  # workers import this file, too
    from vllm.v1.engine.core import EngineCore

MAX_SLEEP_MS = 2


def limit_reader_sleep(busy_loop_s: float | None = None) -> None:
    """In this process, let sleeping readers of vLLM's message queues look again after 2 ms.

    vLLM's readers poll. Where nothing comes for a second, as with every request held, they sleep until a
    message wakes them. But this message is dropped if the one before is still on its way (SNDHWM = 1). Then
    they slept for a minute or for ever.

    busy_loop_s: Seconds for which readers poll before they sleep. None for vLLM's second. An engine core
        polls for as long as its workers compute: on two cores it took two thirds of the trainer's.
    """
    wait = SpinCondition.wait
    if hasattr(wait, "__wrapped__"):
        return

    @functools.wraps(wait)
    def wait_briefly(self: SpinCondition, timeout_ms: int | None = None) -> None:
        if busy_loop_s is not None:
            self.busy_loop_s = busy_loop_s
        wait(self, MAX_SLEEP_MS if timeout_ms is None else min(timeout_ms, MAX_SLEEP_MS))

    SpinCondition.wait = wait_briefly  # type: ignore[method-assign]  # a seam


class InputQueue(queue.Queue[Any]):
    """What comes to an engine core: requests, aborts, calls and its end. A file tells when something comes.

    arrivals: A file that can be read once something has come since `forget_arrivals`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.arrivals = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def _put(self, item: Any) -> None:
        super()._put(item)
        os.eventfd_write(self.arrivals, 1)

    def forget_arrivals(self) -> bool:
        """From now on `arrivals` tells what comes next. False if something has come and was not taken yet."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.arrivals)
        return self.empty()


def listen_to_inputs(engine: "EngineCore") -> InputQueue | None:
    """Have an engine core that is being made take its input from a queue of ours.

    Returns the queue. None for an engine in the process of its front end, which has none.
    """
    if not hasattr(engine, "input_queue"):
        return None
    before, engine.input_queue = engine.input_queue, (inputs := InputQueue())
    with contextlib.suppress(queue.Empty):  # else a worker has failed, which has just started
        while True:
            inputs.put_nowait(before.get_nowait())
    return inputs
