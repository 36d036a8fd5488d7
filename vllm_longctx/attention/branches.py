"""Softmax attention over one branch with its log-sum-exp, and the merge of branches into one softmax."""

import torch
from torch import Tensor

# The fused CPU kernel behind F.scaled_dot_product_attention: the only one that also returns the log-sum-exp.
_attention_with_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def additive(visible: Tensor) -> Tensor:
    """bool mask -> float32: 0 where visible, -inf elsewhere. The kernel takes float32 masks beside any dtype."""
    return torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """One branch. query [B, heads, T, d]; key, value [B, kv_heads, S, d]; mask additive, broadcastable to
    [B, heads, T, S].

    Returns the output [B, heads, T, d] in the query's dtype and the log-sum-exp [B, heads, T] in float32, -inf where a
    query sees nothing.
    """
    output, lse = _attention_with_lse(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
    if mask is not None:
        sees_nothing = torch.isneginf(mask).all(-1)
        lse = lse.masked_fill(sees_nothing, -torch.inf)
    return output, lse


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The softmax over both branches' keys. Each query must see a key in the first; outputs become float32."""
    (a, lse_a), (b, lse_b) = first, second
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = (lse_a - lse).exp().unsqueeze(-1), (lse_b - lse).exp().unsqueeze(-1)
    return a.float() * weight_a + b.float() * weight_b, lse
