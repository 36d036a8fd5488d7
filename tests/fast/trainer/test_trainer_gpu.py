"""The trainer on a GPU and in the engine's memory there, between real processes.

Skipped where there is no GPU.
"""

import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.shared_model import CONFIGS, Engine, load, save
from tests.support.trainer_client import client_of, hear
from vllm_longctx.temp_lora import messages as m
from vllm_longctx.temp_lora import shared_weights as shared
from vllm_longctx.temp_lora.linear_layers import linear_layers
from vllm_longctx.temp_lora.slots import Slots
from vllm_longctx.trainer.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

RECIPE = m.Recipe(rank=4, alpha=8, dropout=0.0, learning_rate=1e-2, warmup_blocks=0)
TOKENS = [[(7 * i + 3 * block) % 100 for i in range(40)] for block in range(4)]
GPU = torch.device("cuda:0")


def train(
    model: torch.nn.Module, recipe: m.Recipe = RECIPE, recompute: bool = False
) -> tuple[list[list[float]], dict]:
    trainer = Trainer(model, recompute)
    trainer.begin(1, recipe)
    losses = [trainer.train(1, number, tokens, 16) for number, tokens in enumerate(TOKENS, 1)]
    return losses, {name: (a.cpu().clone(), b.cpu().clone()) for name, (a, b) in trainer.weights(1).items()}


def assert_close(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=1e-3, atol=1e-4
        )  # AdamW's steps where moments are tiny


@pytest.mark.parametrize("recompute", [False, True])
def test_it_trains_as_on_the_cpu(tiny_llama: Path, recompute: bool):
    on_cpu = train(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32))
    on_gpu = train(
        AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).to(GPU), recompute=recompute
    )
    for one, other in zip(on_cpu[0], on_gpu[0], strict=True):
        assert one == pytest.approx(other, abs=1e-3)
    assert_close(on_cpu[1], on_gpu[1])


def test_dropout_draws_from_the_adapters_own_seed(tiny_llama: Path):
    recipe = m.msgspec.structs.replace(RECIPE, dropout=0.3)
    torch.cuda.manual_seed(1)
    state = torch.cuda.get_rng_state(GPU)
    first = train(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).to(GPU), recipe)
    assert torch.equal(torch.cuda.get_rng_state(GPU), state)
    torch.cuda.manual_seed(2)
    again = train(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).to(GPU), recipe)
    assert first[0][0] == pytest.approx(again[0][0], abs=1e-4)
    other = train(
        AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).to(GPU),
        m.msgspec.structs.replace(recipe, adapter_seed=1),
    )
    assert first[0][0] != pytest.approx(other[0][0], abs=1e-4)


@pytest.mark.parametrize("config", ["llama", "tied", "qwen2"])
def test_another_process_trains_on_our_weights_into_our_memory(tmp_path: Path, config: str):
    original = load(save(tmp_path, CONFIGS[config]), torch.bfloat16)
    engine = Engine(original).to(GPU)
    before = {name: p.clone() for name, p in engine.named_parameters()}
    weights = shared.engine_weights(engine)
    modules = linear_layers(original)
    memory = torch.zeros(Slots.size(modules, 4, 2), dtype=torch.uint8, device=GPU)
    client = client_of(
        tmp_path,
        "bfloat16",
        max_rank=4,
        num_slots=2,
        device=str(GPU),
        recompute=True,
        share=shared.SharedWeights(weights, memory).message,
    )
    client.start()
    client.send(m.Begin(1, 1, RECIPE))
    losses = []
    for version, tokens in enumerate(TOKENS[:2], 1):
        client.send(m.Train(1, 1, version % 2, version, tokens, 16))
        losses.append(hear(client, m.Trained, m.Failed, m.Dead)[-1].losses)
    alone = Trainer(load(tmp_path, torch.bfloat16).to(GPU))
    alone.begin(1, RECIPE)
    for version, tokens in enumerate(TOKENS[:2], 1):
        assert alone.train(1, version, tokens, 16) == pytest.approx(losses[version - 1], abs=2e-2)
    worker = Slots.open(client.slots.path, modules, 4, 2, memory)
    with worker.read(1, 0, 1, 2) as read:
        version_2 = {name: (a.cpu().clone(), b.cpu().clone()) for name, (a, b) in read.items()}
    assert all(a.isfinite().all() and b.any() for a, b in version_2.values())

    os.kill(client.process_id, signal.SIGKILL)  # what it held of ours must stay, and be shared again
    assert isinstance(hear(client, m.Restarted)[-1], m.Restarted)
    with worker.read(1, 0, 1, 2) as read:
        assert all(torch.equal(a.cpu(), version_2[name][0]) for name, (a, _) in read.items())
    client.send(m.Resume(1, 1, 0, 2, RECIPE))
    client.send(m.Train(1, 1, 1, 3, TOKENS[2], 16))
    assert hear(client, m.Trained, m.Failed, m.Dead)[-1].version == 3
    assert all(torch.equal(p, before[name]) for name, p in engine.named_parameters() if not p.isnan().any())
    worker.close()
    client.close()
