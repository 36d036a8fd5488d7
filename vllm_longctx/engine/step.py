"""What the scheduler tells the workers about a step's requests that adapt; it travels on the SchedulerOutput."""

from dataclasses import dataclass

ATTRIBUTE = "longctx_adaptation"


@dataclass(frozen=True)
class Weights:
    """What a request computes with: version `version` in bank `bank` of its slot. bank None: the untrained adapter, zeros."""

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
    slot: int
    owner: int
    weights: Weights


@dataclass(frozen=True)
class Pass:
    """first: the position that a pass computed first. start: of its window. frontier: what lies before was computed before."""

    first: int
    start: int
    frontier: int


@dataclass(frozen=True)
class AdaptationStep:
    """For one step. memory: where the slots are, None while nothing is trained. slots: of the requests computed, by request.

    passes: of requests whose window does not start at 0, or that compute a part of their text again. freed: slots given back
    since the last step.
    """

    memory: SlotsMemory | None
    slots: dict[str, SlotUse]
    passes: dict[str, Pass]
    freed: list[int]
