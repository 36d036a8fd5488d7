"""What training adapters needs beside the model's weights, and what is free of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from vllm.platforms import current_platform
from vllm.utils.import_utils import import_pynvml

from vllm_longctx.settings import Adaptation
from vllm_longctx.temp_lora.host_memory import free_host_bytes
from vllm_longctx.temp_lora.linear_layers import decoder_layers, linear_layers

# Of versions that are remembered, where the user sets no limit.
CACHED_VERSIONS, CACHE_BYTES = 32, 4 << 30
Features = Mapping[str, tuple[int, int]]
# Of a process on a GPU, in bytes: its CUDA context, cuBLAS's workspace, fragmentation. An estimate.
OVERHEAD = 1 << 30
SMALL_STATE = 1 << 16  # of a version beside its weights and their moments, in bytes: at most


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, or of the host.

    A GPU's is asked of its driver: torch would take half a GiB of it for a CUDA context of this process.
    """
    if device.type != "cuda":
        return free_host_bytes()
    nvml = import_pynvml()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:  # there are machines without it
        return torch.cuda.mem_get_info(device)[0]
    try:
        physical = current_platform.visible_device_id_to_physical_device_id(device.index)
        return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(physical)).free)
    finally:
        nvml.nvmlShutdown()


@dataclass(frozen=True)
class LayerShape:
    """The shape of one decoder layer.

    adapter_inputs, adapter_outputs: In and out features of all its linear layers that may have adapters.
    other_bytes: Kept for the backward pass per token, beside what adapters keep.
    """

    adapter_inputs: int
    adapter_outputs: int
    other_bytes: int

    @property
    def activation_bytes(self) -> int:
        """Kept by the layer for the backward pass, per token.

        Each adapter keeps its input, as float32 behind its dropout, and a mask byte for each of its elements.
        """
        return (4 + 1) * self.adapter_inputs + self.other_bytes

    @classmethod
    def of(cls, layer: nn.Module, name: str, linear: Features, config: Any, itemsize: int) -> "LayerShape":
        """layer: One of a model's decoder layers. name: Of it. linear: From `linear_layers`.

        Each norm keeps its input as float32; attention its queries, keys and values for every query head, and
        its output; the MLP its gate, that activated, and up; an expert the same, and what goes in and out.
        """
        adapted = [features for key, features in linear.items() if key.startswith(f"{name}.")]
        heads, hidden = config.num_attention_heads, config.hidden_size
        query = heads * (getattr(config, "head_dim", None) or hidden // heads)
        norms = [module for module in layer.modules() if "Norm" in type(module).__name__]
        inputs = [features[0] for features in adapted]
        experts = [p for key, p in layer.named_parameters() if "expert" in key and p.dim() > 1]
        share = min(1.0, _experts_per_token(config) / max([1, *(len(p) for p in experts if p.dim() == 3)]))
        in_experts = sum(share * p[..., 0].numel() + share * p[..., 0, :].numel() for p in experts)
        others = 4 * query + 3 * max(inputs, default=0) + int(in_experts)
        widths = (getattr(norm, "weight", torch.empty(hidden)).numel() for norm in norms)
        norm_inputs = sum(hidden if width >= hidden else query for width in widths)
        return cls(sum(inputs), sum(features[1] for features in adapted), 4 * norm_inputs + itemsize * others)


@dataclass(frozen=True)
class Shape:
    """The shape of a model, as far as training adapters depends on it.

    layers: Its decoder layers.
    hidden: Width of their outputs.
    vocabulary: Number of token ids.
    itemsize: Bytes of an element of its weights.
    """

    layers: tuple[LayerShape, ...]
    hidden: int
    vocabulary: int
    itemsize: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Shape":
        """Of a model, which may be on `meta`."""
        config, itemsize, linear = model.config.get_text_config(), model.dtype.itemsize, linear_layers(model)
        name, layers = decoder_layers(model)
        shapes = (
            LayerShape.of(layer, f"{name}.{number}", linear, config, itemsize)
            for number, layer in enumerate(layers)
        )
        return cls(tuple(shapes), config.hidden_size, config.vocab_size, itemsize)

    @property
    def adapted_features(self) -> int:
        """in + out features of all adapted linear layers: an adapter has this many values per rank."""
        return sum(layer.adapter_inputs + layer.adapter_outputs for layer in self.layers)

    def version_bytes(self, settings: Adaptation) -> int:
        """Host memory of a version that is remembered: weights and AdamW's two moments.

        Beside these there are the counts of AdamW's steps and the state of the random numbers.
        """
        return 3 * 4 * settings.rank * self.adapted_features + SMALL_STATE

    def cache_bytes(self, settings: Adaptation) -> int:
        """Host memory for versions that are remembered."""
        if settings.cache_gib is not None:
            return int(settings.cache_gib * 2**30)
        return min(CACHED_VERSIONS * self.version_bytes(settings), CACHE_BYTES)

    def training_bytes(self, settings: Adaptation) -> int:
        """The most that training needs on its device beside the model's weights, for examples of the server's
        sizes.
        """
        recompute = settings.trainer.recompute
        tokens = settings.train_context_tokens + settings.block_tokens + 1
        adapter = 4 * settings.max_rank * self.adapted_features
        # Weights and AdamW's two moments of every adapter; of the one in training a gradient, and all as they
        # were before.
        adapters = (3 * settings.slots + 1 + 3) * adapter
        # Activations that are kept, and the last norm's input.
        by_layer = [layer.activation_bytes for layer in self.layers]
        kept = (max(by_layer) if recompute else sum(by_layer)) + 4 * self.hidden
        if recompute:
            kept += len(self.layers) * self.hidden * self.itemsize
        # logits, as float32 too, their log-softmax, and gradients of both
        logits = (settings.block_tokens + 1) * self.vocabulary * (2 * self.itemsize + 12)
        cache = self.cache_bytes(settings) if settings.trainer.device == "cpu" else 0
        return adapters + tokens * kept + logits + cache + OVERHEAD


def _experts_per_token(config: Any) -> int:
    """Experts that compute a token. All, where the config does not say it under a name that is known."""
    names = "num_experts_per_tok", "moe_top_k", "moe_k", "top_k_experts"
    return next((value for name in names if (value := getattr(config, name, None)) is not None), 1 << 30)
