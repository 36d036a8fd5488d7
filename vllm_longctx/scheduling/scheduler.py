"""vLLM's scheduler, sharing each step's tokens fairly and counting what it did for long requests."""

from collections import defaultdict
from collections.abc import Mapping
from itertools import islice
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_longctx.config import KEY
from vllm_longctx.engine.kv_cache import LambdaManager, MemoryManager, prefix_caching
from vllm_longctx.engine.step import StepInfo, StepReport
from vllm_longctx.metrics import StepStats
from vllm_longctx.models.properties import trained_length
from vllm_longctx.processes import end_without_collecting
from vllm_longctx.settings import active_settings

logger = init_logger("vllm.longctx")

NO_LIMIT = 1 << 62  # tokens
LEAST_SHARE = 256  # tokens of a long prompt in a step: in smaller chunks each token costs more, up to four times as much


class LongContextScheduler(Scheduler):
    """Also a mixin: `class X(LongContextScheduler, AsyncScheduler)` counts the same over vLLM's other scheduler."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.trained_length = trained_length(self.vllm_config.model_config)
        self.settings = active_settings(self.vllm_config)
        self.window = self.settings.attention.n_local or self.trained_length
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self.lambda_managers = [m for m in managers if isinstance(m, LambdaManager)]
        self.memory_pools = [m.block_pool for m in managers if isinstance(m, MemoryManager) and m.is_apart]
        self.failed: dict[str, str] = {}  # requests to end, with the reason
        self.step_stats = StepStats()
        scheduling = self.scheduler_config
        # Without chunked prefill vLLM never cuts a prompt; a user's own threshold is how that user shares.
        self.shares_budget = scheduling.enable_chunked_prefill and not scheduling.long_prefill_token_threshold
        self.shares: dict[str, int] = {}  # the most tokens of each request in the step to come
        self.lets_in = True  # the last step let in one of those that waited, or none waited
        self._log_start()

    def _log_start(self) -> None:
        """Here, because there is one scheduler per engine; the engine's arguments are read in every API server."""
        settings, model = self.settings, self.vllm_config.model_config
        parts = [f"mode {settings.mode.name}", *settings.described()]
        parts += [
            f"trained length {self.trained_length}",
            f"max_model_len {model.max_model_len}",
            f"block_size {self.vllm_config.cache_config.block_size}",
            f"at most {sum(m.max_admission_blocks_per_request or 0 for m in self.lambda_managers)} KV blocks per request",
            f"prefix caching {prefix_caching(settings, self.vllm_config.cache_config)}",
            f"worker {self.vllm_config.parallel_config.worker_cls}",
        ]
        logger.info("longctx: %s", ", ".join(parts))

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        waiting = self._share_budget() if self.shares_budget else []
        output = super().schedule(*args, **kwargs)
        self.lets_in = not waiting or any(request.request_id in output.num_scheduled_tokens for request in waiting)
        for request_id, new in output.num_scheduled_tokens.items():
            past = self.requests[request_id].num_computed_tokens - self.trained_length
            if past > 0:
                self.step_stats.tokens_past_trained += min(new, past)
        return output

    def _share_budget(self) -> list[Request]:
        """Decide what each request may compute in the coming step at most. Returns those that may be let in.

        vLLM goes through its list and gives each request all it can take, so a long prompt that came first takes everything.
        Here everybody gets one token, and of the rest as `shares_of` has it; under the priority policy the more urgent first.
        """
        self.shares = {}
        waiting = list(islice(self.waiting, max(self.max_num_active_reqs - len(self.running), 0)))
        wanted: defaultdict[int, dict[str, int]] = defaultdict(dict)
        for request in self.running:
            if (wants := self._wants(request)) > 0:
                wanted[self._priority(request)][request.request_id] = wants
        # Whoever could not be let in would leave its share unused again: one token keeps a place in the step.
        for request in waiting if self.lets_in else waiting[:1]:
            wanted[self._priority(request)][request.request_id] = max(self._wants(request), 1) if self.lets_in else 1
        budget = self.max_num_scheduled_tokens
        least, left = min(LEAST_SHARE, budget // 2), max(budget - sum(map(len, wanted.values())), 0)
        for priority in sorted(wanted):
            more = shares_of({name: wants - 1 for name, wants in wanted[priority].items()}, left, least)
            left -= sum(more.values())
            self.shares |= {name: 1 + tokens for name, tokens in more.items()}
        return waiting

    def _wants(self, request: Request) -> int:
        """Tokens that the request would compute in the coming step if it were alone."""
        known = request.num_tokens_with_spec + request.num_output_placeholders
        return self._reserve_prefill_lookahead(request, request.num_computed_tokens, known - request.num_computed_tokens)

    def _priority(self, request: Request) -> int:
        return request.priority if self.policy == SchedulingPolicy.PRIORITY else 0

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        allowed = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        return min(allowed, self.shares.get(request.request_id, NO_LIMIT))

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        self._step_info(scheduler_output).send_with(scheduler_output)

    def _step_info(self, output: SchedulerOutput) -> StepInfo:
        """What the workers are told of a step. Its tokens count as computed already."""
        return StepInfo()

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        report = StepReport.of(model_runner_output)
        self.step_stats.selection_seconds, self.step_stats.swap_seconds = report.selection_seconds, report.swap_seconds
        ended: dict[int, EngineCoreOutputs] = {}
        if report.failed_adapters:
            self._fail_adapters(scheduler_output, report.failed_adapters)
            self._end_failed(ended)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for client, more in ended.items():
            outputs.setdefault(client, EngineCoreOutputs()).outputs.extend(more.outputs)
        return outputs

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        return self._has_room_for_adapter(request) and super()._handle_blocked_waiting_request(request)

    def _has_room_for_adapter(self, request: Request) -> bool:
        """Whether requests that run have no more than max_loras adapters with this one's.

        Whether this step computes them or not: vLLM counts those of the step only, and a later step may have them all.
        """
        if self.lora_config is None or request.lora_request is None:
            return True
        running = {other.lora_request.lora_int_id for other in self.running if other.lora_request is not None}
        return len(running | {request.lora_request.lora_int_id}) <= self.lora_config.max_loras

    def _fail_adapters(self, scheduler_output: SchedulerOutput, failed: dict[int, str]) -> None:
        """A step's requests with these were computed without them: nobody may see their tokens, nor hit their blocks.

        Nor may those that run with them, and are perhaps computed ahead.
        """
        ahead = {request.request_id: request for request in self.running}
        ahead |= {name: self.requests[name] for name in scheduler_output.num_scheduled_tokens if name in self.requests}
        for name, request in ahead.items():
            if request.lora_request is None or (reason := failed.get(request.lora_request.lora_int_id)) is None:
                continue
            self.failed[name] = reason
            for manager in self.kv_cache_manager.coordinator.single_type_managers:
                pool, blocks = manager.block_pool, manager.req_to_blocks.get(name, ())
                pool.evict_blocks({block.block_id for block in blocks if not block.is_null})
                # A request that was preempted since has no blocks any more, but what it published is still found.
                for block_hash in request.block_hashes:
                    while found := pool.get_cached_block(block_hash, [manager.kv_cache_group_id]):
                        pool.evict_blocks({block.block_id for block in found})
            request._block_hasher = None
            request.block_hashes.clear()

    def _end_failed(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        reasons, self.failed = self.failed, {}
        for request in self.finish_requests(list(reasons), RequestStatus.FINISHED_ERROR):
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    stop_reason=reasons[request.request_id],
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                )
            )

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """As vLLM's, with ours in the open dict that is there for KV connectors; longctx runs with none."""
        stats = super().make_stats(*args, **kwargs)
        ours, self.step_stats = self.step_stats, StepStats()
        if stats is None:
            return None
        for request in self.running:
            ours.requests_past_trained += request.num_computed_tokens > self.trained_length
            if request.num_computed_tokens > self.window:
                ours.live_blocks += sum(m.num_live_blocks(request.request_id) for m in self.lambda_managers)
        for manager in self.lambda_managers:
            ours.freed_blocks += manager.take_num_freed_blocks()
        for pool in self.memory_pools:  # one at most: memory layers are one group
            ours.memory_usage = pool.get_usage()
        stats.kv_connector_stats = {KEY: vars(ours)}
        return stats

    def shutdown(self) -> None:
        end_without_collecting()
        super().shutdown()


def shares_of(wanted: Mapping[str, int], budget: int, least: int) -> dict[str, int]:
    """What each request gets of `budget` tokens: what it wants up to a common share, the largest that fits.

    So short prompts and streams get all they want, and long prompts the rest in equal parts. If these were fewer tokens than
    `least`, those that came first get so many, and the others none.
    """
    left = budget
    for number, wants in enumerate(ordered := sorted(wanted.values())):
        share = left // (len(ordered) - number)
        if wants > share >= least:
            return {name: min(wants, share) for name, wants in wanted.items()}
        if wants > share:
            break
        left -= wants
    else:
        return dict(wanted)
    shares = {}
    for name, wants in sorted(wanted.items(), key=lambda item: min(item[1], least)):
        shares[name] = min(wants, least, budget)
        budget -= shares[name]
    return shares


class AsyncLongContextScheduler(LongContextScheduler, AsyncScheduler):
    """For engines that schedule a step while the device still computes the one before."""
