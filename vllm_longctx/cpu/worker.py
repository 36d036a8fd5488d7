"""vLLM's CPU worker for an engine with a long-context configuration.

It takes over the attention layers once the weights are loaded, instead of overriding vLLM's backend registry:
the registry is process-wide and cached, so a second engine in the process would inherit the override, and a
layer would not know the rotary module that rotated its queries.
"""

from copy import copy
from dataclasses import replace
from typing import Any

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_longctx.cpu.host_memory import allocate_apart
from vllm_longctx.cpu.kernels.tables import ScratchLayout
from vllm_longctx.cpu.rows import StepRows
from vllm_longctx.cpu.runner import LongContextRunner, clear_last_blocks, seeds_of_finished_prompts
from vllm_longctx.cpu.sliding import LambdaImpl
from vllm_longctx.engine.layers import has_alibi, site_groups
from vllm_longctx.engine.step import StepInfo
from vllm_longctx.engine.worker import LongContextWorkerBase
from vllm_longctx.modes import Role, load


class LongContextWorker(LongContextWorkerBase, CPUWorker):
    platform = "cpu"
    less_for_the_trainer = "set adaptation.trainer.recompute true, or adaptation.trainer.dtype bfloat16"
    stock_impl = CPUAttentionBackendImpl
    model_runner: LongContextRunner

    def init_device(self) -> None:
        super().init_device()
        # vLLM's worker for the CPU names the class of its model runner in the code; see seams.
        self.model_runner.__class__ = load(f"cpu.{self.settings.mode.runner}")

    def new_rows(self) -> StepRows:
        return StepRows()

    def beside_layers(self, available: int) -> int:
        return available

    def workers_on_device(self) -> int:
        return self.parallel_config.world_size

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(self.with_scratch_room(kv_cache_config))

    def bind_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        allocate_apart(self.sites, kv_cache_config)
        self.model_runner.bind_kv_cache()

    def begin_step(self, scheduler_output: SchedulerOutput, info: StepInfo) -> None:
        self.model_runner.begin_step(scheduler_output, info)
        clear_last_blocks(self.model_runner, scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        with seeds_of_finished_prompts(self.model_runner):
            return super().sample_tokens(grammar_output)

    def with_scratch_room(self, kv_cache_config: KVCacheConfig) -> KVCacheConfig:
        """The same pool, with room for scratch blocks behind each layer's blocks; the scheduler never hears
        of them.

        KV cache groups are laid over the same memory, so each group has scratch blocks of its own there.
        """
        tensors, layer_blocks = kv_cache_config.kv_cache_tensors, kv_cache_config.num_blocks
        are_alike = (
            all(t.layer_stride == layer_blocks * t.block_stride and t.offset == 0 for t in tensors)
            and len({t.block_stride for t in tensors}) == 1
        )
        groups = site_groups(self.sites, Role.SLIDING, kv_cache_config) if are_alike else []
        layouts: dict[str, ScratchLayout] = {}
        for group in groups:
            layout = ScratchLayout.plan(
                group.sites[0].geometry,
                group.block_size,
                kv_cache_config.num_blocks,
                self.scheduler_config.max_num_seqs,
                alibi=has_alibi(group.sites[0].layer),
            )
            layout = replace(layout, first_block=layer_blocks)
            layer_blocks += layout.num_blocks
            layouts |= {site.name: layout for site in group.sites}
        for site in self.sites:
            if isinstance(site.layer.impl, LambdaImpl):
                nothing = ScratchLayout(kv_cache_config.num_blocks, 0, 0)
                site.layer.impl.scratch = layouts.get(site.name, nothing)
                site.layer.impl.layer_blocks = layer_blocks
        room = (layer_blocks - kv_cache_config.num_blocks) * tensors[0].block_stride if layouts else 0
        config = copy(kv_cache_config)
        config.kv_cache_tensors = [
            replace(
                t,
                size=t.size + room * max(len(t.layers) for t in tensors),
                layer_stride=t.layer_stride + room,
            )
            for t in tensors
        ]
        return config
