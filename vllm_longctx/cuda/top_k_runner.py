"""LM-Infinite's top-k branch: its keys are what the window has left behind, un-rotated."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from vllm_longctx.cuda.kernels.lookup import WORKSPACE
from vllm_longctx.cuda.runner import LongContextRunner
from vllm_longctx.cuda.top_k import TopKImpl, turn_back
from vllm_longctx.engine.layers import SiteGroup, site_groups
from vllm_longctx.engine.lookup import LeftBehind
from vllm_longctx.engine.lora import SlotLoRAManager
from vllm_longctx.modes import Role


class TopKRunner(LongContextRunner, GPUModelRunner):
    """vLLM's Model Runner V2. Methods of its that are overridden here: see `vllm_longctx.seams`."""

    lora_manager: SlotLoRAManager
    kept_groups: list[SiteGroup]
    left_behind: LeftBehind

    def bind_kv_cache(self) -> None:
        self.kept_groups = site_groups(self.sites, Role.KEPT, self.kv_cache_config)
        self.left_behind = LeftBehind.of(self.kept_groups[0].sites[0].settings.geometry)
        for group in self.kept_groups:
            first = group.sites[0].layer
            assert isinstance(first.impl, TopKImpl)
            first.impl.warm_up(first.kv_cache, self.block_tables.input_block_tables[group.number])

    def finish_requests(self, scheduler_output: SchedulerOutput) -> None:
        super().finish_requests(scheduler_output)
        self.left_behind.forget(scheduler_output.finished_req_ids)

    def prepare_attn(self, input_batch: Any) -> tuple[tuple[Tensor, ...], Tensor]:
        block_tables, slot_mappings = super().prepare_attn(input_batch)
        # Of the first query of each row, a writing one's only.
        positions = input_batch.num_computed_tokens_np.astype(np.int64)
        last = self.req_states.prompt_len.np[input_batch.idx_mapping_np] - 1
        self.rows.middle_ends = np.where(positions >= last, positions + 1 - self.left_behind.n_local, 0)
        left = [
            self.left_behind.take(*row) for row in zip(input_batch.req_ids, positions.tolist(), strict=True)
        ]
        starts, ends = np.array(left, dtype=np.int64).reshape(-1, 2).T
        for group in self.kept_groups:
            self._unrotate_middles(group, block_tables[group.number], starts, ends)
        return block_tables, slot_mappings

    def _unrotate_middles(
        self, group: SiteGroup, table: Tensor, starts: NDArray[np.int64], ends: NDArray[np.int64]
    ) -> None:
        """Un-rotate the keys from `starts` up to `ends`, exclusive, of each row, within bounded memory."""
        impl = group.sites[0].layer.impl
        assert isinstance(impl, TopKImpl) and impl.rotary is not None
        lengths = np.maximum(ends - starts, 0)
        rows = np.repeat(np.arange(len(lengths)), lengths)
        positions = np.arange(len(rows)) + np.repeat(starts - lengths.cumsum() + lengths, lengths)
        both, at_once = np.stack((rows, positions)), WORKSPACE // (4 * impl.num_kv_heads * impl.head_size)
        block_size = group.block_size
        for first in range(0, len(rows), at_once):
            row, position = async_tensor_h2d(both[:, first : first + at_once], device=self.device)
            blocks, offsets = table[row, position // block_size].long(), position % block_size
            cos, sin = impl.rotary.cos_sin(-position[:, None])
            for site in group.sites:
                turn_back(site.layer.kv_cache, blocks, offsets, impl.rotary, cos, sin)
