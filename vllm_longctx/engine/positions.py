"""How each attention layer of a loaded model encodes positions, found by running the model.

vLLM has no entry that says it. Some layers of a model have rotary modules that they never call (SmolLM3,
Cohere 2), some have one of several (Gemma 3), and some scale what they have rotated. So the model computes a
few tokens at two places of a text, without a KV cache, and what its layers give to attention is compared. In
every run a layer's attention returns the same. So the layers' inputs are the same, bit by bit, and all that
can differ is what depends on positions.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import get_pp_group
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention

from vllm_longctx.config import LongContextError
from vllm_longctx.engine.rotaries import factors_for, is_rotary, replace_rotaries
from vllm_longctx.models.properties import model_dtype, trained_length
from vllm_longctx.rotary import Rotary, alike, no_turn, rotation_between

TOKENS = 16
Run = Callable[[Tensor], object]  # computes the model at positions int64 [TOKENS]


@dataclass(frozen=True)
class Given:
    """What a layer gives to attention in a run.

    query, key, value: [TOKENS, heads, head_size].
    """

    query: Tensor
    key: Tensor
    value: Tensor


class Probe:
    """Runs of a model whose attention layers only take down what they are given.

    layers: By name, the model's attention layers.
    outputs: What attention returns, by layer. The first run fills it.
    """

    def __init__(self, layers: Mapping[str, Attention], run: Run):
        self.layers, self.run = layers, run
        self.outputs: dict[str, Tensor] = {}

    def at(self, positions: Tensor) -> dict[str, Given]:
        """By layer. Raises LongContextError for a layer that a text does not use, or that has no keys."""
        found: dict[str, Given] = {}

        def attention(name: str, layer: Attention) -> Callable[..., Tensor]:
            def forward(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
                shapes = layer.num_heads, layer.num_kv_heads, layer.num_kv_heads
                parts = (
                    x.reshape(TOKENS, n, -1).clone() for x, n in zip((query, key, value), shapes, strict=True)
                )
                found[name] = Given(*parts)
                if name not in self.outputs:
                    self.outputs[name] = attend(layer, found[name]).to(query.dtype)
                return self.outputs[name]

            return forward

        with ExitStack() as stack:
            for name, layer in self.layers.items():
                layer.forward = attention(name, layer)  # type: ignore[method-assign]  # until the run is over
                stack.callback(delattr, layer, "forward")
            self.run(positions)
        if missing := [name for name in self.layers if name not in found]:
            raise LongContextError(f"longctx cannot serve layer {missing[0]}: a text does not use it")
        return found


def attend(layer: Attention, given: Given) -> Tensor:
    """Plain causal attention, so that later layers get hidden states as in a text.

    Returns [TOKENS, heads * head_size].
    """
    query, key, value = (x.float().transpose(0, 1) for x in (given.query, given.key, given.value))
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=layer.impl.scale, enable_gqa=True
    )
    return output.transpose(0, 1).flatten(1)


def rotations(
    model: nn.Module, layers: Mapping[str, Attention], vllm_config: VllmConfig, length: int, run: Run
) -> dict[str, Rotary | None]:
    """By layer, the rotation of its queries and keys; None without one. The model has exact angles now.

    layers: By name, the model's attention layers.
    length: As of `replace_rotaries`.

    Must come before the first forward, which compiles the model. Raises LongContextError naming a layer whose
    positions are not understood.
    """
    probe, here = Probe(layers, run), torch.arange(TOKENS)
    modules = [m for m in model.modules() if is_rotary(m)]
    used: dict[int, nn.Module] = {}
    with ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_pre_hook(lambda m, _: used.update({id(m): m}))
            stack.callback(handle.remove)
        stack.enter_context(factors_for(modules, length))
        stock = probe.at(here)
    head_size = next(iter(layers.values())).head_size
    candidates = replace_rotaries(model, list(used.values()), head_size, vllm_config, length)
    ours = probe.at(here)
    # Within the trained length: a table of learned positions ends there.
    step = max(min(trained_length(vllm_config.model_config) - TOKENS, 1000) // 2, 1)
    moved = probe.at(here + step)
    tolerance = max(1e-4, 8 * torch.finfo(model_dtype(vllm_config.model_config)).eps)
    for name, given in ours.items():
        if not (
            alike(given.query, stock[name].query, tolerance) and alike(given.key, stock[name].key, tolerance)
        ):
            raise LongContextError(
                f"longctx cannot serve layer {name}: with exact angles its queries and keys are not vLLM's"
            )
    return {name: rotation(name, ours[name], moved[name], step, candidates, tolerance) for name in layers}


def rotation(
    name: str, here: Given, there: Given, step: int, candidates: Sequence[Rotary], tolerance: float
) -> Rotary | None:
    """Of a layer, from what it gives to attention at two places that are `step` positions apart."""
    if not alike(here.value, there.value, tolerance):
        raise LongContextError(
            f"longctx cannot serve layer {name}: what it reads depends on absolute positions. Learned "
            "positions do so, and end at the trained length"
        )
    none = no_turn(here.key.shape[-1]).to(here.key.device)
    queries_and_keys = (here.query, here.key), (there.query, there.key)
    found = rotation_between(*queries_and_keys, step, (none, *candidates), tolerance)
    if found is None:
        raise LongContextError(
            f"longctx cannot serve layer {name}: its keys depend on their positions, but not by a rotation "
            "that longctx knows"
        )
    return found if found.turns else None


def running(model: nn.Module, vllm_config: VllmConfig, device: torch.device) -> Run:
    """How to run a model of vLLM's on a few tokens, without a KV cache and without compiling it."""
    config = vllm_config.model_config
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.get_vocab_size(), (TOKENS,), generator=generator).to(device)
    hidden: Any = None
    if not get_pp_group().is_first_rank:
        hidden = model.make_empty_intermediate_tensors(TOKENS, model_dtype(config), device)  # type: ignore[operator]  # models of vLLM's have it
        for tensor in hidden.tensors.values():
            tensor.normal_()

    def run(positions: Tensor) -> object:
        positions = positions.to(device)
        if config.uses_mrope:  # of a text, its three positions are the same
            positions = positions.expand(3, -1)
        with (
            torch.inference_mode(),
            set_current_vllm_config(vllm_config),
            set_forward_context(None, vllm_config, num_tokens=TOKENS, skip_compiled=True),
        ):
            return model(input_ids=tokens, positions=positions, intermediate_tensors=hidden)

    return run
