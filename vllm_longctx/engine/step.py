"""The two messages of a step: `StepInfo` from the scheduler to the workers, `StepReport` from a worker back.

Each travels as one attribute of vLLM's own message of that step; nothing else is added to vLLM's objects on
the way.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from vllm_longctx.geometry import RequestView
from vllm_longctx.settings import Lookup

ATTRIBUTE = "longctx"  # of a SchedulerOutput and of a ModelRunnerOutput
NO_LIMIT = 1 << 62  # tokens of a request in a step


@dataclass(frozen=True)
class RequestWindow:
    """A request's stepped window in a memory engine. Positions in tokens.

    start: Where the window of the request's tokens in this step begins.
    closes: Where the window began that the last step ended, which now becomes memory; None if it is memory
        already.
    copies: Ids (from, to) of memory layers' blocks, to be copied before anything is written in the step.
    lookup: How the request's queries find their keys in the memory; None where they see all of it.
    """

    start: int
    closes: int | None = None
    copies: tuple[tuple[int, int], ...] = ()
    lookup: Lookup | None = None


@dataclass(frozen=True)
class Weights:
    """What a request computes with.

    version: Of its adapter; 0 is untrained.
    bank: Of its slot, that holds the version; None for the untrained adapter, zeros.
    """

    version: int = 0
    bank: int | None = None


@dataclass(frozen=True)
class SlotsMemory:
    """The arguments of `Slots.open`."""

    path: str
    modules: dict[str, tuple[int, int]]
    max_rank: int
    num_slots: int


@dataclass(frozen=True)
class SlotUse:
    """slot: Of the request's adapter. owner: Names the request to the trainer, never used again."""

    slot: int
    owner: int
    weights: Weights


@dataclass(frozen=True)
class Pass:
    """A request's pass over its stepped window. Positions in tokens.

    first: What the pass computed first: the kept first tokens stand from here to its start.
    start: Of its window.
    frontier: What lies before it has been computed before.
    """

    first: int
    start: int
    frontier: int


@dataclass(frozen=True)
class StepInfo:
    """For one step; by request id where a mapping.

    windows: Of a memory engine's requests.
    slots: Of requests that have an adapter of their own.
    passes: Of requests whose window does not start at 0, or that compute a part of their text again.
    views: Of requests that have chosen what their queries see in sliding layers.
    freed_slots: Given back since the last step.
    slots_memory: Where the slots are; None while nothing is trained.
    """

    windows: Mapping[str, RequestWindow] = field(default_factory=dict)
    slots: Mapping[str, SlotUse] = field(default_factory=dict)
    passes: Mapping[str, Pass] = field(default_factory=dict)
    views: Mapping[str, RequestView] = field(default_factory=dict)
    freed_slots: Sequence[int] = ()
    slots_memory: SlotsMemory | None = None

    def send_with(self, output: SchedulerOutput) -> None:
        setattr(output, ATTRIBUTE, self)

    @staticmethod
    def of(output: SchedulerOutput) -> "StepInfo":
        """What came with a step; nothing with one that vLLM makes up."""
        return getattr(output, ATTRIBUTE, None) or StepInfo()


@dataclass
class StepReport:
    """What a worker reports of a step.

    selection_seconds: Spent on attention metadata: tables, scratch blocks, plans, of all KV cache groups
        together; of the host, where the device computes ahead. None in a step without a forward.
    swap_seconds: Of each adapter that was put into the layers.
    failed_adapters: Users' adapters that could not be loaded, by the id that the user gave, with the reason.
    """

    selection_seconds: float | None = None
    swap_seconds: list[float] = field(default_factory=list)
    failed_adapters: dict[int, str] = field(default_factory=dict)

    def send_with(self, output: ModelRunnerOutput) -> None:
        setattr(output, ATTRIBUTE, self)

    @staticmethod
    def of(output: ModelRunnerOutput) -> "StepReport":
        return getattr(output, ATTRIBUTE, None) or StepReport()


def copied_blocks(windows: Iterable[RequestWindow]) -> tuple[list[int], list[int]] | None:
    """All copies of a step, as sources and targets; None if there are none."""
    copies = [copy for window in windows for copy in window.copies]
    return ([a for a, _ in copies], [b for _, b in copies]) if copies else None
