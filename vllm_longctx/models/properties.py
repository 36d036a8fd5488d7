"""What the engine has to know of a model: its rotation, its trained length, whether it can be adapted."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.models import supports_lora

from vllm_longctx.config import LongContextError

# Those of vLLM's whose files transformers can read. The others stream, cut or make up the weights.
LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "pt", "npcache", "mistral")
# The entries of a Hugging Face config that may hold the trained length: Llama's and GPT-J's, MPT's, BLOOM's.
LENGTH_KEYS = ("max_position_embeddings", "max_seq_len", "seq_length")


def rope_parameters(model_config: ModelConfig) -> Mapping[str, Any] | None:
    """The model's one set of RoPE parameters, or None if it has none or one per layer type."""
    if "GPTJForCausalLM" in model_config.architectures:  # its config has rotary_dim only
        return {"rope_type": "default"}
    parameters = getattr(model_config.hf_text_config, "rope_parameters", None)
    if not isinstance(parameters, dict) or any(isinstance(v, dict) for v in parameters.values()):
        return None
    return parameters


def model_dtype(model_config: ModelConfig) -> torch.dtype:
    """Of a ModelConfig that vLLM has completed; before, it may be a name."""
    assert isinstance(model_config.dtype, torch.dtype)
    return model_config.dtype


def trained_length(model_config: ModelConfig) -> int:
    """Tokens the model was trained (or its positions rescaled) for.

    Raises LongContextError if its config has none.
    """
    hf_config = model_config.hf_text_config
    length = next((v for key in LENGTH_KEYS if (v := getattr(hf_config, key, None)) is not None), None)
    if length is None:
        raise LongContextError(
            f"the config of model {model_config.model} does not say the trained length "
            f"({', '.join(LENGTH_KEYS)}); "
            f"""give it, for example --hf-overrides '{{"{LENGTH_KEYS[-1]}": 2048}}'"""
        )
    parameters = rope_parameters(model_config) or {}
    scaling = parameters.get("rope_type")
    if scaling == "linear":
        return int(length * parameters["factor"])
    if scaling == "yarn":
        return int(parameters["original_max_position_embeddings"] * parameters["factor"])
    return length


def trained_architectures(model_config: ModelConfig) -> list[str]:
    """Those of the model's architectures that transformers has a class for, which the trainer needs."""
    return [name for name in model_config.architectures if hasattr(transformers, name)]


def why_not_adaptable(model_config: ModelConfig) -> str | None:
    """The reason for which no adapter of the model can be trained and used; None if one can."""
    quantized = model_config.quantization or getattr(model_config.hf_config, "quantization_config", None)
    if quantized is not None:
        return (
            f"is quantized ({quantized}), and the trainer loads unquantized weights only; give the "
            "unquantized checkpoint"
        )
    if not trained_architectures(model_config):
        return (
            f"has no class in transformers {transformers.__version__}, with which the trainer computes (it "
            "runs no code of a checkpoint); leave adaptation out"
        )
    kind, _ = model_config.registry.resolve_model_cls(model_config.architectures, model_config=model_config)
    if not supports_lora(kind):
        return f"has no LoRA support in vLLM ({kind.__name__}); leave adaptation out"
    return None


def check_load_format(load: LoadConfig) -> None:
    """Raises LongContextError where a trainer with a copy of its own cannot load the weights that vLLM
    loads.
    """
    if load.load_format not in LOAD_FORMATS:
        raise LongContextError(
            f"load_format = {load.load_format!r}: the trainer loads its own copy of the weights, and not in "
            f"this way; give one "
            f"of {', '.join(LOAD_FORMATS)}, or leave adaptation out"
        )
