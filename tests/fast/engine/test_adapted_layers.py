"""Names and rows of linear layers, of vLLM's models and of Hugging Face's, family by family."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.layers import LoRAMapping
from vllm.lora.request import LoRARequest
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.models.transformers import base

from tests.support.cuda_engine import CPU
from tests.support.families import FAMILIES, WITHOUT_LORA, load, save
from vllm_longctx.config import LongContextError
from vllm_longctx.cpu.runner import LongContextRunner
from vllm_longctx.engine.adapted_layers import AdaptedLayers
from vllm_longctx.engine.lora import LoRAConfigWithSlots, slices
from vllm_longctx.engine.step import SlotsMemory, SlotUse, StepInfo, Weights
from vllm_longctx.models.properties import why_not_adaptable
from vllm_longctx.temp_lora.linear_layers import linear_layers
from vllm_longctx.temp_lora.messages import Recipe
from vllm_longctx.temp_lora.slots import Slots
from vllm_longctx.trainer.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
RANK = 4
# Linear layers whose names in vLLM are no others' of the model, so that no adapter of theirs can be loaded.
LEFT_OUT = {"Glm4": ("gate_up_proj",)}


@pytest.fixture(params=FAMILIES)
def wrapped(
    one_rank: None,
    no_gpu_memory: None,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> SimpleNamespace:
    """A checkpoint as vLLM loads it, wrapped for the slots alone, and as transformers loads it."""
    monkeypatch.setattr(base, "support_torch_compile", lambda **kwargs: lambda kind: kind)  # for good
    theirs = load(save(tmp_path, request.param))
    arguments = EngineArgs(
        str(tmp_path), dtype="float32", skip_tokenizer_init=True, enforce_eager=True, max_num_seqs=4
    )
    config = arguments.create_engine_config()
    assert why_not_adaptable(config.model_config) is None
    runner: Any = object.__new__(LongContextRunner)
    with set_current_vllm_config(config):
        model = get_model_loader(config.load_config).load_model(
            vllm_config=config, model_config=config.model_config
        )
        lora_config = LoRAConfigWithSlots(max_loras=2, max_lora_rank=8, target_modules=[])
        lora_config.slots, lora_config.users = 2, None
        lora_config.verify_with_model_config(config.model_config)
        config.lora_config = lora_config
        runner.load_lora_model(model, config, CPU)
    return SimpleNamespace(family=request.param, model=model, runner=runner, theirs=theirs)


def left_out(wrapped: SimpleNamespace, name: str) -> bool:
    return name.rpartition(".")[2] in LEFT_OUT.get(wrapped.family, ())


def check_rows(wrapped: SimpleNamespace) -> None:
    """Every row is the same in both models, and adapted alike."""
    manager, theirs = wrapped.runner.lora_manager, wrapped.theirs
    adapted: AdaptedLayers = manager.adapted
    linear = {name: sizes for name, sizes in linear_layers(theirs).items() if not left_out(wrapped, name)}
    assert adapted.modules == linear
    assert not any("expert" in name or "lm_head" in name or "embed" in name for name in linear)
    assert manager._adapter_manager.modules.keys() == adapted.parts.keys()
    slots = Slots.create(linear, RANK, 2)
    weights = {name: (torch.randn(RANK, i) / 8, torch.randn(o, RANK) / 8) for name, (i, o) in linear.items()}
    slots.write(1, 0, 7, 3, weights)
    inputs = {
        name: torch.randn(5, manager._adapter_manager.modules[name].input_size) for name in adapted.parts
    }

    def computed(uses_slot: bool) -> dict[str, Tensor]:
        new = SimpleNamespace(req_id="request", lora_request=None)
        uses = {"request": SlotUse(1, 7, Weights(3, 0))} if uses_slot else {}
        step = StepInfo(slots=uses, slots_memory=SlotsMemory(slots.path, slots.modules, RANK, 2))
        wrapped.runner.begin_step(SimpleNamespace(scheduled_new_reqs=[new]), step)
        number = new.lora_request.lora_int_id if uses_slot else 0
        manager.set_active_adapters(set(), LoRAMapping((number,) * 5, (number,) * 5, True))
        outputs = {}
        for name, x in inputs.items():
            output = manager._adapter_manager.modules[name](x)
            outputs[name] = output[0] if isinstance(output, tuple) else output
        return outputs

    manager._adapter_manager.assign_indices(warming_up=False)
    plain, with_adapter = computed(False), computed(True)
    for name, parts in adapted.parts.items():
        x = inputs[name]
        layers = [theirs.get_submodule(part) for part in parts]
        torch.testing.assert_close(
            plain[name], torch.cat([layer(x) for layer in layers], -1), rtol=0, atol=1e-4
        )
        added = torch.cat([x @ weights[part][0].T @ weights[part][1].T for part in parts], -1)
        torch.testing.assert_close(with_adapter[name] - plain[name], added, rtol=0, atol=1e-4)
    for one in (slots, manager.slots):
        one.close()


def check_log(wrapped: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    """What is adapted, and what is left out, is said by kinds of layers."""
    adapted: AdaptedLayers = wrapped.runner.lora_manager.adapted
    with caplog.at_level("INFO", "vllm.longctx"):
        adapted.check("MODEL")
    said = [record.getMessage() for record in caplog.records if record.name == "vllm.longctx"]
    assert said[0].startswith(f"longctx: Temp-LoRA adapts {len(adapted.modules)} linear layers: ")
    assert "layers.*." in said[0] and "layers.0." not in said[0]
    nameless = "vLLM's model has no layer of this name"
    expected = [f"model.layers.*.mlp.{name}: {nameless}" for name in LEFT_OUT.get(wrapped.family, ())]
    experts = {
        "Qwen2Moe": "model.layers.*.mlp.experts, model.layers.*.mlp.shared_expert, "
        "model.layers.*.mlp.shared_expert_gate",
        "Qwen3Moe": "model.layers.*.mlp.experts",
        "Mixtral": "model.layers.*.mlp.experts",
        "Olmoe": "model.layers.*.mlp.experts",
    }
    if wrapped.family in experts:
        expected.append(f"{experts[wrapped.family]}: experts have no adapters")
    assert said[1:] == [f"longctx: Temp-LoRA leaves out {line}" for line in expected]


def check_saved(wrapped: SimpleNamespace, tmp_path: Path) -> None:
    """A saved adapter is one that vLLM loads."""
    manager = wrapped.runner.lora_manager
    trainer = Trainer(wrapped.theirs)
    trainer.adapt(manager.adapted.modules)
    trainer.begin(1, Recipe(rank=RANK, alpha=2 * RANK))
    trainer.randomize(1)
    trainer.save(1, tmp_path / "saved", 0)
    loaded = manager._load_adapter(LoRARequest("saved", 1, str(tmp_path / "saved")))
    manager._adapter_manager._create_merged_loras_inplace(loaded)
    weights = trainer.weights(1)
    for name, parts in manager.adapted.parts.items():
        found = loaded.loras[name].optimize()
        pairs = (
            zip(found.lora_a, found.lora_b, strict=True) if len(parts) > 1 else [(found.lora_a, found.lora_b)]
        )
        for part, pair in zip(parts, pairs, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(pair, weights[part], strict=True))
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {name.rpartition(".")[2] for name in manager.adapted.modules}


def test_both_models_are_adapted_alike(
    wrapped: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_rows(wrapped)
    check_log(wrapped, caplog)
    check_saved(wrapped, tmp_path)


def model_config(path: Path, **kwargs: Any) -> Any:
    return EngineArgs(str(path), dtype="float32", skip_tokenizer_init=True, **kwargs).create_model_config()


@pytest.mark.parametrize("family", WITHOUT_LORA)
def test_a_model_without_lora_in_vllm_is_refused(tmp_path: Path, family: str) -> None:
    reason = why_not_adaptable(model_config(save(tmp_path, family)))
    assert reason is not None
    assert re.fullmatch(r"has no LoRA support in vLLM \(\w+\); leave adaptation out", reason)


def test_a_model_that_transformers_does_not_have_is_refused(tmp_path: Path) -> None:
    overrides = {"architectures": ["InternLM3ForCausalLM"]}
    reason = why_not_adaptable(model_config(save(tmp_path, "Llama"), hf_overrides=overrides))
    assert reason is not None and "has no class in transformers" in reason


def test_a_model_of_which_nothing_can_be_adapted_is_refused() -> None:
    adapted = AdaptedLayers(left_out={"a reason": ["model.layers.0.mlp.up", "model.layers.1.mlp.up"]})
    with pytest.raises(
        LongContextError, match=r"MODEL has no layer .* \(model.layers.\*.mlp.up: a reason\); leave"
    ):
        adapted.check("MODEL")


def test_a_part_of_several_slices_is_laid_out_over_them() -> None:
    """As vLLM's `set_lora` does, for layers with more slices than parts, and for parts without an adapter."""
    module = SimpleNamespace(
        lora_a_stacked=[torch.zeros(2, 1, RANK, 6) for _ in range(4)],
        lora_b_stacked=[torch.zeros(2, 1, rows, RANK) for rows in (8, 4, 4, 3)],
    )
    a, b = torch.randn(RANK, 6), torch.randn(16, RANK)
    found = list(slices(module, [(a, b), None]))
    assert [len(rows) for (_, rows), _, _ in found] == [8, 4, 4]
    assert all(x is a for (x, _), _, _ in found) and torch.equal(torch.cat([y for (_, y), _, _ in found]), b)
    assert [buffer is own for (_, _, buffer), own in zip(found, module.lora_b_stacked, strict=False)] == [
        True
    ] * 3
