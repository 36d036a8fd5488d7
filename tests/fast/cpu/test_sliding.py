"""Layers with Λ attention in vLLM's CPU engine: the stock kernel over compact tables, beside tiles."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.cpu_layers import SINKS, SOFT_CAP, Engine
from vllm_longctx.geometry import branches

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
