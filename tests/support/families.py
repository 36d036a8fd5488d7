"""Tiny random checkpoints of many architectures, by the names of transformers' configs."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.08,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
# By the name of the config's class without "Config": what is not in SIZES.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {"head_dim": 32},
    "Phi3": {},
    "Gemma": {"head_dim": 32},
    "Gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64},
    "Gemma3Text": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64},
    "Granite": {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    "Cohere": {},
    "Cohere2": {"sliding_window": 64},
    "Glm4": {"head_dim": 32},
    "Nemotron": {"head_dim": 32},
    "Exaone4": {"head_dim": 32, "sliding_window": 64, "sliding_window_pattern": 2},
    "Ernie4_5": {"head_dim": 32},
    "Apertus": {},
    "Qwen2Moe": {
        **EXPERTS,
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 96,
        "decoder_sparse_step": 1,
    },
    "Qwen3Moe": {**EXPERTS, "moe_intermediate_size": 96, "head_dim": 32},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "Olmoe": EXPERTS,
    "GPTNeoX": {},
    "Phi": {},
    "Starcoder2": {"sliding_window": None},
    "Olmo": {},
    "Olmo2": {},
    "Glm": {"head_dim": 32},
    "SmolLM3": {},
}
# Those that vLLM serves without LoRA.
WITHOUT_LORA = ("GPTJ", "StableLm", "Falcon", "Bloom")


def save(path: Path, family: str, **changes: Any) -> Path:
    """A random checkpoint, whose norms are no ones."""
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES.get(family, {}), **changes})
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif "embed" not in name:
            parameter.data *= 1.5
    model.save_pretrained(path)
    return path


def load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
