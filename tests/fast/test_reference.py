"""The float64 reference against attention written out for one pair at a time."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.reference_model import ReferenceLlama, focused, with_top_k
from vllm_longctx.geometry import Geometry, SteppedWindows, alibi_slopes, branches
from vllm_longctx.reference import attention
from vllm_longctx.rotary import Rotary, inverse_frequencies


def one_query(q, k, v, distances, scale, rotary=None, slope=0.0, soft_cap=math.inf, sink=-math.inf):
    """Softmax over the keys with a distance, for one head; the query is rotated to each distance in turn."""
    scores = []
    for key, d in zip(k, distances, strict=True):
        turned = q if rotary is None else rotary.turn(q[None], torch.tensor([d]))[0]
        score = float(turned.double() @ key.double()) * scale
        scores.append((score if soft_cap == math.inf else soft_cap * math.tanh(score / soft_cap)) - slope * d)
    weights = [math.exp(s) for s in scores]
    total = sum(weights) + math.exp(sink)
    return sum(w * x.double() for w, x in zip(weights, v, strict=True)) / total


def test_rope_alibi_caps_and_sinks_are_as_written_out() -> None:
    geometry, n, heads, d = Geometry(2, 5, 4), 12, 4, 16
    rotary = Rotary(d, 8, False, inverse_frequencies(8, {"rope_theta": 100.0}))
    query, key, value = torch.randn(n, heads, d), torch.randn(n, 2, d), torch.randn(n, 2, d)
    positions = torch.arange(n)
    both = branches(geometry, positions, positions)
    slopes = alibi_slopes(heads)
    sinks = torch.tensor([0.5, -2.0, 30.0, -torch.inf])
    for kwargs in (
        {"rotary": rotary},
        {"alibi_slopes": slopes},
        {"rotary": rotary, "soft_cap": 1.5, "sinks": sinks},
        {"alibi_slopes": slopes, "soft_cap": 1.5},
    ):
        out = attention(query, key, value, both, 0.3, **kwargs)
        for i in (0, 4, 5, 6, 11):
            sees = [j for j in range(i + 1) if j < 2 or i - j < 5]
            distances = [i - j if i - j < 5 else min(i - j, 4) for j in sees]
            for head in range(heads):
                expected = one_query(
                    query[i, head],
                    key[sees, head // 2],
                    value[sees, head // 2],
                    distances,
                    0.3,
                    kwargs.get("rotary"),
                    float(slopes[head]) if "alibi_slopes" in kwargs else 0.0,
                    kwargs.get("soft_cap", math.inf),
                    float(sinks[head]) if "sinks" in kwargs else -math.inf,
                )
                assert torch.allclose(out[i, head], expected, atol=1e-6)


@pytest.mark.slow
def test_the_reference_is_longllama(goldens: Path) -> None:
    case = goldens / "longllama_a"
    ids = np.load(case / "input_ids.npy").flatten().tolist()
    reference = ReferenceLlama(goldens / "models" / "longllama")
    ours = reference.token_logprobs(ids, focused(SteppedWindows(128, 64), len(ids), [2, 4]))
    assert np.abs(ours.numpy() - np.load(case / "logprobs.npy").flatten()).max() < 5e-5


@pytest.mark.parametrize(
    "row", [2, 5]
)  # 143 tokens: one query, of the last layers, has just enough keys between
def test_the_reference_is_lm_infinite_with_top_k(goldens: Path, row: int) -> None:
    case = goldens / "lminf_topk"
    p = json.loads((case / "case.json").read_text())
    length = int(np.load(case / "prefix_lengths.npy")[row])
    ids = np.load(case / "input_ids.npy").flatten().tolist()[:length]
    geometry = Geometry(p["global_branch"], p["local_branch"], p["limit_distance"])
    layers = range(p["top_k_from_layer"], p["top_k_to_layer"])
    seen = with_top_k(geometry, length, layers, p["top_k_attention"], p["top_k_insert_at"])
    ours = ReferenceLlama(goldens / "models" / "llama").logprobs(ids, seen)[-1]
    assert np.abs(ours.numpy() - np.load(case / "logprobs.npy")[row]).max() < 1e-4
