"""Softmax attention over one branch with its log-sum-exp, and further keys merged into the same softmax."""

import torch
from torch import Tensor

from vllm_longctx.engine.lookup import weigh

# The fused CPU kernel behind F.scaled_dot_product_attention: the only one that also returns the log-sum-exp.
_attention_with_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def additive(visible: Tensor) -> Tensor:
    """bool mask -> float32: 0 where visible, -inf elsewhere.

    The kernel takes float32 masks beside any dtype.
    """
    return torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """One branch, of which every query sees a key.

    query [B, heads, T, d]; key, value [B, kv_heads, S, d]; mask additive, broadcastable to [B, heads, T, S].
    Returns the output [B, heads, T, d] in the query's dtype and the log-sum-exp [B, heads, T] in float32.
    """
    return _attention_with_lse(query, key, value, 0.0, False, attn_mask=mask, scale=scale)


def scores_of(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """query [T, heads, d], key [S, kv_heads, d] -> float32 [T, heads, S]."""
    grouped = query.float().unflatten(1, (key.shape[1], -1))
    return torch.einsum("tkgd,skd->tkgs", grouped, key.float()).flatten(1, 2) * scale


def merge(branch: tuple[Tensor, Tensor], scores: Tensor, value: Tensor) -> Tensor:
    """The softmax over a branch's keys and a few more, whose scores are at hand: float32 [T, heads, d].

    branch: output [T, heads, d] and log-sum-exp [T, heads]. scores [T, heads, S], -inf where a query sees
    nothing; value [S, kv_heads, d].
    """
    weights, rest = weigh(branch[1], scores)
    grouped = weights.unflatten(1, (value.shape[1], -1))
    added = torch.einsum("tkgs,skd->tkgd", grouped, value.float()).flatten(1, 2)
    return torch.addcmul(added, branch[0].float(), rest)
