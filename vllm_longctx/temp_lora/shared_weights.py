"""The engine's GPU memory in the trainer's process: the base model's weights and the slots' device memory, by CUDA IPC.

The engine's worker exports them, the trainer on the same GPU maps them; nothing is copied. The trainer never writes to the
weights: peft freezes the base model, and gradients go to the adapters alone.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from vllm_longctx.temp_lora.messages import Share, SharedTensor

# vLLM's names for layers whose rows are those of several layers one behind the other: `packed_modules_mapping` of its models.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
PADDED = ("model.embed_tokens.weight", "lm_head.weight")  # to a multiple of 64 rows, behind the vocabulary


def export(tensor: Tensor) -> SharedTensor:
    """A GPU tensor, for `attach` in another process, which must not outlive the memory. Once for each process that attaches."""
    _, arguments = reduce_tensor(tensor.detach())
    _, shape, stride, offset, _, dtype, _, handle, storage_bytes, storage_offset, _, *counter_and_event = arguments
    return SharedTensor(
        list(shape),
        list(stride),
        offset,
        str(dtype).removeprefix("torch."),
        handle,
        storage_bytes,
        storage_offset,
        *counter_and_event,
    )


def attach(shared: SharedTensor, device: torch.device) -> Tensor:
    """The tensor itself, in this process. device: the same GPU by this process's number for it."""
    return rebuild_cuda_tensor(
        tensor_cls=Tensor,
        tensor_size=torch.Size(shared.shape),
        tensor_stride=tuple(shared.stride),
        tensor_offset=shared.offset,
        storage_cls=torch.storage.TypedStorage,
        dtype=getattr(torch, shared.dtype),
        storage_device=device.index,
        storage_handle=shared.handle,
        storage_size_bytes=shared.storage_bytes,
        storage_offset_bytes=shared.storage_offset,
        requires_grad=False,
        ref_counter_handle=shared.counter_handle,
        ref_counter_offset=shared.counter_offset,
        event_handle=shared.event_handle,
        event_sync_required=shared.wait_for_event,
    )


@dataclass(frozen=True)
class SharedWeights:
    """What an engine's only worker shares with the trainer on its GPU. weights: under vLLM's names. slots: device memory, uint8."""

    weights: dict[str, Tensor]
    slots: Tensor

    def message(self) -> Share:
        """For one process of the trainer's."""
        return Share({name: export(weight) for name, weight in self.weights.items()}, export(self.slots))


# Of the engines in this process, by their `VllmConfig.instance_id`: a worker adds one, the scheduler beside it takes it.
shared_by_engine: dict[str, SharedWeights] = {}


def engine_weights(model: nn.Module) -> dict[str, Tensor]:
    """Of a vLLM model, under the names that its layers had before they were wrapped for LoRA."""
    return {name.replace(".base_layer.", "."): p.detach() for name, p in model.named_parameters()}


def model_class(config: Mapping[str, Any]) -> type[PreTrainedModel]:
    """transformers' own for a complete Hugging Face config: by its architecture, as vLLM does, whatever code comes with it."""
    return next(found for name in config["architectures"] if (found := getattr(transformers, name, None)) is not None)


def skeleton(model: str, dtype: str, attention: str, config: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """A checkpoint's Hugging Face model without weights, on `meta`. config: a complete one in place of the checkpoint's."""
    settings = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
    if config is None:
        made = AutoConfig.from_pretrained(model)
    else:
        config_class = model_class(config).config_class
        assert config_class is not None
        made = config_class.from_dict(dict(config))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(made, **settings)


def views(weights: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """The engine's weights under Hugging Face's names: rows of fused layers, the vocabulary's rows of padded ones.

    Raises ValueError if they are not exactly the model's, as those of one of several tensor-parallel ranks are not.
    """
    shapes = {name: p.shape for name, p in model.named_parameters()}
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        layer, _, kind = name.rpartition(".")
        parent, _, last = layer.rpartition(".")
        if last in FUSED:
            names = [f"{parent}.{part}.{kind}" for part in FUSED[last]]
            rows = [shapes[part][0] for part in names if part in shapes]
            if len(rows) < len(names) or sum(rows) != len(weight):
                raise ValueError(f"{name} has {len(weight)} rows, but {', '.join(names)} have {rows}")
            found |= zip(names, weight.split(rows), strict=True)
        else:
            found[name] = weight[: shapes[name][0]] if name in PADDED and name in shapes else weight
    if model.config.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    different = sorted(shapes.keys() ^ found.keys()) or [n for n in shapes if shapes[n] != found[n].shape]
    if different:
        raise ValueError(f"{different[0]} and {len(different) - 1} more are not in both models, or not of one shape")
    return found


def fill(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """The skeleton with the engine's weights for its own, on their device, and its rotary tables made anew."""
    own = views(weights, model)
    device = next(iter(own.values())).device
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            with device:
                model.set_submodule(name, type(module)(config=model.config))
    model.load_state_dict(own, strict=False, assign=True)  # not strict, since a tied output layer has no weights of its own
    model.tie_weights()
    return model.requires_grad_(False)


def adapted_modules(weights: Mapping[str, Tensor], linear_layers: Collection[str]) -> dict[str, tuple[int, int]]:
    """The trainer's `modules`, from `views`: (in, out) features of the layers whose last names are given."""
    names = (name.removesuffix(".weight") for name in weights if name.endswith(".weight"))
    shapes = {name: weights[f"{name}.weight"].shape for name in names if name.rpartition(".")[2] in linear_layers}
    return {name: (inputs, outputs) for name, (outputs, inputs) in shapes.items()}
