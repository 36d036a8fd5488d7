"""The base model's weights and the adapter slots in GPU memory that engine and trainer share, by CUDA IPC.

The engine's worker exports them and the trainer on the same GPU maps them. Nothing is copied. The trainer
never writes to the base model's weights: peft freezes them, and only the adapters have gradients.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
import transformers
from torch import Tensor, nn
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from vllm_longctx.temp_lora.messages import Share, SharedTensor

# Layers of vLLM whose rows are those of several layers, in this order: `packed_modules_mapping` of its
# models.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
SOFT_CAP = "attn_logit_softcapping"  # the entry of a Hugging Face config
PROBE_TIMEOUT_S = 120.0
PADDED = ("model.embed_tokens.weight", "lm_head.weight")  # after the vocabulary, to a multiple of 64 rows


def export(tensor: Tensor) -> SharedTensor:
    """A GPU tensor for `attach` in one other process, which must end before the memory is freed."""
    _, arguments = reduce_tensor(tensor.detach())
    _, shape, stride, offset, _, dtype, _, handle, storage_bytes, storage_offset, _, *rest = arguments
    return SharedTensor(
        list(shape),
        list(stride),
        offset,
        str(dtype).removeprefix("torch."),
        handle,
        storage_bytes,
        storage_offset,
        *rest,  # counter and event
    )


def attach(shared: SharedTensor, device: torch.device) -> Tensor:
    """The tensor itself, in this process. device: The same GPU, with its index in this process."""
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


def why_not_attached(tensor: Tensor) -> str | None:
    """Whether another process can map a GPU tensor of this one: the reason why not, None if it can.

    Starts that process, which takes seconds. Where drivers and containers forbid it cannot be told otherwise.
    """
    command = [sys.executable, "-m", __name__, str(tensor.device)]
    try:
        message = msgspec.msgpack.encode(export(tensor))
        done = subprocess.run(command, input=message, capture_output=True, timeout=PROBE_TIMEOUT_S)
    except (RuntimeError, ValueError, OSError, subprocess.TimeoutExpired) as e:
        return f"{type(e).__name__}: {e}".splitlines()[0]
    if done.returncode:
        return (done.stderr.decode(errors="replace").strip() or f"code {done.returncode}").splitlines()[-1]
    is_same = done.stdout.decode().strip() == first_numbers(tensor)
    return None if is_same else "another process sees other numbers there"


def first_numbers(tensor: Tensor) -> str:
    return json.dumps(tensor.flatten()[:16].float().tolist())


def attach_probe(device: str, message: bytes) -> str:
    """In the process that `why_not_attached` starts: the first numbers of the tensor."""
    shared = msgspec.msgpack.decode(message, type=SharedTensor)
    return first_numbers(attach(shared, torch.device(device)))


@dataclass(frozen=True)
class SharedWeights:
    """What an engine's only worker shares with the trainer on its GPU.

    weights: The base model's, under vLLM's names.
    slots: GPU memory of the adapter slots, uint8 [`Slots.size`].
    """

    weights: dict[str, Tensor]
    slots: Tensor

    def message(self) -> Share:
        """For one trainer process."""
        return Share({name: export(weight) for name, weight in self.weights.items()}, export(self.slots))


# Of the engines in this process, by `VllmConfig.instance_id`: an engine's worker adds it, its scheduler takes
# it out.
shared_by_engine: dict[str, SharedWeights] = {}


def engine_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a vLLM model, under the names that its layers had before they were wrapped for LoRA."""
    return {name.replace(".base_layer.", "."): p.detach() for name, p in model.named_parameters()}


def model_class(config: Mapping[str, Any]) -> type[PreTrainedModel]:
    """transformers' own class for a complete Hugging Face config.

    By architecture, as in vLLM; a checkpoint's code is not run.
    """
    classes = (getattr(transformers, name, None) for name in config["architectures"])
    return next(found for found in classes if found is not None)


def attention_implementation(attention: str, config: PreTrainedConfig) -> str | None:
    """transformers' `attn_implementation` for `adaptation.trainer.attention`.

    None has transformers take SDPA where the model goes with it, else eager attention. SDPA drops a soft cap
    of attention logits without a word.
    """
    if attention != "sdpa":
        return attention
    return "eager" if getattr(config.get_text_config(), SOFT_CAP, None) else None


def skeleton(
    model: str,
    dtype: str,
    attention: str,
    config: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A checkpoint's Hugging Face model without weights, on `meta`.

    model: A directory, or a name in Hugging Face's cache.
    dtype: torch's name for it.
    attention: As in `adaptation.trainer`.
    config: A complete Hugging Face config in place of the checkpoint's.
    """
    if config is None:
        hf_config = AutoConfig.from_pretrained(model)
    else:
        config_class = model_class(config).config_class
        assert config_class is not None
        hf_config = config_class.from_dict(dict(config))
    implementation = attention_implementation(attention, hf_config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            hf_config, dtype=getattr(torch, dtype), attn_implementation=implementation
        )


def views(weights: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """The engine's weights under Hugging Face's names. Fused layers are split, and padding is left out.

    Raises ValueError if they are not exactly the model's. Those of one of several tensor-parallel ranks are
    not.
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
        more = len(different) - 1
        raise ValueError(f"{different[0]} and {more} more are not in both models, or not of one shape")
    return found


def check_buffers(model: PreTrainedModel) -> None:
    """Raises ValueError if `fill` cannot make a skeleton's buffers, which no checkpoint has."""
    for name, module in _with_buffers(model):
        try:
            with torch.device("meta"):
                type(module)(config=model.config)
        except TypeError:
            raise ValueError(f"{name} has buffers that are not made from the config alone") from None


def _with_buffers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if any(buffer.is_meta for buffer in module.buffers(recurse=False))
    ]


def fill(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """Give a skeleton the engine's weights, on their device, and new rotary tables. Returns it."""
    own = views(weights, model)
    device = next(iter(own.values())).device
    for name, module in _with_buffers(model):
        with device:
            model.set_submodule(name, type(module)(config=model.config))
    model.load_state_dict(own, strict=False, assign=True)  # a tied output layer has no weights of its own
    model.tie_weights()
    return model.requires_grad_(False)


if __name__ == "__main__":
    print(attach_probe(sys.argv[1], sys.stdin.buffer.read()))
