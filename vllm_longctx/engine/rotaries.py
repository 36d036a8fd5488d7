"""Exact rotary angles in the place of a loaded model's own.

A model of vLLM's has modules that rotate queries and keys (vllm/model_executor/layers/rotary_embedding). A
model of transformers, in vLLM's Transformers backend, has modules that return cosines and sines
(`transformers.modeling_rope_utils`). Both compute in float32, and vLLM's tables end at the trained length.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.rotary_embedding import Phi3LongRoPEScaledRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from vllm_longctx.config import LongContextError
from vllm_longctx.rotary import Rotary, attention_factor, inverse_frequencies

StockRotary = RotaryEmbeddingBase | Phi3LongRoPEScaledRotaryEmbedding


class CosSin(nn.Module):
    """Takes the place of a rotary module of transformers: float64 angles, its dtypes and shapes.

    rotaries: By the layer type that the model asks for; None where it asks for none.
    repeats: Whether each angle stands twice in a row, for pairs of neighbours; else all angles stand twice.
    """

    def __init__(self, rotaries: Mapping[str | None, Rotary], repeats: bool, dtype: torch.dtype | None):
        super().__init__()
        self.kinds = list(rotaries)
        self.rotaries = nn.ModuleList(rotaries.values())
        self.repeats, self.dtype = repeats, dtype

    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """x: of the dtype wanted. position_ids int [1, tokens]. Returns each [1, tokens, rotary_dim]."""
        rotary = self.rotaries[self.kinds.index(layer_type)]
        assert isinstance(rotary, Rotary)
        cos, sin = (
            t.repeat_interleave(2, -1) if self.repeats else torch.cat((t, t), -1)
            for t in rotary.scaled_cos_sin(position_ids)
        )
        dtype = self.dtype or x.dtype
        return cos.to(dtype), sin.to(dtype)


def is_rotary(module: nn.Module) -> bool:
    """Whether it is a rotary module of vLLM's or of transformers'."""
    return isinstance(module, StockRotary) or any(
        name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False)
    )


def replace_rotaries(
    model: nn.Module, used: Sequence[nn.Module], head_size: int, vllm_config: VllmConfig, length: int
) -> list[Rotary]:
    """Put exact modules in the place of those that a text uses. Returns the rotations that layers may have.

    length: The longest distance between a query and a key, in tokens; LongRoPE has factors for short lengths
        and for long ones.

    Raises LongContextError for a rotation that is not known.
    """
    exact: dict[int, nn.Module] = {}
    rotations: list[Rotary] = []
    for module in used:
        if isinstance(module, StockRotary):
            rotations.append(exact_rotary(module, vllm_config, length))
            exact[id(module)] = rotations[-1]
        else:
            exact[id(module)] = cos_sin = exact_cos_sin(module, head_size, vllm_config, length)
            for rotary in cos_sin.rotaries:
                assert isinstance(rotary, Rotary)
                pairs = Rotary(
                    head_size, rotary.rotary_dim, False, rotary.inverse_frequencies.cpu(), rotary.factor
                )
                rotations += [rotary, pairs.to(rotary.inverse_frequencies.device)]
    replace_modules(model, exact)
    return rotations


def replace_modules(model: nn.Module, replacements: Mapping[int, nn.Module]) -> int:
    """Put modules in the place of others everywhere in a model. Returns how often.

    replacements: By `id` of the other module.
    """
    count = 0
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if id(child) in replacements:
                setattr(module, name, replacements[id(child)])
                count += 1
    return count


@contextmanager
def factors_for(modules: Sequence[nn.Module], length: int) -> Iterator[None]:
    """Have vLLM's LongRoPE modules rotate by the factors of a length. They choose by max_model_len."""
    chosen = [m for m in modules if isinstance(m, Phi3LongRoPEScaledRotaryEmbedding)]
    before = [m.use_long_rope for m in chosen]
    try:
        for m in chosen:
            m.use_long_rope = length > m.original_max_position_embeddings
        yield
    finally:
        for m, use_long_rope in zip(chosen, before, strict=True):
            m.use_long_rope = use_long_rope


def exact_rotary(stock: Any, vllm_config: VllmConfig, length: int) -> Rotary:
    """The rotation of a module of vLLM's with float64 angles, on its device.

    length: As of `replace_rotaries`.

    Of the model's RoPE parameters those count whose angles are in the module's table; a model may have some
    for each kind of layer. Raises LongContextError if there are none.
    """
    if isinstance(stock, Phi3LongRoPEScaledRotaryEmbedding):
        original = stock.original_max_position_embeddings
        table: Any = stock.long_short_cos_sin_cache
        table = table[original:] if length > original else table[:original]
    else:
        table = stock.cos_sin_cache
    positions = torch.arange(min(64, len(table)))
    theirs = table[: len(positions)].float().cpu()
    own = [{"rope_type": "default", "rope_theta": stock.base}] if hasattr(stock, "base") else []
    for parameters in [*_rope_parameters(vllm_config), *own]:
        try:
            sizes = parameters, stock.max_position_embeddings, length
            frequencies = inverse_frequencies(stock.rotary_dim, *sizes)
            factor = attention_factor(*sizes)
        except (KeyError, ValueError):  # of another module, or not known
            continue
        is_neox = getattr(stock, "is_neox_style", True)
        rotary = Rotary(stock.head_size, stock.rotary_dim, is_neox, frequencies, factor)
        ours = torch.cat(rotary.scaled_cos_sin(positions), -1)
        if _alike(ours, theirs, 1e-5 + torch.finfo(table.dtype).eps):
            return rotary.to(table.device)
    raise _unknown(stock, vllm_config)


def exact_cos_sin(stock: Any, head_size: int, vllm_config: VllmConfig, length: int) -> CosSin:
    """The exact module for one of transformers'. Raises LongContextError for a rotation that is not known."""
    kinds = [name.removesuffix("inv_freq").removesuffix("_") for name, _ in stock.named_buffers()]
    kinds = [kind for kind in dict.fromkeys(kinds) if not kind.endswith("original")]
    rotaries: dict[str | None, Rotary] = {}
    max_positions = vllm_config.model_config.hf_text_config.max_position_embeddings
    for kind in kinds:
        prefix = f"{kind}_" if kind else ""
        theirs, scaling = (
            getattr(stock, f"{prefix}inv_freq"),
            getattr(stock, f"{prefix}attention_scaling", 1.0),
        )
        for parameters in _rope_parameters(vllm_config):
            try:
                sizes = parameters, max_positions, length
                frequencies, factor = inverse_frequencies(2 * len(theirs), *sizes), attention_factor(*sizes)
            except (KeyError, ValueError):
                continue
            if _alike(frequencies.float(), theirs.cpu(), 1e-6) and abs(factor - scaling) <= 1e-6:
                rotary = Rotary(head_size, 2 * len(theirs), True, frequencies, factor)
                rotaries[kind or None] = rotary.to(theirs.device)
                break
        else:
            raise _unknown(stock, vllm_config)
    layer_type = next(iter(rotaries))
    further = () if layer_type is None else (layer_type,)
    device = vllm_config.device_config.device
    x, positions = torch.zeros(1, dtype=torch.bfloat16, device=device), torch.arange(16, device=device)[None]
    cos, _ = stock(x, positions, *further)
    for repeats in (False, True):
        exact = CosSin(rotaries, repeats, None if cos.dtype == x.dtype else cos.dtype)
        ours, _ = exact(x, positions, *further)
        if ours.shape == cos.shape and _alike(ours.float(), cos.float(), 1e-2):
            return exact
    raise _unknown(stock, vllm_config)


def _rope_parameters(vllm_config: VllmConfig) -> list[Mapping[str, Any]]:
    """All that the model's config has: one set, or one for each kind of layer."""
    parameters: dict[str, Any] = (
        getattr(vllm_config.model_config.hf_text_config, "rope_parameters", None) or {}
    )
    sets: list[Mapping[str, Any]] = [v for v in parameters.values() if isinstance(v, dict)]
    return sets or [parameters]


def _alike(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=tolerance, rtol=1e-5)


def _unknown(stock: nn.Module, vllm_config: VllmConfig) -> LongContextError:
    types = {str(p.get("rope_type", "default")) for p in _rope_parameters(vllm_config)}
    return LongContextError(
        f"longctx does not know the rotation {type(stock).__name__} of the model (rope_type: "
        f"{', '.join(sorted(types))})"
    )
