"""The geometry against the table of the papers, evaluated pair by pair in plain Python."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_longctx.geometry import Geometry, alibi_slopes, branches

geometries = st.builds(
    Geometry,
    n_global=st.integers(0, 6),
    n_local=st.integers(1, 12) | st.none(),
    distance_ceiling=st.integers(1, 20) | st.none(),
)
positions = st.integers(0, 60)


def pair(geometry: Geometry, i: int, j: int, start: int) -> int | None:
    """The distance at which query i sees key j, or None."""
    if j > i:
        return None
    if j >= start:
        return i - j
    if j >= geometry.n_global:
        return None
    return i - j if geometry.distance_ceiling is None else min(i - j, geometry.distance_ceiling)


def seen(geometry: Geometry, i: int, length: int, start: int | None = None) -> list[int | None]:
    starts = None if start is None else torch.tensor([start])
    result: list[int | None] = [None] * length
    for branch in branches(geometry, torch.tensor([i]), torch.arange(length), starts):
        for j in branch.visible[0].nonzero().flatten().tolist():
            assert result[j] is None, "branches overlap"
            result[j] = int(branch.distance[0, j])
    return result


@given(geometries, positions)
def test_a_sliding_window_sees_the_first_and_the_last_tokens_at_capped_distances(geometry: Geometry, i: int) -> None:
    start = 0 if geometry.n_local is None else max(i - geometry.n_local + 1, 0)
    assert seen(geometry, i, 64) == [pair(geometry, i, j, start) for j in range(64)]


@given(geometries, positions, st.data())
def test_a_stepped_window_sees_from_its_start_on(geometry: Geometry, i: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, i))
    assert seen(geometry, i, 64, start) == [pair(geometry, i, j, start) for j in range(64)]


@given(st.integers(0, 6), st.integers(1, 12), positions)
def test_in_cache_distances_count_the_visible_tokens_between(n_global: int, n_local: int, i: int) -> None:
    geometry = Geometry(n_global, n_local, distances="in_cache")
    distances = seen(geometry, i, i + 1)
    visible = [j for j, d in enumerate(distances) if d is not None]
    assert [distances[j] for j in visible] == list(reversed(range(len(visible))))


def test_the_first_position_past_the_window() -> None:
    geometry = Geometry(n_global=2, n_local=4, distance_ceiling=4)
    assert seen(geometry, 3, 5) == [3, 2, 1, 0, None]
    assert seen(geometry, 4, 5) == [4, 3, 2, 1, 0]
    assert seen(geometry, 6, 7) == [4, 4, None, 3, 2, 1, 0]


def test_alibi_slopes_are_those_of_the_paper() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-k for k in range(1, 9)]
    between = alibi_slopes(12)
    assert between[:8].tolist() == alibi_slopes(8).tolist()
    assert between[8:].tolist() == alibi_slopes(16)[0:8:2].tolist()
