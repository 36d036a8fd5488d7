"""Chunked prefill by tiles against the dense float64 reference, over geometries and places of the chunk in
the text.
"""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_longctx import reference
from vllm_longctx.cpu.kernels.branches import attend, merge, scores_of
from vllm_longctx.cpu.kernels.tiles import attend_chunk, plan_chunk
from vllm_longctx.geometry import Geometry, alibi_slopes, branches
from vllm_longctx.rotary import Rotary, inverse_frequencies

D, HEADS, KV_HEADS = 16, 4, 2


def run(
    geometry: Geometry, context: int, length: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(context * 1000 + length)
    rotary = Rotary(D, D, True, inverse_frequencies(D, {"rope_theta": 50.0}))
    total = context + length
    query, key, value = (torch.randn(total, h, D).to(dtype) for h in (HEADS, KV_HEADS, KV_HEADS))
    positions = torch.arange(total)
    expected = reference.attention(
        query[context:], key, value, branches(geometry, positions[context:], positions), 0.5, rotary
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
@example(Geometry(4, 32, 32), 0, 1)  # the first query past the window
@example(Geometry(4, 32, 64), 28, 12)  # a ceiling above the window: some pairs below it, some at it
@example(Geometry(10, 10, 10), 0, 64)
def test_a_chunk_equals_the_reference(geometry: Geometry, past: int, length: int) -> None:
    got, expected = run(geometry, geometry.n_local + past, length, torch.float32)
    assert (got - expected).abs().max() < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_by_its_own_rounding(dtype: torch.dtype) -> None:
    got, expected = run(Geometry(8, 64, 64), 100, 90, dtype)
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


def test_merging_further_keys_is_one_softmax() -> None:
    q, k, v = torch.randn(5, HEADS, D), torch.randn(9, KV_HEADS, D), torch.randn(9, KV_HEADS, D)

    def by_kernel(keys: slice) -> tuple[torch.Tensor, torch.Tensor]:
        output, lse = attend(*(x.transpose(0, 1)[None] for x in (q, k[keys], v[keys])), None, 0.2)
        return output[0].transpose(0, 1), lse[0].transpose(0, 1)

    whole, _ = by_kernel(slice(9))
    assert torch.allclose(merge(by_kernel(slice(4)), scores_of(q, k[4:], 0.2), v[4:]), whole, atol=1e-6)


def test_keys_that_a_query_does_not_see_add_nothing() -> None:
    branch = torch.randn(2, HEADS, D), torch.randn(2, HEADS)
    merged = merge(branch, torch.full((2, HEADS, 3), -torch.inf), torch.randn(3, KV_HEADS, D))
    assert torch.equal(merged, branch[0])


def test_queries_inside_the_window_are_refused() -> None:
    with pytest.raises(ValueError, match="n_local is 32 and context is 31"):
        plan_chunk(Geometry(4, 32, 32), 31, 8)
