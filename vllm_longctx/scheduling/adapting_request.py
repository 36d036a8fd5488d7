"""The state of one request that adapts: its versions, its current pass, and what it waits for.

Nothing here talks to vLLM's scheduler or to the trainer, so each rule can be read by itself. Positions are in
tokens. A block is a text block here, except where it says KV block.
"""

from dataclasses import dataclass, field
from enum import Enum, auto

from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.request import Request

from vllm_longctx.engine.step import NO_LIMIT, Pass, SlotUse, Weights
from vllm_longctx.scheduling.request_pass import KVHasher, RequestPass
from vllm_longctx.settings import Adaptation
from vllm_longctx.temp_lora.blocks import Blocks, PassStart, Start, Window


class WaitsFor(Enum):
    """What a request that adapts waits for.

    SLOT: A slot for its adapter, and room for its KV blocks.
    BEGAN: The trainer's Began or Recalled: the adapter that it starts from is being loaded.
    VERSION: The version that computes its next position, which is being trained.
    SAVE: The save of its adapter. It has ended, and its last output is held back.
    """

    SLOT = auto()
    BEGAN = auto()
    VERSION = auto()
    SAVE = auto()


@dataclass
class Versions:
    """The versions of a request's adapter.

    A version has the number of the block that it was trained on; 0 is untrained.

    Always approved <= trained <= sent <= approved + 1. So one bank of the slot is read and the other one can
    be written.

    approved: The version that the request computes with.
    trained: The newest version that the trainer has answered for.
    sent: The newest version that the trainer has been asked for.
    approved_weights: Those of `approved`. If its training failed, those of the version before.
    trained_weights: Those of `trained`, likewise.
    attempts: How often the trainer has ended while it worked on `sent`, or on the save.
    """

    approved: int = 0
    trained: int = 0
    sent: int = 0
    approved_weights: Weights = field(default_factory=Weights)
    trained_weights: Weights = field(default_factory=Weights)
    attempts: int = 0

    @property
    def in_training(self) -> bool:
        return self.sent > self.trained

    @property
    def can_send(self) -> bool:
        """Whether the version before the next one is trained, and no step reads the next one's bank."""
        return self.sent == self.trained and self.sent <= self.approved

    @property
    def free_bank(self) -> int:
        """The bank of the slot that no step reads."""
        return 0 if self.approved_weights.bank is None else 1 - self.approved_weights.bank

    def load(self, weights: Weights) -> None:
        """Start from a saved adapter: `weights` are version 0."""
        self.approved_weights = self.trained_weights = weights

    def add(self, weights: Weights) -> None:
        """The version in training is there."""
        self.trained, self.attempts, self.trained_weights = self.sent, 0, weights

    def skip(self) -> None:
        """The version in training will never be there.

        Its number stands for the weights of the version before.
        """
        self.trained, self.attempts = self.sent, 0

    def approve(self) -> None:
        """Compute with the trained version from now on. No step may be in flight."""
        self.approved, self.approved_weights = self.trained, self.trained_weights


@dataclass
class PendingSave:
    """The end of a request whose adapter is to be saved.

    output: Its last output, which is held back.
    last_step: Number of the last step that may still compute the request.
    sent: Whether the trainer has been asked to save.
    """

    output: EngineCoreOutput
    last_step: int
    sent: bool = False


@dataclass
class AdaptingRequest:
    """A request that adapts: what it asks for, and how far it is.

    request: vLLM's request.
    settings: The server's Temp-LoRA settings, changed by the request's options.
    save_as: Name under which its adapter is saved when it ends. None if it is not saved.
    start_from: Name of the saved adapter that it starts from. None for a new one.
    blocks: Where its blocks lie, and which version computes each.
    window: When its stepped window moves.
    kv_blocks: KV blocks reserved for it, from its admission to its end.
    owner: Number of its adapter at the trainer, never used again.
    admitted: Whether its KV blocks are reserved, and it has a slot if it needs one.
    slot: Slot of its adapter. None until it is admitted, and for one that needs none.
    loaded: Whether the adapter that it starts from is in the slot. True if it starts from none.
    versions: The versions of its adapter.
    chain: The addresses of its versions, from h(0) on, as far as they are known. Empty where its versions are
        not what their text alone makes of them.
    began_with: Names the weights of the saved adapter with which its training began. Empty for a new one.
    recalls: Where it may begin, the best first, while the trainer is asked for the versions.
    blocks_remembered: Blocks that were not trained for it.
    tokens_cached: Tokens of its text that were not computed for it.
    hasher: Names its KV blocks. None if they have no names.
    current_pass: The pass in which it is computed.
    passes_seen: Passes in which it may begin, until it does.
    waits_for_other: Whether another request computes just what comes next, in the current step.
    pass_versions: With which each of its passes began, the current one and those before.
    frontier: The first position that was never computed.
    checked: The frontier when the version and the pass were last found right for what comes next.
    held_since: When it began to wait for the trainer, in seconds of `time.monotonic`. None while it does not
        wait.
    save: The save that it waits for. None until it has ended.
    """

    request: Request
    settings: Adaptation
    save_as: str | None
    start_from: str | None
    blocks: Blocks
    window: Window
    kv_blocks: int
    owner: int
    admitted: bool = False
    slot: int | None = None
    loaded: bool = field(init=False)
    versions: Versions = field(default_factory=Versions)
    chain: list[bytes] = field(default_factory=list)
    began_with: bytes = b""
    recalls: list[Start] = field(default_factory=list)
    blocks_remembered: int = 0
    tokens_cached: int = 0
    hasher: KVHasher | None = None
    current_pass: RequestPass = field(init=False)
    passes_seen: dict[PassStart, RequestPass] = field(default_factory=dict)
    waits_for_other: bool = False
    pass_versions: list[int] = field(default_factory=lambda: [0])
    frontier: int = 0
    checked: int = 0
    held_since: float | None = None
    save: PendingSave | None = None

    def __post_init__(self) -> None:
        self.loaded = self.start_from is None
        self.current_pass = self.pass_at(PassStart(0, 0, 0))

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def trains(self) -> bool:
        return self.settings.epochs > 0 and self.settings.learn != "none"

    @property
    def needs_slot(self) -> bool:
        return self.settings.epochs > 0 or self.start_from is not None or self.save_as is not None

    @property
    def is_scored(self) -> bool:
        """Whether its whole prompt must be computed."""
        params = self.request.sampling_params
        return params is not None and bool(params.skip_reading_prefix_cache)

    @property
    def needed_version(self) -> int:
        """The version that computes the position at the frontier."""
        return self.blocks.version_of(self.frontier) if self.trains else 0

    @property
    def waits_for(self) -> WaitsFor | None:
        """None if it can be computed, as soon as the version that it needs is approved."""
        if self.save is not None:
            return WaitsFor.SAVE
        if not self.admitted:
            return WaitsFor.SLOT
        if not self.loaded or self.recalls:
            return WaitsFor.BEGAN
        return WaitsFor.VERSION if self.needed_version > self.versions.trained else None

    @property
    def versions_behind(self) -> int:
        """Blocks that were computed before the one at the frontier and are not trained yet."""
        if not self.trains:
            return 0
        begun, last = self.blocks.block_of(self.frontier) - 1, self.blocks.last_version
        return max((begun if last is None else min(begun, last)) - self.versions.trained, 0)

    @property
    def slot_use(self) -> SlotUse | None:
        """What the workers compute it with. None without a slot."""
        return None if self.slot is None else SlotUse(self.slot, self.owner, self.versions.approved_weights)

    def allowance(self, computed: int) -> int:
        """Tokens that may be computed after `computed` ones: to the end of the block and of the window.

        0 until the version that it needs is approved.
        """
        if not self.loaded or self.waits_for_other or self.needed_version > self.versions.approved:
            return 0
        return max(self.end - computed, 0)

    @property
    def end(self) -> int:
        """Of its text block, or of its window."""
        ends = [NO_LIMIT]
        if self.trains or self.window.policy == "recompute":
            ends.append(self.blocks.end_of_block(max(self.checked, self.blocks.origin)))
        if self.window.policy != "keep":
            ends.append(self.window.last_position(self.current_pass.start))
        return min(ends)

    def pass_at(self, begun: PassStart) -> RequestPass:
        blocks = self.blocks if self.trains else None
        return RequestPass(begun, self.window.first_computed(begun.start), blocks, self.hasher)

    def pass_seen(self, begun: PassStart) -> RequestPass:
        """A pass that may become the current one."""
        if begun == self.current_pass.begun:
            return self.current_pass
        return self.passes_seen.setdefault(begun, self.pass_at(begun))

    def name_kv(self, one: RequestPass, limit: int) -> None:
        """Name the KV blocks of a pass, up to a position."""
        one.extend(self.request.all_token_ids, self.chain, limit)

    def begin_pass(self) -> bool:
        """Begin the pass that is due at the frontier. False if none is due."""
        window, current = self.window, self.current_pass
        start = window.next_start(current.start, self.frontier, self.blocks)
        if start is None:
            return False
        is_full = window.live_tokens(current.start, self.frontier) >= window.window_tokens
        if self.frontier == current.begun.position and not is_full:  # the pass due here is the current one
            return False
        version = self.versions.approved_weights.version
        self._set_pass(self.pass_at(PassStart(self.frontier, start, version)))
        self.current_pass.sends_table = True
        self.pass_versions.append(self.needed_version)
        return True

    def _set_pass(self, current: RequestPass) -> None:
        self.current_pass = current
        self.request.block_hashes.clear()

    def begin_with(self, start: Start, position: int) -> None:
        """Begin inside of a pass in place of the text's first token. Its version is in the free bank.

        position: What is computed next.
        """
        versions, begun = self.versions, start.begun
        if self.trains:
            versions.approved = versions.trained = versions.sent = start.version
        if start.version:
            versions.load(Weights(start.version, versions.free_bank))
        before = self.window.passes(self.blocks, begun.position)
        passes = [*before, begun] if begun.position or begun.version else []
        self.pass_versions = [0, *(one.version for one in passes)]
        self.frontier = self.checked = max(begun.position, position)
        self.tokens_cached = position
        self._set_pass(self.pass_seen(begun))
        self.passes_seen.clear()

    def new_block_hashes(self, request: Request) -> list[BlockHash]:
        """Hashes of further blocks of its current table, for vLLM's prefix cache."""
        current = self.current_pass
        self.name_kv(current, self.end)
        if len(request.block_hashes) >= current.table_index(len(current.names)):
            return []
        return current.hashes[len(request.block_hashes) :]

    def lose_addresses(self) -> None:
        """Its versions are not what its text alone makes of them."""
        self.chain.clear()
        self.lose_kv_names()

    def lose_kv_names(self) -> None:
        """The KV of its current pass is not what its text and its versions make of it."""
        self.current_pass.forget_names()
        self.request.block_hashes.clear()

    def versions_to_keep(self) -> list[int]:
        """Versions with which a text that begins as this one would go on, the most useful last.

        It would begin with the version of a pass, and then need those that compute the pass. Of the passes
        before the current one, these are worth it: 1, 2, 4, 8, ... passes back. In the first pass, so many
        versions.
        """
        *earlier, begun = self.pass_versions
        if not begun:
            earlier = list(range(self.versions.sent))
        far = [earlier[-(2**n)] for n in reversed(range(len(earlier).bit_length()))]
        kept = (*far, *range(begun + 1, self.versions.sent), begun) if begun else far
        return [version for version in kept if version]

    def pass_of_step(self, first: int) -> Pass | None:
        """What the workers must know of the pass in a step that computes from the position `first` on.

        None where it is the first pass and nothing is computed again.
        """
        current = self.current_pass
        if not current.start and first >= self.frontier:
            return None
        return Pass(current.first, current.start, self.frontier)
