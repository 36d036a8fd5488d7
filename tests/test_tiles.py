"""Chunked prefill by tiles against the dense float64 reference, over geometries and places of the chunk in the text."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_longctx.attention import reference
from vllm_longctx.attention.branches import attend, merge
from vllm_longctx.attention.tiles import attend_chunk, plan_chunk
from vllm_longctx.geometry import Geometry, alibi_slopes, branches
from vllm_longctx.rotary import Rotary, inverse_frequencies

D, HEADS, KV_HEADS = 16, 4, 2


def run(geometry: Geometry, context: int, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(context * 1000 + length)
    rotary = Rotary(D, D, True, inverse_frequencies(D, {"rope_theta": 50.0}))
    total = context + length
    query, key, value = (torch.randn(total, h, D).to(dtype) for h in (HEADS, KV_HEADS, KV_HEADS))
    positions = torch.arange(total)
    expected = reference.attention(query[context:], key, value, branches(geometry, positions[context:], positions), 0.5, rotary)
    q, k = (rotary.turn(x, positions[:, None]) for x in (query, key))
    start = max(context - geometry.n_local + 1, 0)
    plan = plan_chunk(geometry, context, length)
    first = k[: geometry.n_global], value[: geometry.n_global]
    got = attend_chunk(
        plan, q[context:], k[context:], value[context:], (k[start:context], value[start:context]), first, rotary, 0.5
    )
    return got.double(), expected


geometries = st.builds(
    lambda g, n, ceiling, in_cache: Geometry(
        min(g, n), n, None if in_cache else ceiling, "in_cache" if in_cache else "relative"
    ),
    st.integers(0, 12),
    st.integers(1, 80),
    st.integers(1, 120) | st.none(),
    st.booleans(),
)


@settings(deadline=None, max_examples=150)
@given(geometries, st.integers(0, 150), st.integers(1, 100))
@example(Geometry(4, 32, 32), 31, 1)  # the last query that sees everything
@example(Geometry(4, 32, 32), 32, 1)  # the first one past the window
@example(Geometry(4, 32, 64), 60, 12)  # a ceiling above the window: some pairs below it, some at it
@example(Geometry(10, 10, 10), 0, 64)
def test_a_chunk_equals_the_reference(geometry: Geometry, context: int, length: int) -> None:
    length = max(length, geometry.n_global - context)  # the first tokens are computed
    got, expected = run(geometry, context, length, torch.float32)
    assert (got - expected).abs().max() < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_by_its_own_rounding(dtype: torch.dtype) -> None:
    got, expected = run(Geometry(8, 64, 64), 100, 90, dtype)
    # Scores of rotated keys carry one rounding of the key; outputs are averages of values of size 1.
    assert (got - expected).abs().max() < 8 * torch.finfo(dtype).eps


@settings(deadline=None, max_examples=100)
@given(geometries, st.integers(0, 150), st.integers(1, 100))
@example(Geometry(4, 32, 64), 60, 12)
def test_a_chunk_with_alibi_equals_the_reference(geometry: Geometry, context: int, length: int) -> None:
    length = max(length, geometry.n_global - context)
    torch.manual_seed(context * 1000 + length)
    query, key, value = (torch.randn(context + length, h, D) for h in (HEADS, KV_HEADS, KV_HEADS))
    positions, slopes = torch.arange(context + length), alibi_slopes(HEADS).float()
    both = branches(geometry, positions[context:], positions)
    expected = reference.attention(query[context:], key, value, both, 0.5, alibi_slopes=slopes)
    start = max(context - geometry.n_local + 1, 0)
    plan = plan_chunk(geometry, context, length, slopes)
    before, first = ((key[s], value[s]) for s in (slice(start, context), slice(geometry.n_global)))
    got = attend_chunk(plan, query[context:], key[context:], value[context:], before, first, None, 0.5)
    assert (got - expected).abs().max() < 2e-5


def test_merging_branches_is_one_softmax() -> None:
    q, k, v = torch.randn(2, 3, 5, D), torch.randn(2, 3, 9, D), torch.randn(2, 3, 9, D)
    whole, lse = attend(q, k, v, None, 0.2)
    parts = [attend(q, k[:, :, s], v[:, :, s], None, 0.2) for s in (slice(0, 4), slice(4, 9))]
    merged, merged_lse = merge(*parts)
    assert torch.allclose(merged, whole, atol=1e-6) and torch.allclose(merged_lse, lse, atol=1e-6)


def test_a_query_that_sees_nothing_adds_nothing() -> None:
    q, k, v = torch.randn(1, 1, 2, D), torch.randn(1, 1, 3, D), torch.randn(1, 1, 3, D)
    mask = torch.tensor([[0.0, 0.0, 0.0], [-torch.inf] * 3])
    other = attend(q, k, v, mask, 0.2)
    assert torch.isneginf(other[1][..., 1]).all()
    whole = attend(q, k, v, None, 0.2)
    assert torch.allclose(merge(whole, other)[0][:, :, 1], whole[0][:, :, 1], atol=1e-6)
