"""What `vllm-longctx tune` makes of what it has measured."""

import math

import pytest

from vllm_longctx.cli.tune import Run, advice, compared, recommended

TOLERANCE = 0.01


def measured(n_global: int, n_local: int, *nll: float) -> tuple[Run, list[float]]:
    return Run(n_global, n_local, sum(nll) / len(nll), 1, 2, 3.0, 4.0), list(nll)


def test_losses_are_compared_token_by_token() -> None:
    best, worse = compared([measured(10, 512, 3.0, 1.0, 5.0), measured(10, 256, 3.1, 1.2, 5.3)])
    assert (best.extra, best.error) == (0, 0)
    assert worse.extra == pytest.approx(0.2) and worse.error == pytest.approx(0.1 / math.sqrt(3))


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({(10, 512): 0.0, (10, 256): 0.02}, (10, 512)),
        ({(10, 512): 0.0, (10, 256): 0.01}, (10, 256)),
        ({(10, 512): 0.02, (10, 256): 0.0}, (10, 256)),
        ({(10, 256): 0.0, (4, 256): 0.005, (1, 256): 0.005, (0, 256): 3.0}, (1, 256)),
        ({(10, 512): 0.0, (4, 512): math.nan}, (10, 512)),
    ],
)
def test_the_cheapest_that_loses_little_is_recommended(
    losses: dict[tuple[int, int], float], expected: tuple[int, int]
) -> None:
    runs = compared([measured(*key, 2 + loss, 4 + loss) for key, loss in losses.items()])
    chosen = recommended(runs, TOLERANCE + 1e-9)
    assert (chosen.n_global, chosen.n_local) == expected
    n_global, n_local = expected
    assert f'{{"n_global": {n_global}, "n_local": {n_local}}}' in advice(chosen, TOLERANCE)


def test_a_model_that_computes_nothing_has_no_recommendation() -> None:
    with pytest.raises(ValueError, match="no configuration has a finite loss"):
        compared([measured(10, 512, math.nan, 1.0)])
