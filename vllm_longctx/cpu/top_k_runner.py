"""LM-Infinite's top-k branch: its keys are what the window has left behind, un-rotated."""

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput

from vllm_longctx.cpu.memory import close_window
from vllm_longctx.cpu.runner import LongContextRunner
from vllm_longctx.engine.layers import SiteGroup, site_groups
from vllm_longctx.engine.lookup import ClosedWindow, LeftBehind, covering
from vllm_longctx.modes import Role


class TopKRunner(LongContextRunner):
    """Private methods of vLLM's that are overridden here: see `vllm_longctx.seams`."""

    kept_groups: list[SiteGroup]
    left_behind: LeftBehind
    kept_isa: str  # of the CPU kernel, by which it packs blocks

    def bind_kv_cache(self) -> None:
        self.kept_groups = site_groups(self.sites, Role.KEPT, self.kv_cache_config)
        self.left_behind = LeftBehind.of(self.kept_groups[0].sites[0].settings.geometry)
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
        self.left_behind.forget(scheduler_output.finished_req_ids)
        for row, request_id in enumerate(self.input_batch.req_ids):
            start, end = self.left_behind.take(request_id, int(positions[row]))
            for group in self.kept_groups if start < end else ():
                self._unrotate_middle(group, row, start, end)
        return prepared

    def _unrotate_middle(self, group: SiteGroup, row: int, start: int, end: int) -> None:
        """Un-rotate keys start .. end - 1, which have left the window since the step before."""
        table = self.input_batch.block_table[group.number].get_cpu_tensor()
        left = ClosedWindow(0, start, end, covering(table[row], start, end, group.block_size))
        for site in group.sites:
            close_window(site.layer.kv_cache, left, site.rotary, site.layer.kv_cache.dtype, self.kept_isa)
