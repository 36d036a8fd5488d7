"""The CUDA worker of an engine with a long-context configuration, for both of vLLM's model runners."""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from vllm_longctx.attention.cuda import LambdaBackend, LambdaImpl
from vllm_longctx.attention.cuda_focused import LookupBackend, SteppedBackend, SteppedImpl, pool_beside_lookups
from vllm_longctx.attention.memory import Lookup
from vllm_longctx.config import LongContextConfig, active_config
from vllm_longctx.engine_args import trained_length
from vllm_longctx.focused.worker_cuda import FocusedCUDARunner
from vllm_longctx.geometry import Geometry
from vllm_longctx.kv_cache import LambdaSpec, MemorySpec, SteppedSpec, WindowSpec
from vllm_longctx.layers import take_over_rotary, with_spec
from vllm_longctx.rotary import NoRotation, Rotary


class LongContextCUDAWorker(Worker):
    def init_device(self) -> None:
        super().init_device()
        if active_config(self.vllm_config).windows is not None:
            if type(self.model_runner) is not GPUModelRunner:
                raise RuntimeError(f"longctx cannot take over {type(self.model_runner)}")
            self.model_runner.__class__ = FocusedCUDARunner

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        take_over_attention(self.model_runner.get_model(), self.vllm_config, self.device)
        if isinstance(self.model_runner, FocusedCUDARunner):
            self.model_runner.count_from_windows()

    def determine_available_memory(self) -> int:
        available = super().determine_available_memory()
        if self.cache_config.kv_cache_memory_bytes:  # as the user says
            return available
        return pool_beside_lookups(available, lookup_of(active_config(self.vllm_config)), self.model_config.dtype.itemsize)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        if isinstance(self.model_runner, FocusedCUDARunner):
            self.model_runner.look_into_memory()


def take_over_attention(model: nn.Module, vllm_config: VllmConfig, device: torch.device) -> None:
    """Tell every attention layer of a loaded model what it sees, and give the model exact rotary angles."""
    layers, parents, rotary = take_over_rotary(model, vllm_config, LambdaImpl)
    config = active_config(vllm_config)
    if config.windows is not None:
        take_over_focused(layers, parents, config, rotary, device)
        return
    geometry = config.geometry
    if config.slides:
        backend = with_spec(LambdaBackend, lambda spec: LambdaSpec.from_attention_spec(spec, geometry))
    else:
        most_tokens = trained_length(vllm_config.model_config)
        backend = with_spec(SteppedBackend, lambda spec: SteppedSpec.from_attention_spec(spec, most_tokens))
    for layer in layers.values():
        layer.impl.take_over(geometry, rotary, device)
        layer.attn_backend = backend
        if not config.slides:
            layer.impl = SteppedImpl(layer.impl)


def take_over_focused(
    layers: dict[str, Attention],
    parents: dict[str, nn.Module],
    config: LongContextConfig,
    rotary: Rotary | None,
    device: torch.device,
) -> None:
    """Memory layers keep all blocks, the others those of the window. A memory layer that sees all is plain attention."""
    windows, attention, lookup = config.windows, config.attention, lookup_of(config)
    assert windows is not None and attention.mem_layers is not None
    window = with_spec(SteppedBackend, lambda spec: WindowSpec.of(spec, windows))
    seen = LambdaBackend if lookup is None else LookupBackend
    memory = with_spec(seen, lambda spec: MemorySpec.of(spec, windows, None))
    for name, layer in layers.items():
        layer.impl.take_over(Geometry(), rotary, device)
        is_memory = extract_layer_index(name) in attention.mem_layers
        layer.attn_backend = memory if is_memory else window
        if not is_memory or lookup is not None:
            layer.impl = SteppedImpl(layer.impl, lookup if is_memory else None)
        if is_memory and not attention.mem_positionals:
            parents[name].rotary_emb = NoRotation()


def lookup_of(config: LongContextConfig) -> Lookup | None:
    """Of memory layers; None where they see all."""
    attention = config.attention
    if config.windows is None or attention.top_k is None:
        return None
    return Lookup(attention.top_k, attention.lookup_share)
