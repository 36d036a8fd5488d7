"""How an engine core and its workers wait for each other while a trainer shares the machine."""

import functools

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

LONGEST_WAIT_MS = 2


def wait_patiently(busy_loop_s: float | None = None) -> None:
    """From now on, in this process, a reader of vLLM's shared memory that sleeps looks again after 2 ms at the latest.

    vLLM's readers poll, and sleep where nothing came for a second, as with every request held. But the message that is to wake
    them is dropped if the one before is still on its way (SNDHWM = 1), and they slept on, for a minute or for ever.

    busy_loop_s: how long they poll before, None for vLLM's second. An engine core polls for as long as its workers compute: on
    two cores it took two thirds of the trainer's.
    """
    wait = SpinCondition.wait
    if hasattr(wait, "__wrapped__"):
        return

    @functools.wraps(wait)
    def patient(self: SpinCondition, timeout_ms: int | None = None) -> None:
        if busy_loop_s is not None:
            self.busy_loop_s = busy_loop_s
        wait(self, LONGEST_WAIT_MS if timeout_ms is None else min(timeout_ms, LONGEST_WAIT_MS))

    SpinCondition.wait = patient  # type: ignore[method-assign]  # a seam
