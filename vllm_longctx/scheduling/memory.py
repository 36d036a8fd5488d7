"""vLLM's schedulers for memory layers and top-k. A step of a request ends where its window does."""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from vllm_longctx.engine.memory_kv import MemoryManager
from vllm_longctx.engine.step import NO_LIMIT, RequestWindow, StepInfo
from vllm_longctx.geometry import RequestView, SteppedWindows
from vllm_longctx.scheduling.scheduler import LongContextScheduler
from vllm_longctx.settings import Lookup

ONE_WINDOW = SteppedWindows(NO_LIMIT, NO_LIMIT)  # of a request that sees its whole text


class MemoryScheduler(LongContextScheduler):
    """Ends each step of a request at the end of its window at the latest.

    Also a mixin: `class X(MemoryScheduler, AsyncScheduler)` does the same over vLLM's other scheduler.
    Nothing here depends on the tokens themselves, so a step can be scheduled before those of the step before
    are known. A window is closed by the step after its last one, in the order in which the device computes
    them.

    windows: Where windows begin and end.
    lookups: By request id, how queries find keys of requests that have chosen what these see.
    open: By request id, where the window of its last step began.
    memories: KV managers of the memory layers.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.windows = self.settings.memory.windows
        self.lookups: dict[str, Lookup | None] = {}
        self.open: dict[str, int] = {}
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self.memories = [m for m in managers if isinstance(m, MemoryManager)]

    def add_request(self, request: Request) -> None:
        """Let prefix caching see the prompt up to the start of its last window only.

        Where that window starts depends on the prompt's length, so other prompts do not share what follows. A
        prompt that is all in its first window can be cached whole: every text's first window starts at 0.
        """
        if last_start := self.windows.last_start(request.num_prompt_tokens):
            request._block_hasher = None
            del request.block_hashes[last_start // self.block_size :]
        super().add_request(request)

    def _begin_view(self, request: Request, view: RequestView) -> None:
        super()._begin_view(request, view)
        self.lookups[request.request_id] = self.settings.lookup_of(self._options_of(request))

    def _windows_of(self, request: Request) -> SteppedWindows:
        view = self.views.get(request.request_id)
        return ONE_WINDOW if view is not None and view.n_global is None else self.windows

    def _most_tokens(self, request: Request, computed: int) -> int:
        end = self._windows_of(request).end(computed, request.num_prompt_tokens)
        return min(super()._most_tokens(request, computed), end - computed)

    def _step_info(self, output: SchedulerOutput) -> StepInfo:
        scheduled = output.num_scheduled_tokens
        return StepInfo(windows={name: self._window(name, new) for name, new in scheduled.items()})

    def _window(self, request_id: str, num_new_tokens: int) -> RequestWindow:
        request = self.requests[request_id]
        first = request.num_computed_tokens - num_new_tokens  # already counted as computed
        start = self._windows_of(request).start(first, request.num_prompt_tokens)
        # A prefix cache hit ends where a window begins, and all before is memory; or in the first window,
        # which is open.
        hit_in = 0 if first < self.windows.tokens else start
        before = self.open.get(request_id, hit_in)
        self.open[request_id] = start
        copies = tuple(copy for memory in self.memories for copy in memory.take_copies(request_id))
        lookup = self.lookups.get(request_id, self.settings.memory.lookup)
        return RequestWindow(start, None if before == start else before, copies, lookup)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self.open.pop(request.request_id, None)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        if self.open.pop(request.request_id, None) == 0:
            for memory in self.memories:
                memory.publish_first_window(request)
        self.lookups.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)


class TopKScheduler(LongContextScheduler):
    """For LM-Infinite's top-k branch: from the prompt's last token on, each token takes a step.

    So do tokens that are replayed after a preemption.

    The official code gives the branch to the last query of a call. In an engine this must not depend on how a
    prompt is split.
    """

    def _most_tokens(self, request: Request, computed: int) -> int:
        return min(super()._most_tokens(request, computed), max(request.num_prompt_tokens - 1 - computed, 1))


class AsyncMemoryScheduler(MemoryScheduler, AsyncScheduler):
    """For engines that schedule a step while the device still computes the one before."""


class AsyncTopKScheduler(TopKScheduler, AsyncScheduler):
    """For engines that schedule a step while the device still computes the one before."""
