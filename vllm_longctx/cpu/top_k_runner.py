"""LM-Infinite's top-k branch: its keys are what the window has left behind when a request writes,
un-rotated.
"""

from typing import Any

import torch
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_longctx.cpu.memory import close_window
from vllm_longctx.cpu.runner import LongContextRunner
from vllm_longctx.engine.layers import SiteGroup, site_groups
from vllm_longctx.engine.lookup import ClosedWindow, covering
from vllm_longctx.modes import Role


class TopKRunner(LongContextRunner):
    """Private methods of vLLM's that are overridden here: see `vllm_longctx.seams`."""

    kept_groups: list[SiteGroup]
    kept_isa: str  # of the CPU kernel, by which it packs blocks

    def bind_kv_cache(self) -> None:
        self.kept_groups = site_groups(self.sites, Role.KEPT, self.kv_cache_config)
        self.kept_isa = self.isa(self.kept_groups[0].number)

    def _prepare_inputs(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, *args, **kwargs)
        # Of the first query of each row, and of a writing one's only.
        positions = self.input_batch.num_computed_tokens_cpu
        writing = [
            row
            for row, request_id in enumerate(self.input_batch.req_ids)
            if positions[row] >= self.requests[request_id].num_prompt_tokens - 1
        ]
        self.rows.writing = frozenset(writing)
        for row in writing:
            for group in self.kept_groups:
                self._unrotate_middle(group, row, int(positions[row]))
        return prepared

    def _unrotate_middle(self, group: SiteGroup, row: int, position: int) -> None:
        """Un-rotate what has left the window since the step before: at the prompt's last token all, then one
        token a step.
        """
        geometry = group.sites[0].settings.geometry
        table = self.input_batch.block_table[group.number].get_cpu_tensor()
        end = int(geometry.window_start(torch.tensor(position)))
        is_first = position == self.requests[self.input_batch.req_ids[row]].num_prompt_tokens - 1
        start = geometry.n_global if is_first else max(end - 1, geometry.n_global)
        if end <= start:
            return
        left = ClosedWindow(0, start, end, covering(table[row], start, end, group.block_size))
        for site in group.sites:
            close_window(site.layer.kv_cache, left, site.rotary, site.layer.kv_cache.dtype, self.kept_isa)
