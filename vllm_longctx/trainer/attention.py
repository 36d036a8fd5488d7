"""The trainer's attention through xformers, for `adaptation.trainer.attention: xformers`.

Examples are shorter than the trained length. They need plain causal attention, or the model's own sliding
window, and nothing else. With the name `xformers`, transformers makes no mask of its own and passes the
window.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface


def xformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within one example. Returns [1, tokens, heads, head_size], and no attention weights.

    query: [1, heads, tokens, head_size].
    key, value: [1, kv_heads, tokens, head_size].
    attention_mask: None.
    scaling: Of the inner products. None for head_size ** -0.5.
    dropout: Share of attention weights that are dropped.
    sliding_window: The model's, in tokens; None for no window.
    """
    from xformers.ops import LowerTriangularMask, memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    tokens = query.shape[2]
    is_plain = attention_mask is None and key.shape[2] == tokens
    assert is_plain, "an example is one sequence without padding or cache"
    bias: Any = LowerTriangularMask()
    if sliding_window is not None and sliding_window < tokens:
        bias = BlockDiagonalCausalMask.from_seqlens([tokens]).make_local_attention(sliding_window)
    # KV heads are repeated, since xformers has gradients only for as many of them as query heads.
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return memory_efficient_attention(query, key, value, attn_bias=bias, p=dropout, scale=scaling), None


def register() -> None:
    """Make `attn_implementation="xformers"` known to transformers."""
    AttentionInterface.register("xformers", xformers_attention)
