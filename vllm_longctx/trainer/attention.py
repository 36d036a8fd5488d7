"""The trainer's attention through xformers, for `adaptation.trainer.attention: xformers`.

Examples fit into the trained length and are trained with plain causal attention, or with the model's own sliding window; so
that is all there is here. Under the name `xformers` transformers makes no mask of its own and hands over the window.
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
    """query [1, heads, tokens, head_size], key and value [1, kv_heads, tokens, head_size] to [1, tokens, heads, head_size]."""
    from xformers.ops import LowerTriangularMask, memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    tokens = query.shape[2]
    assert attention_mask is None and key.shape[2] == tokens, "an example is one sequence without padding or cache"
    bias: Any = LowerTriangularMask()
    if sliding_window is not None and sliding_window < tokens:
        bias = BlockDiagonalCausalMask.from_seqlens([tokens]).make_local_attention(sliding_window)
    # Each KV head is repeated, since xformers differentiates attention with as many of them as query heads only.
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return memory_efficient_attention(query, key, value, attn_bias=bias, p=dropout, scale=scaling), None


def register() -> None:
    """Make `attn_implementation="xformers"` known to transformers."""
    AttentionInterface.register("xformers", xformers_attention)
