"""The worker's side of Focused Transformers: positions counted from each request's window, and windows that become memory.

And of LM-Infinite's top-k branch, whose memory is what the window has left behind when a request writes.
"""

from typing import Any

import torch
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_longctx.config import active_config
from vllm_longctx.cpu.lora import LongContextRunner
from vllm_longctx.cpu.memory import MemoryImpl, MemoryMetadataBuilder, remember
from vllm_longctx.cpu.sliding import LambdaMetadataBuilder
from vllm_longctx.cpu.window import PassRow, SteppedMetadataBuilder
from vllm_longctx.engine.kv_cache import MemorySpec
from vllm_longctx.engine.lookup import ClosedWindow, covering
from vllm_longctx.engine.window_step import ATTRIBUTE, RequestWindow, copies_of
from vllm_longctx.rotary import Rotary


class FocusedRunner(LongContextRunner):
    """vLLM's model runner. Private methods of its that are overridden here: see `vllm_longctx.seams`."""

    windows: dict[str, RequestWindow]
    mem_dtype: torch.dtype

    def begin_step(self, scheduler_output: SchedulerOutput) -> None:
        super().begin_step(scheduler_output)
        self.windows = getattr(scheduler_output, ATTRIBUTE)
        if copies := copies_of(self.windows.values()):
            sources, targets = copies
            for name in self._memory_layers():
                cache = self.compilation_config.static_forward_context[name].kv_cache
                cache[targets] = cache[sources]

    def _memory_layers(self) -> list[str]:
        groups = self.kv_cache_config.kv_cache_groups
        return [name for group in groups if isinstance(group.kv_cache_spec, MemorySpec) for name in group.layer_names]

    def _prepare_inputs(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, *args, **kwargs)
        request_ids = self.input_batch.req_ids
        starts = torch.tensor([self.windows[request_id].start for request_id in request_ids])
        lengths = torch.tensor([scheduler_output.num_scheduled_tokens[request_id] for request_id in request_ids])
        # Slots are computed; what still reads positions is the model.
        self.positions[: scheduler_output.total_num_scheduled_tokens] -= starts.repeat_interleave(lengths)
        past = tuple(PassRow(row, start) for row, start in enumerate(starts.tolist()) if start)
        for group_id, groups in enumerate(self.attn_groups):
            for group in groups:
                builder = group.get_metadata_builder()
                if isinstance(builder, SteppedMetadataBuilder):
                    builder.passes = past
                elif isinstance(builder, MemoryMetadataBuilder):
                    builder.windows = past
                    self._close_windows(group_id, builder)
        return prepared

    def _close_windows(self, group_id: int, builder: MemoryMetadataBuilder) -> None:
        table = self.input_batch.block_table[group_id].get_cpu_tensor()
        for row, request_id in enumerate(self.input_batch.req_ids):
            window = self.windows[request_id]
            if window.closes is None:
                continue
            blocks = covering(table[row], window.closes, window.start, builder.block_size)
            closed = ClosedWindow(window.closes, window.closes, window.start, blocks)
            for name in builder.layer_names:
                layer = self.compilation_config.static_forward_context[name]
                rotary = self._rotary_of(name)
                remember(layer.kv_cache, closed, rotary, self.mem_dtype, builder.isa)
                if isinstance(layer.impl, MemoryImpl):
                    layer.impl.summarise(closed)

    def look_into_memory(self) -> None:
        """Once the KV cache is there."""
        mem_dtype = active_config(self.vllm_config).attention.mem_dtype
        assert mem_dtype is not None
        self.mem_dtype = getattr(torch, mem_dtype)
        for groups in self.attn_groups:
            for group in groups:
                builder = group.get_metadata_builder()
                if isinstance(builder, MemoryMetadataBuilder):
                    for name in builder.layer_names:
                        layer = self.compilation_config.static_forward_context[name]
                        if isinstance(layer.impl, MemoryImpl):
                            builder.lookup = layer.impl.lookup
                            layer.impl.look_into(layer.kv_cache, builder.isa)

    def _rotary_of(self, layer_name: str) -> Rotary | None:
        rotary = self.model.get_submodule(layer_name.rpartition(".")[0]).rotary_emb
        return rotary if isinstance(rotary, Rotary) else None


class TopKRunner(LongContextRunner):
    """vLLM's model runner. Private methods of its that are overridden here: see `vllm_longctx.seams`."""

    def _prepare_inputs(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, *args, **kwargs)
        positions = self.input_batch.num_computed_tokens_cpu  # of the first query of each row, and of a writing one's only
        writing = [
            row
            for row, request_id in enumerate(self.input_batch.req_ids)
            if positions[row] >= self.requests[request_id].num_prompt_tokens - 1
        ]
        for group_id, groups in enumerate(self.attn_groups):
            for group in groups:
                builder = group.get_metadata_builder()
                assert isinstance(builder, LambdaMetadataBuilder)
                builder.writing = frozenset(writing)
                if builder.impl.top_k is not None:
                    for row in writing:
                        self._leave_behind(group_id, builder, row, int(positions[row]))
        return prepared

    def _leave_behind(self, group_id: int, builder: LambdaMetadataBuilder, row: int, position: int) -> None:
        """Un-rotate what has left the window since the step before: at the prompt's last token all, then one token a step."""
        geometry, table = builder.geometry, self.input_batch.block_table[group_id].get_cpu_tensor()
        assert geometry.n_local is not None
        end = position + 1 - geometry.n_local
        is_first = position == self.requests[self.input_batch.req_ids[row]].num_prompt_tokens - 1
        start = geometry.n_global if is_first else max(end - 1, geometry.n_global)
        if end <= start:
            return
        left = ClosedWindow(0, start, end, covering(table[row], start, end, builder.block_size))
        for layer in builder.layers:
            remember(layer.kv_cache, left, layer.impl.rotary, layer.kv_cache.dtype, builder.isa)
