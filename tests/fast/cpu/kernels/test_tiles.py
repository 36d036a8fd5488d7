"""Chunked prefill by tiles against the dense float64 reference, over geometries and places of the chunk in
the text.
"""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_longctx import reference
from vllm_longctx.cpu.kernels.branches import attend, merge, scores_of, with_sinks
from vllm_longctx.cpu.kernels.tiles import attend_chunk, plan_chunk
from vllm_longctx.geometry import Geometry, alibi_slopes, branches
from vllm_longctx.rotary import Rotary, inverse_frequencies

D, HEADS, KV_HEADS, SOFT_CAP = 16, 4, 2, 1.5
SINKS = torch.tensor([1.0, -3.0, 4.0, 0.0])


def run(
    geometry: Geometry,
    context: int,
    length: int,
    dtype: torch.dtype,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(context * 1000 + length)
    rotary = Rotary(D, D, True, inverse_frequencies(D, {"rope_theta": 50.0}))
    total = context + length
    query, key, value = (torch.randn(total, h, D).to(dtype) for h in (HEADS, KV_HEADS, KV_HEADS))
    positions = torch.arange(total)
    both = branches(geometry, positions[context:], positions)
    expected = reference.attention(
        query[context:], key, value, both, 0.5, rotary, soft_cap=soft_cap, sinks=sinks
    )
    q, k = (rotary.turn(x, positions[:, None]) for x in (query, key))
    start = context - geometry.n_local + 1
    plan = plan_chunk(geometry, context, length)
    first = k[: geometry.n_global], value[: geometry.n_global]
    got = attend_chunk(
        plan,
        q[context:],
        k[context:],
        value[context:],
        (k[start:context], value[start:context]),
        first,
        rotary,
        0.5,
        soft_cap=soft_cap,
        sinks=sinks,
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


soft_caps, sinks_or_none = st.sampled_from([0.0, SOFT_CAP]), st.sampled_from([None, SINKS])


@settings(deadline=None, max_examples=150)
@given(geometries, st.integers(0, 150), st.integers(1, 100), soft_caps, sinks_or_none)
@example(Geometry(4, 32, 32), 0, 1, 0.0, None)  # the first query past the window
@example(Geometry(4, 32, 32), 0, 1, SOFT_CAP, SINKS)
@example(
    Geometry(4, 32, 64), 28, 12, 0.0, None
)  # a ceiling above the window: some pairs below it, some at it
@example(Geometry(4, 32, 64), 28, 65, SOFT_CAP, SINKS)  # three tiles, the last of one query
@example(Geometry(0, 32), 5, 40, SOFT_CAP, SINKS)  # no other branch
@example(Geometry(10, 10, 10), 0, 64, 0.0, None)
def test_a_chunk_equals_the_reference(
    geometry: Geometry, past: int, length: int, soft_cap: float, sinks: torch.Tensor | None
) -> None:
    got, expected = run(geometry, geometry.n_local + past, length, torch.float32, soft_cap, sinks)
    assert (got - expected).abs().max() < 2e-5


@pytest.mark.parametrize(("soft_cap", "sinks"), [(0.0, None), (SOFT_CAP, SINKS)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_by_its_own_rounding(
    dtype: torch.dtype, soft_cap: float, sinks: torch.Tensor | None
) -> None:
    sinks = None if sinks is None else sinks.to(dtype)
    got, expected = run(Geometry(8, 64, 64), 100, 90, dtype, soft_cap, sinks)
    # Scores of rotated keys carry one rounding of the key; outputs are averages of values of size 1.
    assert (got - expected).abs().max() < 8 * torch.finfo(dtype).eps


@settings(deadline=None, max_examples=100)
@given(geometries, st.integers(0, 150), st.integers(1, 100))
@example(Geometry(4, 32, 64), 28, 12)
def test_a_chunk_with_alibi_equals_the_reference(geometry: Geometry, past: int, length: int) -> None:
    context = geometry.n_local + past
    torch.manual_seed(context * 1000 + length)
    query, key, value = (torch.randn(context + length, h, D) for h in (HEADS, KV_HEADS, KV_HEADS))
    positions, slopes = torch.arange(context + length), alibi_slopes(HEADS).float()
    both = branches(geometry, positions[context:], positions)
    expected = reference.attention(query[context:], key, value, both, 0.5, alibi_slopes=slopes)
    start = context - geometry.n_local + 1
    plan = plan_chunk(geometry, context, length, slopes)
    before, first = ((key[s], value[s]) for s in (slice(start, context), slice(geometry.n_global)))
    got = attend_chunk(plan, query[context:], key[context:], value[context:], before, first, None, 0.5)
    assert (got - expected).abs().max() < 2e-5


@pytest.mark.parametrize(("soft_cap", "sinks"), [(0.0, None), (SOFT_CAP, None), (SOFT_CAP, SINKS)])
def test_merging_further_keys_is_one_softmax(soft_cap: float, sinks: torch.Tensor | None) -> None:
    q, k, v = torch.randn(5, HEADS, D), torch.randn(9, KV_HEADS, D), torch.randn(9, KV_HEADS, D)

    def by_kernel(keys: slice) -> tuple[torch.Tensor, torch.Tensor]:
        output, lse = attend(*(x.transpose(0, 1)[None] for x in (q, k[keys], v[keys])), None, 0.2, soft_cap)
        return with_sinks((output[0].transpose(0, 1), lse[0].transpose(0, 1)), sinks)

    whole, _ = by_kernel(slice(9))
    merged = merge(by_kernel(slice(4)), scores_of(q, k[4:], 0.2, soft_cap), v[4:])
    assert torch.allclose(merged, whole, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_capped_attention_is_the_kernels_where_the_cap_is_far(masked: bool) -> None:
    """In all that it returns; bfloat16 within its rounding."""
    query = torch.randn(3, HEADS, 5, D)
    key, value = torch.randn(2, 3, KV_HEADS, 7, D)
    mask = torch.randn(1, HEADS, 5, 7) if masked else None
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        inputs = [x.to(dtype) for x in (query, key, value)]
        capped, stock = attend(*inputs, mask, 0.2, 1e4), attend(*inputs, mask, 0.2)
        for ours, theirs in zip(capped, stock, strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def test_keys_that_a_query_does_not_see_add_nothing() -> None:
    branch = torch.randn(2, HEADS, D), torch.randn(2, HEADS)
    merged = merge(branch, torch.full((2, HEADS, 3), -torch.inf), torch.randn(3, KV_HEADS, D))
    assert torch.equal(merged, branch[0])


def test_queries_inside_the_window_are_refused() -> None:
    with pytest.raises(ValueError, match="n_local is 32 and context is 31"):
        plan_chunk(Geometry(4, 32, 32), 31, 8)
