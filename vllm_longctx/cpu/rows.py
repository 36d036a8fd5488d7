"""What metadata builders are told of a step, by row of its batch."""

from dataclasses import dataclass

from vllm_longctx.engine.rows import StepTimes


@dataclass(frozen=True)
class WindowRow:
    """row: of the step's batch.

    first: where its window starts; of a pass, the first position that it computed.
    """

    row: int
    first: int


class StepRows(StepTimes):
    """Of the step to come. The runner writes it before vLLM builds attention metadata.

    Sliding layers need nothing of it.

    windows: Rows whose window or pass does not start at 0.
    writing: Rows whose query has LM-Infinite's top-k branch: from the prompt's last token on.
    """

    windows: tuple[WindowRow, ...] = ()
    writing: frozenset[int] = frozenset()
