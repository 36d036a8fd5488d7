"""Memory layers and those beside them in vLLM's CPU engine."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.cpu_layers import SINKS, SOFT_CAP, Engine
from vllm_longctx.geometry import local_branch, memory_branch

ATTENTION = {
    "method": "focused",
    "n_local": 64,
    "last_context_length": 50,
    "mem_layers": [1],
    "mem_dtype": "float32",
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("soft_cap", "sinks"), [(0.0, None), (SOFT_CAP, SINKS)])
@pytest.mark.parametrize(
    ("number", "lookup"),
    [(0, {}), (1, {}), (1, {"lookup": "top_k", "top_k": 3}), (1, {"lookup": "blocks", "top_k": 3})],
    ids=["window", "all", "top_k", "blocks"],
)
def test_queries_see_their_window_and_the_memory(
    number: int, lookup: dict[str, Any], soft_cap: float, sinks: Tensor | None, small_llama: Path
) -> None:
    """One request's second window begins inside a block; the other's memory is no larger than top_k."""
    attention = {**ATTENTION, **lookup}
    engine = Engine(small_llama, attention, {"a": 110, "b": 40}, number, soft_cap=soft_cap, sinks=sinks)
    starts = {"a": 40, "b": 2}
    engine.step(starts)
    for name, start in starts.items():
        if number == 1:
            engine.unrotate(name, 0, start)
    for tokens in ({"a": 30, "b": 9}, {"b": 1, "a": 1}):
        for name, output in engine.step(tokens, starts).items():
            end = engine.computed[name]
            queries, keys = torch.arange(end - tokens[name], end), torch.arange(end)
            start = torch.full_like(queries, starts[name])
            seen = [local_branch(queries, keys, start)]
            if number == 1:
                seen.append(memory_branch(queries, keys, start, lookup.get("top_k")))
            assert engine.error(name, output, seen) < 1e-5
