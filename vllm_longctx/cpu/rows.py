"""What metadata builders are told of a step, by row of its batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from vllm_longctx.engine.rows import StepTimes
from vllm_longctx.geometry import RequestView
from vllm_longctx.settings import Lookup


@dataclass(frozen=True)
class WindowRow:
    """row: of the step's batch.

    first: where its window starts; of a pass, the first position that it computed.
    lookup: how its queries find their keys in a memory; None where they see all of it.
    """

    row: int
    first: int
    lookup: Lookup | None = None


class StepRows(StepTimes):
    """Of the step to come. The runner writes it before vLLM builds attention metadata.

    views: By row, of requests that have chosen what their queries see in sliding layers.
    windows: Rows whose window or pass does not start at 0.
    writing: Rows whose query has LM-Infinite's top-k branch: from the prompt's last token on.
    """

    views: Mapping[int, RequestView] = MappingProxyType({})
    windows: tuple[WindowRow, ...] = ()
    writing: frozenset[int] = frozenset()
