"""Names and rows of linear layers, of vLLM's models and of Hugging Face's, family by family."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.layers import LoRAMapping
from vllm.model_executor.model_loader import get_model_loader

from tests.support.cuda_engine import CPU
from tests.support.families import FAMILIES, WITHOUT_LORA, load, save
from vllm_longctx.config import LongContextError
from vllm_longctx.cpu.runner import LongContextRunner
from vllm_longctx.engine.adapted_layers import AdaptedLayers
from vllm_longctx.engine.lora import LoRAConfigWithSlots
from vllm_longctx.engine.step import SlotsMemory, SlotUse, StepInfo, Weights
from vllm_longctx.models.properties import why_not_adaptable
from vllm_longctx.temp_lora.linear_layers import linear_layers
from vllm_longctx.temp_lora.slots import Slots

pytestmark = pytest.mark.usefixtures("one_thread")
RANK = 4


@pytest.fixture(params=FAMILIES)
def wrapped(
    one_rank: None, no_gpu_memory: None, tmp_path: Path, request: pytest.FixtureRequest
) -> SimpleNamespace:
    """A checkpoint as vLLM loads it, wrapped for the slots alone, and as transformers loads it."""
    save(tmp_path, request.param)
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
    return SimpleNamespace(family=request.param, model=model, runner=runner, theirs=load(tmp_path))


def last_parts(names: Any) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def test_every_row_is_the_same_in_both_models_and_adapted_alike(wrapped: SimpleNamespace) -> None:
    manager, theirs = wrapped.runner.lora_manager, wrapped.theirs
    adapted: AdaptedLayers = manager.adapted
    linear = linear_layers(theirs)
    assert adapted.modules == linear, "each linear layer outside of experts and routers has an adapter"
    assert not any("expert" in name or "lm_head" in name or "embed" in name for name in linear)
    assert manager._adapter_manager.modules.keys() == adapted.parts.keys()
    slots = Slots.create(linear, RANK, 2)
    weights = {name: (torch.randn(RANK, i) / 8, torch.randn(o, RANK) / 8) for name, (i, o) in linear.items()}
    slots.write(1, 0, 7, 3, weights)
    inputs = {name: torch.randn(5, manager._adapter_manager.modules[name].input_size) for name in adapted.parts}

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
        torch.testing.assert_close(plain[name], torch.cat([layer(x) for layer in layers], -1), rtol=0, atol=1e-4)
        added = torch.cat([x @ weights[part][0].T @ weights[part][1].T for part in parts], -1)
        torch.testing.assert_close(with_adapter[name] - plain[name], added, rtol=0, atol=1e-4)
    for one in (slots, manager.slots):
        one.close()
