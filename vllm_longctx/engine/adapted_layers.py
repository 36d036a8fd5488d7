"""Which layers of a vLLM model adapters adapt, and which linear layers of Hugging Face's model they are.

The trainer has Hugging Face's model, the engine vLLM's. Names are mapped as vLLM maps those of an adapter's
file, so that stock vLLM takes a saved adapter as this engine does.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn
from vllm.config.lora import LoRAConfig
from vllm.logger import init_logger
from vllm.lora import layers as lora_layers
from vllm.lora.utils import parse_fine_tuned_lora_name, process_packed_modules_mapping
from vllm.model_executor.layers.linear import LinearBase

from vllm_longctx.config import LongContextError

logger = init_logger("vllm.longctx")

CLASSES = [getattr(lora_layers, name) for name in lora_layers.__all__ if "LinearWith" in name]


@dataclass(frozen=True)
class AdaptedLayers:
    """What both models have, and what only Hugging Face's has.

    parts: By vLLM's name of a layer, Hugging Face's names of the linear layers whose rows it has, in their
        order. None for one that has no adapter.
    modules: By Hugging Face's name of each linear layer that has an adapter, its (in, out) features.
    left_out: By reason, Hugging Face's names of linear layers without an adapter.
    """

    parts: dict[str, list[str | None]] = field(default_factory=dict)
    modules: dict[str, tuple[int, int]] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def check(self, model: str) -> None:
        """Say in the log what is adapted. Raises LongContextError if nothing is."""
        left_out = [f"{kinds(names)}: {reason}" for reason, names in self.left_out.items()]
        if not self.modules:
            reasons = "; ".join(left_out) or "it has no linear layers outside of experts and routers"
            raise LongContextError(
                f"longctx.adaptation: model {model} has no layer that can be adapted ({reasons}); leave "
                "adaptation out"
            )
        logger.info("longctx: Temp-LoRA adapts %d linear layers: %s", len(self.modules), kinds(self.modules))
        for line in left_out:
            logger.info("longctx: Temp-LoRA leaves out %s", line)


def adapted_layers(
    model: nn.Module, linear: Mapping[str, tuple[int, int]], lora_config: LoRAConfig
) -> AdaptedLayers:
    """Match a vLLM model, before its layers are wrapped for LoRA, with Hugging Face's.

    linear: Of every linear layer of Hugging Face's that may have an adapter, by its name, the (in, out)
        features.
    """
    packed = process_packed_modules_mapping(model)
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    rename = None if mapper is None else mapper.get_rename_mapper()
    saved = {name: f"base_model.model.{name}.lora_A.weight" for name in linear}
    by_vllm = {parse_fine_tuned_lora_name(key, rename)[0]: name for name, key in saved.items()}
    found = AdaptedLayers()
    reasons: dict[str, str] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LinearBase):
            continue
        parent, _, last = name.rpartition(".")
        children = packed.get(last, [])
        parts = [by_vllm.get(f"{parent}.{child}") for child in children or [last]]
        there = [part for part in parts if part is not None]
        if not there:
            continue
        if not _can_be_wrapped(layer, children, lora_config, model):
            reasons |= dict.fromkeys(there, "vLLM has no LoRA for layers of this kind")
        elif any(linear[part][0] != layer.input_size for part in there) or (
            len(parts) == 1 and linear[there[0]][1] != layer.output_size
        ):
            reasons |= dict.fromkeys(there, "vLLM's layer has another size")
        else:
            found.parts[name] = parts
            found.modules.update({part: linear[part] for part in there})
    for name in linear:
        if name not in found.modules:
            reason = reasons.get(name, "vLLM's model has no layer of this name")
            found.left_out.setdefault(reason, []).append(name)
    return found


def _can_be_wrapped(layer: nn.Module, children: list[str], lora_config: LoRAConfig, model: nn.Module) -> bool:
    return any(
        kind.can_replace_layer(
            source_layer=layer,
            lora_config=lora_config,
            packed_modules_list=children,
            model_config=model.config,
        )
        for kind in CLASSES
    )


def kinds(names: Iterable[str]) -> str:
    """Names of layers, with a star for the number of a decoder layer."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
