"""Temp-LoRA of other architectures than Llama's, against the independent replay: fused layers, several norms,
experts.
"""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.support.engines import metric, running_here
from tests.support.families import save
from tests.support.temp_lora_engine import STEPPED, assert_equal, replayed, written_together

# peft's "all-linear" adapts experts and routers, too.
TARGETS = {"Qwen3Moe": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}}
CASES: list[tuple[int, int, dict[str, Any]]] = [(50, 70, {}), (150, 40, {"kv_policy": "recompute"})]


@pytest.mark.parametrize(
    "family",
    [
        "Phi3",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("Qwen2", "Qwen3Moe", "Gemma", "Granite")),
    ],
)
def test_it_writes_what_the_replay_writes(tmp_path: Path, family: str) -> None:
    model = save(tmp_path / "model", family)
    adaptation = {**STEPPED, "slots": 2, "adapters_root": str(tmp_path / "adapters")}
    with running_here(model, {"method": "none"}, adaptation=adaptation) as llm:
        (length, tokens, options), *others = CASES
        outputs = written_together(llm, [(length, tokens, {**options, "save_as": "book"}), *others])
        assert metric(llm, "vllm:longctx_blocks_trained") >= 6
    for seed, (case, output) in enumerate(zip(CASES, outputs, strict=True)):
        expected = replayed(model, seed, case, {**STEPPED, **TARGETS.get(family, {})})
        assert_equal(output, expected)
        if seed == 0:
            saved = load_file(tmp_path / "adapters" / "book" / "adapter_model.safetensors")
            names = {f"base_model.model.{name}.lora_A.weight" for name in expected.adapter}
            assert {name for name in saved if "lora_A" in name} == names
