"""Stepped windows of a memory engine: positions counted from each request's window, and windows that become
memory.
"""

from typing import Any

import torch
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_longctx.cpu.memory import MemoryImpl, close_window
from vllm_longctx.cpu.rows import WindowRow
from vllm_longctx.cpu.runner import LongContextRunner
from vllm_longctx.engine.layers import LayerSite, SiteGroup, site_groups
from vllm_longctx.engine.lookup import ClosedWindow, covering
from vllm_longctx.engine.step import StepInfo, copied_blocks
from vllm_longctx.modes import Role


class MemoryRunner(LongContextRunner):
    """Private methods of vLLM's that are overridden here: see `vllm_longctx.seams`."""

    memory_groups: list[SiteGroup]  # none, of a model without memory layers

    def bind_kv_cache(self) -> None:
        self.memory_groups = site_groups(self.sites, Role.MEMORY, self.kv_cache_config)
        for group in self.memory_groups:
            isa = self.isa(group.number)
            for site in group.sites:
                memory_impl(site).bind_kv_cache(site.layer.kv_cache, isa)

    def begin_step(self, scheduler_output: SchedulerOutput, info: StepInfo) -> None:
        super().begin_step(scheduler_output, info)
        self._copy_blocks()

    def _copy_blocks(self) -> None:
        """Of requests that were hit in another one's open window, before anything is written in the step."""
        if copies := copied_blocks(self.step.windows.values()):
            sources, targets = copies
            for site in (site for group in self.memory_groups for site in group.sites):
                site.layer.kv_cache[targets] = site.layer.kv_cache[sources]

    def _prepare_inputs(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, *args, **kwargs)
        request_ids, windows = self.input_batch.req_ids, self.step.windows
        starts = torch.tensor([windows[request_id].start for request_id in request_ids])
        lengths = torch.tensor(
            [scheduler_output.num_scheduled_tokens[request_id] for request_id in request_ids]
        )
        # Slots are computed; what still reads positions is the model.
        self.positions[: scheduler_output.total_num_scheduled_tokens] -= starts.repeat_interleave(lengths)
        self.rows.windows = tuple(
            WindowRow(row, start, windows[request_id].lookup)
            for row, (request_id, start) in enumerate(zip(request_ids, starts.tolist(), strict=True))
            if start
        )
        for group in self.memory_groups:
            self._close_windows(group)
        return prepared

    def _close_windows(self, group: SiteGroup) -> None:
        table, isa = self.input_batch.block_table[group.number].get_cpu_tensor(), self.isa(group.number)
        for row, request_id in enumerate(self.input_batch.req_ids):
            window = self.step.windows[request_id]
            if window.closes is None:
                continue
            blocks = covering(table[row], window.closes, window.start, group.block_size)
            closed = ClosedWindow(window.closes, window.closes, window.start, blocks)
            for site in group.sites:
                dtype = getattr(torch, site.settings.memory.dtype)
                close_window(site.layer.kv_cache, closed, site.rotary, dtype, isa)
                memory_impl(site).summarise(closed)


def memory_impl(site: LayerSite) -> MemoryImpl:
    assert isinstance(site.layer.impl, MemoryImpl)
    return site.layer.impl
