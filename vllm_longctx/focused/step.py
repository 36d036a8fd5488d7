"""What the scheduler tells the workers about a step's requests with stepped windows; it travels on the SchedulerOutput."""

from dataclasses import dataclass

ATTRIBUTE = "longctx_windows"


@dataclass(frozen=True)
class RequestWindow:
    """start: where the window of the request's tokens in this step begins. Positions in tokens.

    closes: where the window began that the last step ended, which now becomes memory; None if it is memory already.
    """

    start: int
    closes: int | None
