"""Which keys sliding windows leave behind, step by step."""

import pytest

from vllm_longctx.engine.lookup import LeftBehind

N_GLOBAL, N_LOCAL = 4, 10


@pytest.mark.parametrize("steps", [[1] * 40, [40], [9, 1, 1, 10, 11, 8], [14, 1, 5, 20], [3, 3, 34]])
def test_each_key_is_left_behind_once_and_when_no_window_sees_it(steps: list[int]) -> None:
    """Never more of them than the step before had tokens."""
    left, seen, position, before = LeftBehind(N_GLOBAL, N_LOCAL), [], 0, N_GLOBAL
    for tokens in [*steps, 1]:
        start, end = left.take("a", position)
        assert end - start <= before
        assert start == (seen[-1] + 1 if seen else N_GLOBAL)
        assert end == max(position - N_LOCAL + 1, N_GLOBAL)  # the first key that the step's first query sees
        seen += range(start, end)
        position, before = position + tokens, tokens
    assert seen == list(range(N_GLOBAL, position - 1 - N_LOCAL + 1))


def test_a_request_that_begins_anew_leaves_all_behind_again() -> None:
    left = LeftBehind(N_GLOBAL, N_LOCAL)
    for position in (0, 30):
        left.take("a", position)
    assert left.take("a", 0) == (N_GLOBAL, N_GLOBAL)  # preempted
    assert left.take("a", 20) == (N_GLOBAL, 11)
    left.forget(["a", "never seen"])
    assert left.take("a", 20) == (N_GLOBAL, 11)


def test_requests_are_apart() -> None:
    left = LeftBehind(0, N_LOCAL)
    assert [left.take(name, position) for name, position in (("a", 20), ("b", 15), ("a", 21), ("b", 16))] == [
        (0, 11),
        (0, 6),
        (11, 12),
        (6, 7),
    ]
