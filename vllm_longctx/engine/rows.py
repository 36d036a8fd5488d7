"""What metadata builders are told of a step, and the time they take."""

import time
from collections.abc import Sequence
from typing import Any

from vllm_longctx.rotary import Rotary


class StepTimes:
    """Of a worker.

    selection_seconds: Spent in metadata builders since they were last taken.
    rotaries: Of the model's layers; each keeps the angles of a step's positions.
    """

    selection_seconds = 0.0
    rotaries: Sequence[Rotary] = ()

    def take_selection_seconds(self) -> float:
        seconds, self.selection_seconds = self.selection_seconds, 0.0
        return seconds


class Timed:
    """Mixed into a metadata builder, before it. rows: the platform's `StepRows`."""

    rows: StepTimes

    def build(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        for rotary in self.rows.rotaries:
            rotary.new_step()
        try:
            return super().build(*args, **kwargs)  # type: ignore[misc]  # of the builder behind
        finally:
            self.rows.selection_seconds += time.perf_counter() - started
