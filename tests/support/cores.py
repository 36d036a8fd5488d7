"""The machine's cores.

Engines bind their threads to all that they see, so processes of pytest-xdist have one each. But a trainer,
whose priority is low, would starve beside its engine on one core: `ALL_CORES` in the environment leaves them
all of them.
"""

import os

CORES = sorted(os.sched_getaffinity(0))


def take_one() -> None:
    """Bind this process, if it is one of several that run tests, and what it starts from now on."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None and "ALL_CORES" not in os.environ:
        os.sched_setaffinity(0, {CORES[int(worker.removeprefix("gw")) % len(CORES)]})
