"""What training adapters needs beside the model's weights, and what is free of it."""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.utils.import_utils import import_pynvml

from vllm_longctx.settings import Adaptation
from vllm_longctx.temp_lora.host_memory import free_host_bytes

# Of a process on a GPU, in bytes: its CUDA context, cuBLAS's workspace, fragmentation. An estimate.
OVERHEAD = 1 << 30


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
class Shape:
    """The shape of a Llama-like model.

    layers: Number of decoder layers.
    hidden, intermediate: Widths.
    query, kv: Widths of all query heads, and of all KV heads, together.
    vocabulary: Number of token ids.
    itemsize: Bytes of an element of its weights.
    """

    layers: int
    hidden: int
    intermediate: int
    query: int
    kv: int
    vocabulary: int
    itemsize: int

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype) -> "Shape":
        """config: a Hugging Face text configuration."""
        heads, kv_heads = (
            config.num_attention_heads,
            getattr(config, "num_key_value_heads", config.num_attention_heads),
        )
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            heads * head_size,
            kv_heads * head_size,
            config.vocab_size,
            dtype.itemsize,
        )

    @property
    def adapted_features(self) -> int:
        """in + out features of all adapted linear layers: an adapter has this many values per rank."""
        attention = 2 * self.hidden + self.query + 2 * (self.hidden + self.kv) + self.query
        return self.layers * (attention + 3 * (self.hidden + self.intermediate))

    @property
    def activation_bytes(self) -> int:
        """Kept by one layer for the backward pass, per token.

        Each adapter keeps its input, as float32 behind its dropout, and a mask byte for each of its elements;
        each RMSNorm its float32 input; attention its queries, keys and values for every query head, and its
        output; the MLP its gate, that activated, and up.
        """
        adapters = (4 + 1) * (5 * self.hidden + self.query + self.intermediate)
        return adapters + 2 * 4 * self.hidden + self.itemsize * (4 * self.query + 3 * self.intermediate)

    def training_bytes(self, settings: Adaptation) -> int:
        """The most that training needs beside the model's weights, for examples of the server's sizes."""
        recompute = settings.trainer.recompute
        tokens = settings.train_context_tokens + settings.block_tokens + 1
        adapter = 4 * settings.max_rank * self.adapted_features
        # Weights and AdamW's two moments of every adapter; of the one in training a gradient, and all as they
        # were before.
        adapters = (3 * settings.slots + 1 + 3) * adapter
        # Activations that are kept, and the last norm's input.
        kept = self.activation_bytes * (1 if recompute else self.layers) + 4 * self.hidden
        if recompute:
            kept += self.layers * self.hidden * self.itemsize
        # logits, as float32 too, their log-softmax, and gradients of both
        logits = (settings.block_tokens + 1) * self.vocabulary * (2 * self.itemsize + 12)
        return adapters + tokens * kept + logits + OVERHEAD
