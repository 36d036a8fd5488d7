"""Softmax attention over one branch with its log-sum-exp, and further keys merged into the same softmax.

soft_cap: scores become cap * tanh(score / cap) before any mask or bias; 0 for no cap. sinks [heads]: scores
of one more key per head, whose value is zero.
"""

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
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, soft_cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """One branch, of which every query sees a key.

    query [B, heads, T, d]; key, value [B, kv_heads, S, d]; mask additive, broadcastable to [B, heads, T, S].
    Returns the output [B, heads, T, d] in the query's dtype and the log-sum-exp [B, heads, T] in float32.
    """
    if soft_cap:
        return _attend_capped(query, key, value, mask, scale, soft_cap)
    return _attention_with_lse(query, key, value, 0.0, False, attn_mask=mask, scale=scale)


def _attend_capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, soft_cap: float
) -> tuple[Tensor, Tensor]:
    """As `attend`, in float32: the fused kernel has no cap.

    The scores of one KV head's queries are in memory at once.
    """
    batch, kv_heads, length = key.shape[:3]
    output, lse = torch.empty_like(query), torch.empty(query.shape[:3])
    if mask is not None:
        mask = mask.expand(*query.shape[:3], length).unflatten(1, (kv_heads, -1))
    by_head = [x.unflatten(1, (kv_heads, -1)) for x in (query, output, lse)]
    for b in range(batch):
        for h in range(kv_heads):
            q, out, out_lse = (x[b, h] for x in by_head)
            scores = torch.matmul(q.float(), key[b, h].float().T)
            scores.mul_(scale / soft_cap).tanh_().mul_(soft_cap)
            if mask is not None:
                scores += mask[b, h]
            torch.logsumexp(scores, -1, out=out_lse)
            out.copy_(torch.matmul(scores.sub_(out_lse.unsqueeze(-1)).exp_(), value[b, h].float()))
    return output, lse


def capped(scores: Tensor, soft_cap: float) -> Tensor:
    """Scores under a cap; -inf, which is no key, stays."""
    if not soft_cap:
        return scores
    return (soft_cap * torch.tanh(scores / soft_cap)).masked_fill(scores.isneginf(), -torch.inf)


def with_sinks(branch: tuple[Tensor, Tensor], sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The branch with the sinks among its keys.

    branch: output [T, heads, d] and log-sum-exp [T, heads]. An attention of several branches has the sinks in
    one of them.
    """
    if sinks is None:
        return branch
    output, lse = branch
    return output * torch.sigmoid(lse - sinks).unsqueeze(-1), torch.logaddexp(lse, sinks.to(lse.dtype))


def scores_of(query: Tensor, key: Tensor, scale: float, soft_cap: float = 0.0) -> Tensor:
    """query [T, heads, d], key [S, kv_heads, d] -> float32 [T, heads, S]."""
    grouped = query.float().unflatten(1, (key.shape[1], -1))
    scores = torch.einsum("tkgd,skd->tkgs", grouped, key.float()).flatten(1, 2) * scale
    return capped(scores, soft_cap)


def merge(branch: tuple[Tensor, Tensor], scores: Tensor, value: Tensor) -> Tensor:
    """The softmax over a branch's keys and a few more, whose scores are at hand: float32 [T, heads, d].

    branch: output [T, heads, d] and log-sum-exp [T, heads]. scores [T, heads, S], -inf where a query sees
    nothing; value [S, kv_heads, d].
    """
    weights, rest = weigh(branch[1], scores)
    grouped = weights.unflatten(1, (value.shape[1], -1))
    added = torch.einsum("tkgs,skd->tkgd", grouped, value.float()).flatten(1, 2)
    return torch.addcmul(added, branch[0].float(), rest)
