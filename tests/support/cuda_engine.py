"""vLLM's engine core around Model Runner V2, on CPU tensors: scheduler, runner, model and sampler are all
vLLM's own.

What a GPU alone can do is replaced by the fixtures of tests/fast/cuda/conftest.py.
"""

import pickle
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.worker.gpu import attn_utils

from tests.support.engine_args import create
from tests.support.reference_model import Layers, ReferenceLlama
from tests.support.vllm_names import kv_cache_config
from vllm_longctx.cuda.rows import StepRows
from vllm_longctx.cuda.worker import LongContextWorker
from vllm_longctx.engine.layers import LayerSite
from vllm_longctx.engine.lora import with_slots
from vllm_longctx.engine.positions import Run
from vllm_longctx.engine.step import StepInfo
from vllm_longctx.settings import active_settings

CPU, BLOCK_SIZE = torch.device("cpu"), 16


def text(length: int) -> list[int]:
    return torch.randint(3, 128, (length,)).tolist()


def to_cpu(config: VllmConfig) -> VllmConfig:
    """As for CUDA, but models are loaded to the CPU."""
    config.device_config.device, config.load_config.device, config.load_config.load_format = (
        CPU,
        "cpu",
        "auto",
    )
    return config


def made_layers(
    model: nn.Module, config: VllmConfig, run: Run | None = None
) -> tuple[list[LayerSite], StepRows]:
    """What the worker does to a loaded model. run: how to run it, if it is none of vLLM's."""
    worker = object.__new__(LongContextWorker)
    worker.vllm_config, worker.settings, worker.device = config, active_settings(config), CPU
    rows = StepRows(config.scheduler_config.max_num_seqs, CPU)
    return worker.make_layers(model, rows, run), rows


def places(firsts: list[int], ends: list[int], tables: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Of a step's tokens, from `first` up to `end` of each request: positions [tokens], and slots by the
    tables [groups, tokens].
    """
    positions = torch.cat([torch.arange(first, end) for first, end in zip(firsts, ends, strict=True)])
    row = torch.repeat_interleave(torch.arange(len(ends)), torch.tensor(ends) - torch.tensor(firsts))
    slots = [t[row, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE for t in tables]
    return positions, torch.stack(slots)


class Inputs:
    """Tensors that persist from step to step, as those of vLLM that a CUDA graph of decodes replays over."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def __call__(self, name: str, value: Tensor) -> Tensor:
        """The value where it stood in the last step of the same shape."""
        stood = self._tensors.get(name)
        if stood is None or stood.shape != value.shape:
            stood = self._tensors[name] = torch.empty_like(value)
        return stood.copy_(value)


def metadata_of(
    attn_groups: Any,
    pool: KVCacheConfig,
    firsts: list[int],
    ends: list[int],
    tables: Any,
    slots: Tensor,
    positions: Tensor | None = None,
    inputs: Inputs | None = None,
) -> dict[str, Any]:
    """Of such a step, as the Model Runner V2 has it made; by layer.

    positions: of all tokens, those of padding included, where there are such. inputs: where they are to
    stand.
    """
    lens = [end - first for first, end in zip(firsts, ends, strict=True)]
    starts = torch.tensor([0, *lens]).cumsum(0).int()
    if positions is None:
        positions = places(firsts, ends, tables)[0]
    inputs = inputs or Inputs()
    return attn_utils.build_attn_metadata(
        attn_groups,
        num_reqs=len(lens),
        num_tokens=len(positions),
        query_start_loc_gpu=inputs("query_start_loc", starts),
        query_start_loc_cpu=starts,
        max_query_len=max(lens),
        seq_lens=inputs("seq_lens", torch.tensor(ends, dtype=torch.int32)),
        max_seq_len=max(ends),
        block_tables=tables,
        slot_mappings=slots,
        kv_cache_config=pool,
        positions=positions,
    )


class Core:
    """What vLLM's engine core does in a step (v1/engine/core.py).

    steps_ahead: 1 as `step_with_batch_queue`, which looks at a step's outputs once the next one is scheduled
    and sent off; 0 as `step`. What is sent ahead is computed as late as can be, from a copy, as by a worker
    in a process of its own.
    """

    def __init__(self, scheduler: Any, steps_ahead: int):
        self.scheduler, self.steps_ahead = scheduler, steps_ahead
        self.managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        init_none_hash(sha256)
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, list[EngineCoreOutput]] = {}
        self.stale: set[str] = set()  # requests that were preempted with a step under way
        self.in_vain: set[str] = set()  # requests that ended with a step under way
        self.under_way: deque[SchedulerOutput] = deque()
        self.sent: deque[SchedulerOutput] = deque()

    def add(
        self, name: str, prompt: list[int], extra_args: dict[str, Any] | None = None, **params: Any
    ) -> Request:
        request = self.make(name, prompt, extra_args, **params)
        self.scheduler.add_request(request)
        return request

    def make(
        self, name: str, prompt: list[int], extra_args: dict[str, Any] | None = None, **params: Any
    ) -> Request:
        params = {"temperature": 0, "ignore_eos": True, "logprobs": 0, "prompt_logprobs": 0, **params}
        sampling = SamplingParams(**params, extra_args=extra_args)
        hasher = get_request_block_hasher(self.scheduler.block_size, sha256)
        request = Request(name, prompt, sampling, None, block_hasher=hasher)
        self.requests[name], self.outputs[name] = request, []
        return request

    def step(self) -> None:
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            self.stale |= {name for name, request in self.requests.items() if request.num_stale_output_tokens}
            self.under_way.append(output)
            self.sent.append(pickle.loads(pickle.dumps(output)) if self.steps_ahead else output)
            if len(self.under_way) <= self.steps_ahead and output.total_num_scheduled_tokens:
                return
        self.look_at_outputs()

    def look_at_outputs(self) -> None:
        """Of the oldest step under way."""
        output, sent = self.under_way.popleft(), self.sent.popleft()
        done = self.compute(sent)
        for outputs in self.scheduler.update_from_output(output, done).values():
            for one in outputs.outputs:
                self.outputs[one.request_id].append(one)
        self.in_vain |= {
            n
            for step in self.under_way
            for n in step.num_scheduled_tokens
            if n not in self.scheduler.requests
        }

    def compute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """What a worker does in a step."""
        raise NotImplementedError

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)

    def run(self) -> None:
        """To the end of all requests, and until the runner has heard who has finished."""
        while self.scheduler.has_requests() or self.under_way:
            self.step()


class Engine(Core):
    """With a model and its runner."""

    def __init__(
        self,
        model: Path,
        section: dict[str, Any],
        runner: type,
        schedulers: Sequence[type[Scheduler]],
        steps_ahead: int,
        **kwargs: Any,
    ):
        settings = {
            "dtype": "float32",
            "block_size": BLOCK_SIZE,
            "max_model_len": 512,
            "max_num_seqs": 4,
            "enforce_eager": True,
            "compilation_config": {"mode": 0, "custom_ops": ["none"]},
            "async_scheduling": bool(steps_ahead),
        }
        self.config = config = to_cpu(create(model, {"longctx": section}, **{**settings, **kwargs}))
        assert config.scheduler_config.get_scheduler_cls() is schedulers[steps_ahead]
        assert config.max_concurrent_batches == steps_ahead + 1
        with set_current_vllm_config(config):
            self.runner = runner(with_slots(config), CPU)
            self.runner.load_model()
            self.runner.begin(*made_layers(self.runner.get_model(), config))
            specs = self.runner.get_kv_cache_spec()
            layers = config.compilation_config.static_forward_context.values()
            kv = kv_cache_config(config, specs, layers, 1 << 30)
            config.cache_config.num_gpu_blocks = kv.num_blocks
            self.runner.initialize_kv_cache(kv)
            self.runner.bind_kv_cache()
        for layer in layers:
            cache = layer.kv_cache
            cache.fill_(torch.nan if cache.is_floating_point() else 0x7F)  # the NaN of float8
        super().__init__(
            schedulers[steps_ahead](config, kv, MagicMock(), BLOCK_SIZE, log_stats=True), steps_ahead
        )
        self.reference = ReferenceLlama(model)

    def compute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        self.runner.begin_step(output, StepInfo.of(output))
        done = self.runner.execute_model(output)
        if done is not None:
            return done
        self.check_inputs()
        return self.runner.sample_tokens(None).get_output()

    def check_inputs(self) -> None:
        """Of the step whose sampling is still to come."""

    def logprobs(self, name: str) -> list[float]:
        return [float(one.new_logprobs.logprobs[0, 0]) for one in self.outputs[name] if one.new_token_ids]

    def prompt_logprobs(self, name: str) -> Tensor:
        (tensors,) = [t for one in self.outputs[name] if (t := one.new_prompt_logprobs_tensors) is not None]
        prompt = self.requests[name].prompt_token_ids
        assert prompt is not None and tensors.logprob_token_ids[:, 0].tolist() == prompt[1:]
        return tensors.logprobs[:, 0].double()

    def check(self, name: str, seen: Layers) -> None:
        """The request's tokens are the likeliest ones, and its log-probabilities those of the dense
        reference.
        """
        request = self.requests[name]
        tokens, prompt = list(request.all_token_ids), request.num_prompt_tokens
        expected = self.reference.logprobs(tokens[:-1], seen)
        assert expected[prompt - 1 :].argmax(-1).tolist() == tokens[prompt:]
        rows = expected.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        if request.sampling_params.prompt_logprobs is not None:
            torch.testing.assert_close(self.prompt_logprobs(name), rows[: prompt - 1], atol=1e-4, rtol=0)
        assert self.logprobs(name) == pytest.approx(rows[prompt - 1 :].tolist(), abs=1e-4)

    def is_empty(self) -> bool:
        """Whether nothing of any request is left."""
        pool = self.managers[0].block_pool
        return (
            not self.runner.req_states.req_id_to_index
            and pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        )
