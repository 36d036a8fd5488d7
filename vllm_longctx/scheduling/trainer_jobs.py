"""What the scheduler asks of the trainer for each request that adapts, and what follows from the answers.

The trainer may end at any time. Its client then starts another one, and what was asked is asked again, except
for a job that has ended the trainer twice. Without a trainer, requests go on with the versions that they
have, or end.
"""

from typing import Protocol

from vllm.logger import init_logger

from vllm_longctx.engine.step import Weights
from vllm_longctx.metrics import StepStats
from vllm_longctx.scheduling.adapting_request import AdaptingRequest
from vllm_longctx.settings import Adaptation
from vllm_longctx.temp_lora import messages
from vllm_longctx.temp_lora.blocks import example
from vllm_longctx.temp_lora.client import TrainerClient

logger = init_logger("vllm.longctx")

MAX_ATTEMPTS = 2  # at a block or a save that ends the trainer
DIED_AGAIN = "the trainer died over it again"


class JobEvents(Protocol):
    """What a scheduler does when a job ends a request.

    step_stats: The statistics of the current step.
    """

    step_stats: StepStats

    def fail_request(self, request_id: str, reason: str) -> None:
        """End a request with an error in the current step."""

    def end_save(self, adapting: AdaptingRequest, error: str | None) -> None:
        """Answer a request that waits for its save. error: Why its adapter is not saved; None if it is."""


class TrainerJobs:
    """The jobs of all requests that adapt.

    trainer: The engine's end of the trainer process.
    settings: The server's settings.
    bos: The model's token that begins a text; None if it has none.
    events: Called back when a request fails or its save ends.

    by_owner: By owner, each request until its adapter is dropped.
    lost: Why there is no trainer any more; None while there is one.
    """

    def __init__(self, trainer: TrainerClient, settings: Adaptation, bos: int | None, events: JobEvents):
        self.trainer, self.settings, self.bos, self.events = trainer, settings, bos, events
        self.by_owner: dict[int, AdaptingRequest] = {}
        self.lost: str | None = None

    # --- jobs ---------------------------------------------------------------------------------------------

    def begin(self, adapting: AdaptingRequest) -> None:
        """Have its adapter made, or loaded, in its slot."""
        assert adapting.slot is not None
        if self.lost is not None:
            self._skip_block(adapting, self.lost)
            return
        recipe = recipe_of(adapting.settings)
        self.trainer.send(messages.Begin(adapting.owner, adapting.slot, recipe, adapting.start_from))

    def train_next(self, adapting: AdaptingRequest) -> None:
        """Have the next block trained if its tokens, the version before it and a bank are there."""
        if adapting.loaded and adapting.versions.can_send:
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
            self.trainer.send(messages.Save(adapting.owner, adapting.save_as, adapting.request.num_tokens))

    def drop(self, adapting: AdaptingRequest) -> None:
        """Have its adapter forgotten. No report reaches the request any more."""
        del self.by_owner[adapting.owner]
        if adapting.slot is not None:
            self.trainer.send(messages.Drop(adapting.owner))

    def _train_block(self, adapting: AdaptingRequest) -> bool:
        """Have the next block trained.

        False if it has none: its tokens are not all known, or it does not train.
        """
        versions, request = adapting.versions, adapting.request
        targets = adapting.blocks.targets(versions.sent + 1)
        if not adapting.trains or adapting.slot is None or targets.stop > request.num_tokens:
            return False
        versions.sent += 1
        if self.lost is not None:
            self._skip_block(adapting, self.lost)
            return True
        tokens = example(request.all_token_ids, targets, adapting.settings.train_context_tokens, self.bos)
        bank, version = versions.free_bank, versions.sent
        self.trainer.send(messages.Train(adapting.owner, adapting.slot, bank, version, tokens, len(targets)))
        return True

    # --- reports ------------------------------------------------------------------------------------------

    def handle(self, report: messages.Report) -> None:
        if isinstance(report, messages.Restarted):
            self._handle_restart(report.owner)
            return
        if isinstance(report, messages.Dead):
            self._handle_end(report.reason)
            return
        adapting = self.by_owner.get(getattr(report, "owner", -1))
        if adapting is None:  # its request has left, or is answered
            return
        request_id, versions, stats = adapting.request_id, adapting.versions, self.events.step_stats
        match report:
            case messages.Began():
                if not adapting.loaded:  # else a restarted trainer has begun: the weights in use stay
                    adapting.loaded = True
                    versions.load(Weights(version=0, bank=0))
                self.train_next(adapting)
            case messages.Trained() if report.version == versions.sent:
                stats.blocks_trained += 1
                stats.train_seconds.append(report.seconds)
                stats.losses.append((report.losses[0], report.losses[-1]))
                versions.add(Weights(report.version, report.bank))
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
        recipe = recipe_of(adapting.settings)
        self.trainer.send(
            messages.Resume(adapting.owner, adapting.slot, weights.bank, weights.version, recipe),
        )

    def _handle_end(self, reason: str) -> None:
        """There is no trainer any more. Requests that wait for their save are answered in the next step."""
        for adapting in self.by_owner.values():
            if adapting.save is None and (adapting.versions.in_training or not adapting.loaded):
                self._skip_block(adapting, reason)
        self.lost = reason


def recipe_of(settings: Adaptation) -> messages.Recipe:
    """How the trainer makes and trains an adapter with these settings."""
    alpha = settings.rank if settings.alpha is None else settings.alpha
    return messages.Recipe(**{**messages.shared_fields(messages.Recipe, settings), "alpha": alpha})
