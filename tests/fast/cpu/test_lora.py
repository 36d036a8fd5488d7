"""LoRA on the CPU without an engine: vLLM's own layers, their operators per segment, and the two pools of
places in them.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from vllm import SamplingParams
from vllm.config import set_current_vllm_config
from vllm.exceptions import VLLMValidationError
from vllm.inputs import tokens_input
from vllm.lora.layers import LoRAMapping
from vllm.lora.request import LoRARequest
from vllm.model_executor.model_loader import get_model_loader
from vllm.v1.engine.input_processor import InputProcessor

from tests.support.cuda_engine import CPU
from tests.support.engine_args import create
from tests.support.lora_adapters import write_adapter, write_bad_adapters
from vllm_longctx.cpu.lora import SegmentedPunica
from vllm_longctx.cpu.runner import LongContextRunner
from vllm_longctx.engine import lora
from vllm_longctx.engine.lora import with_slots
from vllm_longctx.engine.step import SlotsMemory, SlotUse, StepInfo, Weights
from vllm_longctx.scheduling.scheduler import LongContextScheduler
from vllm_longctx.temp_lora.slots import Slots

pytestmark = pytest.mark.usefixtures("one_thread")
PLACES, RANK, INPUTS, OUTPUTS = 3, 4, 6, 10


def punica(tokens: list[int], samples: list[int]) -> SegmentedPunica:
    """tokens, samples: an adapter's number for each, 0 for none; adapter n has place n - 1."""
    wrapper = SegmentedPunica(256, 256, CPU)
    wrapper.scored = None
    wrapper.update_metadata(LoRAMapping(tuple(tokens), tuple(samples), True), [1, 2, 3], PLACES + 1, 32)
    return wrapper


def added(x: Tensor, a: Tensor, b: Tensor, numbers: list[int]) -> Tensor:
    """By the definition, row by row, in float64."""
    rows = [
        b[n - 1, 0].double() @ (a[n - 1, 0].double() @ row.double()) if n else torch.zeros(len(b[0, 0]))
        for n, row in zip(numbers, x, strict=True)
    ]
    return torch.stack([row.double() for row in rows])


numbers_of_rows = st.lists(st.tuples(st.integers(0, PLACES), st.integers(1, 5)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(numbers_of_rows)
def test_rows_get_their_own_adapters_output_and_others_none(runs: list[tuple[int, int]]) -> None:
    """Every operator, for any order of prompts and single tokens: stock's give the last place's to rows
    without an adapter.
    """
    tokens = [number for number, length in runs for _ in range(length)]
    samples = [number for number, _ in runs]
    wrapper = punica(tokens, samples)
    a = [torch.randn(PLACES, 1, RANK, INPUTS) for _ in range(2)]
    b = [torch.randn(PLACES, 1, outputs, RANK) for outputs in (OUTPUTS, 4)]
    x, base = torch.randn(len(tokens), INPUTS), torch.randn(len(tokens), OUTPUTS + 4)
    want = base + torch.cat([added(x, *pair, tokens) for pair in zip(a, b, strict=True)], 1)
    without = torch.tensor(tokens) == 0

    def check(found: Tensor, want: Tensor, without: Tensor, base: Tensor) -> None:
        torch.testing.assert_close(found, want.float(), rtol=1e-4, atol=1e-4)
        assert torch.equal(found[without], base[without])

    linear = base.clone()
    wrapper.add_lora_linear(linear, x, tuple(a), tuple(b), 1.0, (OUTPUTS, 4))
    check(linear, want, without, base)
    sharded, low = base.clone(), torch.zeros(2, len(tokens), RANK)
    wrapper.add_shrink(low, x, tuple(a), 1.0)
    wrapper.add_expand(sharded, low, tuple(b), (OUTPUTS, 4), offset_start=0, add_input=True)
    check(sharded, want, without, base)
    embedded, row_of_a = base[:, :OUTPUTS].clone(), torch.randn(len(tokens), RANK)
    wrapper.add_lora_embedding(embedded, row_of_a, b[0], add_input=True)
    identity = torch.eye(RANK).expand(PLACES, 1, RANK, RANK)
    check(embedded, base[:, :OUTPUTS] + added(row_of_a, identity, b[0], tokens), without, base[:, :OUTPUTS])
    logits, hidden = torch.randn(len(samples), OUTPUTS), torch.randn(len(samples), INPUTS)
    sampled = logits.clone()
    wrapper.add_lora_logits(sampled, hidden, a[0], b[0], 1.0)
    check(sampled, logits + added(hidden, a[0], b[0], samples), torch.tensor(samples) == 0, logits)
    wrapper.scored, first = x, len(tokens) // 2
    before = base[first:, :OUTPUTS]
    scored = before.clone()
    wrapper.add_lora_logits(scored, x[first:], a[0], b[0], 1.0)
    check(
        scored,
        base[first:, :OUTPUTS] + added(x[first:], a[0], b[0], tokens[first:]),
        without[first:],
        base[first:, :OUTPUTS],
    )


@pytest.fixture
def adapters(tiny_llama: Path, tmp_path: Path) -> list[Path]:
    return [write_adapter(tmp_path / str(seed), tiny_llama, seed) for seed in range(4)]


@pytest.fixture(
    params=[{"enable_lora": True, "max_loras": 1, "max_cpu_loras": 2, "max_lora_rank": 8}], ids=["lora"]
)
def loaded(
    one_rank: None, no_gpu_memory: None, tiny_llama: Path, request: pytest.FixtureRequest
) -> SimpleNamespace:
    """A model of vLLM's wrapped for LoRA by our runner: two slots behind the places that the user asked
    for.
    """
    section = {"attention": {"method": "none"}, "adaptation": {"rank": 4, "slots": 2, "block_tokens": 16}}
    kwargs = {"dtype": "float32", "max_num_seqs": 8, "enforce_eager": True, **request.param}
    config = create(tiny_llama, {"longctx": section}, **kwargs)
    config = with_slots(config)
    runner = object.__new__(LongContextRunner)
    with set_current_vllm_config(config):
        model = get_model_loader(config.load_config).load_model(
            vllm_config=config, model_config=config.model_config
        )
        runner.load_lora_model(model, config, CPU)
    return SimpleNamespace(config=config, model=model, runner=runner, manager=runner.lora_manager)


def compute(runner: LongContextRunner, rows: list[Any], step: StepInfo = lora.EMPTY) -> list[int]:
    """The places that a step's requests compute with, -1: none.

    rows: their adapters; None: without; an int: with this slot.
    """
    new = [
        SimpleNamespace(req_id=str(row), lora_request=None if isinstance(a, int) else a)
        for row, a in enumerate(rows)
    ]
    output: Any = SimpleNamespace(scheduled_new_reqs=new)
    runner.begin_step(output, step)
    numbers = tuple(0 if one.lora_request is None else one.lora_request.lora_int_id for one in new)
    requests = {one.lora_request for one in new if one.lora_request is not None}
    runner.lora_manager.set_active_adapters(requests, LoRAMapping(numbers, numbers, True))
    (wrapper,) = runner.lora_manager.wrappers()
    return wrapper.token_lora_indices.tolist()


def test_a_place_each_for_users_and_slots(loaded: SimpleNamespace, adapters: list[Path]) -> None:
    runner, manager = loaded.runner, loaded.manager
    a, b, c = (
        LoRARequest(f"longctx-slot-{n}", n + (1 << 20), str(path)) for n, path in enumerate(adapters[:3])
    )
    uses = {str(row): SlotUse(slot, 7 + slot, Weights()) for row, slot in ((1, 0), (2, 1))}
    step = StepInfo(slots=uses)
    assert compute(runner, [a, 0, 1, None], step) == [0, 1, 2, -1]
    assert compute(runner, [b, 0, 1, None, b], step) == [0, 1, 2, -1, 0]
    assert runner.list_loras() == {1 << 20, (1 << 20) + 1}
    compute(runner, [c])
    assert runner.list_loras() == {(1 << 20) + 1, (1 << 20) + 2}  # as many as the user's max_cpu_loras
    assert manager.in_layers.keys() == {0, 1} and not runner.take_failed_adapters()
    weights = load_file(adapters[2] / "adapter_model.safetensors")
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.down_proj"
        module = manager._adapter_manager.modules[name]
        assert torch.equal(
            module.lora_b_stacked[0][0, 0, :, :4], weights[f"base_model.model.{name}.lora_B.weight"]
        )
        assert not module.lora_b_stacked[0][1:].any()


def test_slots_beside_an_adapter_of_all_modules(
    loaded: SimpleNamespace, tiny_llama: Path, tmp_path: Path
) -> None:
    """Embeddings and output layer are the users' alone; what vLLM's dummy runs leave there is never a
    slot's.
    """
    modules = ("q_proj", "embed_tokens", "lm_head")
    adapter = LoRARequest("whole", 1, str(write_adapter(tmp_path / "whole", tiny_llama, 5, modules=modules)))
    runner, manager = loaded.runner, loaded.manager
    sizes = {}
    for name, module in manager._adapter_manager.modules.items():
        parts = manager._adapter_manager.packed_modules.get(name, [name])
        if name.rpartition(".")[2] in ("embed_tokens", "lm_head"):
            continue
        for part, a, b in zip(parts, module.lora_a_stacked, module.lora_b_stacked, strict=True):
            sizes[part] = a.shape[-1], b.shape[-2]
    slots = Slots.create(sizes, 4, 2)
    made = {name: (torch.randn(4, i), torch.randn(o, 4)) for name, (i, o) in sizes.items()}
    slots.write(1, 1, 9, 3, made)
    step = StepInfo(
        slots={"1": SlotUse(1, 9, Weights(3, 1))}, slots_memory=SlotsMemory(slots.path, sizes, 4, 2)
    )
    with runner.maybe_dummy_run_with_lora(
        loaded.config.lora_config, np.ones(3, int), np.ones(3, int), num_active_loras=3
    ):
        assert manager._adapter_manager.lora_slots == 3 and manager.list_adapters() == {1, 2, 3}
        for module in manager._adapter_manager.modules.values():
            for buffer in (module.lora_a_stacked, module.lora_b_stacked):
                for tensor in buffer if isinstance(buffer, tuple) else (buffer,):
                    tensor.fill_(3.0)
    assert manager.list_adapters() == set()
    assert compute(runner, [adapter, 1, None], step) == [0, 2, -1]
    for name, module in manager._adapter_manager.modules.items():
        if name.rpartition(".")[2] in ("embed_tokens", "lm_head"):
            assert not module.lora_b_stacked[2].any() and module.lora_b_stacked[0].any()
        else:
            parts = manager._adapter_manager.packed_modules.get(name, [name])
            for part, a, b in zip(parts, module.lora_a_stacked, module.lora_b_stacked, strict=True):
                assert torch.equal(a[2, 0, :4], made[part][0]) and torch.equal(b[2, 0, :, :4], made[part][1])
                assert not a[2, 0, 4:].any() and not b[2, 0, :, 4:].any()
    slots.clear(
        1
    )  # as when its request has ended; with data parallelism vLLM may have a dummy run before the next step
    with runner.maybe_dummy_run_with_lora(
        loaded.config.lora_config, np.ones(3, int), np.ones(3, int), num_active_loras=3
    ):
        assert not manager.in_layers
    for one in (slots, manager.slots):
        one.close()


@pytest.mark.parametrize(
    "loaded",
    [{"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["q_proj", "lm_head"]}],
    indirect=True,
)
def test_the_users_target_modules_are_theirs(loaded: SimpleNamespace, adapters: list[Path]) -> None:
    """As in stock vLLM: a layer of which some part is a target, and no other."""
    assert compute(loaded.runner, [LoRARequest("a", 1, str(adapters[0]))]) == [0]
    for name, module in loaded.manager._adapter_manager.modules.items():
        is_target = name.rpartition(".")[2] == "qkv_proj"
        assert any(b[0].any() for b in module.lora_b_stacked) == is_target, name


@pytest.mark.parametrize("loaded", [{}], indirect=True)
def test_without_enable_lora_there_is_no_place_for_users(
    loaded: SimpleNamespace, adapters: list[Path]
) -> None:
    request = LoRARequest("a", 1, str(adapters[0]))
    for call in (
        lambda: loaded.runner.add_lora(request),
        lambda: loaded.runner.remove_lora(1),
        lambda: loaded.runner.pin_lora(1),
        lambda: loaded.runner.list_loras(),
    ):
        with pytest.raises(RuntimeError, match=r"LoRA is not enabled\. Use --enable-lora to enable LoRA\."):
            call()
    assert {name.rpartition(".")[2] for name in loaded.manager._adapter_manager.modules} == {
        "qkv_proj",
        "o_proj",
        "gate_up_proj",
        "down_proj",
    }
    step = StepInfo(slots={"0": SlotUse(1, 7, Weights())})
    assert compute(loaded.runner, [1, None], step) == [1, -1]


def test_one_that_cannot_be_loaded_is_told_and_leaves_nothing(
    loaded: SimpleNamespace, adapters: list[Path], tiny_llama: Path, tmp_path: Path
) -> None:
    runner, good = loaded.runner, LoRARequest("good", 1, str(adapters[0]))
    for number, (name, path) in enumerate(write_bad_adapters(tmp_path / "bad", tiny_llama).items(), 2):
        request = LoRARequest(name, number, str(path))
        for _ in range(2):
            assert compute(runner, [request, None, request]) == [-1, -1, -1]
            failed = runner.take_failed_adapters()
            assert failed.keys() == {number} and f"the adapter '{name}' cannot be used: " in failed[number]
        with pytest.raises(Exception):  # noqa: B017, PT011 (vLLM's own, of many types)
            runner.add_lora(request)
        assert compute(runner, [good, None]) == [0, -1] and not runner.take_failed_adapters()
        assert runner.list_loras() == {1}


@pytest.mark.parametrize("stage", ["files", "layers"])
def test_all_ranks_have_an_adapter_or_none(
    loaded: SimpleNamespace, adapters: list[Path], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Where another rank fails, this one behaves as if it had; every rank asks the others equally often."""
    runner, asked = loaded.runner, []

    def of_two_ranks(failed: Tensor, group: Any) -> None:
        asked.append(int(failed))
        failed += len(asked) == {"files": 1, "layers": 2}[stage]

    monkeypatch.setattr(lora, "get_tp_group", lambda: SimpleNamespace(world_size=2, cpu_group=None))
    monkeypatch.setattr(torch.distributed, "all_reduce", of_two_ranks)
    request = LoRARequest("a", 1, str(adapters[0]))
    assert compute(runner, [request]) == [-1]
    assert "another rank cannot load it" in runner.take_failed_adapters()[1]
    assert runner.list_loras() == set() and asked == [0] * {"files": 1, "layers": 2}[stage]
    asked.clear()
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda failed, group: asked.append(int(failed)))
    assert compute(runner, [request]) == [0] and asked == [0, 0]
    assert compute(runner, [request]) == [0] and asked == [0, 0]


def test_reloading_in_place(loaded: SimpleNamespace, adapters: list[Path], tmp_path: Path) -> None:
    """What cannot be read leaves what was there, as in stock vLLM."""
    runner = loaded.runner
    runner.add_lora(LoRARequest("a", 1, str(adapters[0])))
    down = loaded.manager._adapter_manager.modules["model.layers.0.mlp.down_proj"].lora_b_stacked[0]
    before = down[0].clone()
    with pytest.raises(Exception, match="missing"):
        runner.add_lora(LoRARequest("a", 1, str(tmp_path / "missing"), load_inplace=True))
    assert runner.list_loras() == {1} and torch.equal(down[0], before)
    runner.add_lora(LoRARequest("a", 1, str(adapters[1]), load_inplace=True))
    assert runner.list_loras() == {1} and not torch.equal(down[0], before)


def front_end(additional_config: dict[str, Any], **kwargs: Any) -> Callable[..., Any]:
    """What `LLM.generate`, AsyncLLM and the server call with every request."""
    processor = InputProcessor(create(additional_config=additional_config, **kwargs))
    return lambda adapter=None, **params: processor.process_inputs(
        "id",
        tokens_input([5, 6]),
        SamplingParams(max_tokens=5, **params),
        ("generate",),
        lora_request=adapter,
    )


def test_the_door_knows_of_the_users_adapters_only() -> None:
    adapter, config = LoRARequest("a", 1, "path"), {"longctx": {"preset": "temp-lora-quality"}}
    messages = []
    for additional_config in ({}, config):
        with pytest.raises(VLLMValidationError) as refused:
            front_end(additional_config)(adapter)
        messages.append(str(refused.value))
    assert messages[0] == messages[1] and "but LoRA is not enabled!" in messages[0]
    assert front_end(config, enable_lora=True)(adapter).lora_request is adapter


def test_a_request_with_an_adapter_learns_none_where_all_learn() -> None:
    config = {"longctx": {"preset": "temp-lora-quality", "adaptation": {"requests": "all"}}}
    add, adapter = front_end(config, enable_lora=True), LoRARequest("a", 1, "path")
    assert add(adapter).lora_request is adapter
    with pytest.raises(ValueError, match=r"longctx.temp_lora beside the adapter 'a': a request has one"):
        add(adapter, extra_args={"longctx": {"temp_lora": True}})


def running(*ids: int | None) -> list[Any]:
    return [SimpleNamespace(lora_request=None if i is None else LoRARequest(str(i), i, "path")) for i in ids]


@pytest.mark.parametrize(
    ("max_loras", "ids", "candidate", "admitted"),
    [
        (1, [], 5, True),
        (1, [None, None], 5, True),
        (1, [5, None], 5, True),
        (1, [5], 6, False),
        (2, [5], 6, True),
        (2, [5, 6, 6], 7, False),
        (2, [5, 6], None, True),
        (None, [], 5, True),
    ],
)
def test_adapters_of_all_that_runs_are_counted(
    max_loras: int | None, ids: list[Any], candidate: Any, admitted: bool
) -> None:
    """Also those of requests that this step does not compute: a later one may have all of them."""
    scheduler: Any = object.__new__(LongContextScheduler)
    scheduler.lora_config = None if max_loras is None else SimpleNamespace(max_loras=max_loras)
    scheduler.running = running(*ids)
    assert scheduler._has_room_for_adapter(running(candidate)[0]) == admitted
