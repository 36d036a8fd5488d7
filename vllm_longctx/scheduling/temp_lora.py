"""vLLM's scheduler for requests that adapt: slots, blocks, versions, holds and passes.

A request that adapts lives as follows. It waits for a slot and for room for its live context. It is computed
up to the end of a block. The block goes to the trainer as soon as its tokens are known. The next block is
computed once the version that it needs is trained. Where windows step, a full one starts a new pass, which is
a roll-back of `num_computed_tokens`. Nothing else of vLLM's scheduling changes: a request that is held is one
that may compute no token in this step.

Steps may be scheduled before the outputs of the last one have come (vLLM's AsyncScheduler, which counts
tokens before it knows them). Inside a block and a window that makes no difference. A request at the end of
one waits until none of its steps is in flight. Only then is a version approved, a bank free to be written, or
a pass begun.

A request that ends and has something to save frees its KV blocks at once, but its last output is held back
until its adapter is saved, or cannot be. It keeps its slot until then, because a restarted trainer goes on
with the weights there.
"""

import functools
import itertools
import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from vllm.logger import init_logger
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor import Executor
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_longctx import refusals
from vllm_longctx.config import KEY, LongContextError, RequestOptions
from vllm_longctx.engine.adapted_layers import AdaptedLayers, kinds
from vllm_longctx.engine.sliding_kv import PrivateRequests
from vllm_longctx.engine.step import Pass, SlotsMemory, SlotUse, StepInfo, Weights
from vllm_longctx.engine.stepped_kv import SteppedManager
from vllm_longctx.engine.waiting import InputQueue, limit_reader_sleep, listen_to_inputs
from vllm_longctx.metrics import StepStats
from vllm_longctx.scheduling.adapting_request import AdaptingRequest
from vllm_longctx.scheduling.request_pass import KVHasher
from vllm_longctx.scheduling.saves import PendingSaves, ended_by_itself
from vllm_longctx.scheduling.scheduler import LongContextScheduler
from vllm_longctx.scheduling.trainer_jobs import TrainerJobs
from vllm_longctx.settings import Adaptation
from vllm_longctx.temp_lora import base_model, messages
from vllm_longctx.temp_lora.blocks import Blocks, Start, Window
from vllm_longctx.temp_lora.client import TrainerClient, trainer_client
from vllm_longctx.temp_lora.shared_weights import shared_by_engine

logger = init_logger("vllm.longctx")

# All in seconds. When all requests were held for so long, an empty step goes by, whose statistics say so.
LATE = 1.0
# Where something else may have to be looked at, the engine waits for the trainer this long.
SHORT_WAIT = 0.06


class TempLoraScheduler(LongContextScheduler):
    """Schedules requests that adapt, beside others.

    Also a mixin: `class X(TempLoraScheduler, AsyncScheduler)` does the same over vLLM's other scheduler.

    adapting: By request id, the requests that adapt, until they end.
    saves: Those that have ended and wait for their save.
    jobs: What the trainer is asked.
    free_slots: Slots of no request.
    retiring_slots: Slots whose request has ended, each behind the number of the last step that may read it.
    freed_slots: Slots that were freed since the last step, for the workers.
    reserved_blocks: KV blocks reserved for admitted requests.
    hasher: Names the KV blocks of requests that adapt. None where these are not shared.
    steps_scheduled, steps_done: Steps that computed anything: scheduled so far, and those whose outputs have
        come.
    is_idle: Whether the last step whose output has come computed nothing.
    inputs: What comes to the engine core. None where the scheduler's process gives it requests itself.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.temp_lora = self.settings.temp_lora
        trains_on_cpu = self.temp_lora.trainer.device == "cpu"  # where polling would take the trainer's core
        limit_reader_sleep(busy_loop_s=0.0 if trains_on_cpu else None)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self.private_managers = [m for m in managers if isinstance(m, PrivateRequests)]
        self.adapting: dict[str, AdaptingRequest] = {}
        self.saves = PendingSaves()
        self.owners = itertools.count(1)
        self.free_slots = deque(range(self.temp_lora.slots))
        self.retiring_slots: deque[tuple[int, int]] = deque()
        self.freed_slots: list[int] = []
        self.reserved_blocks = 0
        self.hasher = self._kv_hasher()
        self.steps_scheduled = self.steps_done = 0
        self.is_idle = False
        self.inputs: InputQueue | None = None
        shared = shared_by_engine.pop(self.vllm_config.instance_id, None)
        with refusals.reported(self.vllm_config):
            trainer = trainer_client(self.vllm_config, self.temp_lora, shared)
            trainer.start()
        bos = self.vllm_config.model_config.hf_text_config.bos_token_id
        model = base_model.identity(self.vllm_config)
        self.jobs = TrainerJobs(trainer, self.temp_lora, bos, model, self)
        check_trainer_at_engine_start()

    @property
    def trainer(self) -> TrainerClient:
        return self.jobs.trainer

    def _kv_hasher(self) -> KVHasher | None:
        """None where nothing is remembered.

        Or where others hear of what is cached, as if it were the base model's.
        """
        cache, sizes = self.cache_config, {manager.block_size for manager in self.private_managers}
        remembers = self.temp_lora.cache_gib != 0 and cache.enable_prefix_caching
        if not remembers or self.enable_kv_cache_events or sizes != {self.hash_block_size}:
            return None
        return KVHasher(get_hash_fn_by_name(cache.prefix_caching_hash_algo), self.hash_block_size)

    def check_trainer_model(self, executor: Executor) -> None:
        """Wait for the trainer, and compare its model with the engine's, without and with an adapter.

        Raises LongContextError if there is no trainer, it has another model, or no layer can be adapted.
        """
        trainer, address, begin = self.trainer, self.temp_lora.trainer.address, time.monotonic()
        adapted: AdaptedLayers = executor.collective_rpc("adapted_layers")[0]
        adapted.check(self.vllm_config.model_config.model)
        trainer.modules = list(adapted.modules)
        ours = base_model.probe_logprobs(self, executor, trainer.probe) if trainer.probe else []
        waits = f"at {address}" if address else "to load its model"
        logger.info("longctx: waiting for the trainer %s", waits)
        mismatch = partial(base_model.mismatch, ours=ours, vllm_config=self.vllm_config, address=address)
        trainer.wait_until_ready(mismatch)
        if trainer.probe:
            self._check_adapter(executor, adapted, ours)
        self.step_stats = StepStats()  # no user's request was in these steps
        seconds = time.monotonic() - begin
        logger.info("longctx: the trainer was ready, and its model compared, after %.1f s", seconds)

    def _check_adapter(self, executor: Executor, adapted: AdaptedLayers, without: list[float]) -> None:
        """Compute the probe with an adapter of random weights, here and in the trainer.

        Raises LongContextError if the results differ: then the two take one of the weights in another way.

        without: our log-probabilities of the probe without an adapter, in nats.
        """
        trainer, rank, theirs = self.trainer, self.temp_lora.max_rank, []

        def begin(request_id: str) -> None:
            adapting = self.adapting[request_id]
            adapting.slot = self.free_slots.popleft()
            recipe = messages.Recipe(rank=rank, alpha=rank, dropout=0.0)
            theirs.extend(
                trainer.probe_adapter(messages.Probe(adapting.owner, adapting.slot, recipe, trainer.probe))
            )
            adapting.versions.load(Weights(version=0, bank=0))

        ours = base_model.probe_logprobs(self, executor, trainer.probe, begin)
        model = self.vllm_config.model_config
        difference = base_model.difference_beyond_rounding(ours, theirs, model, without)
        if difference is not None:
            raise LongContextError(
                f"longctx.adaptation: the trainer computes an adapter of {model.model} otherwise than the "
                f"engine: {difference}. It would adapt {kinds(adapted.modules)}; leave adaptation out"
            )

    # --- a request's life ---------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        is_new = request.request_id not in self.requests
        if is_new and request.sampling_params is not None and request.lora_request is None:
            self._add_adapting(request)
        super().add_request(request)

    def _shares_view(self, request: Request) -> bool:
        """The blocks of those that adapt have names already. Of these, only a start's probe chooses."""
        return request.request_id not in self.adapting and super()._shares_view(request)

    def _add_adapting(self, request: Request) -> None:
        """Add the state of a request that adapts; nothing for one that does not."""
        assert request.sampling_params is not None
        try:
            options = RequestOptions.parse((request.sampling_params.extra_args or {}).get(KEY) or {})
            settings = self.temp_lora.for_request(options, self.trained_length, self.block_size)
        except LongContextError as e:  # the front end has checked this, but an adapter may be gone since
            self.fail_request(request.request_id, str(e))
            return
        if settings is None:
            return
        request.skip_reading_prefix_cache = True
        prompt, mode = request.num_prompt_tokens, settings.update_mode
        sizes = settings.window_tokens, settings.context_tokens, settings.keep_first
        adapting = AdaptingRequest(
            request,
            settings,
            options.save_as,
            options.start_from,
            Blocks.of_prompt(prompt, settings.block_tokens, mode, settings.learn),
            Window(settings.kv_policy, *sizes, self.block_size),
            sum(self._kv_blocks_of(request, settings)),
            owner=self.new_owner(),
            hasher=None if request.mm_features else self.hasher,
        )
        request.block_hashes.clear()
        request._block_hasher = adapting.new_block_hashes
        self.adapting[request.request_id] = self.jobs.by_owner[adapting.owner] = adapting

    def new_owner(self) -> int:
        return next(self.owners)

    def _kv_blocks_of(self, request: Request, settings: Adaptation) -> list[int]:
        """The most KV blocks that a request with these settings has at a time, by manager."""
        text = min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)
        return [manager.most_blocks_of(settings.window_tokens, text) for manager in self.private_managers]

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        adapting = self.adapting.get(request.request_id)
        if adapting is not None:
            if not adapting.admitted and not self._admit(adapting):
                return False
            if request.num_in_flight_tokens or not self._approve_version(adapting):
                return False
            self._advance(adapting)
            adapting.current_pass.sends_table = False  # vLLM sends it
            if not adapting.allowance(request.num_computed_tokens):
                return False
        return super()._handle_blocked_waiting_request(request)

    def _admit(self, adapting: AdaptingRequest) -> bool:
        """Reserve KV blocks and a slot for a request, which it keeps to its end.

        False if it must wait for them.
        """
        if not self._has_place(adapting):
            return False
        self.reserved_blocks += adapting.kv_blocks
        by_manager = self._kv_blocks_of(adapting.request, adapting.settings)
        for manager, blocks in zip(self.private_managers, by_manager, strict=True):
            manager.make_private(adapting.request_id, blocks)
        adapting.admitted = True
        if adapting.needs_slot:
            adapting.slot = self.free_slots.popleft()
            self.jobs.begin(adapting)
            self.jobs.train_next(adapting)
        return True

    def _has_place(self, adapting: AdaptingRequest) -> bool:
        """Whether there are KV blocks for it, and a slot if it needs one."""
        room = self.kv_cache_manager.block_pool.num_gpu_blocks - 1 - self.reserved_blocks
        return adapting.kv_blocks <= room and (not adapting.needs_slot or bool(self.free_slots))

    def can_begin_with(self, adapting: AdaptingRequest, start: Start) -> bool:
        blocks, _ = self._cached(adapting, start)
        return bool(blocks[0])

    def begin_with(self, adapting: AdaptingRequest, start: Start) -> bool:
        blocks, position = self._cached(adapting, start)
        if not blocks[0] and start.version != start.begun.version:
            return False
        adapting.begin_with(start, position)
        if position:
            self._roll_back(adapting)
            if blocks[0]:
                self._adopt(adapting, blocks, 0)
            self._count_cached(adapting)
        return True

    def _cached(self, adapting: AdaptingRequest, start: Start) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """KV blocks of a pass that are cached, by KV cache group, and the position to be computed next."""
        seen, coordinator = adapting.pass_seen(start.begun), self.kv_cache_manager.coordinator
        none: tuple[list[KVCacheBlock], ...] = ([],) * len(coordinator.single_type_managers)
        if seen.hasher is None:
            return none, seen.first
        if self.temp_lora.has_passes:  # a pass is cached from its first block on, or not at all
            adapting.name_kv(seen, seen.end_of(0))
            if not seen.names or self._find(seen.names[0]) is None:
                return none, seen.first
        adapting.name_kv(seen, start.latest)
        before = seen.end_of(-1)
        longest = min(start.latest - before, len(seen.names) * seen.hasher.block_tokens)
        blocks, length, _ = coordinator.find_longest_cache_hit(seen.names, max(longest, 0))
        if not length or before + length < start.earliest:
            return none, seen.first
        return blocks, before + length

    def _find(self, name: BlockHash) -> list[KVCacheBlock] | None:
        """The KV block of this name, of each KV cache group. None if one is not cached."""
        groups = [manager.kv_cache_group_id for manager in self.private_managers]
        return self.kv_cache_manager.block_pool.get_cached_block(name, groups)

    def _adopt(
        self, adapting: AdaptingRequest, blocks: tuple[Sequence[KVCacheBlock], ...], kv_block: int
    ) -> None:
        """Go on behind cached KV blocks of a request's pass, of which these are those from `kv_block` on."""
        current = adapting.current_pass
        for manager, of_group in zip(self.private_managers, blocks, strict=True):
            manager.adopt(adapting.request_id, of_group, current.table_index(kv_block))
        adapting.request.num_computed_tokens = current.end_of(kv_block + len(blocks[0]) - 1)

    def _count_cached(self, adapting: AdaptingRequest) -> None:
        """Where vLLM counts what it finds in the prefix cache."""
        request = adapting.request
        if request.prefill_stats is not None:
            request.prefill_stats.set(request.num_prompt_tokens, adapting.tokens_cached, 0)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Free it. Returns what its last output says of transfers. What it says of KV has a part of ours."""
        adapting = self.adapting.pop(request.request_id, None)
        if adapting is not None:
            self._end_adapting(adapting)
        kv_transfer_params, others = super()._free_request(request, *args, **kwargs)
        if adapting is not None and adapting.blocks_remembered:
            ours = {KEY: {"blocks_remembered": adapting.blocks_remembered}}
            kv_transfer_params = (kv_transfer_params or {}) | ours
        return kv_transfer_params, others

    def _end_adapting(self, adapting: AdaptingRequest) -> None:
        """Free what a request has that ends. It keeps its slot if its adapter is to be saved."""
        self.failed.pop(adapting.request_id, None)
        adapting.request._block_hasher = None
        adapting.held_since = None
        if adapting.admitted:
            self.reserved_blocks -= adapting.kv_blocks
            for manager in self.private_managers:
                manager.forget(adapting.request_id)
        if adapting.admitted and adapting.save_as is not None and ended_by_itself(adapting.request):
            self.saves.add(adapting, last_step=self.steps_scheduled)
        else:
            self._release_slot(adapting)

    def _release_slot(self, adapting: AdaptingRequest) -> None:
        self.jobs.drop(adapting)
        if adapting.slot is not None:
            self.retiring_slots.append((self.steps_scheduled, adapting.slot))
            self._free_retiring_slots()

    def _free_retiring_slots(self) -> None:
        """Free the slots that no step in flight reads: a worker may be late, and its copies later still."""
        while self.retiring_slots and self.retiring_slots[0][0] <= self.steps_done:
            _, slot = self.retiring_slots.popleft()
            if self.trainer.slots is not None:
                self.trainer.slots.clear(slot)
            self.free_slots.append(slot)
            self.freed_slots.append(slot)

    def fail_request(self, request_id: str, reason: str) -> None:
        self.failed[request_id] = reason

    def end_save(self, adapting: AdaptingRequest, error: str | None) -> None:
        if error is None:
            self.step_stats.adapters_saved += 1
        else:
            self.step_stats.save_failures += 1
        self.saves.answer(adapting, error)
        self._release_slot(adapting)

    def _continue_saves(self) -> None:
        for adapting in list(self.saves.waiting.values()):
            self.jobs.save_next(adapting, self.steps_done)

    def finish_requests(
        self,
        request_ids: str | Iterable[str] | None,
        finished_status: RequestStatus,
    ) -> list[Request]:
        if request_ids is None:  # the engine is paused or shut down: these are no stop strings
            for adapting in self.adapting.values():
                adapting.save_as = None
            for adapting in list(self.saves.waiting.values()):
                self.end_save(adapting, "the engine was paused or shut down")
        return super().finish_requests(request_ids, finished_status)

    def has_finished_requests(self) -> bool:
        return bool(self.saves.waiting or self.saves.answers) or super().has_finished_requests()

    # --- a step -------------------------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self._hear_trainer()
        self._wait_while_held(math.inf if self.is_idle else LATE)
        next_blocks: set[BlockHash] = set()
        for request in self.running:
            adapting = self.adapting.get(request.request_id)
            if adapting is not None:
                self._prepare(adapting, next_blocks)
        # vLLM preempts the last of them. Requests that adapt cannot be replayed, so they stand first.
        self.running.sort(key=lambda request: request.request_id not in self.adapting)
        output = super().schedule(*args, **kwargs)
        for request_id in output.num_scheduled_tokens:
            adapting = self.adapting.get(request_id)
            if adapting is not None:
                adapting.frontier = max(adapting.frontier, adapting.request.num_computed_tokens)
        if output.total_num_scheduled_tokens:
            self.steps_scheduled += 1
        elif self._only_trainer_works():
            self.step_stats.idle_steps += 1
            if not self._all_are_held():
                self.trainer.wait(SHORT_WAIT)
        return output

    def _hear_trainer(self) -> None:
        for report in self.trainer.poll():
            self.jobs.handle(report)
        self._continue_saves()

    def _only_trainer_works(self) -> bool:
        """Whether nothing is in flight or to be answered, while requests wait for the trainer."""
        if self.steps_scheduled > self.steps_done or self.saves.answers or self.failed:
            return False
        return any(adapting.admitted for adapting in self.jobs.by_owner.values())

    def _all_are_held(self) -> bool:
        """Whether nothing can happen until the trainer reports or something comes to the engine core.

        Never where other engines compute each of their steps together with this one's.
        """
        return (
            self._only_trainer_works()
            and self.jobs.lost is None
            and not self.finished_req_ids  # the workers have not heard of them
            and self.vllm_config.parallel_config.data_parallel_size == 1
            and all(map(self._is_held, self.requests.values()))
        )

    def _is_held(self, request: Request) -> bool:
        adapting = self.adapting.get(request.request_id)
        if adapting is None:
            return False
        return adapting.waits_for is not None if adapting.admitted else not self._has_place(adapting)

    def _wait_while_held(self, seconds: float) -> None:
        """Block while all requests are held, at most this long, until something comes to the engine core."""
        end, arrivals = time.monotonic() + seconds, [] if self.inputs is None else [self.inputs.arrivals]
        while self._all_are_held() and (left := end - time.monotonic()) > 0:
            for adapting in self.adapting.values():
                if adapting.admitted and adapting.held_since is None:
                    adapting.held_since = time.monotonic()
            if self.inputs is not None and not self.inputs.forget_arrivals():
                return
            self.trainer.wait(left, arrivals)
            self._hear_trainer()

    def _prepare(self, adapting: AdaptingRequest, next_blocks: set[BlockHash]) -> None:
        """Before a step, for a running request.

        Of requests that would compute the same KV block, the first one does. The others take it up then.

        next_blocks: What those before it in the list compute next.
        """
        is_in_flight = adapting.request.num_in_flight_tokens > 0
        if not is_in_flight:
            self._advance(adapting)
        name = self._next_block(adapting)
        if name is not None:
            adapting.waits_for_other = name in next_blocks and not is_in_flight
            next_blocks.add(name)

    def _advance(self, adapting: AdaptingRequest) -> None:
        """Bring a request without a step in flight as far as it comes without computing.

        By no more tokens than a step may compute: others may wait for it.
        """
        adapting.waits_for_other = False
        self._prepare_next_position(adapting)
        most = self.max_num_scheduled_tokens
        while most > 0 and (taken := self._take_up(adapting, most)):
            most -= taken
            self._prepare_next_position(adapting)

    def _next_block(self, adapting: AdaptingRequest) -> BlockHash | None:
        """The KV block that a request computes next, if it may compute all of it. None if it has no name."""
        request, current = adapting.request, adapting.current_pass
        if current.hasher is None or adapting.is_scored:
            return None
        first, index = request.num_computed_tokens, self._kv_block(adapting)
        if current.end_of(index) > min(first + adapting.allowance(first), request.num_tokens - 1):
            return None
        adapting.name_kv(current, current.end_of(index))
        return current.names[index] if index < len(current.names) else None

    def _kv_block(self, adapting: AdaptingRequest) -> int:
        """Which KV block of its pass a request computes next."""
        current = adapting.current_pass
        assert current.hasher is not None
        return (adapting.request.num_computed_tokens - current.end_of(-1)) // current.hasher.block_tokens

    def _take_up(self, adapting: AdaptingRequest, most: int) -> int:
        """Go on behind what other requests have computed of its pass meanwhile. Returns how many tokens.

        most: About so many.
        """
        request, before = adapting.request, adapting.request.num_computed_tokens
        while request.num_computed_tokens - before < most:
            name = self._next_block(adapting)
            found = None if name is None else self._find(name)
            if found is None:
                break
            self._adopt(adapting, tuple([block] for block in found), self._kv_block(adapting))
            # What has left a sliding window: room for more is not reserved.
            self.kv_cache_manager.remove_skipped_blocks(
                request.request_id, request.num_computed_tokens, request.num_prompt_tokens
            )
        if request.num_computed_tokens == before:
            return 0
        adapting.current_pass.sends_table = True
        adapting.tokens_cached += max(request.num_computed_tokens - max(adapting.frontier, before), 0)
        adapting.frontier = max(adapting.frontier, request.num_computed_tokens)
        self._count_cached(adapting)
        return request.num_computed_tokens - before

    def _prepare_next_position(self, adapting: AdaptingRequest) -> None:
        """At the frontier: approve the version that comes next, and begin a new pass if one is due."""
        if adapting.request.num_computed_tokens == adapting.frontier and self._approve_version(adapting):
            adapting.checked = adapting.frontier
            if adapting.begin_pass():
                self._roll_back(adapting)

    def _approve_version(self, adapting: AdaptingRequest) -> bool:
        """Have the request computed with the version that it needs. False while that is not trained."""
        if adapting.waits_for is not None:
            adapting.held_since = adapting.held_since or time.monotonic()
            return False
        if adapting.needed_version > adapting.versions.approved:
            adapting.versions.approve()
            self.jobs.train_next(adapting)
        if adapting.held_since is not None:
            self.step_stats.hold_seconds.append(time.monotonic() - adapting.held_since)
            adapting.held_since = None
        return True

    def _roll_back(self, adapting: AdaptingRequest) -> None:
        """Free the KV blocks of a request's pass, which is computed from its first position on."""
        first = adapting.current_pass.first
        for manager in self.private_managers:
            if isinstance(manager, SteppedManager):
                manager.roll_back(adapting.request_id, first)
            else:
                manager.free(adapting.request_id)
        adapting.request.num_computed_tokens = first

    def _most_tokens(self, request: Request, computed: int) -> int:
        adapting = self.adapting.get(request.request_id)
        most = super()._most_tokens(request, computed)
        return most if adapting is None else min(most, adapting.allowance(computed))

    def _make_cached_request_data(self, *args: Any, **kwargs: Any) -> CachedRequestData:
        data = super()._make_cached_request_data(*args, **kwargs)
        for row, request_id in enumerate(data.req_ids):
            adapting = self.adapting.get(request_id)
            if adapting is None or not adapting.current_pass.sends_table:
                continue
            # The worker replaces the block table of a resumed request and keeps all the rest.
            data.resumed_req_ids.add(request_id)
            data.new_block_ids[row] = self.kv_cache_manager.get_block_ids(request_id)
            if not self.use_v2_model_runner:  # which keeps a request's tokens as long as it lives
                data.all_token_ids.setdefault(request_id, adapting.request.all_token_ids.copy())
            adapting.current_pass.sends_table = False
        return data

    @property
    def slots_memory(self) -> SlotsMemory | None:
        slots = self.trainer.slots
        if slots is None:
            return None
        return SlotsMemory(slots.path, slots.modules, slots.max_rank, slots.num_slots)

    def _step_info(self, output: SchedulerOutput) -> StepInfo:
        slots: dict[str, SlotUse] = {}
        passes: dict[str, Pass] = {}
        freed, self.freed_slots = self.freed_slots, []
        for request_id, new in output.num_scheduled_tokens.items():
            adapting = self.adapting.get(request_id)
            if adapting is None:
                continue
            if (use := adapting.slot_use) is not None:
                slots[request_id] = use
            first = adapting.request.num_computed_tokens - new  # they count as computed already
            if (current := adapting.pass_of_step(first)) is not None:
                passes[request_id] = current
        return StepInfo(slots=slots, passes=passes, freed_slots=freed, slots_memory=self.slots_memory)

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        """Only `reset_prefix_cache` with running requests preempts one that adapts.

        It computes its pass again.

        Outputs of its steps in flight are kept then, unlike vLLM's: they count as computed, and the first
        pass wins.
        """
        adapting = self.adapting.get(request.request_id)
        super()._preempt_request(request, timestamp, drop_stale_output and adapting is None)
        if adapting is None:
            return
        logger.warning(
            "longctx: %s adapts and was preempted; its window is computed again with version %d",
            request.request_id,
            adapting.versions.approved_weights.version,
        )
        adapting.lose_kv_names()  # all of it is computed with one version
        adapting.current_pass.sends_table = False  # vLLM sends it
        if adapting.current_pass.first:
            self._roll_back(adapting)

    def reset_prefix_cache(self, reset_running_requests: bool = False, *args: Any, **kwargs: Any) -> bool:
        if reset_running_requests:
            for adapting in self.adapting.values():
                if adapting.request.num_computed_tokens and adapting.request.status == RequestStatus.WAITING:
                    self._roll_back(adapting)
                    adapting.lose_kv_names()
        return super().reset_prefix_cache(reset_running_requests, *args, **kwargs)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        for request_id, tokens in scheduler_output.num_scheduled_tokens.items():
            if request_id in self.adapting:
                self.step_stats.adapted_tokens += tokens
        self.is_idle = not scheduler_output.total_num_scheduled_tokens
        if not self.is_idle:
            self.steps_done += 1
            self._free_retiring_slots()
        answers = self.saves.take_answers()  # those that vLLM's statistics of this step count
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self.saves.hold_back(outputs)
        for client_index, output in answers:
            outputs.setdefault(client_index, EngineCoreOutputs()).outputs.append(output)
        for request_id in scheduler_output.num_scheduled_tokens:
            adapting = self.adapting.get(request_id)
            if adapting is not None:
                self.jobs.train_next(adapting)
        self._continue_saves()
        if self.failed:
            self._end_failed(outputs)
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = self.step_stats
        with_slot = [a for a in self.jobs.by_owner.values() if a.slot is not None]
        stats.slots_in_use = len(with_slot)
        stats.held_requests = sum(a.held_since is not None for a in with_slot)
        stats.saving_requests = len(self.saves.waiting)
        stats.train_queue = sum(a.versions.in_training for a in with_slot)
        stats.versions_behind = sum(a.versions_behind for a in with_slot)
        return super().make_stats(*args, **kwargs)

    def shutdown(self) -> None:
        self.trainer.close()
        super().shutdown()


class AsyncTempLoraScheduler(TempLoraScheduler, AsyncScheduler):
    """For engines that schedule a step while the device still computes the one before."""


def check_trainer_at_engine_start() -> None:
    """Have each engine core with Temp-LoRA compare the models when its workers and scheduler are there."""
    initialize = EngineCore._initialize_effective_attention_block_size
    if hasattr(initialize, "__wrapped__"):
        return

    @functools.wraps(initialize)
    def initialize_and_check(self: EngineCore) -> None:
        initialize(self)
        if isinstance(self.scheduler, TempLoraScheduler):
            self.scheduler.inputs = listen_to_inputs(self)
            try:
                with refusals.reported(self.vllm_config):
                    self.scheduler.check_trainer_model(self.model_executor)
            except LongContextError:
                self.shutdown()
                raise

    EngineCore._initialize_effective_attention_block_size = initialize_and_check  # type: ignore[method-assign]  # a seam
