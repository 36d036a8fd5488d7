"""Temp-LoRA's passes in vLLM's Model Runner V2: scheduler, runner, model and sampler of vLLM's, on CPU tensors.

All of a step is vLLM's own code, its Triton kernels interpreted. What a GPU alone can do is replaced: streams and events, the
operator that writes the KV cache, memory that both sides see, LoRA's kernels. The trainer makes its weights up.
"""

import inspect
import pkgutil
from collections.abc import Iterator
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import temp_lora_replay
import torch
import triton
from temp_lora_replay import Learner, Options, Replay, replay
from test_cuda import CPU, gpu, one_rank, stock_cache_update  # noqa: F401 (fixtures)
from test_engine_args import create
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from vllm.config import set_current_vllm_config
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
from vllm.v1.core.kv_cache_utils import (
    get_kv_cache_config_from_groups,
    get_kv_cache_groups,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.worker import gpu as v2
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as GPUModelRunnerV1

from vllm_longctx import engine_args
from vllm_longctx.adaptation import messages, scheduler, worker_cuda
from vllm_longctx.adaptation.lora import Adapts
from vllm_longctx.adaptation.passes_cuda import PassesCUDARunner
from vllm_longctx.adaptation.scheduler import TempLoraScheduler
from vllm_longctx.adaptation.slots import Slots
from vllm_longctx.adaptation.step import Pass
from vllm_longctx.adaptation.worker import SegmentedLoRAManager
from vllm_longctx.adaptation.worker_cuda import AdaptingCUDAWorker
from vllm_longctx.config import LongContextError, active_config
from vllm_longctx.worker_cuda import take_over_attention

BLOCK_SIZE, RANK, NUM_BLOCKS, MAX_TOKENS = 16, 4, 30, 24
SIZES = {"block_tokens": 16, "window_tokens": 48, "context_tokens": 20, "keep_first": 3}
KERNELS = ("buffer_utils", "input_batch", "block_table", "prompt_logprob", "logprob", "gumbel", "penalties")


class HostBuffer:
    """Of memory that host and device see."""

    def __init__(self, size: Any, dtype: torch.dtype):
        self.cpu = torch.zeros(size, dtype=dtype)
        self.np = self.cpu.numpy()

    def uva(self, n: int | None = None) -> Tensor:
        return self.cpu[:n]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Model Runner V2 on the CPU, where vLLM leaves its kernels undecorated."""
    for module in pkgutil.walk_packages(v2.__path__, v2.__name__ + "."):
        if module.name.rpartition(".")[2] in KERNELS:
            names = vars(import_module(module.name))
            monkeypatch.setitem(names, "tl", triton.language)
            monkeypatch.setitem(names, "triton", triton)
            for name, function in list(names.items()):
                if inspect.isfunction(function) and inspect.getsource(function).startswith("@triton.jit"):
                    monkeypatch.setitem(names, name, triton.jit(function))
    monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: False)
    monkeypatch.setattr(buffer_utils, "NonUvaBuffer", HostBuffer)
    for name in ("Stream", "Event", "set_stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    profiled = nullcontext(SimpleNamespace(consumed_memory=0))
    monkeypatch.setattr("vllm.v1.worker.gpu.model_runner.DeviceMemoryProfiler", lambda: profiled)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda: 0)
    monkeypatch.setattr(
        "vllm.lora.model_manager.get_punica_wrapper",
        lambda tokens, max_batches, device, **kwargs: PunicaWrapperCPU(tokens, max_batches, device, **kwargs),
    )
    monkeypatch.setattr("vllm.lora.model_manager.PIN_MEMORY", False)


class Trainer:
    """Answers at the next poll. weights: of each version, by module of Hugging Face's."""

    def __init__(self, model: Path):
        parts = AutoModelForCausalLM.from_pretrained(model).named_modules()
        linear = {name: part for name, part in parts if isinstance(part, torch.nn.Linear) and name != "lm_head"}
        self.modules = {name: (part.in_features, part.out_features) for name, part in linear.items()}
        self.slots = Slots.create(self.modules, RANK, 2)
        self.reports: list[Any] = []

    def weights(self, version: int) -> dict[str, tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(version)
        size = 0.15 if version else 0.0
        return {
            name: (size * torch.randn(RANK, i, generator=generator), size * torch.randn(o, RANK, generator=generator))
            for name, (i, o) in self.modules.items()
        }

    def start(self) -> None: ...

    def send(self, job: Any) -> None:
        if isinstance(job, messages.Train):
            self.slots.write(job.slot, job.bank, job.owner, job.version, self.weights(job.version))
            self.reports.append(messages.Trained(job.owner, job.slot, job.bank, job.version, [1.0, 1.0], 0.1))

    def poll(self) -> list[Any]:
        reports, self.reports = self.reports, []
        return reports

    def wait(self, seconds: float) -> None: ...


class Runner(PassesCUDARunner):
    lora_manager_class = SegmentedLoRAManager  # the stock one for the CPU gives every token an adapter


class Engine:
    """What vLLM's engine core does in a step."""

    def __init__(self, model: Path, policy: str, monkeypatch: pytest.MonkeyPatch):
        adaptation = {**SIZES, "rank": RANK, "slots": 2, "kv_policy": policy, "trainer": {"device": "cpu"}}
        section = {"attention": {"method": "none"}, "adaptation": adaptation}
        self.config = config = create(
            model,
            {"longctx": section},
            dtype="float32",
            block_size=BLOCK_SIZE,
            num_gpu_blocks_override=NUM_BLOCKS,
            max_model_len=512,
            max_num_seqs=4,
            max_num_batched_tokens=MAX_TOKENS,
            enforce_eager=True,
            compilation_config={"mode": 0, "custom_ops": ["none"]},
        )
        config.device_config.device, config.load_config.device, config.load_config.load_format = CPU, "cpu", "auto"
        self.trainer = Trainer(model)
        monkeypatch.setattr(scheduler, "wait_patiently", lambda **kwargs: None)
        monkeypatch.setattr(scheduler, "trainer_client", lambda *args: self.trainer)
        with set_current_vllm_config(config):
            self.runner = Runner(config, CPU)
            self.runner.load_model()
            take_over_attention(self.runner.get_model(), config, CPU)
            specs = self.runner.get_kv_cache_spec()
            layers = config.compilation_config.static_forward_context.values()
            supported = get_supported_kv_cache_layouts(layer.get_attn_backend() for layer in layers)
            resolve_kv_cache_layout(config, [[layout.name for layout in supported]], specs.values())
            kv = get_kv_cache_config_from_groups(config, get_kv_cache_groups(config, specs), available_memory=1 << 30)
            config.cache_config.num_gpu_blocks = kv.num_blocks
            self.runner.initialize_kv_cache(kv)
        for layer in layers:
            layer.kv_cache.fill_(torch.nan)
        self.scheduler = TempLoraScheduler(config, kv, MagicMock(), BLOCK_SIZE, log_stats=True)

        init_none_hash(sha256)
        self.manager = self.scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, list[EngineCoreOutput]] = {}
        self.passes: list[tuple[int, Pass]] = []

    def add(self, name: str, prompt: list[int], adapts: bool, **params: Any) -> None:
        params = {"temperature": 0, "ignore_eos": True, "logprobs": 0, "prompt_logprobs": 0, **params}
        sampling = SamplingParams(**params, extra_args={"longctx": {"temp_lora": True}} if adapts else None)
        request = Request(name, prompt, sampling, None, block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256))
        self.requests[name], self.outputs[name] = request, []
        self.scheduler.add_request(request)

    def step(self) -> None:
        output = self.scheduler.schedule()
        known = {name: self.requests[name].num_tokens for name in output.num_scheduled_tokens}
        self.runner.begin_step(output)
        done = self.runner.execute_model(output)
        if done is None:
            self.check_inputs()
            done = self.runner.sample_tokens(None).get_output()
        for name, sampled in zip(done.req_ids, done.sampled_token_ids, strict=True):
            assert len(sampled) == (self.requests[name].num_computed_tokens == known[name])
        for outputs in self.scheduler.update_from_output(output, done).values():
            for one in outputs.outputs:
                self.outputs[one.request_id].append(one)
        self.check_states()

    def run(self) -> None:
        while self.scheduler.requests:
            self.step()
        self.step()  # in which the runner hears who has finished

    def check_inputs(self) -> None:
        """Of the step whose sampling is still to come, against what the scheduler knows."""
        runner = self.runner
        batch, (builder,) = runner.execute_model_state.input_batch, [g.get_metadata_builder() for g in runner.attn_groups[0]]
        for row, name in enumerate(batch.req_ids):
            request, p = self.requests[name], runner.step.passes.get(name, Pass(0, 0, 0))
            begin, end = batch.query_start_loc[row : row + 2].tolist()
            first, last = request.num_computed_tokens - (end - begin), request.num_computed_tokens
            positions = list(range(first, last))
            text = list(request.all_token_ids)
            if first == p.first < p.frontier:
                self.passes.append((p.frontier, p))
            text[p.first : p.start] = text[: p.start - p.first]
            assert batch.positions[begin:end].tolist() == positions
            assert batch.input_ids[begin:end].tolist() == text[first:last]
            assert batch.seq_lens[row] == last
            assert builder.starts[row] == builder.starts_on_host[row] == p.first
            for metadata in runner.execute_model_state.attn_metadata.values():  # what a CUDA graph of decodes replays over
                assert metadata.starts.data_ptr() == builder.starts.data_ptr()
            table = [block.block_id for block in self.manager.req_to_blocks[name]]
            assert runner.block_tables.input_block_tables[0][row, : len(table)].tolist() == table
            assert all(table[p.first // BLOCK_SIZE :]) and not any(table[: p.first // BLOCK_SIZE])
            slots = [table[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in positions]
            assert runner.block_tables.slot_mappings[0, begin:end].tolist() == slots

    def check_states(self) -> None:
        states = self.runner.req_states
        for name, request in self.scheduler.requests.items():
            if (index := states.req_id_to_index.get(name)) is not None and request.status == RequestStatus.RUNNING:
                assert states.num_computed_tokens.gpu[index] == request.num_computed_tokens
                assert states.total_len.gpu[index] == request.num_tokens
                counts = self.runner.sampler.penalties_state.output_bin_counts[index]
                assert counts.sum() == request.num_output_tokens

    def logprobs(self, name: str) -> list[float]:
        return [float(one.new_logprobs.logprobs[0, 0]) for one in self.outputs[name]]

    def prompt_logprobs(self, name: str) -> Tensor:
        (tensors,) = [t for one in self.outputs[name] if (t := one.new_prompt_logprobs_tensors) is not None]
        prompt = self.requests[name].prompt_token_ids
        assert prompt is not None and tensors.logprob_token_ids[:, 0].tolist() == prompt[1:]
        return tensors.logprobs[:, 0].double()


def replayed(engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch) -> Replay:
    """By the independent replay, which reads with the weights that the trainer made up."""
    request, policy = engine.requests[name], active_config(engine.config).adaptation.kv_policy
    options = Options(**SIZES, rank=RANK, kv_policy=policy, kv_block=BLOCK_SIZE)
    path = "base_model.model.{}.lora_{}.default.weight".format

    class Given(Learner):
        completed = 0

        def __init__(self, model_dir: Path, options: Options, text: list[int]):
            self.options, self.text, self.origin, self.losses = options, text, 0, []

        def version(self, number: int) -> dict[str, Tensor]:
            pairs = engine.trainer.weights(number).items()
            return {path(module, side): t for module, pair in pairs for side, t in zip("AB", pair, strict=True)}

        def adapter(self) -> dict[str, tuple[Tensor, Tensor]]:
            return {}

    monkeypatch.setattr(temp_lora_replay, "Learner", Given)
    return replay(engine.config.model_config.model, request.prompt_token_ids, request.num_output_tokens, options)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose attention is far from uniform; small, since interpreted."""
    path = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.12)
    torch.manual_seed(5)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def engine(
    request: pytest.FixtureRequest,
    one_rank: None,  # noqa: F811
    gpu: type,  # noqa: F811
    host: None,
    stock_cache_update: None,  # noqa: F811
    one_thread: None,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Engine]:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "0")
    made = Engine(model, request.param, monkeypatch)
    with set_current_vllm_config(made.config):
        yield made
    made.trainer.slots.close()


def text(length: int) -> list[int]:
    return torch.randint(3, 128, (length,)).tolist()


@pytest.mark.parametrize("engine", ["reuse", "recompute"], indirect=True)
def test_passes_beside_a_request_that_does_not_adapt(engine: Engine, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both in chunks, then one's decodes beside the other's chunks and passes; against Hugging Face's model and peft's."""
    prompt = text(56)
    engine.add("adapts", prompt, True, max_tokens=10)
    engine.step()
    engine.add("plain", text(20), False, max_tokens=6)
    engine.run()

    expected = replayed(engine, "adapts", monkeypatch)
    assert [(frontier, p.start) for frontier, p in engine.passes] == expected.passes[1:]
    assert any(p.first % BLOCK_SIZE for _, p in engine.passes) and min(expected.margins) > 1e-3
    assert any(frontier > len(prompt) for frontier, _ in engine.passes)
    assert list(engine.requests["adapts"].output_token_ids) == expected.tokens
    assert engine.logprobs("adapts") == pytest.approx(expected.logprobs, abs=1e-4)
    assert engine.prompt_logprobs("adapts").tolist() == pytest.approx(expected.prompt_logprobs, abs=1e-4)

    plain = engine.requests["plain"]
    ids = torch.tensor(plain.all_token_ids)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids[None]).logits[0, :-1]
    rows = logits.double().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    assert [*engine.prompt_logprobs("plain").tolist(), *engine.logprobs("plain")] == pytest.approx(rows.tolist(), abs=1e-4)
    assert not engine.runner.req_states.req_id_to_index and engine.manager.block_pool.get_num_free_blocks() == NUM_BLOCKS - 1


@pytest.mark.parametrize("engine", ["reuse"], indirect=True)
def test_a_preempted_pass_is_computed_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a prompt and of a pass, which the runner gets as a new request: rows of the passes before stay."""
    prompt = text(70)
    scored = np.array([[token, -1] for token in prompt[1:]])
    engine.add("adapts", prompt, True, max_tokens=2, prompt_logprob_token_ids=scored)
    request = engine.requests["adapts"]
    while request.num_computed_tokens != 53:
        engine.step()
    assert engine.scheduler.adapted["adapts"].frontier == 61 and engine.scheduler.adapted["adapts"].first == 29
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.run()
    assert request.num_preemptions == 1 and not engine.runner.prompt_logprobs_worker.aside
    expected = replayed(engine, "adapts", monkeypatch)
    assert engine.passes == [(48, Pass(13, 16, 48)), (61, Pass(29, 32, 61)), (61, Pass(29, 32, 61))]
    ours = engine.prompt_logprobs("adapts").tolist()
    assert ours == pytest.approx(expected.prompt_logprobs, abs=1e-4)
    (scores,) = [t for one in engine.outputs["adapts"] if (t := one.prompt_token_id_logprobs) is not None]
    assert scores[:, 0].tolist() == pytest.approx(ours, abs=1e-5) and scores[:, 1].isneginf().all()
    assert list(request.output_token_ids) == expected.tokens
    assert engine.logprobs("adapts") == pytest.approx(expected.logprobs, abs=1e-4)


@pytest.mark.parametrize(("begin", "ids"), [(13, [100, 101]), (15, [102, 1]), (16, [0, 1])])
def test_first_tokens_of_a_pass_cut_into_steps(begin: int, ids: list[int]) -> None:
    """Two positions a step, of a pass that keeps 3 tokens before its window at 16."""
    runner: Any = PassesCUDARunner.__new__(PassesCUDARunner)
    runner.req_states = SimpleNamespace(all_token_ids=SimpleNamespace(gpu=torch.arange(200).view(2, 100)))
    batch: Any = SimpleNamespace(
        num_computed_tokens_np=np.array([7, begin]),
        num_scheduled_tokens=np.array([1, 2]),
        query_start_loc_np=np.array([0, 1, 3]),
        idx_mapping_np=np.array([0, 1]),
        input_ids=torch.tensor([9, 0, 1, 9]),
    )
    runner._put_first_tokens(batch, 1, Pass(13, 16, 40))
    assert batch.input_ids.tolist() == [9, *ids, 9]


STEPPED = {"longctx": {"preset": "temp-lora-quality", "adaptation": {"trainer": {"device": "cpu"}}}}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("policy", ["reuse", "recompute"])
def test_engine_arguments(policy: str) -> None:
    section = {"preset": "temp-lora-economic", "adaptation": {"trainer": {"device": "cpu"}, "kv_policy": policy}}
    config = create(additional_config={"longctx": section}, max_num_seqs=4)
    assert config.use_v2_model_runner and not config.scheduler_config.async_scheduling
    assert config.parallel_config.worker_cls == engine_args.ADAPTING_CUDA_WORKER
    assert config.scheduler_config.get_scheduler_cls() is TempLoraScheduler


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("kwargs", "v2", "message"),
    [
        ({}, False, "the Model Runner V1 is chosen; leave VLLM_USE_V2_MODEL_RUNNER out"),
        ({"kv_cache_dtype": "fp8"}, True, "kv_cache_dtype = 'fp8'; leave it at 'auto'"),
    ],
)
def test_what_passes_cannot_do_is_refused(
    kwargs: dict[str, Any], v2: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(v2)))
    where = "adaptation with attention.method none does not run on CUDA with this setting: "
    with pytest.raises(LongContextError, match=where + message):
        create(additional_config=STEPPED, max_num_seqs=4, **kwargs)


@pytest.mark.parametrize("stock", [GPUModelRunner, GPUModelRunnerV1])
def test_the_worker_takes_over_runner_v2_only(stock: type, monkeypatch: pytest.MonkeyPatch) -> None:
    worker: Any = object.__new__(AdaptingCUDAWorker)
    worker.vllm_config = SimpleNamespace(additional_config={"longctx": {"preset": "temp-lora-economic"}})
    worker.model_runner = object.__new__(type("Adapting", (Adapts, stock), {}))
    monkeypatch.setattr(worker_cuda.LongContextCUDAWorker, "init_device", lambda self: None)
    if stock is GPUModelRunner:
        worker.init_device()
        assert type(worker.model_runner) is PassesCUDARunner
    else:
        with pytest.raises(RuntimeError, match="longctx cannot take over"):
            worker.init_device()
