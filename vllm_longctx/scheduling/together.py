"""vLLM's schedulers for Temp-LoRA beside layers that keep all keys: a memory, or LM-Infinite's top-k branch.

A key was computed by the version of its block, and stays: no pass computes it again. A request that adapts is
never preempted, so the blocks of its whole text are reserved for it.
"""

from dataclasses import replace
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from vllm_longctx.engine.step import StepInfo
from vllm_longctx.scheduling.adapting_request import AdaptingRequest
from vllm_longctx.scheduling.memory import MemoryScheduler, TopKScheduler
from vllm_longctx.scheduling.temp_lora import TempLoraScheduler


class KeepsWholeTexts(TempLoraScheduler):
    """Refuses requests that adapt for which no pool has room."""

    def _add_adapting(self, request: Request) -> None:
        super()._add_adapting(request)
        adapting, pool = self.adapting.get(request.request_id), self.kv_cache_manager.block_pool
        if adapting is not None:
            self._check_room(request, adapting.kv_blocks, pool.num_gpu_blocks - 1)

    def _check_room(self, request: Request, needed: int, most: int) -> None:
        if needed > most:
            reason = (
                f"a request that learns here keeps its whole text: it may need {needed} KV blocks, and the "
                f"pool has {most}; shorten it, or lower its max_tokens"
            )
            self.fail_request(request.request_id, reason)


class TempLoraTopKScheduler(TopKScheduler, KeepsWholeTexts):
    """Requests that adapt, whose queries look up keys of the middle."""


class TempLoraMemoryScheduler(MemoryScheduler, KeepsWholeTexts):
    """Requests that adapt, with a memory. A step ends where the window does, or the text block.

    reserved_memory: By request id, blocks reserved in pools that memory layers have to themselves.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.reserved_memory: dict[str, int] = {}

    def _add_adapting(self, request: Request) -> None:
        super()._add_adapting(request)
        for pool in self.memory_pools:
            self._check_room(request, self._memory_blocks_of(request), pool.num_gpu_blocks - 1)

    def _memory_blocks_of(self, request: Request) -> int:
        text = min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)
        return max((memory.blocks_apart_of(text) for memory in self.memories), default=0)

    def _admit(self, adapting: AdaptingRequest) -> bool:
        needed = self._memory_blocks_of(adapting.request)
        reserved = sum(self.reserved_memory.values()) + needed
        if any(reserved > pool.num_gpu_blocks - 1 for pool in self.memory_pools):
            return False
        if not super()._admit(adapting):
            return False
        self.reserved_memory[adapting.request_id] = needed
        return True

    def _end_adapting(self, adapting: AdaptingRequest) -> None:
        self.reserved_memory.pop(adapting.request_id, None)
        super()._end_adapting(adapting)

    def _step_info(self, output: SchedulerOutput) -> StepInfo:
        windows = super()._step_info(output).windows
        return replace(TempLoraScheduler._step_info(self, output), windows=windows)


class AsyncTempLoraTopKScheduler(TempLoraTopKScheduler, AsyncScheduler):
    """For engines that schedule a step while the device still computes the one before."""


class AsyncTempLoraMemoryScheduler(TempLoraMemoryScheduler, AsyncScheduler):
    """For engines that schedule a step while the device still computes the one before."""
