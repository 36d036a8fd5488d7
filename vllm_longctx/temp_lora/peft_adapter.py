"""A LoRA in peft's format: what it says, and whether requests can begin with it.

It is plain LoRA of linear layers. Each may have a rank and a scale of its own. A layer without one begins at
zero.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_longctx.temp_lora.messages import ABOUT_NAME

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"  # peft's
SAVING_PREFIX = ".saving-"  # no adapter's name begins with a dot
# Fields of peft's config that change nothing of what the weights say, or that are read here. Any other one
# must be empty.
KNOWN = frozenset(
    {
        *("peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "auto_mapping"),
        *("r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
        *("inference_mode", "init_lora_weights", "bias", "megatron_core", "qalora_group_size"),
        *("loftq_config", "eva_config", "lora_ga_config", "ensure_weight_tying"),
    }
)
# Initial weights that leave the base model's as they are; others (PiSSA, OLoRA, CorDA) go with a changed one.
PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class Pair:
    """The adapter of one linear layer.

    a, b: float32 [rank, in] and [out, rank].
    scale: Of their product.
    """

    a: Tensor
    b: Tensor
    scale: float


def saved_key(module: str, matrix: str) -> str:
    return f"base_model.model.{module}.lora_{matrix}.weight"


def read_config(content: str | bytes) -> dict[str, Any]:
    """Raises ValueError for one that is not a plain LoRA's, with the reason."""
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"its {CONFIG_NAME} is not JSON: {e}") from None
    if not isinstance(config, dict) or config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"its {CONFIG_NAME} is not that of a LoRA")
    given = [name for name, value in config.items() if value and name not in KNOWN]
    if config.get("bias", "none") != "none":
        given.append("bias")
    if config.get("init_lora_weights", True) not in PLAIN_BEGINNINGS:
        given.append("init_lora_weights")
    if given:
        raise ValueError(f"it is no plain LoRA: its {CONFIG_NAME} has {given[0]} = {config[given[0]]!r}")
    for name, needed in (("r", int), ("lora_alpha", int | float)):
        value = config.get(name)
        if not isinstance(value, needed) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"its {CONFIG_NAME} has {name} = {value!r}, which is no number")
    for name in ("rank_pattern", "alpha_pattern"):
        _check_patterns(name, config.get(name) or {})
    return config


def _check_patterns(name: str, patterns: Any) -> None:
    """Raises ValueError unless they are numbers by regular expressions that are quick to match."""
    if not isinstance(patterns, dict):
        raise ValueError(f"its {CONFIG_NAME} has {name} = {patterns!r}, which is no object")
    for pattern, value in patterns.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"its {name} has {pattern!r}: {value!r}, which is no number")
        is_slow = pattern.count("*") > 2 or ")*" in pattern or set(pattern) & set("+?{")
        try:
            re.compile(pattern)
        except re.error as e:
            raise ValueError(f"its {name} has {pattern!r}, which is no regular expression: {e}") from None
        if is_slow:
            raise ValueError(f"its {name} has {pattern!r}; name layers, with at most two '*'")


def rank_of(config: Mapping[str, Any]) -> int:
    """The largest."""
    return int(max([config["r"], *(config.get("rank_pattern") or {}).values()]))


def pairs_of(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, tuple[int, int]],
    max_rank: int,
) -> dict[str, Pair]:
    """What it adapts, by module. Raises ValueError, with the reason, for what a model cannot take.

    config: From `read_config`.
    tensors: By peft's names.
    modules: Of each linear layer that may have an adapter, the (in, out) features.
    max_rank: The largest that there is room for.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"it has {key}, which is no LoRA of a linear layer")
        found.setdefault(match[1], {})[match[2]] = tensor
    if strange := sorted(found.keys() - modules.keys()):
        raise ValueError(f"it adapts {', '.join(strange[:3])}, where requests of this model have no adapter")
    if not found:
        raise ValueError("it adapts nothing")
    return {name: _pair(config, name, found[name], *modules[name], max_rank) for name in sorted(found)}


def _pair(
    config: Mapping[str, Any], name: str, tensors: dict[str, Tensor], inputs: int, outputs: int, max_rank: int
) -> Pair:
    if tensors.keys() != {"A", "B"}:
        raise ValueError(f"it has lora_{next(iter(tensors))} of {name} only")
    a, b = tensors["A"], tensors["B"]
    rank = _by_pattern(config, "rank_pattern", name, config["r"])
    needed = (rank, inputs), (outputs, rank)
    if (tuple(a.shape), tuple(b.shape)) != needed:
        raise ValueError(
            f"its {name} has shapes {tuple(a.shape)} and {tuple(b.shape)}; this model and rank {rank} need "
            f"{needed[0]} and {needed[1]}"
        )
    if rank < 1:
        raise ValueError(f"its {name} has rank {rank}; give at least 1")
    if rank > max_rank:
        raise ValueError(
            f"its {name} has rank {rank}: ask for that rank to start from it (at most {max_rank})"
        )
    alpha = _by_pattern(config, "alpha_pattern", name, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    for tensor in (a, b):
        if tensor.dtype not in FLOATS:
            raise ValueError(f"its {name} is {tensor.dtype}; give float32, float16 or bfloat16")
        if not torch.isfinite(tensor.float() * scale).all():
            raise ValueError(f"its {name} is not finite, times its scale {scale:g}")
    return Pair(a.float(), b.float(), scale)


def _by_pattern(config: Mapping[str, Any], name: str, module: str, default: Any) -> Any:
    """As peft's `get_pattern_key`: the first pattern that matches the end of the module's name."""
    patterns: Mapping[str, Any] = config.get(name) or {}
    return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), default)


def read_directory_config(directory: Path) -> dict[str, Any]:
    """Of a saved adapter. Raises ValueError if there is none, or as `read_config`."""
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"there is no adapter {directory.name!r} in adapters_root")
    try:
        return read_config(path.read_bytes())
    except (OSError, ValueError) as e:
        raise ValueError(f"adapter {directory.name!r}: {e}") from None


def check_replaceable(directory: Path) -> None:
    """Raises ValueError for a directory that is not ours to replace or remove."""
    if directory.exists() and not (directory / ABOUT_NAME).is_file():
        why = "exists in adapters_root and was not saved by longctx"
        raise ValueError(f"{directory.name!r} {why}; choose another name")


def about_model(config: Any) -> dict[str, Any]:
    """What a saved adapter says of the model that it is for. config: Hugging Face's."""
    keys = "model_type", "hidden_size", "num_hidden_layers", "vocab_size"
    return {key: getattr(config, key, None) for key in keys}
