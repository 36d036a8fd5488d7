"""Layers with Λ attention in vLLM's CPU engine: the stock kernel over compact tables, beside tiles."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.cpu_layers import SINKS, SOFT_CAP, Engine
from vllm_longctx.geometry import Geometry, RequestView, branches

pytestmark = pytest.mark.usefixtures("one_thread")
LAMBDA = {"n_global": 5, "n_local": 48, "distance_ceiling": 60}


@pytest.mark.parametrize(
    ("dtype", "soft_cap", "sinks"),
    [
        (torch.float32, 0.0, None),
        (torch.float32, SOFT_CAP, None),
        (torch.float32, 0.0, SINKS),
        (torch.float32, SOFT_CAP, SINKS),
        (torch.bfloat16, SOFT_CAP, SINKS),
        (torch.float16, SOFT_CAP, SINKS),
    ],
)
def test_steps_of_two_requests_attend_as_the_reference(
    dtype: torch.dtype, soft_cap: float, sinks: Tensor | None, small_llama: Path
) -> None:
    engine = Engine(small_llama, LAMBDA, {"a": 160, "b": 160}, 0, dtype, soft_cap, sinks)
    geometry = engine.settings.geometry

    def check(tokens: dict[str, int]) -> None:
        for name, output in engine.step(tokens).items():
            end = engine.computed[name]
            seen = branches(geometry, torch.arange(end - tokens[name], end), torch.arange(end))
            tolerance = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
            assert engine.error(name, output, seen) < tolerance

    check({"a": 40})  # inside the window
    check({"a": 60, "b": 48})  # past it on the way, two tiles; just as long as it
    check({"a": 1, "b": 1})  # the first query past the window, and one far past it, at a block's end
    check({"b": 33, "a": 1})
    for _ in range(3):
        check({"a": 1, "b": 1})


VIEWS = {
    "plain": RequestView(),
    "more": RequestView(40),
    "fewer": RequestView(0),
    "turns": RequestView(7, (7, 20, 33, 90, 100, 141)),
}


@pytest.mark.parametrize(
    "attention",
    [LAMBDA, {"method": "streaming", "n_global": 5, "n_local": 44, "allow_beyond_trained": True}],
)
def test_each_request_sees_what_it_has_chosen(attention: dict[str, Any], small_llama: Path) -> None:
    """Beside one that has chosen nothing."""
    attention = {"max_n_global": 44, **attention}
    engine = Engine(small_llama, attention, dict.fromkeys([*VIEWS, "as_engine"], 190))
    geometry = engine.settings.geometry

    def check(tokens: dict[str, int]) -> None:
        for name, output in engine.step(tokens, views=VIEWS).items():
            end = engine.computed[name]
            queries = torch.arange(end - tokens[name], end)
            view = VIEWS.get(name)
            own = geometry if view is None else view.geometry(geometry)
            start = own.window_start(queries)
            if view is not None and view.turns:
                start = torch.tensor([first_whole_turn(view.turns, q, own) for q in queries.tolist()])
            seen = branches(own, queries, torch.arange(end), start)
            assert engine.error(name, output, seen) < 1e-5, (name, end)

    check({"plain": 40, "as_engine": 60})
    check({"more": 70, "fewer": 48, "turns": 30, "plain": 60})
    check(dict.fromkeys(engine.computed, 1))
    check({"turns": 100, "as_engine": 1, "more": 50})
    for _ in range(12):
        check(dict.fromkeys(engine.computed, 1))
    check({"plain": 1})


def first_whole_turn(turns: tuple[int, ...], query: int, geometry: Geometry) -> int:
    assert geometry.n_local is not None
    lowest = query - geometry.n_local + 1
    if lowest <= 0:
        return 0
    return next((turn for turn in turns if lowest <= turn <= query), lowest)
