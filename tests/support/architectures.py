"""Decoders of every family that vLLM serves, tiny and random: the rows of the matrix in `docs/models.md`.

A family is data: transformers' classes, what its config says beside `COMMON`, and where vLLM serves it under
another name. `made` writes the checkpoint. What a row needs of the oracle is in `hf_oracle`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

TRAINED = 128
LAYERS = 4
OWN_WINDOW = 48  # of layers that have one: less than the windows of the methods, and no whole KV blocks
COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": TRAINED,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Takes out the entries of `COMMON` that GPT-J, BLOOM and MPT have under other names.
OTHER_NAMES = dict.fromkeys(
    (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    )
)
HEADS_OF_32 = {"head_dim": 32}
ONE_IN_FOUR = ["sliding_attention"] * 3 + ["full_attention"]
ONE_IN_TWO = ["sliding_attention", "full_attention"] * 2
# A scaling of a layer's logits, as Granite's checkpoints have one, instead of 1 / sqrt(head_dim).
MULTIPLIERS = {
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.15,
    "logits_scaling": 2.0,
}


@dataclass(frozen=True)
class Architecture:
    """A row.

    name, about: As in the table; `about` says what its layers have.
    family: `{family}Config` and `{family}ForCausalLM` are transformers' classes.
    config: Of the config, beside `COMMON`; None takes an entry of `COMMON` away.
    interleaved: A rotated pair is (x[2k], x[2k + 1]); else (x[k], x[k + rotary_dim / 2]).
    unrotated: Layers whose queries and keys are not rotated, in a model with RoPE.
    own_windows: Layers with a sliding window of the model's own.
    window: Its size in tokens in vLLM, the query included.
    scaled_at: For transformers, the length of a text at which it scales RoPE as vLLM does at any; None where
        the longest distance decides (LongRoPE), or none does.
    served_as: The architecture in the checkpoint that vLLM reads, and the names and layout of its weights,
        where they are not transformers'.
    """

    name: str
    about: str
    family: str
    config: dict[str, Any] = field(default_factory=dict)
    interleaved: bool = False
    unrotated: tuple[int, ...] = ()
    own_windows: tuple[int, ...] = ()
    window: int = OWN_WINDOW
    scaled_at: int | None = None
    served_as: str | None = None
    converted: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None

    @property
    def memory_layer(self) -> int:
        """The last one without a window of its own; where all have one, the last."""
        return max((layer for layer in range(LAYERS) if layer not in self.own_windows), default=LAYERS - 1)

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        found: type[PreTrainedConfig] = getattr(transformers, f"{self.family}TextConfig", None) or getattr(
            transformers, f"{self.family}Config"
        )
        return found

    @property
    def model_class(self) -> type[PreTrainedModel]:
        found: type[PreTrainedModel] = getattr(transformers, f"{self.family}ForCausalLM")
        return found

    @property
    def architecture(self) -> str:
        """The name that a checkpoint's config has."""
        return self.served_as or self.model_class.__name__

    @property
    def values(self) -> dict[str, Any]:
        return {k: v for k, v in {**COMMON, **self.config}.items() if k not in COMMON or v is not None}


def internlm2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Llama's weights in InternLM2's checkpoints: the heads of a group stand with their key and value."""
    names = {
        "model.embed_tokens": "model.tok_embeddings",
        "lm_head": "output",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    }
    converted = {}
    for name, weight in weights.items():
        if "q_proj" in name:
            q, k, v = (weights[name.replace("q_proj", p)].unflatten(0, (2, -1, 32)) for p in _QKV)
            together = torch.cat([q, k, v], 1).flatten(0, 2)
            converted[name.replace("self_attn.q_proj", "attention.wqkv")] = together
        elif "k_proj" not in name and "v_proj" not in name:
            for theirs, ours in names.items():
                name = name.replace(theirs, ours)
            converted[name] = weight
    return converted


_QKV = ("q_proj", "k_proj", "v_proj")


def rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


def experts(**sizes: int) -> dict[str, Any]:
    return {"num_experts_per_tok": 2, **sizes}


YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "short_factor": [1.0 + 0.05 * k for k in range(16)],
    "long_factor": [1.0 + 0.4 * k for k in range(16)],
    "original_max_position_embeddings": 64,
}
LLAMA = {**HEADS_OF_32, "tie_word_embeddings": False}

ARCHITECTURES = {
    row.name: row
    for row in (
        Architecture("Llama", "RoPE, scaled linearly", "Llama", {**LLAMA, **rope("linear", factor=4.0)}),
        Architecture(
            "Mistral v0.1",
            "windows of its own in all layers",
            "Mistral",
            {**LLAMA, "sliding_window": OWN_WINDOW},
            own_windows=tuple(range(LAYERS)),
        ),
        Architecture(
            "Mistral",
            "RoPE, scaled by dynamic NTK",
            "Mistral",
            {
                **LLAMA,
                "sliding_window": None,
                **rope("dynamic", factor=2.0, max_trained_positions=64),
            },
            # transformers grows the base as texts outgrow 128 tokens, vLLM once, for 64 tokens' growth to 128
            scaled_at=2 * TRAINED,
        ),
        Architecture("Mixtral", "RoPE; experts", "Mixtral", {**LLAMA, **experts(num_local_experts=4)}),
        Architecture("Qwen2", "RoPE, scaled by YaRN; biases", "Qwen2", rope("yarn", **YARN)),
        Architecture(
            "Qwen2-MoE",
            "RoPE; experts, also a shared one",
            "Qwen2Moe",
            experts(num_experts=4, moe_intermediate_size=128, shared_expert_intermediate_size=128),
        ),
        Architecture(
            "Qwen3",
            "RoPE, scaled as Llama 3's; norms of heads",
            "Qwen3",
            {**HEADS_OF_32, **rope("llama3", **LLAMA3)},
        ),
        Architecture(
            "Qwen3-MoE",
            "RoPE; norms of heads; experts",
            "Qwen3Moe",
            {**HEADS_OF_32, **experts(num_experts=4, moe_intermediate_size=128), "norm_topk_prob": True},
        ),
        Architecture(
            "Phi-2", "partial RoPE; attention beside the MLP", "Phi", {"partial_rotary_factor": 0.5}
        ),
        Architecture(
            "Phi-3",
            "LongRoPE; fused weights",
            "Phi3",
            {
                "num_hidden_layers": LAYERS,
                "original_max_position_embeddings": 64,
                **rope("longrope", **LONGROPE),
            },
        ),
        Architecture(
            "Phi-MoE",
            "RoPE; experts by SparseMixer",
            "Phimoe",
            {**experts(num_local_experts=4), "attention_bias": True, "lm_head_bias": True},
            served_as="PhiMoEForCausalLM",
        ),
        Architecture("Gemma", "RoPE; scaled embeddings", "Gemma", HEADS_OF_32),
        Architecture(
            "Gemma 2",
            "windows in every other layer; soft caps",
            "Gemma2",
            {
                **HEADS_OF_32,
                "query_pre_attn_scalar": 32,
                "sliding_window": OWN_WINDOW,
                "layer_types": ONE_IN_TWO,
                "attn_logit_softcapping": 5.0,
                "final_logit_softcapping": 10.0,
            },
            own_windows=(0, 2),
        ),
        Architecture(
            "Gemma 3",
            "windows in three of four layers, which have a RoPE of their own; norms of heads",
            "Gemma3",
            {
                **HEADS_OF_32,
                "query_pre_attn_scalar": 32,
                "sliding_window": OWN_WINDOW,
                "layer_types": ONE_IN_FOUR,
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 2.0},
                },
            },
            own_windows=(0, 1, 2),
        ),
        Architecture(
            "GPT-NeoX",
            "partial RoPE; attention beside the MLP",
            "GPTNeoX",
            {"num_key_value_heads": None, **rope("default", partial_rotary_factor=0.25)},
        ),
        Architecture(
            "GPT-J",
            "partial RoPE of neighbouring pairs",
            "GPTJ",
            {
                "n_embd": 128,
                "n_layer": LAYERS,
                "n_head": 4,
                "n_positions": TRAINED,
                "rotary_dim": 16,
                **OTHER_NAMES,
            },
            interleaved=True,
        ),
        Architecture("StarCoder2", "RoPE; biases", "Starcoder2", {"tie_word_embeddings": False}),
        Architecture(
            "StableLM", "partial RoPE", "StableLm", {"use_qkv_bias": True, "partial_rotary_factor": 0.25}
        ),
        Architecture("OLMo 2", "RoPE; norms after the sublayers", "Olmo2"),
        Architecture(
            "OLMo 3",
            "windows in three of four layers, YaRN in the fourth",
            "Olmo3",
            {
                "sliding_window": OWN_WINDOW,
                "layer_types": ONE_IN_FOUR,
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                    "full_attention": {"rope_type": "yarn", "rope_theta": 10000.0, **YARN},
                },
            },
            own_windows=(0, 1, 2),
        ),
        Architecture("OLMoE", "RoPE; experts", "Olmoe", experts(num_experts=4)),
        Architecture(
            "Falcon",
            "RoPE; grouped heads",
            "Falcon",
            {
                "new_decoder_architecture": True,
                "num_kv_heads": 2,
                "ffn_hidden_size": 512,
                "intermediate_size": None,
                "num_key_value_heads": None,
            },
        ),
        Architecture(
            "Falcon, ALiBi",
            "ALiBi",
            "Falcon",
            {
                "alibi": True,
                "multi_query": False,
                "parallel_attn": False,
                "bias": True,
                "ffn_hidden_size": 512,
                "intermediate_size": None,
                "num_key_value_heads": None,
            },
        ),
        Architecture(
            "Command-R",
            "RoPE of neighbouring pairs; norms of heads",
            "Cohere",
            {"logit_scale": 0.5, "use_qk_norm": True},
            interleaved=True,
        ),
        Architecture(
            "Cohere 2",
            "windows in three of four layers, no positions in the fourth",
            "Cohere2",
            {"logit_scale": 0.5, "sliding_window": OWN_WINDOW, "layer_types": ONE_IN_FOUR},
            interleaved=True,
            unrotated=(3,),
            own_windows=(0, 1, 2),
            window=OWN_WINDOW + 1,  # as it was trained, vLLM says; in transformers OWN_WINDOW
        ),
        Architecture("Granite", "RoPE; multipliers", "Granite", MULTIPLIERS),
        Architecture(
            "Granite-MoE",
            "RoPE; multipliers; experts",
            "GraniteMoe",
            {**MULTIPLIERS, **experts(num_local_experts=4)},
        ),
        Architecture(
            "SmolLM3",
            "RoPE, in every other layer no positions",
            "SmolLM3",
            {"no_rope_layers": [1, 0, 1, 0]},
            unrotated=(1, 3),
        ),
        Architecture(
            "GLM-4",
            "partial RoPE of neighbouring pairs",
            "Glm4",
            {**HEADS_OF_32, **rope("default", partial_rotary_factor=0.5)},
            interleaved=True,
        ),
        Architecture(
            "InternLM2",
            "RoPE; fused weights",
            "Llama",
            {**LLAMA, "rms_norm_eps": 1e-5},
            served_as="InternLM2ForCausalLM",
            converted=internlm2,
        ),
        Architecture("InternLM3", "RoPE", "Llama", LLAMA, served_as="InternLM3ForCausalLM"),
        Architecture(
            "EXAONE 4",
            "windows in three of four layers, no positions in the fourth; norms of heads",
            "Exaone4",
            {"sliding_window": OWN_WINDOW, "layer_types": ONE_IN_FOUR, **rope("llama3", **LLAMA3)},
            unrotated=(3,),
            own_windows=(0, 1, 2),
        ),
        Architecture(
            "gpt-oss",
            "windows in every other layer; sinks; YaRN; experts",
            "GptOss",
            {
                **HEADS_OF_32,
                **experts(num_local_experts=4),
                "sliding_window": OWN_WINDOW,
                "layer_types": ONE_IN_TWO,
                **rope("yarn", **YARN, beta_fast=32.0, beta_slow=1.0, truncate=False),
            },
            own_windows=(0, 2),
        ),
        Architecture("Baichuan", "RoPE; fused weights", "Llama", LLAMA, served_as="BaichuanForCausalLM"),
        Architecture(
            "BLOOM",
            "ALiBi",
            "Bloom",
            {
                **OTHER_NAMES,
                "hidden_size": 192,
                "n_layer": LAYERS,
                "n_head": 6,  # not a power of two
                "seq_length": TRAINED,
            },
        ),
        Architecture(
            "MPT",
            "ALiBi (our own model, since vLLM dropped it after 0.28)",
            "Mpt",
            {
                "d_model": 192,
                "n_layers": LAYERS,
                "n_heads": 6,
                "max_seq_len": TRAINED,
                **OTHER_NAMES,
            },
        ),
        # More that vLLM runs through transformers' own code, or with a part that no row above has.
        Architecture("OLMo", "RoPE; norms without weights", "Olmo", {"clip_qkv": 2.0}),
        Architecture(
            "GLM",
            "partial RoPE of neighbouring pairs",
            "Glm",
            {**HEADS_OF_32, **rope("default", partial_rotary_factor=0.5)},
            True,
        ),
        Architecture("Nemotron", "partial RoPE", "Nemotron", rope("default", partial_rotary_factor=0.5)),
        Architecture("ERNIE 4.5", "RoPE of neighbouring pairs", "Ernie4_5", HEADS_OF_32, interleaved=True),
        Architecture("Seed-OSS", "RoPE; biases", "SeedOss", {**HEADS_OF_32, "attention_out_bias": False}),
        Architecture("Arcee", "RoPE", "Arcee", HEADS_OF_32),
    )
}

SHARPENED = ("q_proj.weight", "k_proj.weight", "query_key_value.weight", "qkv_proj.weight", "Wqkv.weight")
NORMS_OF_HEADS = ("q_norm", "k_norm")


@dataclass(frozen=True)
class Checkpoint:
    """served: What vLLM reads. transformers: the same model for transformers."""

    served: Path
    transformers: Path


def made(architecture: Architecture, path: Path) -> Checkpoint:
    """A random checkpoint whose attention is far from uniform, and whose biases and norms do something."""
    torch.manual_seed(5)
    config = architecture.config_class(**architecture.values, initializer_range=0.08)
    model = architecture.model_class(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("bias", "sinks")):
                weight.normal_(std=0.1 if name.endswith("bias") else 1.0)
            elif weight.ndim == 1:
                weight += 0.1 * torch.randn_like(weight)
            if name.endswith(SHARPENED):
                weight *= 2.0
            if any(norm in name for norm in NORMS_OF_HEADS):
                weight += 0.5
    model.save_pretrained(path / "transformers")
    if architecture.served_as is None:
        return Checkpoint(path / "transformers", path / "transformers")
    served = path / "served"
    served.mkdir()
    weights = load_file(path / "transformers" / "model.safetensors")
    save_file(
        weights if architecture.converted is None else architecture.converted(weights),
        served / "model.safetensors",
        {"format": "pt"},
    )
    as_json = json.loads((path / "transformers" / "config.json").read_text())
    (served / "config.json").write_text(json.dumps(as_json | {"architectures": [architecture.served_as]}))
    return Checkpoint(served, path / "transformers")
