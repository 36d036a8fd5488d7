"""Tiny checkpoints, and their parameters as vLLM has them on a GPU."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from vllm_longctx.temp_lora import shared_weights as shared

SIZES = {
    "vocab_size": 100,  # vLLM pads it to 128
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "rope_theta": 5e5,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama3": LlamaConfig(**SIZES, rope_parameters={**LLAMA3, "original_max_position_embeddings": 64}),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
}


def save(path: Path, config: Any) -> Path:
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def load(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


class Engine(nn.Module):
    """Parameters as vLLM has them on a GPU: fused, padded, tied, wrapped for LoRA."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        states = dict(model.named_parameters())
        for name in shared.PADDED & states.keys():
            states[name] = torch.cat([states[name], torch.full((28, 64), torch.nan, dtype=model.dtype)])
        for fused, parts in shared.FUSED.items():
            for first in [name for name in states if f".{parts[0]}." in name]:
                joined = [states.pop(first.replace(parts[0], part)) for part in parts]
                states[first.replace(parts[0], fused)] = torch.cat(joined)
        for name, value in states.items():
            *path, last = name.replace("_proj.", "_proj.base_layer.").split(".")
            module = self
            for part in path:
                if not hasattr(module, part):
                    setattr(module, part, nn.Module())
                module = getattr(module, part)
            setattr(module, last, nn.Parameter(value.detach().clone(), requires_grad=False))
