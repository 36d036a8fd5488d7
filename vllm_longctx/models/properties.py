"""What the engine has to know of a model: its rotation, its trained length, whether it can be adapted."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.models import supports_lora
from vllm.transformers_utils.config import get_config, get_hf_text_config

from vllm_longctx.config import LongContextError

# Architectures whose outputs are compared with a dense reference, end to end (tests/engine/test_models.py).
TESTED = (
    "ArceeForCausalLM",
    "BloomForCausalLM",
    "CohereForCausalLM",
    "Cohere2ForCausalLM",
    "Ernie4_5ForCausalLM",
    "Exaone4ForCausalLM",
    "FalconForCausalLM",
    "GPTJForCausalLM",
    "GPTNeoXForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GlmForCausalLM",
    "Glm4ForCausalLM",
    "GptOssForCausalLM",
    "GraniteForCausalLM",
    "GraniteMoeForCausalLM",
    "InternLM2ForCausalLM",
    "InternLM3ForCausalLM",
    "LlamaForCausalLM",
    "LongLlamaForCausalLM",
    "MPTForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "MptForCausalLM",
    "NemotronForCausalLM",
    "OlmoForCausalLM",
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",
    "OlmoeForCausalLM",
    "PhiForCausalLM",
    "Phi3ForCausalLM",
    "PhiMoEForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "SeedOssForCausalLM",
    "SmolLM3ForCausalLM",
    "StableLmForCausalLM",
    "Starcoder2ForCausalLM",
)
# Transformers has no class of this name, and the model is its Llama but for the memory (`models.longllama`).
TRAINED_AS = {"LongLlamaForCausalLM": "LlamaForCausalLM"}
# Those of vLLM's whose files transformers can read. The others stream, cut or make up the weights.
LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "pt", "npcache", "mistral")
# The entries of a Hugging Face config that may hold the trained length: Llama's and GPT-J's, MPT's, BLOOM's.
LENGTH_KEYS = ("max_position_embeddings", "max_seq_len", "seq_length")
# Our own entry of that config: the sliding window, in tokens, that every layer was trained with.
TRAINED_WINDOW = "longctx_trained_window"
# Another one: the model takes images or the like, but this engine takes text only.
TEXT_ONLY = "longctx_text_only"


def model_dtype(model_config: ModelConfig) -> torch.dtype:
    """Of a ModelConfig that vLLM has completed; before, it may be a name."""
    assert isinstance(model_config.dtype, torch.dtype)
    return model_config.dtype


def trained_length(model_config: ModelConfig) -> int:
    """Tokens the model was trained (or its positions rescaled) for: a query never saw more of them.

    That is the sliding window where every layer was trained with one. What vLLM deletes of it
    (`--disable-sliding-window`) counts after `keep_trained_window`.

    Raises LongContextError if the model's config has none.
    """
    hf_config = model_config.hf_text_config
    length = next((v for key in LENGTH_KEYS if (v := getattr(hf_config, key, None)) is not None), None)
    if length is None:
        raise LongContextError(
            f"the config of model {model_config.model} does not say the trained length "
            f"({', '.join(LENGTH_KEYS)}); "
            f"""give it, for example --hf-overrides '{{"{LENGTH_KEYS[-1]}": 2048}}'"""
        )
    window = getattr(hf_config, TRAINED_WINDOW, None) or _window_of_all_layers(hf_config)
    positions = _rescaled(length, getattr(hf_config, "rope_parameters", None) or {})
    return positions if window is None else min(positions, window)


def keep_trained_window(model_config: ModelConfig) -> None:
    """Note the sliding window that all layers were trained with in the config that every process gets.

    vLLM deletes it from there if it is disabled, so it is read from the checkpoint again.
    """
    hf_config = model_config.hf_text_config
    window = _window_of_all_layers(_config_as_read(model_config))
    if window is not None:
        hf_config.update({TRAINED_WINDOW: window})


def _config_as_read(model_config: ModelConfig) -> PretrainedConfig:
    """The model's text config with the user's overrides, before vLLM changes it."""
    if not model_config.disable_sliding_window:
        return model_config.hf_text_config
    overrides = model_config.hf_overrides
    values, function = ({}, overrides) if callable(overrides) else (overrides, None)
    hf_config = get_config(
        model_config.hf_config_path or model_config.model,
        model_config.trust_remote_code,
        model_config._hf_config_revision or model_config.revision,
        model_config.code_revision,
        model_config.config_format,
        hf_overrides_kw={k: v for k, v in values.items() if not isinstance(v, dict)},
        hf_overrides_fn=function,
        token=model_config.hf_token,
    )
    return get_hf_text_config(hf_config)


def _window_of_all_layers(hf_config: PretrainedConfig) -> int | None:
    """The sliding window in tokens, if every layer has it, by the rules of vLLM's cache config."""
    window = getattr(hf_config, "sliding_window", None)
    layer_types = getattr(hf_config, "layer_types", None)
    if layer_types is None:
        # Configs of before there were layer types: every n-th layer sees all.
        is_mixed = bool(getattr(hf_config, "sliding_window_pattern", None))
    else:
        is_mixed = any(layer_type != "sliding_attention" for layer_type in layer_types)
    if not window or is_mixed or not getattr(hf_config, "use_sliding_window", True):
        return None
    return int(window)


def layer_windows(model_config: ModelConfig) -> list[int | None]:
    """Each layer's own sliding window in tokens; None for a layer that sees all.

    As far as the config says it.
    """
    hf_config = model_config.hf_text_config
    layer_types = getattr(hf_config, "layer_types", None)
    if model_config.disable_sliding_window or layer_types is None:
        window = None if model_config.disable_sliding_window else _window_of_all_layers(hf_config)
        return [window] * model_config.get_total_num_hidden_layers()
    window = getattr(hf_config, "sliding_window", None)
    window = window if getattr(hf_config, "use_sliding_window", True) else None
    return [window if layer_type == "sliding_attention" else None for layer_type in layer_types]


def _rescaled(length: int, parameters: Mapping[str, Any]) -> int:
    """The trained length, in tokens, of a config that says `length` and has these RoPE parameters.

    With LongRoPE, Llama 3's and dynamic NTK's it says the whole length. So it does where each layer type has
    a rotation of its own (Gemma 3), also with the linear one; then full attention's counts.
    """
    is_per_layer_type = any(isinstance(value, dict) for value in parameters.values())
    own = parameters.get("full_attention", {}) if is_per_layer_type else parameters
    scaling = own.get("rope_type")
    if scaling == "linear" and not is_per_layer_type:
        return int(length * own["factor"])
    if scaling == "yarn":
        return int(own["original_max_position_embeddings"] * own["factor"])
    return length


def without_weights(model_config: ModelConfig) -> PreTrainedModel | None:
    """The model on `meta`; None if transformers does not know it."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(deepcopy(model_config.hf_text_config))
    except Exception:  # whatever transformers says of a config that it does not know
        return None


def trained_architectures(model_config: ModelConfig) -> list[str]:
    """Those of the model's architectures that transformers has a class for, which the trainer needs."""
    names = (TRAINED_AS.get(name, name) for name in model_config.architectures)
    return [name for name in names if hasattr(transformers, name)]


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
