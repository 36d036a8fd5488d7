"""Our schedulers over vLLM's, one step at a time, with a worker that computes nothing."""

from typing import Any
from unittest.mock import MagicMock

import torch
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from tests.support.cuda_engine import Core
from tests.support.engine_args import create
from vllm_longctx.engine import kv_cache
from vllm_longctx.engine.memory_kv import MemorySpec, MiddleSpec, WindowSpec
from vllm_longctx.engine.sliding_kv import LambdaSpec
from vllm_longctx.modes import Role
from vllm_longctx.scheduling import temp_lora as temp_lora
from vllm_longctx.settings import active_settings

BUDGET = 1024
BS = 32
NUM_BLOCKS = 20_000
FULL = FullAttentionSpec(block_size=BS, num_kv_heads=1, head_size=8, dtype=torch.float32)


class Steps(Core):
    """scheduled: of each step, the tokens of each request."""

    def __init__(
        self,
        section: dict[str, Any] | None = None,
        steps_ahead: int = 0,
        num_blocks: int = NUM_BLOCKS,
        **engine: Any,
    ):
        kv_cache.register()
        settings = {
            "max_num_batched_tokens": BUDGET,
            "max_num_seqs": 8,
            "max_model_len": 1 << 20,
            "dtype": "float32",
            "enable_prefix_caching": False,
        }
        config = create(additional_config={"longctx": section or {}}, **{**settings, **engine})
        config.cache_config.num_gpu_blocks = num_blocks
        active = active_settings(config)
        classes = [resolve_obj_by_qualname(path) for path in active.mode.scheduler_paths]
        if Role.WINDOW in active.mode.layers:
            windows = active.memory.windows
            specs = [WindowSpec.of(FULL, windows, 1 + steps_ahead)]
            if Role.MEMORY in active.mode.layers:
                specs.insert(0, MemorySpec.of(FULL, windows, None))
        else:
            specs = [LambdaSpec.from_attention_spec(FULL, active.geometry)]
            if active.mode.top_k:
                specs.append(MiddleSpec.of(FULL))
        pool = KVCacheConfig(
            num_blocks, [], [KVCacheGroupSpec([f"layer{i}"], spec) for i, spec in enumerate(specs)]
        )
        scheduler = classes[steps_ahead](config, pool, MagicMock(), BS, hash_block_size=BS, log_stats=True)
        super().__init__(scheduler, steps_ahead)
        self.scheduled: list[dict[str, int]] = []

    def ask(
        self,
        name: str,
        length: int,
        max_tokens: int = 500,
        priority: int = 0,
        options: dict[str, Any] | None = None,
    ) -> Request:
        given = None if options is None else {"longctx": options}
        request = self.make(
            name, [5] * length, given, max_tokens=max_tokens, logprobs=None, prompt_logprobs=None
        )
        request.priority = priority
        self.scheduler.add_request(request)
        return request

    def compute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        self.scheduled.append(dict(output.num_scheduled_tokens))
        names = list(output.num_scheduled_tokens)
        tokens = []
        for name in names:
            request = self.requests[name]
            read = (
                request.num_computed_tokens - request.num_in_flight_tokens + output.num_scheduled_tokens[name]
            )
            tokens.append([7] if read >= request.num_prompt_tokens else [])
        return ModelRunnerOutput(names, {name: row for row, name in enumerate(names)}, tokens)

    def steps(self, count: int) -> list[dict[str, int]]:
        """What the next steps computed."""
        self.scheduled = []
        while len(self.scheduled) < count:
            self.step()
        return self.scheduled
