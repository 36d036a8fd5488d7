"""vLLM's scheduler, with fair shares of a step's tokens and statistics of long requests."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from vllm.logger import init_logger
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_longctx.config import KEY, RequestOptions
from vllm_longctx.engine.kv_cache import prefix_caching
from vllm_longctx.engine.memory_kv import MemoryManager
from vllm_longctx.engine.sliding_kv import LambdaManager
from vllm_longctx.engine.step import NO_LIMIT, StepInfo, StepReport
from vllm_longctx.engine.view_hashes import ViewHashes, view_hasher
from vllm_longctx.geometry import RequestView
from vllm_longctx.metrics import StepStats
from vllm_longctx.models.properties import trained_length
from vllm_longctx.processes import end_without_collecting
from vllm_longctx.serving.attention_options import TURNS
from vllm_longctx.settings import active_settings

logger = init_logger("vllm.longctx")

# Tokens of a long prompt in a step. In smaller chunks each token costs more, up to four times as much.
MIN_SHARE = 256


class LongContextScheduler(Scheduler):
    """vLLM's scheduler with fair shares and statistics.

    Also a mixin: `class X(LongContextScheduler, AsyncScheduler)` does the same over vLLM's other scheduler.

    trained_length: Of the model, in tokens.
    window: Tokens that a query sees at most, apart from a memory.
    lambda_managers: KV managers that free what leaves a window.
    view_managers: KV managers that must know what requests see that have chosen it.
    memory_pools: Pools of memory layers that have one of their own.
    views: By request id, what the queries of requests see that have chosen it.
    view_hash: Hashes KV blocks of these requests. None where they are not shared.
    failed: By request id, the requests to end with an error, and the reason.
    step_stats: Statistics of the current step.
    shares_budget: Whether a step's tokens are shared fairly. Not without chunked prefill, where vLLM never
        splits a prompt, nor with a threshold of the user's own, which is that user's way to share.
    shares: By request id, the most tokens in the coming step.
    admitted_waiting: Whether the last step admitted a request that waited, or none waited.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.trained_length = trained_length(self.vllm_config.model_config)
        self.settings = active_settings(self.vllm_config)
        self.window = self.settings.attention.n_local or self.trained_length
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self.lambda_managers = [m for m in managers if isinstance(m, LambdaManager)]
        self.view_managers = [m for m in managers if isinstance(m, LambdaManager | MemoryManager)]
        self.memory_pools = [m.block_pool for m in managers if isinstance(m, MemoryManager) and m.is_apart]
        self.views: dict[str, RequestView] = {}
        self.view_hash = self._view_hash()
        self.failed: dict[str, str] = {}
        self.step_stats = StepStats()
        scheduling = self.scheduler_config
        self.shares_budget = scheduling.enable_chunked_prefill and not scheduling.long_prefill_token_threshold
        self.shares: dict[str, int] = {}
        self.admitted_waiting = True
        self._log_start()

    def _view_hash(self) -> Callable[[Any], bytes] | None:
        """None where windows step, and where others hear of what is cached, as if all saw the same."""
        cache, slides = self.cache_config, self.settings.mode.slides
        if not slides or not cache.enable_prefix_caching or self.enable_kv_cache_events:
            return None
        return get_hash_fn_by_name(cache.prefix_caching_hash_algo)

    def _log_start(self) -> None:
        """Log what is in force.

        Here, because an engine has one scheduler, but several API servers read its arguments.
        """
        settings, model = self.settings, self.vllm_config.model_config
        most_blocks = sum(m.max_admission_blocks_per_request or 0 for m in self.lambda_managers)
        parts = [f"mode {settings.mode.name}", *settings.described()]
        parts += [
            f"trained length {self.trained_length}",
            f"max_model_len {model.max_model_len}",
            f"block_size {self.vllm_config.cache_config.block_size}",
            f"at most {most_blocks} KV blocks per request",
            f"prefix caching {prefix_caching(settings, self.vllm_config.cache_config)}",
            f"worker {self.vllm_config.parallel_config.worker_cls}",
        ]
        logger.info("longctx: %s", ", ".join(parts))

    def add_request(self, request: Request) -> None:
        if (view := self._view_of(request)) is not None:
            self._begin_view(request, view)
        super().add_request(request)

    def _view_of(self, request: Request) -> RequestView | None:
        options, sampling = self._options_of(request), request.sampling_params
        if not options.of_attention or sampling is None:
            return None
        # Only beside `drop` are they the front end's, and not what a client has sent.
        turns = tuple((sampling.extra_args or {})[TURNS]) if options.drop is not None else ()
        return self.settings.view_of(options, self.trained_length, turns)

    @staticmethod
    def _options_of(request: Request) -> RequestOptions:
        """Which the front end has checked."""
        sampling = request.sampling_params
        given = (sampling and sampling.extra_args) or {}
        return RequestOptions.parse(given.get(KEY) or {})

    def _begin_view(self, request: Request, view: RequestView) -> None:
        name = request.request_id
        self.views[name] = view
        if self.view_hash is None or not self._shares_view(request):
            request.skip_reading_prefix_cache = True
        else:
            request.block_hashes = ViewHashes(view)
            request._block_hasher = view_hasher(view, self.view_hash, self.hash_block_size)
            request.update_block_hashes()
        for manager in self.view_managers:
            manager.begin_view(name, view)
        tokens = min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)
        needed = sum(manager.blocks_for(name, tokens) for manager in self.lambda_managers)
        if needed > (most := self.kv_cache_manager.block_pool.num_gpu_blocks - 1):
            self.failed[name] = (
                f"the request needs {needed} KV blocks with the attention that it has chosen, and the pool "
                f"has {most}; shorten it, or lower its max_tokens"
            )

    def _shares_view(self, request: Request) -> bool:
        """Whether KV blocks of a request that has chosen its attention may be shared."""
        return not request.mm_features

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        freed = super()._free_request(request, *args, **kwargs)
        if self.views.pop(request.request_id, None) is not None:
            for manager in self.view_managers:
                manager.end_view(request.request_id)
        return freed

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        waiting = self._share_budget() if self.shares_budget else []
        output = super().schedule(*args, **kwargs)
        info = self._step_info(output)
        if self.views:
            info = replace(info, views=dict(self._seen_in_step(output)))
        info.send_with(output)
        scheduled = output.num_scheduled_tokens
        self.admitted_waiting = not waiting or any(request.request_id in scheduled for request in waiting)
        for request_id, new in output.num_scheduled_tokens.items():
            past = self.requests[request_id].num_computed_tokens - self.trained_length
            if past > 0:
                self.step_stats.tokens_past_trained += min(new, past)
        return output

    def _share_budget(self) -> list[Request]:
        """Set `shares` for the coming step. Returns the waiting requests that may be admitted.

        vLLM serves its list in order, each request with all tokens that it can take. So a long prompt that
        came first takes the whole budget. Here each request gets one token, and a share of the rest by
        `shares_of`. With the priority policy, requests of a more urgent priority get theirs first.
        """
        self.shares = {}
        waiting = list(islice(self.waiting, max(self.max_num_active_reqs - len(self.running), 0)))
        wanted: defaultdict[int, dict[str, int]] = defaultdict(dict)
        for request in self.running:
            if (wants := self._wants(request)) > 0:
                wanted[self._priority(request)][request.request_id] = wants
        # A request that cannot be admitted would leave its share unused again: reserve one token for it.
        for request in waiting if self.admitted_waiting else waiting[:1]:
            wants = max(self._wants(request), 1) if self.admitted_waiting else 1
            wanted[self._priority(request)][request.request_id] = wants
        budget = self.max_num_scheduled_tokens
        min_share, left = min(MIN_SHARE, budget // 2), max(budget - sum(map(len, wanted.values())), 0)
        for priority in sorted(wanted):
            more = shares_of({name: wants - 1 for name, wants in wanted[priority].items()}, left, min_share)
            left -= sum(more.values())
            self.shares |= {name: 1 + tokens for name, tokens in more.items()}
        return waiting

    def _wants(self, request: Request) -> int:
        """Tokens that the request would compute in the coming step if it were alone."""
        computed = request.num_computed_tokens
        known = request.num_tokens_with_spec + request.num_output_placeholders
        return self._reserve_prefill_lookahead(request, computed, known - computed)

    def _priority(self, request: Request) -> int:
        return request.priority if self.policy == SchedulingPolicy.PRIORITY else 0

    def _reserve_prefill_lookahead(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
    ) -> int:
        allowed = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        return min(allowed, self._most_tokens(request, num_computed_tokens))

    def _most_tokens(self, request: Request, computed: int) -> int:
        """How many tokens the request may compute in the coming step, from position `computed` on."""
        return self.shares.get(request.request_id, NO_LIMIT)

    def _seen_in_step(self, output: SchedulerOutput) -> Iterator[tuple[str, RequestView]]:
        for name, new in output.num_scheduled_tokens.items():
            if (view := self.views.get(name)) is not None:
                end = self.requests[name].num_computed_tokens  # the step's count as computed already
                yield name, view.seen_from(end - new, end, self.window)

    def _step_info(self, output: SchedulerOutput) -> StepInfo:
        """What the workers get with a step. vLLM counts the step's tokens as computed already."""
        return StepInfo()

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        report = StepReport.of(model_runner_output)
        self.step_stats.selection_seconds, self.step_stats.swap_seconds = (
            report.selection_seconds,
            report.swap_seconds,
        )
        ended: dict[int, EngineCoreOutputs] = {}
        if report.failed_adapters:
            self._fail_adapters(scheduler_output, report.failed_adapters)
            self._end_failed(ended)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for client, more in ended.items():
            outputs.setdefault(client, EngineCoreOutputs()).outputs.extend(more.outputs)
        if self.failed:
            self._end_failed(outputs)
        return outputs

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        return self._has_room_for_adapter(request) and super()._handle_blocked_waiting_request(request)

    def _has_room_for_adapter(self, request: Request) -> bool:
        """Whether the running requests have at most max_loras adapters, together with this request's.

        vLLM counts the adapters of the current step only, and a later step may compute all running requests.
        """
        if self.lora_config is None or request.lora_request is None:
            return True
        running = {other.lora_request.lora_int_id for other in self.running if other.lora_request is not None}
        return len(running | {request.lora_request.lora_int_id}) <= self.lora_config.max_loras

    def _fail_adapters(self, scheduler_output: SchedulerOutput, failed: dict[int, str]) -> None:
        """Fail requests that were computed without their adapter, and evict their KV from the prefix cache.

        These are the step's requests, and the running ones, which may be scheduled in a later step already.

        failed: By adapter id, why it could not be loaded.
        """
        names = scheduler_output.num_scheduled_tokens
        computed = {request.request_id: request for request in self.running}
        computed |= {name: self.requests[name] for name in names if name in self.requests}
        for name, request in computed.items():
            adapter = request.lora_request
            if adapter is None or (reason := failed.get(adapter.lora_int_id)) is None:
                continue
            self.failed[name] = reason
            for manager in self.kv_cache_manager.coordinator.single_type_managers:
                pool, blocks = manager.block_pool, manager.req_to_blocks.get(name, ())
                pool.evict_blocks({block.block_id for block in blocks if not block.is_null})
                # A request that was preempted since has no KV blocks, but those that it published are still
                # cached.
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
        """vLLM's statistics. Ours are in its dict for KV connectors, of which longctx has none."""
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
        for pool in self.memory_pools:  # one for each KV cache group of memory layers; all are used alike
            ours.memory_usage = pool.get_usage()
        stats.kv_connector_stats = {KEY: vars(ours)}
        return stats

    def shutdown(self) -> None:
        end_without_collecting()
        super().shutdown()


def shares_of(wanted: Mapping[str, int], budget: int, min_share: int) -> dict[str, int]:
    """The tokens that each request gets: what it wants, up to a common share, the largest that fits.

    So short prompts and streams get all that they want, and long prompts equal parts of the rest.

    wanted: By request id, tokens; in the order in which the requests came.
    budget: Tokens for all of them.
    min_share: If the common share were smaller, the first requests get this many tokens and the others none.
    """
    left = budget
    for number, wants in enumerate(ordered := sorted(wanted.values())):
        share = left // (len(ordered) - number)
        if wants > share >= min_share:
            return {name: min(wants, share) for name, wants in wanted.items()}
        if wants > share:
            break
        left -= wants
    else:
        return dict(wanted)
    shares = {}
    for name, wants in sorted(wanted.items(), key=lambda item: min(item[1], min_share)):
        shares[name] = min(wants, min_share, budget)
        budget -= shares[name]
    return shares


class AsyncLongContextScheduler(LongContextScheduler, AsyncScheduler):
    """For engines that schedule a step while the device still computes the one before."""
