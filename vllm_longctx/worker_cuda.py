"""The CUDA worker of an engine with a long-context configuration, for both of vLLM's model runners."""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.v1.worker.gpu_worker import Worker

from vllm_longctx.attention.cuda import LambdaBackend, LambdaImpl
from vllm_longctx.config import active_config
from vllm_longctx.kv_cache import LambdaSpec
from vllm_longctx.layers import take_over_rotary, with_spec


class LongContextCUDAWorker(Worker):
    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        take_over_attention(self.model_runner.get_model(), self.vllm_config, self.device)


def take_over_attention(model: nn.Module, vllm_config: VllmConfig, device: torch.device) -> None:
    """Tell every attention layer of a loaded model what it sees, and give the model exact rotary angles."""
    layers, _, rotary = take_over_rotary(model, vllm_config, LambdaImpl)
    geometry = active_config(vllm_config).geometry
    backend = with_spec(LambdaBackend, lambda spec: LambdaSpec.from_attention_spec(spec, geometry))
    for layer in layers.values():
        layer.impl.take_over(geometry, rotary, device)
        layer.attn_backend = backend
