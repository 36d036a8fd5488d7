"""What the scheduler asks of the trainer for each request that adapts, and what follows from the answers.

The trainer may end at any time. Its client then starts another one, and what was asked is asked again, except
for a job that has ended the trainer twice. Without a trainer, requests go on with the versions that they
have, or end.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

from vllm.logger import init_logger

from vllm_longctx.engine.step import Weights
from vllm_longctx.metrics import StepStats
from vllm_longctx.scheduling.adapting_request import AdaptingRequest
from vllm_longctx.settings import Adaptation
from vllm_longctx.temp_lora import address, messages
from vllm_longctx.temp_lora.blocks import PassStart, Start, example
from vllm_longctx.temp_lora.client import TrainerClient

logger = init_logger("vllm.longctx")

MAX_ATTEMPTS = 2  # at a block or a save that ends the trainer
DIED_AGAIN = "the trainer died over it again"


class JobEvents(Protocol):
    """What a scheduler does when a job ends a request.

    step_stats: The statistics of the current step.
    """

    step_stats: StepStats

    def new_owner(self) -> int:
        """A number for an adapter, never used again."""

    def fail_request(self, request_id: str, reason: str) -> None:
        """End a request with an error in the current step."""

    def can_begin_with(self, adapting: AdaptingRequest, start: Start) -> bool:
        """Whether all that comes before is cached or need not be computed."""

    def begin_with(self, adapting: AdaptingRequest, start: Start) -> bool:
        """Have a request of which nothing is computed begin there. Its version is in the slot.

        False if it cannot.
        """

    def end_save(self, adapting: AdaptingRequest, error: str | None) -> None:
        """Answer a request that waits for its save. error: Why its adapter is not saved; None if it is."""


class TrainerJobs:
    """The jobs of all requests that adapt.

    trainer: The engine's end of the trainer process.
    settings: The server's settings.
    bos: The model's token that begins a text; None if it has none.
    model: Names the model's weights, see `base_model.identity`.
    events: Called back when a request begins with a later pass, fails, or its save ends.

    by_owner: By owner, each request until its adapter is dropped.
    remembered: Addresses of versions that the trainer has, as far as is known.
    lost: Why there is no trainer any more; None while there is one.
    """

    def __init__(
        self,
        trainer: TrainerClient,
        settings: Adaptation,
        bos: int | None,
        model: bytes,
        events: JobEvents,
    ):
        self.trainer, self.settings, self.bos, self.model, self.events = trainer, settings, bos, model, events
        self.by_owner: dict[int, AdaptingRequest] = {}
        self.remembered: set[bytes] = set()
        self.lost: str | None = None

    # --- jobs ---------------------------------------------------------------------------------------------

    def begin(self, adapting: AdaptingRequest, looks_into_cache: bool = True) -> None:
        """Have its adapter made, or loaded, in its slot.

        looks_into_cache: Whether it may begin inside of a pass whose KV is cached.
        """
        assert adapting.slot is not None
        if self.lost is not None:
            self._skip_block(adapting, self.lost)
            return
        recipe = recipe_of(adapting.settings)
        goes_on = None if adapting.loaded else self._saved_version(adapting)
        self.trainer.send(messages.Begin(adapting.owner, adapting.slot, recipe, adapting.start_from, goes_on))
        if adapting.loaded:
            self._begin_chain(adapting, looks_into_cache=looks_into_cache)

    def _saved_version(self, adapting: AdaptingRequest) -> tuple[int, bytes] | None:
        """The version of the request's own text that the saved adapter is, and its address. None if none."""
        assert adapting.start_from is not None
        saved = messages.chain_of(messages.adapter_path(self.settings.adapters_root, adapting.start_from))
        if saved is None:
            return None
        self._name_prompt(adapting, bytes.fromhex(saved.began_with))
        version, chain = saved.version, adapting.chain
        is_own = 0 < version < len(chain) and chain[version].hex() == saved.address
        return (version, chain[version]) if is_own else None

    def _name_prompt(self, adapting: AdaptingRequest, began_with: bytes, all_versions: bool = True) -> None:
        """Name the versions of its prompt, if they have names. all_versions: Else the untrained one only."""
        request, settings, recipe = adapting.request, adapting.settings, recipe_of(adapting.settings)
        if not settings.epochs or request.prompt_embeds is not None:  # whose tokens are not known
            return
        adapting.began_with = began_with
        adapting.chain = [address.untrained(self.model, settings, recipe, request.cache_salt, began_with)]
        while all_versions and (tokens := self._example(adapting, len(adapting.chain))) is not None:
            self._name(adapting, len(adapting.chain), tokens)

    def _begin_chain(
        self, adapting: AdaptingRequest, began_with: bytes = b"", looks_into_cache: bool = True
    ) -> None:
        """Name its versions, and begin as late in its text as can be."""
        may_recall = bool(self.remembered) and not adapting.frontier
        self._name_prompt(adapting, began_with, all_versions=may_recall)
        if adapting.frontier or not adapting.chain or adapting.is_scored:
            return
        chain = adapting.chain
        starts = list(self._starts(adapting, lambda v: chain[v] in self.remembered, looks_into_cache))
        if not starts or starts[0].version == 0:
            self._begin_with(adapting, starts)
            return
        assert adapting.slot is not None
        adapting.recalls, bank = starts, adapting.versions.free_bank
        versions = dict.fromkeys((start.version, chain[start.version]) for start in starts if start.version)
        self.trainer.send(messages.Recall(adapting.owner, adapting.slot, bank, list(versions)))

    def _starts(
        self, adapting: AdaptingRequest, is_there: Callable[[int], bool], looks_into_cache: bool = True
    ) -> Iterator[Start]:
        """Where it may begin, with the versions that are there; the best first.

        Where a pass begins, all that matters is the text and one version. Inside of a pass, the KV of all
        versions before must be cached, too. A request that trains nothing computes all with one version: the
        newest that there is.
        """
        window, blocks, named = adapting.window, adapting.blocks, len(adapting.chain)
        passes = [PassStart(0, 0, 0), *window.passes(blocks, adapting.request.num_tokens)]
        latest = adapting.request.num_tokens - 1
        if not adapting.trains:
            for version in reversed(range(named)):
                start = Start(replace(passes[-1], version=version), version, 0, latest)
                if is_there(version) if version else self.events.can_begin_with(adapting, start):
                    yield start
            return
        for begun in reversed(passes):
            versions = range(begun.version, min(blocks.version_of(latest) + 1, named))
            for version in reversed(versions):
                if version and not is_there(version):
                    continue
                end = latest
                if version < blocks.version_of(latest):
                    end = min(latest, blocks.first_position_of(version + 1) - 1)
                begins = version == begun.version
                start = Start(begun, version, 0 if begins else blocks.first_position_of(version), end)
                cached = looks_into_cache and self.events.can_begin_with(adapting, start)
                if (begins and version) or cached:
                    yield start
            latest = begun.position - 1

    def _go_on(self, adapting: AdaptingRequest, version: int) -> None:
        """Begin with a version of its own text, which was saved.

        Where its KV is cached, as if the text had never ended. Else with a pass from there on, where there
        are passes, or all is computed with this version.
        """
        blocks, window, end = adapting.blocks, adapting.window, adapting.request.num_tokens - 1
        starts = [] if adapting.is_scored else list(self._starts(adapting, lambda one: one == version))
        position = min(blocks.first_position_of(version), end) if adapting.trains else end
        begun = PassStart(position, window.start_at(position), version)
        if window.policy == "keep" or adapting.is_scored:
            begun = PassStart(0, 0, version)
        anew = Start(begun, version, 0, begun.position)
        self._begin_with(adapting, [*(start for start in starts if start.version == version), anew])

    def _begin_anew(self, adapting: AdaptingRequest) -> None:
        """Begin again: what its adapter was to go on from is not cached any more."""
        self.drop(adapting)
        adapting.owner = self.events.new_owner()
        adapting.loaded = adapting.start_from is None
        self.by_owner[adapting.owner] = adapting
        self.begin(adapting, looks_into_cache=False)

    def _begin_with(self, adapting: AdaptingRequest, starts: list[Start]) -> bool:
        """Begin with the first of these that can be. False if none can."""
        for start in starts:
            if self.events.begin_with(adapting, start):
                self._count_remembered(adapting, start.version)
                return True
        return False

    def _count_remembered(self, adapting: AdaptingRequest, blocks: int) -> None:
        adapting.blocks_remembered += blocks
        self.events.step_stats.blocks_remembered += blocks

    def _example(self, adapting: AdaptingRequest, version: int) -> list[int] | None:
        """What a version is trained on. None while that is not known, or if it is never trained."""
        text, blocks = adapting.request.all_token_ids, adapting.blocks
        targets = blocks.targets(version)
        is_behind = blocks.last_version is not None and version > blocks.last_version
        if is_behind or targets.stop > len(text):
            return None
        return example(text, targets, adapting.settings.train_context_tokens, self.bos)

    def _name(self, adapting: AdaptingRequest, version: int, tokens: list[int]) -> bytes | None:
        """The address of a version, which is trained on `tokens`. None if it has none."""
        chain = adapting.chain
        if chain and version == len(chain):
            chain.append(address.trained(chain[-1], tokens, adapting.settings.block_tokens))
        return chain[version] if version < len(chain) else None

    def _uses(self, adapting: AdaptingRequest) -> list[bytes]:
        """See `messages.Train`. Last are later versions that the text itself needs."""
        chain, version = adapting.chain, adapting.versions.sent
        needed = [named for named in chain[version + 1 :] if named in self.remembered]
        return [chain[v] for v in (*adapting.versions_to_keep(), version)] + needed

    def train_next(self, adapting: AdaptingRequest) -> None:
        """Have the next block trained if its tokens, the version before it and a bank are there."""
        if adapting.loaded and not adapting.recalls and adapting.versions.can_send:
            self._train_block(adapting)

    def save_next(self, adapting: AdaptingRequest, steps_done: int) -> None:
        """Send the next job of a request that has ended: its blocks one by one, then the save.

        steps_done: Number of the last step whose outputs have come.
        """
        save, versions = adapting.save, adapting.versions
        assert save is not None and adapting.save_as is not None
        if self.lost is not None:
            self.events.end_save(adapting, self.lost)
            return
        if save.sent or versions.in_training:
            return
        reads_other_bank = versions.trained > versions.approved and steps_done < save.last_step
        if reads_other_bank:
            return
        versions.approve()
        if not self._train_block(adapting):
            save.sent = True
            version, chain = versions.trained_weights.version, None
            if 0 < version < len(adapting.chain):
                chain = messages.Chain(version, adapting.chain[version].hex(), adapting.began_with.hex())
            position = adapting.request.num_tokens
            self.trainer.send(messages.Save(adapting.owner, adapting.save_as, position, chain))

    def drop(self, adapting: AdaptingRequest) -> None:
        """Have its adapter forgotten. No report reaches the request any more."""
        del self.by_owner[adapting.owner]
        if adapting.slot is not None:
            self.trainer.send(messages.Drop(adapting.owner))

    def _train_block(self, adapting: AdaptingRequest) -> bool:
        """Have the next block trained.

        False if it has none: its tokens are not all known, or it does not train.
        """
        versions = adapting.versions
        tokens = self._example(adapting, versions.sent + 1)
        if not adapting.trains or adapting.slot is None or tokens is None:
            return False
        versions.sent += 1
        if self.lost is not None:
            self._skip_block(adapting, self.lost)
            return True
        bank, version, targets = versions.free_bank, versions.sent, adapting.settings.block_tokens
        name = self._name(adapting, version, tokens)
        uses = [] if name is None else self._uses(adapting)
        job = messages.Train(adapting.owner, adapting.slot, bank, version, tokens, targets, name, uses)
        self.trainer.send(job)
        return True

    # --- reports ------------------------------------------------------------------------------------------

    def handle(self, report: messages.Report) -> None:
        if isinstance(report, messages.Restarted):
            self._handle_restart(report.owner)
            return
        if isinstance(report, messages.Dead):
            self._handle_end(report.reason)
            return
        if isinstance(report, messages.Kept):
            self.remembered.add(report.address)
            self.remembered.difference_update(report.gone)
            return
        adapting = self.by_owner.get(getattr(report, "owner", -1))
        if adapting is None:  # its request has left, or is answered
            return
        request_id, versions, stats = adapting.request_id, adapting.versions, self.events.step_stats
        match report:
            case messages.Began():
                if not adapting.loaded:  # else a restarted trainer has begun: the weights in use stay
                    adapting.loaded = True
                    if report.version:
                        self._go_on(adapting, report.version)
                    else:
                        versions.load(Weights(version=0, bank=0))
                        self._begin_chain(adapting, report.content)
                self.train_next(adapting)
            case messages.Recalled() | messages.Failed() if adapting.recalls:
                version = report.version if isinstance(report, messages.Recalled) else 0
                starts = [start for start in adapting.recalls if start.version == version]
                adapting.recalls = []
                if not self._begin_with(adapting, starts) and version:
                    self._begin_anew(adapting)
                self.train_next(adapting)
            case messages.Trained() if report.version == versions.sent:
                if report.losses:
                    stats.blocks_trained += 1
                    stats.train_seconds.append(report.seconds)
                    stats.losses.append((report.losses[0], report.losses[-1]))
                else:
                    self._count_remembered(adapting, 1)
                versions.add(Weights(report.version, report.bank))
                if self.settings.cache_gib != 0 and report.version < len(adapting.chain):
                    # It is kept by now, or about to be: Kept comes later, maybe after the next request.
                    self.remembered.add(adapting.chain[report.version])
                self.train_next(adapting)
            case messages.Failed() if report.version == versions.sent:
                self._skip_block(adapting, report.reason)
            case messages.Failed():
                logger.error("longctx: the adapter of %s was not taken up: %s", request_id, report.reason)
            case messages.Saved() if adapting.save is not None:
                self.events.end_save(adapting, None)
            case messages.SaveFailed() if adapting.save is not None:
                self.events.end_save(adapting, report.reason)

    def _skip_block(self, adapting: AdaptingRequest, reason: str) -> None:
        """Do without a block, or the adapter to start from.

        Go on with the last version, or end the request.
        """
        versions = adapting.versions
        adapting.lose_addresses()
        self.events.step_stats.train_failures += 1
        fails = self.settings.on_failure == "fail" or not adapting.loaded
        version = versions.trained_weights.version
        if self.lost is None:  # else the log says it once, not for every block
            logger.error(
                "longctx: training of %s failed at block %d: %s; %s",
                adapting.request_id,
                versions.sent,
                reason,
                "the request ends" if fails else f"it goes on with version {version}",
            )
        versions.skip()
        if fails and adapting.save is not None:
            self.events.end_save(adapting, f"block {versions.sent} was not trained: {reason}")
        elif fails:
            self.events.fail_request(adapting.request_id, f"Temp-LoRA: {reason}")

    def _handle_restart(self, at: int | None) -> None:
        """Ask again for all that was asked.

        Weights come back from the slots; the optimizers' states are lost.

        at: Owner of the job that the trainer worked on when it ended.
        """
        self.events.step_stats.trainer_restarts += 1
        self._forget()
        logger.warning(
            "longctx: the trainer was restarted; the optimizer states of %d requests are lost",
            len(self.by_owner),
        )
        for adapting in list(self.by_owner.values()):
            if adapting.slot is not None:
                adapting.versions.attempts += adapting.owner == at
                self._ask_again(adapting)

    def _ask_again(self, adapting: AdaptingRequest) -> None:
        versions, save = adapting.versions, adapting.save
        gives_up = versions.attempts >= MAX_ATTEMPTS
        if gives_up and not adapting.loaded:
            self._skip_block(adapting, DIED_AGAIN)
            return
        self._resume(adapting)
        if versions.in_training and gives_up:
            self._skip_block(adapting, DIED_AGAIN)
        elif versions.in_training:
            versions.sent -= 1
            self._train_block(adapting)
        elif save is not None and save.sent:
            save.sent = False
            if gives_up:
                self.events.end_save(adapting, DIED_AGAIN)

    def _resume(self, adapting: AdaptingRequest) -> None:
        """Have its adapter made again, from the slot if that has a version of it."""
        weights = adapting.versions.trained_weights
        if weights.bank is None or not adapting.loaded:
            self.begin(adapting)
            return
        assert adapting.slot is not None
        adapting.lose_addresses()  # without the optimizer's state, the next versions are others
        recipe = recipe_of(adapting.settings)
        self.trainer.send(
            messages.Resume(adapting.owner, adapting.slot, weights.bank, weights.version, recipe),
        )

    def _handle_end(self, reason: str) -> None:
        """There is no trainer any more. Requests that wait for their save are answered in the next step."""
        self._forget()
        for adapting in self.by_owner.values():
            if adapting.save is None and (adapting.versions.in_training or not adapting.loaded):
                self._skip_block(adapting, reason)
        self.lost = reason

    def _forget(self) -> None:
        """What the trainer remembered is lost."""
        self.remembered.clear()
        for adapting in self.by_owner.values():
            adapting.recalls = []


def recipe_of(settings: Adaptation) -> messages.Recipe:
    """How the trainer makes and trains an adapter with these settings."""
    alpha = settings.rank if settings.alpha is None else settings.alpha
    return messages.Recipe(**{**messages.shared_fields(messages.Recipe, settings), "alpha": alpha})
