"""How an engine core and its workers wait for each other while a trainer shares the machine."""

import functools

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

LONGEST_WAIT_MS = 2


def wait_patiently() -> None:
    """From now on, in this process, sleep where vLLM polls shared memory, and look again after 2 ms at the latest.

    Two reasons. The engine core polls for as long as its workers compute, and on two cores it took two thirds of the
    trainer's. And vLLM does sleep where nothing came for a second, as with every request held; but the message that is to
    wake it is dropped if the one before is still on its way (SNDHWM = 1), and it slept on, for a minute or for ever.
    """
    wait = SpinCondition.wait
    if hasattr(wait, "__wrapped__"):
        return

    @functools.wraps(wait)
    def patient(self: SpinCondition, timeout_ms: int | None = None) -> None:
        self.busy_loop_s = 0.0
        wait(self, LONGEST_WAIT_MS if timeout_ms is None else min(timeout_ms, LONGEST_WAIT_MS))

    SpinCondition.wait = patient
