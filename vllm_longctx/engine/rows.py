"""What metadata builders are told of a step, and the time they take."""

import time
from typing import Any


class StepTimes:
    """Of a worker. selection_seconds: spent in metadata builders since they were last taken."""

    selection_seconds = 0.0

    def take_selection_seconds(self) -> float:
        seconds, self.selection_seconds = self.selection_seconds, 0.0
        return seconds


class Timed:
    """Mixed into a metadata builder, before it. rows: the platform's `StepRows`."""

    rows: StepTimes

    def build(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return super().build(*args, **kwargs)  # type: ignore[misc]  # of the builder behind
        finally:
            self.rows.selection_seconds += time.perf_counter() - started
