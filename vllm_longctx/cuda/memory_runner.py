"""The GPU worker's side of Focused Transformers: positions counted from each request's window, and windows that become memory.

And of LM-Infinite's top-k branch, whose memory is what the window has left behind when a request writes.

For vLLM's Model Runner V2. What it computes from a request's true positions (slots, the sampler's random numbers) stays; where
they are counted from windows the model alone is given others, in a buffer of its own that CUDA graphs may hold.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_longctx.config import active_config
from vllm_longctx.cuda.kernels.lookup import WORKSPACE
from vllm_longctx.cuda.top_k import TopKMetadataBuilder, turn_back
from vllm_longctx.cuda.window import SteppedImpl, SteppedMetadataBuilder, remember
from vllm_longctx.engine.kv_cache import MemorySpec
from vllm_longctx.engine.lookup import ClosedWindow, covering
from vllm_longctx.engine.lora import Adapts
from vllm_longctx.engine.window_step import ATTRIBUTE, RequestWindow, copies_of
from vllm_longctx.rotary import Rotary

FIRST = RequestWindow(0, None)  # of requests that vLLM makes up to warm its kernels


class WindowedModelState(DefaultModelState):
    """vLLM's, whose model is given positions counted from windows. Takes over a DefaultModelState (`FocusedCUDARunner`)."""

    window_positions: Tensor

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Tensor | None]:
        return {"positions": self.window_positions[: input_batch.num_tokens_after_padding]}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return {**inputs, "positions": self.window_positions[:num_tokens]}


class FocusedCUDARunner(Adapts, GPUModelRunner):
    """vLLM's Model Runner V2. Methods of its that are overridden here: see `vllm_longctx.seams`."""

    windows: dict[str, RequestWindow]

    def count_from_windows(self) -> None:
        """Once the model is loaded. Raises RuntimeError for a model whose positions are not one number per token."""
        if type(self.model_state) is not DefaultModelState or self.model_state.rope_state is not None:
            raise RuntimeError(f"longctx cannot count the positions of {type(self.model_state).__name__} from windows")
        self.model_state.__class__ = WindowedModelState
        self.model_state.window_positions = torch.zeros_like(self.input_buffers.positions)

    def look_into_memory(self) -> None:
        """Once the KV cache is there."""
        mem_dtype = active_config(self.vllm_config).attention.mem_dtype
        assert mem_dtype is not None
        self.mem_dtype = getattr(torch, mem_dtype)
        self.window_starts = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=self.device)
        for builder in self._builders():
            builder.starts = self.window_starts
        tables = self.block_tables.input_block_tables
        for table, group in zip(tables, self.kv_cache_config.kv_cache_groups, strict=True):
            layers = [self.compilation_config.static_forward_context[name] for name in group.layer_names]
            looking = [layer for layer in layers if isinstance(layer.impl, SteppedImpl) and layer.impl.lookup is not None]
            for layer in looking:
                layer.impl.look_into(layer.kv_cache)
            if looking:
                looking[0].impl.warm_up(looking[0].kv_cache, table)

    def prepare_inputs(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        batch = super().prepare_inputs(scheduler_output, *args, **kwargs)
        windows = getattr(scheduler_output, ATTRIBUTE, {})
        self.windows = {name: windows.get(name, FIRST) for name in batch.req_ids}
        starts = np.array([self.windows[name].start for name in batch.req_ids], dtype=np.int32)
        async_tensor_h2d(starts, out=self.window_starts[: len(starts)])
        for builder in self._builders():
            builder.starts_on_host[: len(starts)] = starts
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
        for table, group in zip(block_tables, self.kv_cache_config.kv_cache_groups, strict=True):
            if isinstance(group.kv_cache_spec, MemorySpec):
                self._copy_blocks(group.layer_names)
                self._close_windows(input_batch.req_ids, table, group.kv_cache_spec.block_size, group.layer_names)
        return block_tables, slot_mappings

    def _copy_blocks(self, layer_names: list[str]) -> None:
        if copies := copies_of(self.windows.values()):
            sources, targets = async_tensor_h2d(np.array(copies, dtype=np.int64), device=self.device)
            for name in layer_names:
                cache = self.compilation_config.static_forward_context[name].kv_cache
                cache[targets] = cache[sources]

    def _close_windows(self, request_ids: list[str], table: Tensor, block_size: int, layer_names: list[str]) -> None:
        for row, request_id in enumerate(request_ids):
            window = self.windows[request_id]
            if window.closes is None:
                continue
            blocks = covering(table[row], window.closes, window.start, block_size)
            closed = ClosedWindow(window.closes, window.closes, window.start, blocks)
            for name in layer_names:
                layer = self.compilation_config.static_forward_context[name]
                remember(layer.kv_cache, closed, self._rotary_of(name), self.mem_dtype)
                if isinstance(layer.impl, SteppedImpl):
                    layer.impl.summarise(layer.kv_cache, closed)

    def _builders(self) -> list[SteppedMetadataBuilder]:
        builders = (group.get_metadata_builder() for groups in self.attn_groups for group in groups)
        return [builder for builder in builders if isinstance(builder, SteppedMetadataBuilder)]

    def _rotary_of(self, layer_name: str) -> Rotary | None:
        rotary = self.model.get_submodule(layer_name.rpartition(".")[0]).rotary_emb
        return rotary if isinstance(rotary, Rotary) else None


class TopKCUDARunner(Adapts, GPUModelRunner):
    """vLLM's Model Runner V2. Methods of its that are overridden here: see `vllm_longctx.seams`."""

    def warm_up(self) -> None:
        """Once the KV cache is there."""
        for builder, table in self._builders(self.block_tables.input_block_tables):
            builder.impl.warm_up(builder.layers[0].kv_cache, table)

    def prepare_attn(self, input_batch: Any) -> tuple[tuple[Tensor, ...], Tensor]:
        block_tables, slot_mappings = super().prepare_attn(input_batch)
        positions = input_batch.num_computed_tokens_np.astype(np.int64)  # of the first query of each row, a writing one's only
        last = self.req_states.prompt_len.np[input_batch.idx_mapping_np] - 1
        for builder, table in self._builders(block_tables):
            n_global, n_local = builder.geometry.n_global, builder.geometry.n_local
            assert n_local is not None
            builder.ends = np.where(positions >= last, positions + 1 - n_local, 0)
            # Since the step before one token has left the window; at the prompt's last, none was turned back before.
            starts = np.where(positions == last, n_global, np.maximum(builder.ends - 1, n_global))
            self._leave_behind(builder, table, starts, builder.ends)
        return block_tables, slot_mappings

    def _leave_behind(
        self, builder: TopKMetadataBuilder, table: Tensor, starts: NDArray[np.int64], ends: NDArray[np.int64]
    ) -> None:
        """Un-rotate the keys starts .. ends - 1 of each row. A long prompt's middle comes in parts, within bounded memory."""
        impl = builder.impl
        assert impl.rotary is not None
        lengths = np.maximum(ends - starts, 0)
        rows = np.repeat(np.arange(len(lengths)), lengths)
        positions = np.arange(len(rows)) + np.repeat(starts - lengths.cumsum() + lengths, lengths)
        both, at_once = np.stack((rows, positions)), WORKSPACE // (4 * impl.num_kv_heads * impl.head_size)
        for first in range(0, len(rows), at_once):
            row, position = async_tensor_h2d(both[:, first : first + at_once], device=self.device)
            block_size = builder.layers[0].kv_cache.shape[2]
            blocks, offsets = table[row, position // block_size].long(), position % block_size
            cos, sin = impl.rotary.cos_sin(-position[:, None])
            for layer in builder.layers:
                turn_back(layer.kv_cache, blocks, offsets, impl.rotary, cos, sin)

    def _builders(self, block_tables: Iterable[Tensor]) -> Iterator[tuple[TopKMetadataBuilder, Tensor]]:
        """Those of layers with a top-k branch, each with its group's block table."""
        for table, groups in zip(block_tables, self.attn_groups, strict=True):
            for group in groups:
                if isinstance(builder := group.get_metadata_builder(), TopKMetadataBuilder):
                    yield builder, table
