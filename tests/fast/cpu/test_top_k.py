"""Layers with LM-Infinite's top-k branch in vLLM's CPU engine."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.cpu_layers import SINKS, SOFT_CAP, Engine
from vllm_longctx.geometry import branches, middle_branch

ATTENTION = {
    "n_global": 5, "n_local": 48, "distance_ceiling": 60,
    "top_k": 3, "top_k_from_layer": 1, "top_k_to_layer": 2, "top_k_insert_at": 20,
}  # fmt: skip


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("soft_cap", "sinks"), [(0.0, None), (SOFT_CAP, SINKS)])
def test_a_request_that_writes_sees_the_best_keys_of_its_middle(
    soft_cap: float, sinks: Tensor | None, small_llama: Path
) -> None:
    engine = Engine(small_llama, ATTENTION, {"a": 130}, number=1, soft_cap=soft_cap, sinks=sinks)
    geometry, top_k, prompt = engine.settings.geometry, engine.settings.top_k, 110
    engine.step({"a": prompt - 1})
    left = 5
    for position in range(prompt - 1, prompt + 3):
        start = int(geometry.window_start(torch.tensor(position)))
        engine.unrotate("a", left, start)
        left = start
        output = engine.step({"a": 1}, writing=True)["a"]
        queries, keys = torch.arange(position, position + 1), torch.arange(position + 1)
        seen = branches(geometry, queries, keys)
        seen.append(middle_branch(geometry, queries, keys, top_k.k, top_k.insert_at, prompt - 1))
        assert engine.error("a", output, seen) < 1e-5
