"""Passes of requests that adapt, in stepped windows: the first tokens of a pass are the text's first
again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput

from vllm_longctx.cpu.rows import WindowRow
from vllm_longctx.cpu.runner import LongContextRunner


class PassesRunner(LongContextRunner):
    """Private methods of vLLM's that are overridden here: see `vllm_longctx.seams`."""

    def _prepare_inputs(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        with self._first_tokens_before_windows():
            prepared = super()._prepare_inputs(scheduler_output, *args, **kwargs)
        rows = self.input_batch.req_id_to_index
        self.rows.windows = tuple(
            WindowRow(rows[request_id], p.first) for request_id, p in self.step.passes.items()
        )
        return prepared

    @contextmanager
    def _first_tokens_before_windows(self) -> Iterator[None]:
        """While ids are gathered, a pass's positions right before its window hold the text's first tokens."""
        hidden = []
        for request_id, p in self.step.passes.items():
            ids = self.input_batch.token_ids_cpu[self.input_batch.req_id_to_index[request_id]]
            hidden.append((ids[p.first : p.start], ids[p.first : p.start].copy()))
            ids[p.first : p.start] = ids[: p.start - p.first]
        try:
            yield
        finally:
            for ids, own in hidden:
                ids[:] = own
