"""vLLM's scheduler for requests that adapt: slots, blocks, versions, holds and passes.

A request's life here: it waits for a slot and for room for its live context; it is computed up to the end of a block; the
block goes to the trainer as soon as its tokens are known; the next block is computed once the version it needs is trained; a
full window starts a new pass, which is a roll-back of `num_computed_tokens`. Nothing else of vLLM's scheduling changes: a
held request is one that may compute no token in this step.

Steps may be scheduled ahead of the device (vLLM's AsyncScheduler, which counts tokens before it knows them). Inside a block and
a window that makes no difference. A request that has come to the end of one waits until the outputs of all its steps have
come: only then a version is approved, a bank free to be written, or a pass begun.

A request that ends and has something to save gives its blocks back at once, but its last output waits until the adapter is
saved, or is known not to be. Till then it has its slot, whose weights a trainer that is started again goes on with.
"""

import functools
import itertools
import os
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor import Executor
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_longctx import refusals
from vllm_longctx.config import KEY, LongContextError, RequestOptions
from vllm_longctx.engine.kv_cache import LambdaManager, PrivateRequests, SteppedManager
from vllm_longctx.engine.step import Pass, SlotsMemory, SlotUse, StepInfo, Weights
from vllm_longctx.engine.waiting import wait_patiently
from vllm_longctx.metrics import StepStats
from vllm_longctx.models.properties import model_dtype
from vllm_longctx.scheduling.scheduler import LongContextScheduler
from vllm_longctx.settings import Adaptation
from vllm_longctx.temp_lora import base_model, messages
from vllm_longctx.temp_lora.blocks import Blocks, Window, example
from vllm_longctx.temp_lora.client import TrainerClient
from vllm_longctx.temp_lora.shared_weights import SharedWeights, shared_by_engine
from vllm_longctx.temp_lora.training_memory import Shape

logger = init_logger("vllm.longctx")

# While every request is held the engine loop would spin; it waits this long for the trainer, in seconds.
IDLE_WAIT = 0.06
ATTEMPTS = 2  # at a block, or at a save, when the trainer dies over it
DIED_AGAIN = "the trainer died over it again"


@dataclass
class PendingSave:
    """What a request that has ended waits for.

    output: its last, which is held back. last_step: the last that may still compute it. sent: the trainer has been asked.
    """

    output: EngineCoreOutput
    last_step: int
    sent: bool = False


@dataclass
class Adapted:
    """A request that adapts. Positions in tokens.

    owner: names this request to the trainer, never used again. most_blocks: KV blocks reserved for it. frontier: first
    position never computed so far; what is computed before it again belongs to a new pass. checked: the frontier when version
    and pass were last found to be right for what comes next. start: of the window. first: what the pass computed first.
    passed_at: the frontier when it began. Versions: `approved` is computed with, `trained` is there,
    `sent` is at the trainer; a block that failed leaves the weights of the version before. saving: None until it has ended.
    """

    request: Request
    settings: Adaptation
    save_as: str | None
    start_from: str | None
    blocks: Blocks
    window: Window
    most_blocks: int
    owner: int
    slot: int | None = None
    admitted: bool = False
    ready: bool = True
    frontier: int = 0
    checked: int = 0
    start: int = 0
    first: int = 0
    passed_at: int = 0
    new_table: bool = False
    approved: int = 0
    trained: int = 0
    sent: int = 0
    attempts: int = 0
    weights: Weights = field(default_factory=Weights)
    trained_weights: Weights = field(default_factory=Weights)
    held_since: float | None = None
    saving: PendingSave | None = None

    @property
    def trains(self) -> bool:
        return self.settings.epochs > 0

    @property
    def needs_slot(self) -> bool:
        return self.trains or self.start_from is not None or self.save_as is not None

    def needed_version(self) -> int:
        return self.blocks.version_of(self.frontier) if self.trains else 0

    def allowance(self, computed: int) -> int:
        """Tokens that may be computed from `computed` on: to the end of the block and of the window; 0 while it is held."""
        if not self.ready or self.needed_version() > self.approved:
            return 0
        by_block = self.trains or self.window.policy == "recompute"
        ends = [self.blocks.end_of_block(max(self.checked, self.blocks.origin))] if by_block else []
        if self.window.policy != "keep":
            ends.append(self.window.last_position(self.start))
        return max(min(ends) - computed, 0) if ends else 1 << 62


class TempLoraScheduler(LongContextScheduler):
    """Also a mixin: `class X(TempLoraScheduler, AsyncScheduler)` decides the same over vLLM's other scheduler."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.temp_lora = self.settings.temp_lora
        on_the_cpu = self.temp_lora.trainer.device == "cpu"  # where polling would take the trainer's core
        wait_patiently(busy_loop_s=0.0 if on_the_cpu else None)
        self.bos = self.vllm_config.model_config.hf_text_config.bos_token_id
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self.private_managers = [m for m in managers if isinstance(m, PrivateRequests)]
        self.adapted: dict[str, Adapted] = {}  # by request, until it ends
        self.saving: dict[str, Adapted] = {}  # by request, from then until it is answered
        self.by_owner: dict[int, Adapted] = {}  # all of these
        self.answers: list[tuple[int, EngineCoreOutput]] = []  # last outputs to be sent, each with its client
        self.owners = itertools.count(1)
        self.free_slots = deque(range(self.temp_lora.slots))
        self.freed_slots: list[int] = []
        self.steps_scheduled = self.steps_done = 0  # only those that compute anything
        self.leaving: deque[tuple[int, int]] = deque()  # slots whose request has ended, each with its last step
        self.reserved_blocks = 0
        self.trainer_lost: str | None = None
        shared = shared_by_engine.pop(self.vllm_config.instance_id, None)
        with refusals.told(self.vllm_config):
            self.trainer = trainer_client(self.vllm_config, self.temp_lora, shared)
            self.trainer.start()
        check_when_engines_start()

    def check_trainer_model(self, executor: Executor) -> None:
        """Wait for the trainer and compare its model. Raises LongContextError if there is no trainer, or with another model."""
        trainer, address, begin = self.trainer, self.temp_lora.trainer.address, time.monotonic()
        ours = base_model.measure(self, executor, trainer.probe) if trainer.probe else []
        self.step_stats = StepStats()  # no request of a user's was in these steps
        logger.info("longctx: waiting for the trainer%s", f" at {address}" if address else " to load its model")
        trainer.wait_until_ready(partial(base_model.fault, ours=ours, vllm_config=self.vllm_config, address=address))
        logger.info("longctx: the trainer was ready, and its model compared, after %.1f s", time.monotonic() - begin)

    # --- a request's life -----------------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        is_new = request.request_id not in self.requests
        if is_new and request.sampling_params is not None and request.lora_request is None:
            self._adapt(request)
        super().add_request(request)

    def _adapt(self, request: Request) -> None:
        assert request.sampling_params is not None
        try:
            options = RequestOptions.parse((request.sampling_params.extra_args or {}).get(KEY) or {})
            settings = self.temp_lora.for_request(options, self.trained_length, self.block_size)
        except LongContextError as e:  # the front end has checked this, but an adapter may be gone since
            self.failed[request.request_id] = str(e)
            return
        if settings is None:
            return
        sizes = settings.window_tokens, settings.context_tokens, settings.keep_first
        window = Window(settings.kv_policy, *sizes, self.block_size)
        manager = self.private_managers[0]
        if isinstance(manager, LambdaManager):
            assert manager.max_admission_blocks_per_request is not None
            most_blocks = manager.max_admission_blocks_per_request
        else:
            most_blocks = cdiv(settings.window_tokens, self.block_size) + 1
        request.skip_reading_prefix_cache = True
        self.adapted[request.request_id] = adapted = Adapted(
            request,
            settings,
            options.save_as,
            options.start_from,
            Blocks.of_prompt(request.num_prompt_tokens, settings.block_tokens, settings.update_mode, settings.train_on_prompt),
            window,
            most_blocks,
            owner=next(self.owners),
            ready=options.start_from is None,
        )
        self.by_owner[adapted.owner] = adapted

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        adapted = self.adapted.get(request.request_id)
        if adapted is not None:
            if not adapted.admitted and not self._admit(request, adapted):
                return False
            if request.num_in_flight_tokens or not self._approve(request, adapted):
                return False
        return super()._handle_blocked_waiting_request(request)

    def _admit(self, request: Request, adapted: Adapted) -> bool:
        """Give a request its slot and reserve its blocks, which it keeps to its end; False if it must wait."""
        room = self.kv_cache_manager.block_pool.num_gpu_blocks - 1 - self.reserved_blocks
        if adapted.most_blocks > room or (adapted.needs_slot and not self.free_slots):
            return False
        self.reserved_blocks += adapted.most_blocks
        for manager in self.private_managers:
            manager.make_private(request.request_id, adapted.most_blocks)
        adapted.admitted = True
        if adapted.needs_slot:
            adapted.slot = self.free_slots.popleft()
            self._begin(adapted)
            self._train(adapted)
        return True

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        adapted = self.adapted.pop(request.request_id, None)
        if adapted is not None:
            self._let_go(request, adapted)
        return super()._free_request(request, *args, **kwargs)

    def _let_go(self, request: Request, adapted: Adapted) -> None:
        self.failed.pop(request.request_id, None)
        adapted.held_since = None
        if adapted.admitted:
            self.reserved_blocks -= adapted.most_blocks
            for manager in self.private_managers:
                manager.forget(request.request_id)
        if adapted.admitted and adapted.save_as is not None and ends_by_itself(request):
            reason = request.get_finished_reason()
            if reason == FinishReason.ABORT:  # by a stop string; nothing more comes of this request
                reason = FinishReason.STOP
            output = EngineCoreOutput(request.request_id, [], finish_reason=reason)
            adapted.saving = PendingSave(output, self.steps_scheduled)
            self.saving[request.request_id] = adapted
        else:
            self._give_back(adapted)

    def _give_back(self, adapted: Adapted) -> None:
        del self.by_owner[adapted.owner]
        if adapted.slot is not None:
            self.trainer.send(messages.Drop(adapted.owner))
            self.leaving.append((self.steps_scheduled, adapted.slot))
            self._free_slots()

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        if request_ids is None:  # the engine ends or is paused: nobody has found a stop string, and nobody waits for a save
            for adapted in self.adapted.values():
                adapted.save_as = None
            for adapted in list(self.saving.values()):
                self._answer(adapted, "the engine was paused or shut down")
        return super().finish_requests(request_ids, finished_status)

    def has_finished_requests(self) -> bool:
        return bool(self.saving or self.answers) or super().has_finished_requests()

    def _free_slots(self) -> None:
        """Those that no step under way has still to read: a worker may be behind, and its copies behind the worker."""
        while self.leaving and self.leaving[0][0] <= self.steps_done:
            _, slot = self.leaving.popleft()
            if self.trainer.slots is not None:
                self.trainer.slots.clear(slot)
            self.free_slots.append(slot)
            self.freed_slots.append(slot)

    # --- a step ---------------------------------------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        for message in self.trainer.poll():
            self._hear(message)
        self._go_on_saving()
        for request in self.running:
            adapted = self.adapted.get(request.request_id)
            if adapted is not None and request.num_in_flight_tokens == 0:
                self._prepare(request, adapted)
        # vLLM preempts the last: those that adapt cannot be replayed and have their blocks reserved, so they go first.
        self.running.sort(key=lambda request: request.request_id not in self.adapted)
        output = super().schedule(*args, **kwargs)
        if output.total_num_scheduled_tokens:
            self.steps_scheduled += 1
        elif self.steps_scheduled == self.steps_done and not self.answers and any(a.admitted for a in self.by_owner.values()):
            self.step_stats.idle_steps += 1
            self.trainer.wait(IDLE_WAIT)
        return output

    def _prepare(self, request: Request, adapted: Adapted) -> None:
        """Before a request's next new position: the version it needs, and a new pass if one is due."""
        if request.num_computed_tokens == adapted.frontier and self._approve(request, adapted):
            adapted.checked = adapted.frontier
            self._begin_pass(request, adapted)

    def _approve(self, request: Request, adapted: Adapted) -> bool:
        """Let the request compute with the version that its next new position needs; False while that is not trained."""
        needed = adapted.needed_version()
        if not adapted.ready or needed > adapted.trained:
            adapted.held_since = adapted.held_since or time.monotonic()
            return False
        if needed > adapted.approved:
            adapted.approved, adapted.weights = needed, adapted.trained_weights
            self._train(adapted)
        if adapted.held_since is not None:
            self.step_stats.hold_seconds.append(time.monotonic() - adapted.held_since)
            adapted.held_since = None
        return True

    def _begin_pass(self, request: Request, adapted: Adapted) -> None:
        window, frontier = adapted.window, adapted.frontier
        start = window.next_start(adapted.start, frontier, adapted.blocks)
        if start is None or (
            frontier == adapted.passed_at and window.live_tokens(adapted.start, frontier) < window.window_tokens
        ):
            return
        adapted.start, adapted.first, adapted.passed_at = start, window.first_computed(start), frontier
        self._roll_back(request, adapted)
        adapted.new_table = True

    def _roll_back(self, request: Request, adapted: Adapted) -> None:
        for manager in self.private_managers:
            assert isinstance(manager, SteppedManager)
            manager.roll_back(request.request_id, adapted.first)
        request.num_computed_tokens = adapted.first

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        allowed = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        adapted = self.adapted.get(request.request_id)
        return allowed if adapted is None else min(allowed, adapted.allowance(num_computed_tokens))

    def _make_cached_request_data(self, *args: Any, **kwargs: Any) -> CachedRequestData:
        data = super()._make_cached_request_data(*args, **kwargs)
        for row, request_id in enumerate(data.req_ids):
            adapted = self.adapted.get(request_id)
            if adapted is not None and adapted.new_table:
                # The worker replaces the block table of a resumed request and keeps all the rest.
                data.resumed_req_ids.add(request_id)
                data.new_block_ids[row] = self.kv_cache_manager.get_block_ids(request_id)
                if not self.use_v2_model_runner:  # which keeps a request's tokens as long as it lives
                    data.all_token_ids.setdefault(request_id, self.requests[request_id].all_token_ids.copy())
                adapted.new_table = False
        return data

    @property
    def slots_memory(self) -> SlotsMemory | None:
        slots = self.trainer.slots
        return None if slots is None else SlotsMemory(slots.path, slots.modules, slots.max_rank, slots.num_slots)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        for request_id in scheduler_output.num_scheduled_tokens:
            adapted = self.adapted.get(request_id)
            if adapted is not None:
                adapted.frontier = max(adapted.frontier, self.requests[request_id].num_computed_tokens)

    def _step_info(self, output: SchedulerOutput) -> StepInfo:
        slots: dict[str, SlotUse] = {}
        passes: dict[str, Pass] = {}
        freed, self.freed_slots = self.freed_slots, []
        for request_id, new in output.num_scheduled_tokens.items():
            adapted = self.adapted.get(request_id)
            if adapted is None:
                continue
            if adapted.slot is not None:
                slots[request_id] = SlotUse(adapted.slot, adapted.owner, adapted.weights)
            again = self.requests[request_id].num_computed_tokens - new < adapted.frontier
            if adapted.start or again:
                passes[request_id] = Pass(adapted.first, adapted.start, adapted.frontier)
        return StepInfo(slots=slots, passes=passes, freed_slots=freed, slots_memory=self.slots_memory)

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        """Only `reset_prefix_cache` with running requests comes here for one that adapts: it computes its pass again.

        What its steps under way give is not dropped then, as vLLM would: it counts as computed, and the first pass wins.
        """
        adapted = self.adapted.get(request.request_id)
        super()._preempt_request(request, timestamp, drop_stale_output and adapted is None)
        if adapted is None:
            return
        logger.warning(
            "longctx: %s adapts and was preempted; its window is computed again with version %d",
            request.request_id,
            adapted.weights.version,
        )
        adapted.new_table = False
        if adapted.first:
            self._roll_back(request, adapted)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        for request_id in scheduler_output.num_scheduled_tokens:
            if request_id in self.adapted:
                self.step_stats.adapted_tokens += scheduler_output.num_scheduled_tokens[request_id]
        if scheduler_output.total_num_scheduled_tokens:
            self.steps_done += 1
            self._free_slots()
        answers, self.answers = self.answers, []  # before vLLM's statistics are made, which are to have what they tell
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._hold_back(outputs)
        for client_index, output in answers:
            outputs.setdefault(client_index, EngineCoreOutputs()).outputs.append(output)
        for request_id in scheduler_output.num_scheduled_tokens:
            adapted = self.adapted.get(request_id)
            if adapted is not None:
                self._train(adapted)
        self._go_on_saving()
        if self.failed:
            self._end_failed(outputs)
        return outputs

    # --- what is saved --------------------------------------------------------------------------------------------------

    def _hold_back(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Take out the last outputs of requests that wait for their save."""
        for sent in outputs.values():
            for output in sent.outputs:
                if output.finished and (adapted := self.saving.get(output.request_id)) is not None:
                    assert adapted.saving is not None
                    adapted.saving.output = output
            sent.outputs = [o for o in sent.outputs if not (o.finished and o.request_id in self.saving)]

    def _go_on_saving(self) -> None:
        for adapted in list(self.saving.values()):
            self._save(adapted)

    def _save(self, adapted: Adapted) -> None:
        """What comes next on the way to a saved adapter: the blocks that are not trained yet, one by one, then the save."""
        saving = adapted.saving
        assert saving is not None and adapted.save_as is not None
        if self.trainer_lost is not None:
            self._answer(adapted, self.trainer_lost)
        elif saving.sent or adapted.sent > adapted.trained:
            return  # the trainer is at it
        elif adapted.trained == adapted.approved or self.steps_done >= saving.last_step:  # no step reads the other bank
            adapted.approved, adapted.weights = adapted.trained, adapted.trained_weights
            if not self._send_block(adapted):
                saving.sent = True
                self.trainer.send(messages.Save(adapted.owner, adapted.save_as, adapted.request.num_tokens))

    def _answer(self, adapted: Adapted, error: str | None) -> None:
        """Send the last output of a request whose adapter is saved, or will never be."""
        saving = adapted.saving
        assert saving is not None
        if error is None:
            self.step_stats.adapters_saved += 1
        else:
            assert adapted.save_as is not None
            text = messages.not_saved(adapted.save_as, error)
            logger.error("%s (request %s)", text, adapted.request.request_id)
            self.step_stats.save_failures += 1
            # Not all routes show the first, and none makes of the second more than it is.
            saving.output.stop_reason = text
            saving.output.kv_transfer_params = {KEY: {"save_error": text}}
        del self.saving[adapted.request.request_id]
        self._give_back(adapted)
        self.answers.append((adapted.request.client_index, saving.output))

    # --- the trainer ----------------------------------------------------------------------------------------------------

    def _begin(self, adapted: Adapted) -> None:
        assert adapted.slot is not None
        if self.trainer_lost is not None:
            self._lose(adapted, self.trainer_lost)
            return
        self.trainer.send(messages.Begin(adapted.owner, adapted.slot, recipe(adapted.settings), adapted.start_from))

    def _train(self, adapted: Adapted) -> None:
        """Send the next block if its tokens are known, the version before it is there, and a bank of the slot is free."""
        if adapted.ready and adapted.sent == adapted.trained and adapted.sent <= adapted.approved:
            self._send_block(adapted)

    def _send_block(self, adapted: Adapted) -> bool:
        request, targets = adapted.request, adapted.blocks.targets(adapted.sent + 1)
        if not adapted.trains or adapted.slot is None or targets.stop > request.num_tokens:
            return False
        adapted.sent += 1
        if self.trainer_lost is not None:
            self._lose(adapted, self.trainer_lost)
            return True
        tokens = example(request.all_token_ids, targets, adapted.settings.train_context_tokens, self.bos)
        bank = 0 if adapted.weights.bank is None else 1 - adapted.weights.bank
        self.trainer.send(messages.Train(adapted.owner, adapted.slot, bank, adapted.sent, tokens, len(targets)))
        return True

    def _hear(self, message: messages.Report) -> None:
        if isinstance(message, messages.Restarted):
            self._trainer_restarted(message.owner)
            return
        if isinstance(message, messages.Dead):
            self._trainer_died(message.reason)
            return
        adapted = self.by_owner.get(getattr(message, "owner", -1))
        if adapted is None:  # its request has left, or been answered
            return
        match message:
            case messages.Began():
                if not adapted.ready:  # else it is of a trainer that was restarted: the weights in use stay
                    adapted.ready, adapted.weights = True, Weights(0, 0)
                    adapted.trained_weights = adapted.weights
                self._train(adapted)
            case messages.Trained() if message.version == adapted.sent:
                self.step_stats.blocks_trained += 1
                self.step_stats.train_seconds.append(message.seconds)
                self.step_stats.losses.append((message.losses[0], message.losses[-1]))
                adapted.trained, adapted.attempts = message.version, 0
                adapted.trained_weights = Weights(message.version, message.bank)
                self._train(adapted)
            case messages.Failed() if message.version == adapted.sent:
                self._lose(adapted, message.reason)
            case messages.Failed():
                logger.error("longctx: the adapter of %s was not taken up: %s", adapted.request.request_id, message.reason)
            case messages.Saved() if adapted.saving is not None:
                self._answer(adapted, None)
            case messages.SaveFailed() if adapted.saving is not None:
                self._answer(adapted, message.reason)

    def _lose(self, adapted: Adapted, reason: str) -> None:
        """A block (or what the request was to start from) is lost: go on with the last good version, or end the request."""
        request_id = adapted.request.request_id
        self.step_stats.train_failures += 1
        fail = self.temp_lora.on_failure == "fail" or not adapted.ready
        if self.trainer_lost is None:  # else the log has said so, and it would say it for every block
            logger.error(
                "longctx: training of %s failed at block %d: %s; %s",
                request_id,
                adapted.sent,
                reason,
                "the request ends" if fail else f"it goes on with version {adapted.trained_weights.version}",
            )
        adapted.trained, adapted.attempts = adapted.sent, 0
        if fail and adapted.saving is not None:
            self._answer(adapted, f"block {adapted.sent} was not trained: {reason}")
        elif fail:
            self.failed[request_id] = f"Temp-LoRA: {reason}"

    def _trainer_restarted(self, at: int | None) -> None:
        """Weights come back from the slots, optimizer states are lost. All is done again but what it has died over twice.

        at: the owner of what it was at.
        """
        self.step_stats.trainer_restarts += 1
        logger.warning("longctx: the trainer was restarted; the optimizer states of %d requests are lost", len(self.by_owner))
        for adapted in list(self.by_owner.values()):
            if adapted.slot is None:
                continue
            adapted.attempts += adapted.owner == at
            given_up = adapted.attempts >= ATTEMPTS
            if given_up and not adapted.ready:
                self._lose(adapted, DIED_AGAIN)
                continue
            known = adapted.trained_weights
            if known.bank is None or not adapted.ready:
                self._begin(adapted)
            else:
                settings = recipe(adapted.settings)
                self.trainer.send(messages.Resume(adapted.owner, adapted.slot, known.bank, known.version, settings))
            if adapted.sent > adapted.trained and given_up:
                self._lose(adapted, DIED_AGAIN)
            elif adapted.sent > adapted.trained:
                adapted.sent -= 1
                self._send_block(adapted)
            elif adapted.saving is not None and adapted.saving.sent:
                adapted.saving.sent = False
                if given_up:
                    self._answer(adapted, DIED_AGAIN)

    def _trainer_died(self, reason: str) -> None:
        for adapted in self.by_owner.values():
            if adapted.saving is None and (adapted.sent > adapted.trained or not adapted.ready):
                self._lose(adapted, reason)
        self.trainer_lost = reason

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = self.step_stats
        admitted = [a for a in self.by_owner.values() if a.slot is not None]
        stats.slots_in_use = len(admitted)
        stats.held_requests = sum(a.held_since is not None for a in admitted)
        stats.saving_requests = len(self.saving)
        stats.train_queue = sum(a.sent > a.trained for a in admitted)
        stats.versions_behind = sum(max(a.blocks.block_of(a.frontier) - 1 - a.trained, 0) for a in admitted)
        return super().make_stats(*args, **kwargs)

    def shutdown(self) -> None:
        self.trainer.close()
        super().shutdown()


class AsyncTempLoraScheduler(TempLoraScheduler, AsyncScheduler):
    """For engines that schedule a step while the device still computes the one before."""


def check_when_engines_start() -> None:
    """Have each engine core that adapts compare the models as soon as it has its workers and its scheduler."""
    initialize = EngineCore._initialize_effective_attention_block_size
    if hasattr(initialize, "__wrapped__"):
        return

    @functools.wraps(initialize)
    def initialize_and_check(self: EngineCore) -> None:
        initialize(self)
        if isinstance(self.scheduler, TempLoraScheduler):
            try:
                with refusals.told(self.vllm_config):
                    self.scheduler.check_trainer_model(self.model_executor)
            except LongContextError:
                self.shutdown()
                raise

    EngineCore._initialize_effective_attention_block_size = initialize_and_check  # type: ignore[method-assign]  # a seam


def ends_by_itself(request: Request) -> bool:
    """False where a client left or the request failed.

    A stop string is found by the front end, which then aborts as clients do, so what has stop strings and has written anything
    counts as ended by one.
    """
    assert request.sampling_params is not None
    if request.status == RequestStatus.FINISHED_ABORTED:
        return bool(request.sampling_params.stop) and request.num_output_tokens > 0
    return request.status in (
        RequestStatus.FINISHED_STOPPED,
        RequestStatus.FINISHED_LENGTH_CAPPED,
        RequestStatus.FINISHED_REPETITION,
    )


def trainer_client(vllm_config: VllmConfig, settings: Adaptation, shared: SharedWeights | None) -> TrainerClient:
    model, trainer = vllm_config.model_config, settings.trainer
    loads = shared is None and trainer.address is None
    options = messages.Options(
        **{**messages.taken(messages.Options, trainer), "address": trainer.address or ""},
        model=model.model,
        dtype=str(model.dtype).removeprefix("torch."),
        config=base_model.resolved_config(model),
        weights=base_model.weight_files(vllm_config) if loads else [],
        shares=shared is not None,
        adapters_root=settings.adapters_root,
        parent=os.getpid(),
    )
    return TrainerClient(
        options,
        trainer,
        max_rank=settings.max_rank,
        num_slots=settings.slots,
        probe=base_model.probe(model, settings),
        training_bytes=Shape.of(model.hf_text_config, model_dtype(model)).training_bytes(settings),
        share=None if shared is None else shared.message,
    )


def recipe(settings: Adaptation) -> messages.Recipe:
    alpha = settings.rank if settings.alpha is None else settings.alpha
    return messages.Recipe(**{**messages.taken(messages.Recipe, settings), "alpha": alpha})
