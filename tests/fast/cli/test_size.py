"""What `vllm-longctx size` computes, against the schedulers and the trainer's own account."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig

from tests.support.commands import run
from tests.support.engine_args import create
from tests.support.scheduler_steps import Steps
from vllm_longctx.settings import active_settings
from vllm_longctx.startup.platform import CPU, CUDA
from vllm_longctx.startup.sizing import Engine, Load, Part, Place, adaptation_on, engine_of, layers_of
from vllm_longctx.temp_lora.base_model import trained_model
from vllm_longctx.temp_lora.training_memory import Shape

GIB = 1 << 30
LEARNS = {"preset": "temp-lora-quality"}
LOAD = Load(
    sessions=1000, learn=0.1, turn_tokens=300, every_s=60, token_s=0.03, block_tokens=128, block_s=0.1
)


def config_of(section: dict[str, Any], history: int = 4096, model: str = "vllm_longctx/booklm") -> VllmConfig:
    settings = {"max_model_len": history, "kv_cache_memory_bytes": 1 << 60, "max_num_batched_tokens": 1024}
    return create(model, {"longctx": section}, dtype="float32", **settings)


def test_the_kv_of_a_request_is_what_the_scheduler_holds() -> None:
    (kind,) = layers_of(config_of({}, history=1 << 20))
    core = Steps({})
    core.ask("reads", 5000)
    (manager,) = core.managers
    held = []
    while True:
        core.steps(1)
        held.append(manager.num_live_blocks("reads"))
        if core.requests["reads"].num_output_tokens > 100:
            break
    assert max(held) <= kind.blocks + kind.in_flight <= max(held) + 1
    assert max(held[-64:]) <= kind.blocks <= max(held[-64:]) + 1


def test_a_layer_that_keeps_the_text_needs_what_stock_vllm_needs() -> None:
    kinds = {kind.name: kind for kind in layers_of(config_of({"attention": {"top_k": 3}}))}
    assert kinds["kept"].blocks == kinds["kept"].stock == 4096 // 32
    assert kinds["sliding"].blocks < kinds["sliding"].stock
    memory = {"method": "focused", "memory_limit_gib": 1}
    config = config_of({"attention": memory}, 100_000, model="benchmarks/booklm-memory")
    apart = next(kind for kind in layers_of(config) if kind.name == "memory")
    assert (apart.blocks, apart.host) == (0, 100_000 // 32)


def test_what_training_takes_is_what_the_trainer_says() -> None:
    config = config_of(LEARNS)
    settings = adaptation_on(config, CUDA)
    assert settings is not None and settings.trainer.device == "cuda:0" and settings.trainer.recompute
    engine = engine_of(config, CUDA, {Place.DEVICE: GIB})
    trainer = [item for item in engine.items if item.name.startswith("trainer")]
    part = Part(requests=9, slots=5, versions=7, blocks_per_s=0)
    shape = Shape.of(trained_model(config))
    expected = shape.training_bytes(settings.model_copy(update={"slots": 5}))
    assert sum(item.bytes_of(part) for item in trainer) == expected
    own = engine_of(config, CPU, {Place.DEVICE: GIB})
    weights = {item.name: item.fixed for item in own.items}
    assert weights["trainer, weights"] == weights["weights"] > 0
    assert {item.place for item in own.items} == {Place.DEVICE}
    assert active_settings(config).temp_lora.trainer.device == "cpu"


def enough(engine: Engine, load: Load, engines: int) -> bool:
    return max(engine.uses(Part.of(load, engines), load.block_s).values()) <= 1


@pytest.mark.parametrize("gib", [1.5, 2, 8])
@pytest.mark.parametrize("block_s", [0.001, 1.0])
def test_the_fewest_engines_that_are_enough(gib: float, block_s: float) -> None:
    engine = engine_of(config_of(LEARNS), CUDA, {Place.DEVICE: int(gib * GIB), Place.HOST: GIB})
    load = replace(LOAD, block_s=block_s)
    engines = engine.engines(load)
    assert engines is not None and enough(engine, load, engines)
    assert engines == 1 or not enough(engine, load, engines - 1)


def test_the_command_says_what_runs_out_and_what_to_set(tmp_path: Path) -> None:
    file = tmp_path / "size.json"
    words = ["size", "--memory-gib", "8", "--sessions", "1000", "--turn-tokens", "300", "--json", str(file)]
    code, output = run(*words, "--learn", "0.1", "--block-s", "2")
    assert code == 0
    assert "blocks to train │ 3.91 /s │ 1,000 sessions × 0.1 × 300 tokens / block_tokens 128 / 60 s" in output
    assert "one trainer trains │ 0.50 /s" in output
    assert "Engines: 8 (stock vLLM, which does not learn: 3). What runs out first: training." in output
    assert "adaptation.slots 3" in output
    result = json.loads(file.read_text())
    assert result["engines"] == 8 and result["uses"]["training"] == pytest.approx(3.90625 * 2 / 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory-gib", "8", "--preset", "lm-infinite", "--learn", "1"], "but no request can learn with"),
        (["--memory-gib", "0.01"], "No number of engines holds this load: device memory is"),
    ],
)
def test_what_cannot_be(words: list[str], message: str) -> None:
    _, output = run("size", "--sessions", "10", *words)
    assert message in output
