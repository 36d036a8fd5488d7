"""Temp-LoRA in vLLM's GPU engine, without a GPU: arguments, what a worker offers, and slots into vLLM's own
LoRA layers.
"""

import importlib.util
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.model_loader import get_model_loader
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from tests.support.cuda_engine import CPU, to_cpu
from tests.support.engine_args import create
from vllm_longctx.config import AdaptationSection, LongContextConfig, LongContextError, TrainerSection
from vllm_longctx.cuda import lora as cuda_lora
from vllm_longctx.cuda.lora import share_weights, why_not_shared
from vllm_longctx.cuda.runner import LongContextRunner, runner_class
from vllm_longctx.cuda.worker import LongContextWorker
from vllm_longctx.engine.lora import Adapts, SwapTimes, with_slots
from vllm_longctx.engine.rows import StepTimes
from vllm_longctx.engine.step import SlotsMemory, SlotUse, StepInfo, StepReport, Weights
from vllm_longctx.scheduling.temp_lora import AsyncTempLoraScheduler, TempLoraScheduler
from vllm_longctx.settings import active_settings
from vllm_longctx.startup import checks
from vllm_longctx.temp_lora import shared_weights as shared
from vllm_longctx.temp_lora.client import trainer_bytes
from vllm_longctx.temp_lora.slots import Slots, StaleSlot

pytestmark = pytest.mark.usefixtures("one_thread")
LAMBDA = {"n_local": 24, "n_global": 5, "distance_ceiling": 30}
SIZES = {"rank": 4, "slots": 2, "block_tokens": 16}


def adapting(model: Path, trainer: dict[str, Any] | None = None, **kwargs: Any) -> VllmConfig:
    section = {"attention": LAMBDA, "adaptation": {**SIZES, "trainer": trainer or {}}}
    kwargs = {
        "dtype": "float32",
        "block_size": 16,
        "num_gpu_blocks_override": 20,
        "max_num_seqs": 4,
        **kwargs,
    }
    return create(model, {"longctx": section}, max_num_batched_tokens=64, **kwargs)


@pytest.fixture
def gpus(gpu: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize("v2", [True, False])
def test_engine_arguments(gpus: None, tiny_llama: Path, v2: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(v2)))
    config = adapting(tiny_llama)
    assert config.use_v2_model_runner == v2
    assert config.parallel_config.worker_cls == "vllm_longctx.cuda.worker.LongContextWorker"
    assert config.scheduler_config.async_scheduling
    assert config.scheduler_config.get_scheduler_cls() is AsyncTempLoraScheduler
    assert (
        adapting(tiny_llama, async_scheduling=False).scheduler_config.get_scheduler_cls() is TempLoraScheduler
    )
    assert config.lora_config is None
    layers = with_slots(config).lora_config
    assert layers is not None and (layers.max_loras, layers.max_lora_rank) == (2, 8)
    adaptation = active_settings(config).adaptation
    assert adaptation is not None and adaptation.kv_policy == "keep"


@pytest.mark.parametrize(
    ("trainer", "kwargs", "reason"),
    [
        (
            {"device": "cuda:2"},
            {},
            "adaptation.trainer.device = 'cuda:2', but torch sees 2 GPUs, cuda:0 to cuda:1",
        ),
        ({"attention": "xformers"}, {}, "xformers is not installed here"),
    ],
)
def test_what_cannot_adapt_is_refused(
    gpus: None, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, trainer: dict, kwargs: dict, reason: str
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "xformers" else found(name, *rest)
    )
    with pytest.raises(LongContextError, match=reason):
        adapting(tiny_llama, trainer, **kwargs)


def test_one_engine_trains_on_a_gpu(gpus: None, tiny_llama: Path) -> None:
    config = adapting(tiny_llama)
    config.parallel_config.data_parallel_size = 2
    with pytest.raises(
        LongContextError, match="data_parallel_size = 2 on CUDA, where all trainers would be on the first GPU"
    ):
        checks.check_adaptation(LongContextConfig(adaptation=active_settings(config).adaptation), config)


def test_xformers_is_refused_where_it_would_drop_a_soft_cap(gpus: None, tiny_llama: Path) -> None:
    config = adapting(tiny_llama)
    config.model_config.hf_text_config.attn_logit_softcapping = 50.0
    section = AdaptationSection(trainer=TrainerSection(attention="xformers"))
    with pytest.raises(LongContextError, match=r"'xformers', which has no soft cap .*; leave attention out"):
        checks.check_adaptation(LongContextConfig(adaptation=section), config)


@pytest.mark.parametrize("stock", [GPUModelRunner, GPUModelRunnerV2])
def test_both_runners_manage_slots(stock: type) -> None:
    config: Any = SimpleNamespace(use_v2_model_runner=stock is GPUModelRunnerV2)
    runner = runner_class(LongContextConfig().mode, config)
    assert issubclass(runner, stock) and issubclass(runner, Adapts)
    assert runner.load_lora_model is Adapts.load_lora_model
    others = {
        "load_model",
        "load_lora_model",
        "add_lora",
        "remove_lora",
        "pin_lora",
        "list_loras",
        "reload_weights",
    }
    added = {
        name for kind in (Adapts, LongContextRunner) for name in vars(kind) if not name.startswith("__")
    } - others
    assert not added & set(dir(stock)), "only what has to do with adapters is another"


@pytest.mark.parametrize(("section", "refused"), [({"adaptation": SIZES}, True), ({}, False)])
def test_weights_are_reloaded_where_no_trainer_has_a_copy(section: dict[str, Any], refused: bool) -> None:
    reloaded = []
    stock = type("Stock", (), {"reload_weights": lambda self: reloaded.append(self)})
    runner = type("LongContext", (Adapts, stock), {})()
    runner.vllm_config = SimpleNamespace(additional_config={"longctx": section})
    with pytest.raises(RuntimeError, match="its trainer has a copy") if refused else nullcontext():
        runner.reload_weights()
    assert bool(reloaded) != refused


@pytest.fixture
def wrapped(one_rank: None, gpus: None, no_gpu_memory: None, lora_on_the_cpu: None, tiny_llama: Path):
    """A vLLM model as loaded for CUDA, but to the CPU, wrapped for LoRA by a runner of ours."""
    eager = {"enforce_eager": True, "compilation_config": {"mode": 0, "custom_ops": ["none"]}}
    config = with_slots(to_cpu(adapting(tiny_llama, {"device": "cpu"}, **eager)))
    runner = object.__new__(type("Adapting", (LongContextRunner, GPUModelRunner), {}))
    with set_current_vllm_config(config):
        model = get_model_loader(config.load_config).load_model(
            vllm_config=config, model_config=config.model_config
        )
        runner.load_lora_model(model, config, CPU)
    yield SimpleNamespace(config=config, model=model, runner=runner)
    shared.shared_by_engine.clear()


@pytest.fixture
def others_can_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """This GPU's memory."""
    monkeypatch.setattr(shared, "why_not_attached", lambda tensor: None)


@pytest.mark.usefixtures("others_can_map")
def test_a_worker_offers_what_makes_the_same_model(wrapped: Any, tiny_llama: Path) -> None:
    memory = share_weights(wrapped.model, wrapped.config, CPU, wrapped.runner.lora_manager.adapted.modules)
    offered = shared.shared_by_engine[wrapped.config.instance_id]
    assert offered.slots is memory
    model = shared.fill(shared.skeleton(str(tiny_llama), "float32", "sdpa"), offered.weights)
    ids = torch.arange(40)[None]
    original = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    assert torch.equal(model(ids).logits, original(ids).logits)
    engine = {p.untyped_storage().data_ptr() for p in wrapped.model.parameters()}
    assert {p.untyped_storage().data_ptr() for p in model.parameters()} == engine


def test_where_no_other_process_can_map_its_memory_a_worker_offers_nothing(
    wrapped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the trainer loads its own copy, and room is left for it."""
    monkeypatch.setattr(shared, "why_not_attached", lambda tensor: "invalid argument")
    lines: list[str] = []
    monkeypatch.setattr(cuda_lora.logger, "info", lambda text, *values: lines.append(text % values))
    modules = wrapped.runner.lora_manager.adapted.modules
    assert share_weights(wrapped.model, wrapped.config, CPU, modules) is None
    assert wrapped.config.instance_id not in shared.shared_by_engine
    assert lines == [
        "longctx: the trainer loads its own copy of the weights, because another process cannot map this "
        "GPU's memory (invalid argument)"
    ]


@pytest.mark.usefixtures("others_can_map")
def test_slots_are_swapped_from_device_memory(wrapped: Any) -> None:
    runner, manager = wrapped.runner, wrapped.runner.lora_manager
    modules = manager.adapted.modules
    manager.device_slots = share_weights(wrapped.model, wrapped.config, CPU, modules)
    assert manager.device_slots is not None
    assert len(modules) == 3 * 7
    slots = Slots.create(modules, 4, 2)
    trainer = Slots.open(slots.path, modules, 4, 2, manager.device_slots)

    def write(version: int, rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        made = {
            name: (torch.randn(rank, inputs), torch.randn(outputs, rank))
            for name, (inputs, outputs) in modules.items()
        }
        trainer.write(1, version % 2, 7, version, made)
        return made

    weights = write(3, 4)
    memory = SlotsMemory(slots.path, modules, 4, 2)

    def step(version: int, freed: list[int]) -> None:
        use = SlotUse(1, 7, Weights(version, version % 2 if version else None))
        new = SimpleNamespace(req_id="request", lora_request=None)
        output = SimpleNamespace(scheduled_new_reqs=[new])
        info = StepInfo(slots={"request": use}, freed_slots=freed, slots_memory=memory)
        runner.begin_step(output, info)
        manager.set_active_adapters({new.lora_request}, None)

    def assert_held(weights: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        index, found = 1, set()
        for name, module in manager._adapter_manager.modules.items():
            parts = manager._adapter_manager.packed_modules.get(name, [name])
            for part, a, b in zip(parts, module.lora_a_stacked, module.lora_b_stacked, strict=True):
                rank = len(weights[part][0])
                assert torch.equal(a[index, 0, :rank], weights[part][0]) and torch.equal(
                    b[index, 0, :, :rank], weights[part][1]
                )
                assert (
                    not a[index, 0, rank:].any()
                    and not b[index, 0, :, rank:].any()
                    and not a[1 - index].any()
                )
                found.add(part)
        assert found == weights.keys()

    step(0, [])
    assert_held({name: (torch.zeros(4, i), torch.zeros(o, 4)) for name, (i, o) in modules.items()})
    step(3, [])
    assert_held(weights)
    smaller = write(4, 2)
    step(4, [])
    assert_held(smaller)
    manager.remove_all_adapters()  # as vLLM's dummy runs do
    step(4, [])
    assert_held(smaller)
    assert len(runner.take_swap_seconds()) == 4 and runner.take_swap_seconds() == []
    with pytest.raises(StaleSlot, match=r"holds \[7, 4, 2\], not owner 7 version 6"):
        step(6, [])
    for one in (trainer, slots, manager.slots):
        one.close()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"trainer": {"device": "cuda:1"}}, "it trains on cuda:1, and the engine runs on cuda:0"),
        ({"parallel_config.world_size": 2}, "each of 2 workers has a part of them"),
        (
            {"parallel_config.distributed_executor_backend": "mp"},
            "the engine's worker is a process of its own",
        ),
        ({"model_config.quantization": "fp8"}, r"the engine's are quantized \(fp8\)"),
        ({"model_config.enable_cumem_allocator": True}, "in memory that can be put to sleep"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, "expandable_segments:True in PYTORCH_CUDA"),
        ({"PYTORCH_ALLOC_CONF": "a:1,expandable_segments:True"}, "expandable_segments:True in PYTORCH_CUDA"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, None),
    ],
)
def test_why_a_trainer_loads_its_own_copy(
    gpus: None, tiny_llama: Path, change: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in change if name.startswith("PYTORCH")]:
        monkeypatch.setenv(name, change.pop(name))
    config = adapting(tiny_llama, change.pop("trainer", None))
    for name, value in change.items():
        part, _, key = name.partition(".")
        setattr(getattr(config, part), key, value)
    found = why_not_shared(config, torch.device("cuda:0"))
    assert found is None if reason is None else found is not None and re.search(reason, found)


def test_what_the_trainer_needs_is_left_free(
    gpus: None, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = adapting(tiny_llama)
    here, there = torch.device("cuda:0"), torch.device("cuda:1")
    own_copy = trainer_bytes(config, here)
    shared.shared_by_engine[config.instance_id] = shared.SharedWeights({}, torch.empty(0))
    need = trainer_bytes(config, here)
    del shared.shared_by_engine[config.instance_id]
    parameters = AutoModelForCausalLM.from_pretrained(tiny_llama).num_parameters()
    assert own_copy - need == 4 * parameters
    assert trainer_bytes(config, there) == 0
    assert trainer_bytes(adapting(tiny_llama, {"address": "ipc:///there"}), here) == 0

    available = own_copy + 1000
    worker = object.__new__(LongContextWorker)
    worker.vllm_config, worker.cache_config, worker.device = config, config.cache_config, here
    worker.settings = active_settings(config)
    monkeypatch.setattr(Worker, "determine_available_memory", lambda self: available)
    worker.total_consumed, worker.available_kv_cache_memory_bytes = 7, available  # as vLLM's method has set
    assert worker.determine_available_memory() == 1000
    # vLLM suggests, and stores, what is left of its memory beside `total_consumed`.
    assert (worker.total_consumed, worker.available_kv_cache_memory_bytes) == (7 + own_copy, 1000)
    available = own_copy
    with pytest.raises(
        LongContextError, match=r"the trainer needs .* on cuda:0, .* no more than .* lower .* raise gpu"
    ):
        worker.determine_available_memory()
    config.cache_config.kv_cache_memory_bytes = 5000
    available = 5000
    assert worker.determine_available_memory() == 5000


class FakeEvent:
    """Of a GPU that has come to `done`; each event is recorded a second after the one before."""

    done = recorded = 0

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        FakeEvent.recorded += 1
        self.at = FakeEvent.recorded

    def query(self) -> bool:
        return self.at <= FakeEvent.done

    def elapsed_time(self, end: "FakeEvent") -> float:
        return 1000.0 * (end.at - self.at)


def test_a_swap_takes_what_the_gpu_takes_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    times = SwapTimes(torch.device("cuda:0"))
    for _ in range(3):
        with times.timed():
            pass
    FakeEvent.done = 3  # the second swap is under way
    assert times.take() == [1.0] and times.take() == []
    FakeEvent.done = 6
    assert times.take() == [1.0, 1.0]


@pytest.mark.parametrize("is_async", [False, True])
def test_swaps_are_reported_with_a_steps_tokens(is_async: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By either model runner: V2 gives its output with the copies still under way, V1 where steps are
    scheduled ahead.
    """

    class UnderWay(AsyncModelRunnerOutput):
        def get_output(self) -> ModelRunnerOutput:
            return ModelRunnerOutput(["r"], {"r": 0})

        def get_kv_connector_output(self) -> None:
            """vLLM 0.33 asks for it where `get_output` fails."""

    worker = object.__new__(LongContextWorker)
    seconds = [0.25]
    report = {
        "take_swap_seconds": lambda: [seconds.pop()],
        "take_failed_adapters": lambda: {3: "no such file"},
    }
    worker.model_runner = SimpleNamespace(**report, rows=StepTimes())
    given = UnderWay() if is_async else ModelRunnerOutput(["r"], {"r": 0})
    monkeypatch.setattr(Worker, "sample_tokens", lambda self, grammar: given)
    output = worker.sample_tokens(None)
    assert isinstance(output, AsyncModelRunnerOutput) == is_async and not seconds
    told = output.get_output() if is_async else output
    assert StepReport.of(told) == StepReport(0.0, [0.25], {3: "no such file"})


@pytest.mark.parametrize("output", [EMPTY_MODEL_RUNNER_OUTPUT, None])
def test_a_step_without_tokens_reports_no_swaps(output: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's one empty output is that of all such steps."""
    worker = object.__new__(LongContextWorker)
    monkeypatch.setattr(Worker, "sample_tokens", lambda self, grammar: output)
    assert worker.sample_tokens(None) is output and (output is None or StepReport.of(output) == StepReport())
