"""The CPU worker's side of Temp-LoRA: LoRA layers per segment, and passes whose first tokens are the text's first again."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_longctx.adaptation.lora import Adapts, SlotLoRAManager
from vllm_longctx.attention.stepped import PassRow, SteppedMetadataBuilder


class SegmentedPunica(PunicaWrapperCPU):
    """vLLM's, with work per segment of tokens that share an adapter, and none for tokens without one.

    The stock operators gather an adapter's weights for every token, and take index -1, no adapter, to be the last one: its
    output leaks into requests that have none (vLLM pull requests 48421, 49656).
    """

    segments: list[tuple[int, int, int]]  # (adapter index, first token, behind the last) of a step
    single: tuple[Tensor, Tensor] | None  # (adapter indices, tokens) where every segment is one token

    def update_metadata(self, mapping: LoRAMapping, lora_index_to_id: list[int | None], *args: Any, **kwargs: Any) -> None:
        super().update_metadata(mapping, lora_index_to_id, *args, **kwargs)
        self.segments, begin = [], 0
        for lora_id, group in groupby(mapping.index_mapping):
            end = begin + sum(1 for _ in group)
            if lora_id > 0:
                self.segments.append((lora_index_to_id.index(lora_id), begin, end))
            begin = end
        self.single = None
        if len(self.segments) > 1 and all(end - begin == 1 for _, begin, end in self.segments):
            indices, tokens, _ = zip(*self.segments, strict=True)
            self.single = torch.tensor(indices), torch.tensor(tokens)

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """y [T, out] += scale * x [T, in] A^T B^T per segment and slice; A [loras, 1, rank, in], B [loras, 1, out, rank]."""
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        offset = 0
        for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            if self.single is not None:
                indices, tokens = self.single
                low = torch.bmm(a[indices, 0], x[tokens].unsqueeze(-1).to(a.dtype))
                added = torch.bmm(b[indices, 0], low).squeeze(-1)
                y[:, offset : offset + size].index_add_(0, tokens, (added[:, :size] * scale).to(y.dtype))
            else:
                for index, begin, end in self.segments:
                    low = x[begin:end].to(a.dtype) @ a[index, 0].T
                    y[begin:end, offset : offset + size] += (low @ b[index, 0].T)[:, :size] * scale
            offset += size


class SegmentedLoRAManager(SlotLoRAManager):
    def create_lora_manager(self, model: nn.Module, vllm_config: VllmConfig) -> Any:
        wrapped = super().create_lora_manager(model, vllm_config)
        for wrapper in self._adapter_manager.punica_wrapper_mapping.values():
            assert type(wrapper) is PunicaWrapperCPU
            wrapper.__class__ = SegmentedPunica
            wrapper.segments, wrapper.single = [], None
        return wrapped


class AdaptingRunner(Adapts, CPUModelRunner):
    """vLLM's model runner. Private methods of its that are overridden here: see `vllm_longctx.seams`."""

    lora_manager_class = SegmentedLoRAManager

    def _prepare_inputs(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        with self._first_tokens_before_windows():
            prepared = super()._prepare_inputs(scheduler_output, *args, **kwargs)
        rows = self.input_batch.req_id_to_index
        passes = tuple(PassRow(rows[request_id], p.first) for request_id, p in self.step.passes.items())
        for groups in self.attn_groups:
            for group in groups:
                builder = group.get_metadata_builder()
                if isinstance(builder, SteppedMetadataBuilder):
                    builder.passes = passes
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

    def _get_prompt_logprobs_dict(self, hidden_states: Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
        """As vLLM's, but rows of positions that were computed before stay: the first pass wins."""
        kept = []
        for request_id in self.step.passes.keys() & self.num_prompt_logprobs.keys() & num_scheduled_tokens.keys():
            state = self.requests[request_id]
            tensors, begin = state.in_progress_prompt_logprobs_cpu, state.num_computed_tokens
            if tensors is not None:
                end = min(self.step.passes[request_id].frontier, begin + num_scheduled_tokens[request_id])
                kept += [(t, begin, t[begin:end].clone()) for t in tensors[:3]]
        result = super()._get_prompt_logprobs_dict(hidden_states, num_scheduled_tokens)
        for tensor, begin, rows in kept:
            tensor[begin : begin + len(rows)] = rows
        return result
