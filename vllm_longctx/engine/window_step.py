"""What the scheduler tells the workers about a step's requests with stepped windows; it travels on the SchedulerOutput."""

from collections.abc import Iterable
from dataclasses import dataclass

ATTRIBUTE = "longctx_windows"


@dataclass(frozen=True)
class RequestWindow:
    """start: where the window of the request's tokens in this step begins. Positions in tokens.

    closes: where the window began that the last step ended, which now becomes memory; None if it is memory already.
    copies: of memory layers' blocks, (from, to), made before anything is written in the step. Block ids tell groups apart.
    """

    start: int
    closes: int | None
    copies: tuple[tuple[int, int], ...] = ()


def copies_of(windows: Iterable[RequestWindow]) -> tuple[list[int], list[int]] | None:
    """All of a step's, as sources and targets; None if there are none."""
    copies = [copy for window in windows for copy in window.copies]
    return ([a for a, _ in copies], [b for _, b in copies]) if copies else None
