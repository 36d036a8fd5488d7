"""What both platforms do to a loaded model: find its attention layers, and give them exact rotary angles."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig, KVCacheSpec

from vllm_longctx.engine.rows import Timed
from vllm_longctx.models.properties import rope_parameters
from vllm_longctx.modes import Role
from vllm_longctx.rotary import NoRotation, Rotary, attention_factor, inverse_frequencies
from vllm_longctx.settings import Settings, active_settings


@dataclass(frozen=True)
class LayerSite:
    """An attention layer of a loaded model, and what is known where it stands.

    name: vLLM's, by which a forward finds its KV cache and metadata.
    parent: The module around it, whose rotary module rotates its queries and keys.
    role: What it is in the engine's mode.
    rotary: The rotation of the layer's queries and keys; None for a layer without: ALiBi, or no positions.
    """

    name: str
    layer: Attention
    parent: nn.Module
    role: Role
    rotary: Rotary | None
    settings: Settings
    vllm_config: VllmConfig
    device: torch.device


@dataclass(frozen=True)
class SiteGroup:
    """Layers of one role in one KV cache group: vLLM may split the layers of a role among several.

    number: Of the group, by which block tables are found.
    block_size: In tokens.
    """

    number: int
    block_size: int
    sites: list[LayerSite]


def site_groups(sites: Sequence[LayerSite], role: Role, kv_cache_config: KVCacheConfig) -> list[SiteGroup]:
    """The layers of a role, by KV cache group."""
    of_role = {site.name: site for site in sites if site.role == role}
    groups = [
        SiteGroup(
            number,
            group.kv_cache_spec.block_size,
            [of_role[name] for name in group.layer_names if name in of_role],
        )
        for number, group in enumerate(kv_cache_config.kv_cache_groups)
    ]
    return [group for group in groups if group.sites]


def find_layers(
    model: nn.Module, vllm_config: VllmConfig, impl: type[AttentionImpl[Any]], device: torch.device
) -> list[LayerSite]:
    """The attention layers of a loaded model, which now has exact rotary angles, if it has RoPE.

    impl: The class of every layer's implementation, as vLLM made it. Must come before the first forward,
    which compiles the model. Raises RuntimeError for a layer that is not a plain decoder layer with ALiBi
    slopes or with the model's one rotary module beside it (vLLM's `get_rope` gives all layers the same).
    """
    settings = active_settings(vllm_config)
    layers = vllm_config.compilation_config.static_forward_context
    parents = {name: model.get_submodule(name.rpartition(".")[0]) for name in layers}
    stock_rotaries = {id(r): r for r in (getattr(parent, "rotary_emb", None) for parent in parents.values())}
    if len(stock_rotaries) != 1:
        raise RuntimeError(f"longctx needs one rotation in all layers, but there are {len(stock_rotaries)}")
    (stock_rotary,) = stock_rotaries.values()
    for name, layer in layers.items():
        if not (
            isinstance(layer, Attention)
            and type(layer.impl) is impl
            and layer.impl.attn_type == "decoder"  # type: ignore[attr-defined]  # both platforms' classes have it
            and layer.impl.sinks is None  # type: ignore[attr-defined]  # likewise
            and layer.sliding_window is None
            and (
                isinstance(stock_rotary, RotaryEmbedding)
                if layer.impl.alibi_slopes is None  # type: ignore[attr-defined]  # likewise
                else stock_rotary is None
            )
        ):
            raise RuntimeError(
                f"longctx cannot take over {name} ({type(layer).__name__}, {type(stock_rotary).__name__})"
            )

    rotary = None if stock_rotary is None else exact_rotary(stock_rotary, vllm_config)
    sites = []
    for name, layer in layers.items():
        parent, role, own = parents[name], settings.role(extract_layer_index(name)), rotary
        if rotary is not None:
            parent.rotary_emb = rotary
        if role == Role.MEMORY and not settings.memory.has_positions:
            parent.rotary_emb, own = NoRotation(), None
        sites.append(LayerSite(name, layer, parent, role, own, settings, vllm_config, device))
    return sites


def exact_rotary(stock: RotaryEmbedding, vllm_config: VllmConfig) -> Rotary:
    """The same rotation with float64 angles, on its device.

    Raises RuntimeError if it differs from vLLM's own table.
    """
    parameters = rope_parameters(vllm_config.model_config)
    if parameters is None:
        raise RuntimeError(f"{type(stock).__name__} rotates, but the model's config has no RoPE parameters")
    frequencies = inverse_frequencies(stock.rotary_dim, parameters, stock.max_position_embeddings)
    rotary = Rotary(
        stock.head_size, stock.rotary_dim, stock.is_neox_style, frequencies, attention_factor(parameters)
    )
    positions = torch.arange(min(64, len(stock.cos_sin_cache)))
    ours = torch.cat(rotary.scaled_cos_sin(positions), -1)
    theirs = stock.cos_sin_cache[: len(positions)].float().cpu()
    if not torch.allclose(ours, theirs, atol=1e-5 + torch.finfo(stock.cos_sin_cache.dtype).eps):
        raise RuntimeError(f"the rotary angles of {type(stock).__name__} are not those of {dict(parameters)}")
    return rotary.to(stock.cos_sin_cache.device)


class TakenOver:
    """Mixed into an implementation of attention, before vLLM's."""

    @classmethod
    def of(cls, stock: AttentionImpl[Any], **own: Any) -> Self:
        """The layer that vLLM made, with our class and with attributes of our own.

        vLLM makes the layers of a model before anybody knows which one a layer is, and its constructors
        convert what they are given; so the attributes are taken as they are.
        """
        made = cls.__new__(cls)
        vars(made).update(vars(stock), **own)
        return made


def engine_backend(
    backend: type[AttentionBackend], rows: Any, make_spec: Callable[[AttentionSpec], KVCacheSpec]
) -> type[AttentionBackend]:
    """The backend for one engine's layers of one role.

    rows: What its metadata builders read of a step, the platform's `StepRows`.
    make_spec: What the pool must keep of its layers.

    vLLM constructs builders itself and gives them nothing of ours, so both come as attributes of classes.
    """
    stock = backend.get_builder_cls()
    builder = type(stock.__name__, (Timed, stock), {"rows": rows})
    own = {
        "get_builder_cls": staticmethod(lambda: builder),
        "customize_spec": classmethod(lambda cls, spec: make_spec(spec)),
    }
    return type(backend.__name__, (backend,), own)
