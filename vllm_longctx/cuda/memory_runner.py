"""Stepped windows of a memory engine: positions counted from each request's window, and windows that become
memory.

For vLLM's Model Runner V2. What it computes from a request's true positions (slots, the sampler's random
numbers) stays. The model alone is given others, in a buffer of its own that CUDA graphs may hold.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_longctx.cuda.memory import LookupImpl, close_window
from vllm_longctx.cuda.rows import StepRows
from vllm_longctx.cuda.runner import LongContextRunner
from vllm_longctx.engine.layers import LayerSite, SiteGroup, site_groups
from vllm_longctx.engine.lookup import ClosedWindow, covering
from vllm_longctx.engine.lora import SlotLoRAManager
from vllm_longctx.engine.step import RequestWindow, copied_blocks
from vllm_longctx.modes import Role

FIRST = RequestWindow(0)  # of requests that vLLM makes up to warm its kernels


class WindowedModelState(DefaultModelState):
    """vLLM's, whose model is given positions counted from windows.

    Takes over a DefaultModelState (`MemoryRunner`).
    """

    window_positions: Tensor

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Tensor | None]:
        return {"positions": self.window_positions[: input_batch.num_tokens_after_padding]}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return {**inputs, "positions": self.window_positions[:num_tokens]}


class MemoryRunner(LongContextRunner, GPUModelRunner):
    """vLLM's Model Runner V2. Methods of its that are overridden here: see `vllm_longctx.seams`."""

    model_state: WindowedModelState
    lora_manager: SlotLoRAManager
    windows: dict[str, RequestWindow]
    memory_groups: list[SiteGroup]  # none, of a model without memory layers

    def begin(self, sites: Sequence[LayerSite], rows: StepRows) -> None:
        """Raises RuntimeError for a model whose positions are not one number per token."""
        super().begin(sites, rows)
        stock: object = self.model_state
        if type(stock) is not DefaultModelState or stock.rope_state is not None:
            raise RuntimeError(f"longctx cannot count the positions of {type(stock).__name__} from windows")
        # vLLM makes it while the model is loaded, of a class that it names.
        stock.__class__ = WindowedModelState
        self.model_state.window_positions = torch.zeros_like(self.input_buffers.positions)

    def bind_kv_cache(self) -> None:
        self.memory_groups = site_groups(self.sites, Role.MEMORY, self.kv_cache_config)
        for group in self.memory_groups:
            looking = [
                (impl, site.layer.kv_cache)
                for site in group.sites
                if isinstance(impl := site.layer.impl, LookupImpl)
            ]
            for impl, kv_cache in looking:
                impl.bind_kv_cache(kv_cache)
            for impl, kv_cache in looking[:1]:
                impl.warm_up(kv_cache, self.block_tables.input_block_tables[group.number])

    def prepare_inputs(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        batch = super().prepare_inputs(scheduler_output, *args, **kwargs)
        self.windows = {name: self.step.windows.get(name, FIRST) for name in batch.req_ids}
        starts = np.array([self.windows[name].start for name in batch.req_ids], dtype=np.int32)
        self.rows.begin_windows(starts)
        offsets = np.repeat(starts, batch.num_scheduled_tokens).astype(np.int64)
        positions = self.model_state.window_positions
        torch.sub(
            batch.positions[: batch.num_tokens],
            async_tensor_h2d(offsets, device=self.device),
            out=positions[: batch.num_tokens],
        )
        positions[batch.num_tokens : batch.num_tokens_after_padding].zero_()
        return batch

    def prepare_attn(self, input_batch: Any) -> tuple[tuple[Tensor, ...], Tensor]:
        block_tables, slot_mappings = super().prepare_attn(input_batch)
        self._copy_blocks()
        for group in self.memory_groups:
            self._close_windows(group, input_batch.req_ids, block_tables[group.number])
        return block_tables, slot_mappings

    def _copy_blocks(self) -> None:
        """Of requests that were hit in another one's open window."""
        if copies := copied_blocks(self.windows.values()):
            sources, targets = async_tensor_h2d(np.array(copies, dtype=np.int64), device=self.device)
            for site in (site for group in self.memory_groups for site in group.sites):
                site.layer.kv_cache[targets] = site.layer.kv_cache[sources]

    def _close_windows(self, group: SiteGroup, request_ids: list[str], table: Tensor) -> None:
        for row, request_id in enumerate(request_ids):
            window = self.windows[request_id]
            if window.closes is None:
                continue
            blocks = covering(table[row], window.closes, window.start, group.block_size)
            closed = ClosedWindow(window.closes, window.closes, window.start, blocks)
            for site in group.sites:
                dtype = getattr(torch, site.settings.memory.dtype)
                close_window(site.layer.kv_cache, closed, site.rotary, dtype)
                if isinstance(site.layer.impl, LookupImpl):
                    site.layer.impl.summarise(site.layer.kv_cache, closed)
