"""What both workers do to a loaded model: find its attention layers, give them exact rotary angles, and KV specs of our own."""

from collections.abc import Callable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

from vllm_longctx.rotary import Rotary, attention_factor, inverse_frequencies
from vllm_longctx.startup.engine_args import rope_parameters


def take_over_rotary(
    model: nn.Module, vllm_config: VllmConfig, impl: type[AttentionImpl]
) -> tuple[dict[str, Attention], dict[str, nn.Module], Rotary | None]:
    """Give a loaded model, if it has RoPE, exact rotary angles: its attention layers, the modules around them, the rotation.

    impl: the class of every layer's implementation. Must come before the first forward, which compiles the model. Raises
    RuntimeError for a layer that is not a plain decoder layer with ALiBi slopes or with the model's one rotary module beside
    it (vLLM's `get_rope` gives all layers the same).
    """
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
            and layer.impl.attn_type == "decoder"
            and layer.impl.sinks is None
            and layer.sliding_window is None
            and (isinstance(stock_rotary, RotaryEmbedding) if layer.impl.alibi_slopes is None else stock_rotary is None)
        ):
            raise RuntimeError(f"longctx cannot take over {name} ({type(layer).__name__}, {type(stock_rotary).__name__})")

    rotary = None if stock_rotary is None else exact_rotary(stock_rotary, vllm_config)
    if rotary is not None:
        for parent in parents.values():
            parent.rotary_emb = rotary
    return layers, parents, rotary


def exact_rotary(stock: RotaryEmbedding, vllm_config: VllmConfig) -> Rotary:
    """The same rotation with float64 angles, on its device. Raises RuntimeError if it differs from vLLM's own table."""
    parameters = rope_parameters(vllm_config.model_config)
    assert parameters is not None
    frequencies = inverse_frequencies(stock.rotary_dim, parameters, stock.max_position_embeddings)
    rotary = Rotary(stock.head_size, stock.rotary_dim, stock.is_neox_style, frequencies, attention_factor(parameters))
    positions = torch.arange(min(64, len(stock.cos_sin_cache)))
    ours = torch.cat(rotary.scaled_cos_sin(positions), -1)
    theirs = stock.cos_sin_cache[: len(positions)].float().cpu()
    if not torch.allclose(ours, theirs, atol=1e-5 + torch.finfo(stock.cos_sin_cache.dtype).eps):
        raise RuntimeError(f"the rotary angles of {type(stock).__name__} are not those of {dict(parameters)}")
    return rotary.to(stock.cos_sin_cache.device)


def with_spec(backend: type[AttentionBackend], make: Callable[[AttentionSpec], KVCacheSpec]) -> type[AttentionBackend]:
    """The backend with a KV spec of our own: it says what the pool must keep of its layers."""
    return type(backend.__name__, (backend,), {"customize_spec": classmethod(lambda cls, spec: make(spec))})
