"""The geometry against the table of the papers, evaluated pair by pair in plain Python."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_longctx.geometry import Geometry, SteppedWindows, alibi_slopes, branches, memory_branch

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
def test_a_sliding_window_sees_the_first_and_the_last_tokens_at_capped_distances(
    geometry: Geometry, i: int
) -> None:
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


@pytest.mark.parametrize(
    ("prompt_length", "total", "expected"),
    [  # of LongLLaMA's own code, window 128, last window 64
        (1000, 1000, [0, 128, 256, 384, 512, 640, 768, 896, 936]),
        (700, 899, [0, 128, 256, 384, 512, 636, 764, 892]),
        (64, 200, [0, 128]),
        (100, 200, [0, 36, 164]),
        (1, 130, [0, 128]),
    ],
)
def test_stepped_windows(prompt_length: int, total: int, expected: list[int]) -> None:
    windows = SteppedWindows(128, 64)
    starts = [windows.start(i, prompt_length) for i in range(total)]
    assert sorted(set(starts)) == expected
    ends = [windows.end(i, prompt_length) for i in range(total)]
    following = dict(itertools.pairwise(expected))
    assert all(
        end == following.get(start, end) > i for i, (start, end) in enumerate(zip(starts, ends, strict=True))
    )


def test_memory_looks_as_if_first_in_the_window() -> None:
    start = torch.tensor([0, 4, 4])
    branch = memory_branch(torch.tensor([2, 4, 7]), torch.arange(8), start)
    assert branch.visible.sum(1).tolist() == [0, 4, 4]
    assert branch.distance[:, 0].tolist() == [2, 0, 3]
