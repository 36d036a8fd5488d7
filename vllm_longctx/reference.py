"""Dense attention in float64: the oracle every other implementation is tested against.

It evaluates `geometry` literally: one score per (query, key) pair at the distance the geometry gives, one
    softmax.
"""

import torch
from torch import Tensor

from vllm_longctx.geometry import Branch
from vllm_longctx.rotary import Rotary


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    branches: list[Branch],
    scale: float,
    rotary: Rotary | None = None,
    alibi_slopes: Tensor | None = None,
    margins: list[float] | None = None,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention over branches, in float64.

    query [T, heads, d], key and value [S, kv_heads, d]: not rotated. branches: masks and distances [T, S].
    rotary: rotates each pair by its distance. alibi_slopes [heads]: adds -slope * distance. soft_cap: scores
    become cap * tanh(score / cap) before that (Gemma 2, arXiv 2408.00118, section 2); 0 for no cap. sinks
    [heads]: scores of one more key per head, whose value is zero (gpt-oss, arXiv 2508.10925). Returns [T,
    heads, d].

    margins: takes, of a branch of which only the best keys are seen, the smallest difference between the
    score of one that is seen and of one that is not: an implementation whose scores err by more may choose
    others, and rightly.
    """
    query, key, value = query.double(), key.double(), value.double()
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.full((query.shape[1], len(query), len(key)), -torch.inf, dtype=torch.float64)
    for branch in branches:
        pair_scores = _scores_at(query, key, branch.distance, rotary) * scale
        if soft_cap:
            pair_scores = soft_cap * torch.tanh(pair_scores / soft_cap)
        if alibi_slopes is not None:
            pair_scores = pair_scores - alibi_slopes.double()[:, None, None] * branch.distance
        seen = branch.visible
        if branch.best is not None and branch.best < len(key):
            best, keys = pair_scores.masked_fill(~seen, -torch.inf).topk(branch.best + 1, -1)
            seen = seen & torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, keys[..., :-1], True)
            if margins is not None:
                margins.append(float((best[..., -2] - best[..., -1]).nan_to_num(torch.inf).min()))
        scores = torch.where(seen, pair_scores, scores)
    if sinks is not None:
        of_sinks = sinks.double()[:, None, None].expand(-1, len(query), 1)
        scores = torch.cat((scores, of_sinks), -1)
    return torch.einsum("hts,shd->thd", scores.softmax(-1)[..., : len(key)], value)


def _scores_at(query: Tensor, key: Tensor, distance: Tensor, rotary: Rotary | None) -> Tensor:
    """q·R(distance)·k for every pair: float64 [heads, T, S].

    With a pair's elements as complex numbers, q·R(δ)k = Re(q · conj(k) · e^{iδf}) summed over frequencies f.
    Queries and keys both carry the attention factor.
    """
    if rotary is None:
        return torch.einsum("thd,shd->hts", query, key)
    passed = torch.einsum("thd,shd->hts", query[..., rotary.rotary_dim :], key[..., rotary.rotary_dim :])
    q, k = _as_complex(query, rotary), _as_complex(key, rotary)
    scores = torch.zeros_like(passed)
    for f, frequency in enumerate(rotary.inverse_frequencies.double()):
        turned = torch.polar(torch.ones(distance.shape, dtype=torch.float64), distance * frequency)
        scores = scores + (torch.einsum("th,sh->hts", q[..., f], k[..., f].conj()) * turned).real
    return passed + scores * rotary.factor**2


def _as_complex(x: Tensor, rotary: Rotary) -> Tensor:
    rotated = x[..., : rotary.rotary_dim]
    a, b = rotated.chunk(2, -1) if rotary.neox else (rotated[..., ::2], rotated[..., 1::2])
    return torch.complex(a.contiguous(), b.contiguous())
