"""How an engine core and its workers wait for each other's messages while a trainer shares the machine."""

import functools

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

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
