"""Adapters in vLLM's GPU engine: memory that is shared with the trainer, or left free for it."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_longctx.cuda.kernels.swap import PaddedCopies
from vllm_longctx.engine.lora import SlotLoRAManager, slices
from vllm_longctx.engine.step import SlotUse
from vllm_longctx.settings import active_settings
from vllm_longctx.temp_lora import base_model
from vllm_longctx.temp_lora import shared_weights as shared
from vllm_longctx.temp_lora.slots import Slots

logger = init_logger("vllm.longctx")

ALLOCATOR, EXPANDABLE = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"), "expandable_segments:True"


class DeviceSlotLoRAManager(SlotLoRAManager):
    """Swaps from slots in this GPU's memory, too.

    Only where layers are not sharded: with GPU memory for its slots, an engine has one worker.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._copies: dict[tuple[int, int, int], PaddedCopies] = {}  # by slot, bank, rank

    def _copy(self, use: SlotUse, bank: int, index: int) -> None:
        """What `set_lora` does in each layer, in one launch. Hundreds take long."""
        if self.device_slots is None:
            super()._copy(use, bank, index)
            return
        assert self.slots is not None
        with self.slots.holding(use.slot, bank, use.owner, use.weights.version) as rank:
            if (copies := self._copies.get((use.slot, bank, rank))) is None:
                weights = self.slots.views(use.slot, bank, rank)
                sources: list[Tensor] = []
                targets: list[Tensor] = []
                for module, pairs in self._adapted_layers(weights):
                    for pair, a, b in slices(module, pairs):
                        sources.extend(pair)
                        targets.extend((a[index, 0], b[index, 0]))
                copies = self._copies[use.slot, bank, rank] = PaddedCopies.of(sources, targets)
            copies.copy()


def share_weights(
    model: nn.Module,
    vllm_config: VllmConfig,
    device: torch.device,
    modules: Mapping[str, tuple[int, int]],
) -> Tensor | None:
    """Share with the trainer this worker's weights, and memory of its GPU for the slots, which is returned.

    None, with a line in the log, where the trainer has to load its own copy, and slots are in host memory.

    modules: Of each adapted module, by name, the (in, out) features.
    """
    settings = active_settings(vllm_config).temp_lora
    if settings.trainer.address is not None:
        return None
    reason = why_not_shared(vllm_config, device)
    weights = shared.engine_weights(model)
    if reason is None:
        try:
            shared.check_buffers(unloaded := base_model.trained_model(vllm_config))
            shared.views(weights, unloaded)
        except ValueError as e:
            reason = str(e)
        else:
            why = shared.why_not_attached(next(iter(weights.values())))
            reason = None if why is None else f"another process cannot map this GPU's memory ({why})"
    if reason is not None:
        logger.info("longctx: the trainer loads its own copy of the weights, because %s", reason)
        return None
    size = Slots.size(modules, settings.max_rank, settings.slots)
    slots = torch.zeros(size, dtype=torch.uint8, device=device)
    shared.shared_by_engine[vllm_config.instance_id] = shared.SharedWeights(weights, slots)
    return slots


def why_not_shared(vllm_config: VllmConfig, device: torch.device) -> str | None:
    """The reason for which the trainer cannot use this worker's memory; None if it can."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    trains_on = torch.device(active_settings(vllm_config).temp_lora.trainer.device)
    reasons = {
        f"it trains on {trains_on}, and the engine runs on {device}": trains_on != device,
        f"each of {parallel.world_size} workers has a part of them": parallel.world_size > 1,
        "the engine's worker is a process of its own (distributed_executor_backend)": (
            parallel.distributed_executor_backend != "uni"
        ),
        f"the engine's are quantized ({model.quantization})": model.quantization is not None,
        "the engine's are in memory that can be put to sleep (enable_sleep_mode)": bool(
            model.enable_cumem_allocator
        ),
        f"{EXPANDABLE} in {' or '.join(ALLOCATOR)} keeps others from mapping memory; leave it out": any(
            EXPANDABLE in os.environ.get(name, "") for name in ALLOCATOR
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
