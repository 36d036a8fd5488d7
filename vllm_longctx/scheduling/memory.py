"""vLLM's schedulers for memories: no step of a request goes past what its queries see alike."""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from vllm_longctx.engine.kv_cache import MemoryManager
from vllm_longctx.engine.step import RequestWindow, StepInfo
from vllm_longctx.scheduling.scheduler import LongContextScheduler


class MemoryScheduler(LongContextScheduler):
    """Also a mixin: `class X(MemoryScheduler, AsyncScheduler)` cuts the same over vLLM's other scheduler.

    Nothing here depends on which tokens stand where, so a step may be cut before those of the step before are known. A window
    is closed by the step after its last one, in the order in which the device computes them.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.windows = self.settings.memory.windows
        self.open: dict[str, int] = {}  # where the window of each request's last step began
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self.memories = [m for m in managers if isinstance(m, MemoryManager)]

    def add_request(self, request: Request) -> None:
        """Prefix caching sees the prompt up to where its last window begins: what comes then is cut as no other prompt is.

        A prompt that is all within its last window has none that begins elsewhere than every other text's.
        """
        if last_start := self.windows.last_start(request.num_prompt_tokens):
            request._block_hasher = None
            del request.block_hashes[last_start // self.block_size :]
        super().add_request(request)

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        allowed = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        end = self.windows.end(num_computed_tokens, request.num_prompt_tokens)
        return min(allowed, end - num_computed_tokens)

    def _step_info(self, output: SchedulerOutput) -> StepInfo:
        return StepInfo(windows={name: self._window(name, new) for name, new in output.num_scheduled_tokens.items()})

    def _window(self, request_id: str, num_new_tokens: int) -> RequestWindow:
        request = self.requests[request_id]
        first = request.num_computed_tokens - num_new_tokens  # already counted as computed
        start = self.windows.start(first, request.num_prompt_tokens)
        # A hit ends where a window begins and all before is memory, or inside of the first window, which is open.
        hit_in = 0 if first < self.windows.tokens else start
        before = self.open.get(request_id, hit_in)
        self.open[request_id] = start
        copies = tuple(copy for memory in self.memories for copy in memory.take_copies(request_id))
        return RequestWindow(start, None if before == start else before, copies)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self.open.pop(request.request_id, None)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        if self.open.pop(request.request_id, None) == 0:
            for memory in self.memories:
                memory.publish_first_window(request)
        return super()._free_request(request, *args, **kwargs)


class TopKScheduler(LongContextScheduler):
    """For LM-Infinite's top-k branch: the prompt's last token and all later ones are computed one at a time, replayed ones too.

    The official code gives the branch to the last query of a call, which in an engine must not depend on how calls are cut.
    """

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        allowed = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        return min(allowed, max(request.num_prompt_tokens - 1 - num_computed_tokens, 1))


class AsyncMemoryScheduler(MemoryScheduler, AsyncScheduler):
    """For engines that schedule a step while the device still computes the one before."""


class AsyncTopKScheduler(TopKScheduler, AsyncScheduler):
    """For engines that schedule a step while the device still computes the one before."""
