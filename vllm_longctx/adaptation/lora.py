"""The worker's side of Temp-LoRA on any device: slots into vLLM's LoRA layers, swapped in place."""

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_longctx.adaptation.slots import Slots
from vllm_longctx.adaptation.step import ATTRIBUTE, FIRST_LORA_ID, AdaptationStep, SlotUse, Weights
from vllm_longctx.engine_args import LINEAR_MODULES

EMPTY = AdaptationStep(None, [], {}, [])


class SlotLoRAManager(LRUCacheWorkerLoRAManager):
    """vLLM's manager of adapters, some of which are slots whose weights are swapped in place before a forward."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.step = EMPTY
        self.holds: dict[int, tuple[int, Weights]] = {}  # slot -> (owner, weights) in the layers
        self.slots: Slots | None = None
        self.device_slots: Tensor | None = None  # their memory on this GPU, if they have it there
        self.swap_seconds: list[float] = []

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
        self.holds.pop(lora_request.lora_int_id - FIRST_LORA_ID, None)  # vLLM's dummy runs may remove all adapters
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


class Adapts:
    """Mixed into a model runner of vLLM's, before it."""

    step = EMPTY
    lora_manager_class: type[SlotLoRAManager] = SlotLoRAManager

    def load_lora_model(self, model: nn.Module, vllm_config: VllmConfig, device: torch.device) -> nn.Module:
        self.lora_manager = self.lora_manager_class(vllm_config, device, model.embedding_modules)
        return self.lora_manager.create_lora_manager(model, vllm_config)

    def begin_step(self, scheduler_output: SchedulerOutput) -> None:
        """Before a forward: what this step's requests compute with, and where their passes began."""
        self.step = getattr(scheduler_output, ATTRIBUTE, EMPTY)
        manager = self.lora_manager
        if self.step.memory is not None and manager.slots is None:
            manager.slots = Slots.open(**vars(self.step.memory), device_memory=manager.device_slots)
        manager.step = self.step
        manager.free(self.step.freed)

    def take_swap_seconds(self) -> list[float]:
        seconds, self.lora_manager.swap_seconds = self.lora_manager.swap_seconds, []
        return seconds
