"""Temp-LoRA's passes in vLLM's Model Runner V2: scheduler, runner, model and sampler of vLLM's, on CPU
tensors.

The trainer makes its weights up. With a step ahead of the outputs, what comes out is the same.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from vllm.config import set_current_vllm_config
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as GPUModelRunnerV1

from tests.support import temp_lora_replay
from tests.support.cuda_engine import BLOCK_SIZE, Engine, text
from tests.support.engine_args import create
from tests.support.temp_lora_replay import Learner, Options, Replay, replay
from vllm_longctx.config import LongContextConfig, LongContextError
from vllm_longctx.cpu.lora import SegmentedLoRAManager
from vllm_longctx.cuda.passes_runner import PassesRunner
from vllm_longctx.cuda.runner import runner_class
from vllm_longctx.engine.step import Pass, StepInfo
from vllm_longctx.scheduling import temp_lora as scheduler
from vllm_longctx.scheduling.temp_lora import AsyncTempLoraScheduler, TempLoraScheduler
from vllm_longctx.temp_lora import base_model, messages
from vllm_longctx.temp_lora.slots import Slots

RANK, NUM_BLOCKS, MAX_TOKENS = 4, 30, 24
SIZES = {"block_tokens": 16, "window_tokens": 48, "context_tokens": 20, "keep_first": 3}


class Trainer:
    """Answers at the next poll.

    weights: of each version, by module of Hugging Face's. jobs: all that it got.
    """

    def __init__(self, model: Path):
        parts = AutoModelForCausalLM.from_pretrained(model).named_modules()
        linear = {
            name: part for name, part in parts if isinstance(part, torch.nn.Linear) and name != "lm_head"
        }
        self.modules = {name: (part.in_features, part.out_features) for name, part in linear.items()}
        self.slots = Slots.create(self.modules, RANK, 2)
        self.reports: list[Any] = []
        self.jobs: list[Any] = []

    def weights(self, version: int) -> dict[str, tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(version)
        size = 0.15 if version else 0.0
        return {
            name: (
                size * torch.randn(RANK, i, generator=generator),
                size * torch.randn(o, RANK, generator=generator),
            )
            for name, (i, o) in self.modules.items()
        }

    def start(self) -> None: ...

    def send(self, job: Any) -> None:
        self.jobs.append(job)
        if isinstance(job, messages.Train):
            self.slots.write(job.slot, job.bank, job.owner, job.version, self.weights(job.version))
            self.reports.append(messages.Trained(job.owner, job.slot, job.bank, job.version, [1.0, 1.0], 0.1))
            if job.address is not None:
                self.reports.append(messages.Kept(job.address, []))
        elif isinstance(job, messages.Recall):
            version = job.versions[0][0]
            self.slots.write(job.slot, job.bank, job.owner, version, self.weights(version))
            self.reports.append(messages.Recalled(job.owner, version))
        elif isinstance(job, messages.Save):
            self.reports.append(messages.Saved(job.owner, job.name))

    def poll(self) -> list[Any]:
        reports, self.reports = self.reports, []
        return reports

    def wait(self, seconds: float) -> None: ...


class Runner(PassesRunner):
    lora_manager_class = SegmentedLoRAManager  # the stock one for the CPU gives every token an adapter


class PassesEngine(Engine):
    """changes: of `adaptation`.

    passes: those that steps began, each with the frontier. computed: tokens, by request.
    """

    def __init__(self, model: Path, monkeypatch: pytest.MonkeyPatch, steps_ahead: int, **changes: Any):
        self.sizes = {**SIZES, **changes}
        adaptation = {
            **self.sizes,
            "rank": RANK,
            "slots": 2,
            "trainer": {"device": "cpu"},
            "adapters_root": str(model),
        }
        self.trainer = Trainer(model)
        monkeypatch.setattr(scheduler, "limit_reader_sleep", lambda **kwargs: None)
        monkeypatch.setattr(scheduler, "trainer_client", lambda *args: self.trainer)
        section = {"attention": {"method": "none"}, "adaptation": adaptation}
        pool = {"num_gpu_blocks_override": NUM_BLOCKS, "max_num_batched_tokens": MAX_TOKENS}
        super().__init__(
            model, section, Runner, [TempLoraScheduler, AsyncTempLoraScheduler], steps_ahead, **pool
        )
        self.manager = self.managers[0]
        self.passes: list[tuple[int, Pass]] = []
        self.computed: Counter[str] = Counter()

    def add(
        self, name: str, prompt: list[int], adapts: bool, options: dict[str, Any] | None = None, **params: Any
    ) -> Request:
        return super().add(
            name, prompt, {"longctx": {"temp_lora": True, **(options or {})}} if adapts else None, **params
        )

    def compute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        cached = output.scheduled_cached_reqs
        firsts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        firsts |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        for name, p in StepInfo.of(output).passes.items():
            if firsts[name] == p.first < p.frontier:
                self.passes.append((p.frontier, p))
        self.computed.update(output.num_scheduled_tokens)
        known = {name: self.requests[name].num_tokens for name in output.num_scheduled_tokens}
        done = super().compute(output)
        if not self.steps_ahead:
            for name, sampled in zip(done.req_ids, done.sampled_token_ids, strict=True):
                assert len(sampled) == (self.requests[name].num_computed_tokens == known[name])
        return done

    def look_at_outputs(self) -> None:
        super().look_at_outputs()
        if not self.under_way:
            self.check_states()

    def check_inputs(self) -> None:
        """Of the step whose sampling is still to come, against what the scheduler knows."""
        if self.steps_ahead:  # then it knows more
            return
        runner = self.runner
        batch = runner.execute_model_state.input_batch
        for row, name in enumerate(batch.req_ids):
            request, p = self.requests[name], runner.step.passes.get(name, Pass(0, 0, 0))
            begin, end = batch.query_start_loc[row : row + 2].tolist()
            first, last = request.num_computed_tokens - (end - begin), request.num_computed_tokens
            positions = list(range(first, last))
            text = list(request.all_token_ids)
            text[p.first : p.start] = text[: p.start - p.first]
            assert batch.positions[begin:end].tolist() == positions
            assert batch.input_ids[begin:end].tolist() == text[first:last]
            assert batch.seq_lens[row] == last
            assert runner.rows.starts[row] == runner.rows.starts_on_host[row] == p.first
            for metadata in (
                runner.execute_model_state.attn_metadata.values()
            ):  # what a CUDA graph of decodes replays over
                assert metadata.starts.data_ptr() == runner.rows.starts.data_ptr()
            table = [block.block_id for block in self.manager.req_to_blocks[name]]
            assert runner.block_tables.input_block_tables[0][row, : len(table)].tolist() == table
            assert all(table[p.first // BLOCK_SIZE :]) and not any(table[: p.first // BLOCK_SIZE])
            slots = [table[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in positions]
            assert runner.block_tables.slot_mappings[0, begin:end].tolist() == slots

    def check_states(self) -> None:
        states = self.runner.req_states
        for name, request in self.scheduler.requests.items():
            adapting = self.scheduler.adapting.get(name)
            if adapting is not None and adapting.current_pass.sends_table:  # the runner hears of it then
                continue
            if (
                index := states.req_id_to_index.get(name)
            ) is not None and request.status == RequestStatus.RUNNING:
                assert states.num_computed_tokens.gpu[index] == request.num_computed_tokens
                assert states.total_len.gpu[index] == request.num_tokens
                counts = self.runner.sampler.penalties_state.output_bin_counts[index]
                assert counts.sum() == request.num_output_tokens


def replayed(engine: PassesEngine, name: str, monkeypatch: pytest.MonkeyPatch) -> Replay:
    """By the independent replay, which reads with the weights that the trainer made up."""
    request = engine.requests[name]
    options = Options(**engine.sizes, rank=RANK, kv_block=BLOCK_SIZE)
    path = "base_model.model.{}.lora_{}.default.weight".format

    class Given(Learner):
        completed = 0

        def __init__(self, model_dir: Path, options: Options, text: list[int]):
            self.options, self.text, self.origin, self.losses = options, text, 0, []

        def version(self, number: int) -> dict[str, Tensor]:
            pairs = engine.trainer.weights(number).items()
            return {
                path(module, side): t for module, pair in pairs for side, t in zip("AB", pair, strict=True)
            }

        def adapter(self) -> dict[str, tuple[Tensor, Tensor]]:
            return {}

    monkeypatch.setattr(temp_lora_replay, "Learner", Given)
    return replay(
        engine.config.model_config.model, request.prompt_token_ids, request.num_output_tokens, options
    )


@pytest.fixture
def engine(
    request: pytest.FixtureRequest,
    one_rank: None,
    gpu: type,
    host: None,
    lora_on_the_cpu: None,
    stock_cache_update: None,
    one_thread: None,
    small_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[PassesEngine]:
    """param: steps ahead, and changes of SIZES."""
    steps_ahead, changes = request.param
    made = PassesEngine(small_llama, monkeypatch, steps_ahead, **{"kv_policy": "reuse", **changes})
    with set_current_vllm_config(made.config):
        yield made
    made.trainer.slots.close()


RECOMPUTE = {"kv_policy": "recompute"}


@pytest.mark.parametrize(
    "engine", [(0, {}), pytest.param((0, RECOMPUTE), marks=pytest.mark.slow), (1, RECOMPUTE)], indirect=True
)
def test_passes_beside_a_request_that_does_not_adapt(
    engine: PassesEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both in chunks, then one's decodes beside the other's chunks and passes; against Hugging Face's model
    and peft's.
    """
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

    expected_plain = plain_logprobs(engine, list(engine.requests["plain"].all_token_ids))
    assert [*engine.prompt_logprobs("plain").tolist(), *engine.logprobs("plain")] == pytest.approx(
        expected_plain, abs=1e-4
    )
    assert engine.is_empty()


@pytest.mark.parametrize(
    "engine", [(0, {}), pytest.param((1, RECOMPUTE), marks=pytest.mark.slow)], indirect=True
)
def test_a_request_may_begin_later_in_its_text(engine: PassesEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a text that was read before, as one that comes there itself.

    Inside of a pass, behind KV that is cached; else where a pass begins. Of two side by side, one computes
    what the other one takes up.
    """
    prompt = text(100)
    for names in (["first"], ["inside of a pass"], ["with a pass"], ["one", "other"]):
        if names != ["inside of a pass"]:
            engine.scheduler.reset_prefix_cache()
        if names == ["one", "other"]:
            engine.scheduler.jobs.remembered.clear()
        engine.passes.clear()
        engine.computed.clear()
        for name in names:
            # The penalty has vLLM forget which tokens the last request in this place has written.
            engine.add(name, prompt, True, max_tokens=10, prompt_logprobs=None, presence_penalty=1e-6)
        engine.run()
        for name in names:
            expected = replayed(engine, name, monkeypatch)
            assert list(engine.requests[name].output_token_ids) == expected.tokens
            assert engine.logprobs(name) == pytest.approx(expected.logprobs, abs=1e-4)
        begun = [(frontier, p.start) for frontier, p in engine.passes]
        if names == ["with a pass"]:
            assert begun == expected.passes[-len(begun) :] and begun[0][0] == max(
                frontier for frontier, _ in expected.passes if frontier < len(prompt)
            )
        if names == ["first"]:
            alone = engine.computed["first"]
        if names == ["inside of a pass"]:
            assert engine.computed["inside of a pass"] < 40
    assert engine.computed["one"] + engine.computed["other"] < 1.4 * alone
    assert engine.is_empty()


def plain_logprobs(engine: PassesEngine, tokens: list[int]) -> list[float]:
    """Of the tokens after the first, by Hugging Face's model."""
    ids = torch.tensor(tokens)
    model = AutoModelForCausalLM.from_pretrained(engine.config.model_config.model, dtype=torch.float32)
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1]
    return logits.double().log_softmax(-1).gather(1, ids[1:, None])[:, 0].tolist()


@pytest.mark.parametrize("engine", [(0, {}), (1, RECOMPUTE)], indirect=True)
def test_the_probe_of_a_start_is_the_model_and_leaves_nothing_behind(engine: PassesEngine) -> None:
    """Longer than a step takes, and as long as a window."""
    engine.requests = engine.scheduler.requests
    tokens = text(engine.sizes["window_tokens"])
    logprobs = base_model.probe_logprobs(
        engine.scheduler, SimpleNamespace(execute_model=engine.compute), tokens
    )
    assert logprobs == pytest.approx(plain_logprobs(engine, tokens), abs=1e-4)
    assert engine.is_empty() and not engine.scheduler.adapting and not engine.trainer.jobs
    assert len(engine.managers[0].block_pool.cached_block_hash_to_block) == 0


@pytest.mark.parametrize("engine", [(0, {})], indirect=True)
def test_a_pool_that_holds_no_request_that_adapts_ends_the_start(engine: PassesEngine) -> None:
    engine.scheduler.reserved_blocks = NUM_BLOCKS
    with pytest.raises(
        LongContextError, match="the KV cache does not hold a single request that adapts; make it larger"
    ):
        base_model.probe_logprobs(engine.scheduler, SimpleNamespace(execute_model=engine.compute), text(20))
    assert not engine.scheduler.adapting


@pytest.mark.parametrize("engine", [pytest.param((0, {}), marks=pytest.mark.slow), (1, {})], indirect=True)
def test_a_preempted_pass_is_computed_again(engine: PassesEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a prompt and of a pass, which the runner gets as a new request: rows of the passes
    before stay.
    """
    prompt = text(70)
    scored = np.array([[token, -1] for token in prompt[1:]])
    engine.add("adapts", prompt, True, max_tokens=2, prompt_logprob_token_ids=scored)
    request = engine.requests["adapts"]
    adapting = engine.scheduler.adapting["adapts"]
    while request.num_computed_tokens != 53:
        engine.step()
    assert adapting.frontier == 61 and adapting.current_pass.first == 29
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


@pytest.mark.parametrize("engine", [(1, {"context_tokens": 8})], indirect=True)
def test_a_slot_is_not_given_on_before_the_steps_that_read_it(
    engine: PassesEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client leaves when a step has been sent off that puts a new version into the layers; another waits
    for the slot.
    """
    prompts = {name: text(20) for name in ("stays", "leaves", "waits")}
    for name, prompt in prompts.items():
        engine.add(name, prompt, True, max_tokens=14, prompt_logprobs=None)
    adapting, holds = engine.scheduler.adapting["leaves"], engine.runner.lora_manager.in_layers
    while (
        (use := adapting.slot_use) is None
        or use.weights.bank is None
        or holds.get(use.slot) == (use.owner, use.weights)
    ):
        engine.step()
    assert "leaves" in engine.under_way[-1].num_scheduled_tokens and use.weights.version == 1
    engine.abort("leaves")
    assert not engine.scheduler.free_slots and engine.scheduler.adapting["waits"].slot is None
    engine.step()
    assert engine.scheduler.adapting["waits"].slot is None
    engine.run()
    assert engine.scheduler.free_slots and engine.is_empty()
    for name in ("stays", "waits"):
        expected = replayed(engine, name, monkeypatch)
        assert list(engine.requests[name].output_token_ids) == expected.tokens
        assert engine.logprobs(name) == pytest.approx(expected.logprobs, abs=1e-4)


@pytest.mark.parametrize("engine", [(1, {})], indirect=True)
def test_requests_that_stop_while_their_next_step_is_under_way(
    engine: PassesEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a token that nobody knew when that step was scheduled, by length, after one token.

    What is saved is what was said.
    """
    prompt = text(28)
    whole = engine.add("whole", prompt, True, max_tokens=9, prompt_logprobs=None)
    one = engine.add("one", prompt, True, max_tokens=1, prompt_logprobs=None)
    engine.run()
    expected = replayed(engine, "whole", monkeypatch)
    tokens = list(whole.output_token_ids)
    assert tokens == expected.tokens and list(one.output_token_ids) == tokens[:1]
    last = tokens[5]
    cut = engine.add(
        "cut",
        prompt,
        True,
        {"save_as": "cut"},
        max_tokens=9,
        ignore_eos=False,
        stop_token_ids=[last],
        prompt_logprobs=None,
    )
    after = []
    while "cut" in engine.scheduler.requests:
        engine.step()
        after = [name for output in engine.under_way for name in output.num_scheduled_tokens]
    assert after == ["cut"]  # computed in vain
    engine.run()
    length = tokens.index(last) + 1
    assert list(cut.output_token_ids) == tokens[:length] and cut.status == RequestStatus.FINISHED_STOPPED
    (save,) = [job for job in engine.trainer.jobs if isinstance(job, messages.Save)]
    trained = [
        job for job in engine.trainer.jobs if isinstance(job, messages.Train) and job.owner == save.owner
    ]
    assert save.position == cut.num_tokens == 28 + length
    # It begins behind KV that the others computed, with the version that they trained.
    assert [1, *(job.version for job in trained)] == list(range(1, (cut.num_tokens - 1) // 16 + 1))
    assert len(engine.scheduler.free_slots) == 2 and engine.is_empty()


@pytest.mark.parametrize(("begin", "ids"), [(13, [100, 101]), (15, [102, 1]), (16, [0, 1])])
def test_first_tokens_of_a_pass_cut_into_steps(begin: int, ids: list[int]) -> None:
    """Two positions a step, of a pass that keeps 3 tokens before its window at 16."""
    runner: Any = PassesRunner.__new__(PassesRunner)
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
    section = {
        "preset": "temp-lora-economic",
        "adaptation": {"trainer": {"device": "cpu"}, "kv_policy": policy},
    }
    config = create(additional_config={"longctx": section}, max_num_seqs=4)
    assert config.use_v2_model_runner and config.scheduler_config.async_scheduling
    assert config.parallel_config.worker_cls == "vllm_longctx.cuda.worker.LongContextWorker"
    assert config.scheduler_config.get_scheduler_cls() is AsyncTempLoraScheduler


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
    config: Any = SimpleNamespace(
        additional_config={"longctx": {"preset": "temp-lora-economic"}},
        use_v2_model_runner=stock is GPUModelRunner,
    )
    mode = LongContextConfig.parse(config.additional_config["longctx"]).mode
    if stock is GPUModelRunner:
        assert runner_class(mode, config) is PassesRunner
    else:
        with pytest.raises(RuntimeError, match="longctx cannot run mode temp-lora on vLLM's"):
            runner_class(mode, config)
