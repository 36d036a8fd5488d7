"""The CUDA worker of an engine with Temp-LoRA: slots, and memory shared with the trainer or left free for it."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from vllm_longctx.config import LongContextError, active_config
from vllm_longctx.cuda.passes_runner import PassesCUDARunner
from vllm_longctx.cuda.worker import LongContextCUDAWorker
from vllm_longctx.engine.waiting import wait_patiently
from vllm_longctx.startup.engine_args import LINEAR_MODULES
from vllm_longctx.startup.trainer import Shape, device_of, recomputes
from vllm_longctx.temp_lora import base_model
from vllm_longctx.temp_lora import shared_weights as shared
from vllm_longctx.temp_lora.client import weight_bytes
from vllm_longctx.temp_lora.slots import Slots

logger = init_logger("vllm.longctx")


class AdaptingCUDAWorker(LongContextCUDAWorker):
    def init_device(self) -> None:
        super().init_device()
        if not active_config(self.vllm_config).slides:
            if not isinstance(self.model_runner, GPUModelRunner):
                raise RuntimeError(f"longctx cannot take over {type(self.model_runner)}")
            self.model_runner.__class__ = PassesCUDARunner

    def load_model(self, **kwargs: Any) -> None:
        wait_patiently()
        super().load_model(**kwargs)
        self.model_runner.lora_manager.device_slots = offer(self.model_runner.get_model(), self.vllm_config, self.device)

    def determine_available_memory(self) -> int:
        available = super().determine_available_memory()
        if self.cache_config.kv_cache_memory_bytes:  # then the user has said what the KV cache gets
            return available
        need = trainer_bytes(self.vllm_config, self.device)
        if need >= available:
            raise LongContextError(
                f"longctx.adaptation: the trainer needs {need / 2**30:.2f} GiB on {self.device}, but the engine has no more "
                f"than {available / 2**30:.2f} GiB there for it and the KV cache; lower adaptation.slots, adaptation.rank or "
                "adaptation.block_tokens, raise gpu_memory_utilization, or name another GPU in adaptation.trainer.device"
            )
        return available - need


def trainer_bytes(vllm_config: VllmConfig, device: torch.device) -> int:
    """What the trainer will take of this worker's GPU."""
    settings, model = active_config(vllm_config).adaptation, vllm_config.model_config
    assert settings is not None
    if settings.trainer.address is not None or device_of(settings.trainer) != device:
        return 0
    shares = vllm_config.instance_id in shared.offers
    weights = 0 if shares else weight_bytes(model.model, model.dtype, base_model.resolved_config(model))
    return weights + Shape.of(model.hf_text_config, model.dtype).training_bytes(settings, recomputes(settings.trainer))


def offer(model: nn.Module, vllm_config: VllmConfig, device: torch.device) -> Tensor | None:
    """Offer the trainer this worker's weights, and memory of its GPU for the slots, which is returned.

    None, with a line in the log, where the trainer has to load its own copy, and slots are in host memory.
    """
    settings = active_config(vllm_config).adaptation
    assert settings is not None and settings.slots is not None
    if settings.trainer.address is not None:
        return None
    reason = why_not(vllm_config, device)
    weights = shared.engine_weights(model)
    name, dtype = vllm_config.model_config.model, str(vllm_config.model_config.dtype).removeprefix("torch.")
    if reason is None:
        try:
            config = base_model.resolved_config(vllm_config.model_config)
            views = shared.views(weights, shared.skeleton(name, dtype, "sdpa", config))
        except ValueError as e:
            reason = str(e)
    if reason is not None:
        logger.info("longctx: the trainer loads its own copy of the weights, because %s", reason)
        return None
    size = Slots.size(shared.adapted_modules(views, LINEAR_MODULES), settings.rank_limit, settings.slots)
    slots = torch.zeros(size, dtype=torch.uint8, device=device)
    shared.offers[vllm_config.instance_id] = shared.Offer(weights, slots)
    return slots


def why_not(vllm_config: VllmConfig, device: torch.device) -> str | None:
    """The reason for which the trainer cannot use this worker's memory; None if it can."""
    settings, model, parallel = active_config(vllm_config).adaptation, vllm_config.model_config, vllm_config.parallel_config
    assert settings is not None
    trains_on = device_of(settings.trainer)
    reasons = {
        f"it trains on {trains_on}, and the engine runs on {device}": trains_on != device,
        f"each of {parallel.world_size} workers has a part of them": parallel.world_size > 1,
        "the engine's worker is a process of its own (distributed_executor_backend)": (
            parallel.distributed_executor_backend != "uni"
        ),
        f"the engine's are quantized ({model.quantization})": model.quantization is not None,
        "the engine's are in memory that can be put to sleep (enable_sleep_mode)": bool(model.enable_cumem_allocator),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
