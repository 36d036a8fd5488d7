"""What both platforms do to a loaded model: find its attention layers, and what each of them is."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionType
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig, KVCacheSpec

from vllm_longctx.config import LongContextError
from vllm_longctx.engine.positions import Run, rotations, running
from vllm_longctx.engine.rotaries import replace_modules
from vllm_longctx.engine.rows import Timed
from vllm_longctx.geometry import Geometry
from vllm_longctx.models.properties import trained_length
from vllm_longctx.modes import Role
from vllm_longctx.rotary import NoRotation, Rotary, no_turn
from vllm_longctx.settings import Settings, active_settings


@dataclass(frozen=True)
class LayerSite:
    """An attention layer of a loaded model, and what is known where it stands.

    name: vLLM's, by which a forward finds its KV cache and metadata.
    role: What it is in the engine's mode.
    window: The sliding window of its own that the model gives it, in tokens; None for a layer that sees all.
    rotary: The rotation of the layer's queries and keys; None for a layer without: ALiBi, or no positions.
    stock: A copy of its implementation as vLLM made it: scale, soft cap, sinks, ALiBi slopes.
    """

    name: str
    layer: Attention
    stock: Any
    role: Role
    window: int | None
    rotary: Rotary | None
    settings: Settings
    device: torch.device

    @property
    def geometry(self) -> Geometry:
        """Of a sliding layer: a window of its own stays as it is."""
        return self.settings.geometry if self.window is None else Geometry(0, self.window)


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
    model: nn.Module,
    vllm_config: VllmConfig,
    impl: type[AttentionImpl[Any]],
    device: torch.device,
    run: Run | None = None,
) -> list[LayerSite]:
    """The attention layers of a loaded model, which now has exact rotary angles, if it has RoPE.

    impl: The class of every layer's implementation, as vLLM made it.
    run: How to run the model; by default as vLLM runs it.

    Must come before the first forward, which compiles the model. Raises LongContextError naming a layer that
    the engine's mode cannot serve, and why.
    """
    settings = active_settings(vllm_config)
    layers = attention_layers(vllm_config, impl)
    run = run or running(model, vllm_config, device)
    length = settings.windows.longest_distance(trained_length(vllm_config.model_config))
    found = rotations(model, layers, vllm_config, length, run)
    sites = []
    for name, layer in layers.items():
        role, rotary = settings.role(extract_layer_index(name), layer.sliding_window is not None), found[name]
        if role in (Role.KEPT, Role.MEMORY):
            check_keeps_all(name, layer, role)
        if role == Role.KEPT and rotary is None:
            rotary = no_turn(layer.head_size).to(device)
        if role == Role.MEMORY and not settings.memory.has_positions:
            without_rotation(model, name, rotary)
            rotary = None
        sites.append(
            LayerSite(name, layer, copy(layer.impl), role, layer.sliding_window, rotary, settings, device)
        )
    if Role.KEPT in settings.mode.layers and not any(site.role == Role.KEPT for site in sites):
        asked = settings.top_k
        raise LongContextError(
            f"attention.top_k = {asked.k} finds nothing to look up: layers {asked.layers.start} to "
            f"{asked.layers.stop - 1} have windows of their own; give others with attention.top_k_from_layer "
            "and attention.top_k_to_layer, or leave top_k out"
        )
    return sites


def plan(sites: Sequence[LayerSite]) -> str:
    """What each kind of layer is, for users: `5 × own window 1,024 (untouched), 1 × full → Λ 10 + 8,192`."""
    kinds = counted(described(site) for site in sites)
    return kinds if any(site.window is None for site in sites) else f"{kinds}: nothing to extend"


def counted(kinds: Iterable[str]) -> str:
    """Each once, with its number."""
    return ", ".join(f"{count} × {kind}" for kind, count in Counter(kinds).items())


def described(site: LayerSite) -> str:
    """The kind of a layer, and what the engine's mode makes of it."""
    made = made_of(site.settings, site.role, site.window)
    if site.window is not None or (site.rotary is not None and site.rotary.turns):
        return made
    if has_alibi(site.layer):
        return f"ALiBi, {made}"
    has_ceiling = site.geometry.distance_ceiling is not None
    return f"no positions, {made}" + (", where the distance ceiling has no effect" if has_ceiling else "")


def made_of(settings: Settings, role: Role, window: int | None) -> str:
    """What a layer with this role is. window: as of a `LayerSite`."""
    n_local = settings.attention.n_local
    if window is not None and role == Role.WINDOW:
        return f"own window {window:,}, inside of " + (
            "passes" if n_local is None else f"windows of {n_local:,}"
        )
    if window is not None:
        return f"own window {window:,} (untouched)"
    if role == Role.MEMORY:
        return f"full → memory, {settings.attention.lookup or 'all'} of its keys"
    if role == Role.WINDOW:
        return "full → windows" + ("" if n_local is None else f" of {n_local:,}")
    geometry = settings.geometry
    made = f"full → Λ {geometry.n_global:,} + {geometry.n_local:,}"
    return f"{made}, best {settings.top_k.k:,} between" if role == Role.KEPT else made


def has_alibi(layer: Attention) -> bool:
    return layer.impl.alibi_slopes is not None  # type: ignore[attr-defined]  # both platforms' classes have it


def without_rotation(model: nn.Module, name: str, rotary: Rotary | None) -> None:
    """Leave queries and keys of a layer as they are.

    Raises LongContextError where all layers share a module.
    """
    parent = model.get_submodule(name.rpartition(".")[0])
    if rotary is not None and not replace_modules(parent, {id(rotary): NoRotation()}):
        raise LongContextError(
            f"attention.mem_positionals = false, but layer {name} has no rotary module of its own to leave "
            "out; leave mem_positionals at true"
        )


def attention_layers(vllm_config: VllmConfig, impl: type[AttentionImpl[Any]]) -> dict[str, Attention]:
    """By name. Raises LongContextError naming a layer whose kind cannot be served."""
    layers: dict[str, Attention] = {}
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if not isinstance(layer, AttentionLayerBase):  # experts, for one
            continue
        reason = None
        if type(layer) is not Attention:
            reason = f"it is {type(layer).__name__}, and longctx serves plain attention"
        elif layer.attn_type != AttentionType.DECODER:
            reason = f"it is {layer.attn_type} attention, and longctx serves decoders"
        elif layer.kv_sharing_target_layer_name is not None:
            reason = f"it reads the KV cache of layer {layer.kv_sharing_target_layer_name}"
        elif layer.head_size_v != layer.head_size:
            reason = f"its values have {layer.head_size_v} elements, and its keys {layer.head_size}"
        elif type(layer.impl) is not impl:
            reason = f"vLLM gave it {type(layer.impl).__name__}, and longctx knows {impl.__name__}"
        if reason is not None:
            raise LongContextError(f"longctx cannot serve layer {name}: {reason}")
        layers[name] = layer
    if not layers:
        raise LongContextError("longctx cannot serve this model: it has no attention layers")
    return layers


def check_keeps_all(name: str, layer: Attention, role: Role) -> None:
    """Raises LongContextError for a layer that cannot look up keys."""
    reason = None
    if layer.sliding_window is not None:
        reason = f"it has a window of its own ({layer.sliding_window} tokens)"
    elif has_alibi(layer):
        reason = "it has ALiBi, by which no key looks as if it were elsewhere"
    if reason is not None:
        option = "mem_layers" if role == Role.MEMORY else "top_k_from_layer and top_k_to_layer"
        raise LongContextError(
            f"layer {name} cannot look up keys: {reason}; leave it out of attention.{option}"
        )


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
    backend: type[AttentionBackend],
    rows: Any,
    make_spec: Callable[[AttentionSpec], KVCacheSpec],
    rotation: int,
) -> type[AttentionBackend]:
    """The backend for one engine's layers of one role.

    rows: What its metadata builders read of a step, the platform's `StepRows`.
    make_spec: What the pool must keep of its layers.
    rotation: Number of the layers' rotation. vLLM makes one metadata builder for backends of the same name,
        so a builder's layers have one rotation.

    vLLM constructs builders itself and gives them nothing of ours, so both come as attributes of classes.
    """
    stock = backend.get_builder_cls()
    builder = type(stock.__name__, (Timed, stock), {"rows": rows})
    own = {
        "get_builder_cls": staticmethod(lambda: builder),
        "customize_spec": classmethod(lambda cls, spec: make_spec(spec)),
    }
    return type(f"{backend.__name__}{rotation}", (backend,), own)
