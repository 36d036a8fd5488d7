"""The worker's side of Temp-LoRA: slots swapped in place, and passes whose first tokens are the text's first again."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.lora.layers import LoRAMapping
from vllm.lora.lora_model import LoRAModel
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_longctx.adaptation.slots import Slots
from vllm_longctx.adaptation.step import ATTRIBUTE, FIRST_LORA_ID, AdaptationStep, SlotUse, Weights
from vllm_longctx.attention.stepped import PassRow, SteppedMetadataBuilder
from vllm_longctx.engine_args import LINEAR_MODULES

EMPTY = AdaptationStep(None, [], {}, [])


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


class SlotLoRAManager(LRUCacheWorkerLoRAManager):
    """vLLM's manager of adapters, some of which are slots whose weights are swapped in place before a forward."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.step = EMPTY
        self.holds: dict[int, tuple[int, Weights]] = {}  # slot -> (owner, weights) in the layers
        self.slots: Slots | None = None
        self.swap_seconds: list[float] = []

    def create_lora_manager(self, model: nn.Module, vllm_config: VllmConfig) -> Any:
        wrapped = super().create_lora_manager(model, vllm_config)
        for wrapper in self._adapter_manager.punica_wrapper_mapping.values():
            assert type(wrapper) is PunicaWrapperCPU
            wrapper.__class__ = SegmentedPunica
            wrapper.segments, wrapper.single = [], None
        return wrapped

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        if lora_request.lora_int_id < FIRST_LORA_ID:
            adapter = super()._load_adapter(lora_request)
            others = {name.rpartition(".")[2] for name in adapter.loras} - set(LINEAR_MODULES)
            if others:  # vLLM would leave them out and say nothing
                raise ValueError(
                    f"the adapter {lora_request.lora_name!r} has weights of {', '.join(sorted(others))}; beside Temp-LoRA an "
                    f"adapter may have those of {', '.join(LINEAR_MODULES)} only"
                )
            return adapter
        return self._adapter_manager.create_dummy_lora(lora_request.lora_int_id, 1, self.embedding_modules)

    def set_active_adapters(self, requests: set[Any], mapping: Any | None) -> None:
        super().set_active_adapters(requests, mapping)
        for use in self.step.slots:
            if self.holds.get(use.slot) != (use.owner, use.weights):
                started = time.perf_counter()
                self._swap(use)
                self.swap_seconds.append(time.perf_counter() - started)

    def free(self, slots: Iterable[int]) -> None:
        for slot in slots:
            if self.holds.pop(slot, None) is not None and (index := self._index(slot)) is not None:
                for module in self._adapter_manager.modules.values():
                    module.reset_lora(index)

    def _index(self, slot: int) -> int | None:
        ids = self._adapter_manager.lora_index_to_id
        return ids.index(FIRST_LORA_ID + slot) if FIRST_LORA_ID + slot in ids else None

    def _swap(self, use: SlotUse) -> None:
        """Put the weights that the scheduler approved into the layers. A slot that holds others is an error, not a wait."""
        manager, index = self._adapter_manager, self._index(use.slot)
        assert index is not None
        if use.slot not in self.holds:
            manager.pin_adapter(FIRST_LORA_ID + use.slot)
        if use.weights.bank is None:
            for module in manager.modules.values():
                module.reset_lora(index)
        else:
            assert self.slots is not None
            with self.slots.read(use.slot, use.weights.bank, use.owner, use.weights.version) as weights:
                for name, module in manager.modules.items():
                    parts = manager.packed_modules.get(name)
                    if parts is not None:
                        module.set_lora(index, *map(list, zip(*(weights[part] for part in parts), strict=True)))
                    else:
                        module.set_lora(index, *weights[name])
        self.holds[use.slot] = (use.owner, use.weights)


class AdaptingRunner(CPUModelRunner):
    """vLLM's model runner. Private methods of its that are overridden here: see `vllm_longctx.seams`."""

    step = EMPTY

    def load_lora_model(self, model: nn.Module, vllm_config: VllmConfig, device: torch.device) -> nn.Module:
        self.lora_manager = SlotLoRAManager(vllm_config, device, model.embedding_modules)
        return self.lora_manager.create_lora_manager(model, vllm_config)

    def begin_step(self, scheduler_output: SchedulerOutput) -> None:
        """Before a forward: what this step's requests compute with, and where their passes began."""
        self.step = getattr(scheduler_output, ATTRIBUTE, EMPTY)
        manager = self.lora_manager
        if self.step.memory is not None and manager.slots is None:
            manager.slots = Slots.open(**vars(self.step.memory))
        manager.step = self.step
        manager.free(self.step.freed)

    def take_swap_seconds(self) -> list[float]:
        seconds, self.lora_manager.swap_seconds = self.lora_manager.swap_seconds, []
        return seconds

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
