"""The CPU worker of an engine with a long-context configuration.

It takes over the attention layers once the weights are loaded, instead of overriding vLLM's backend registry: the registry
is process-wide and cached, so a second engine in the process would inherit the override, and a layer would not know the
rotary module that rotated its queries.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_longctx.config import LongContextConfig, active_config
from vllm_longctx.cpu.lora import AdaptingRunner, LongContextRunner
from vllm_longctx.cpu.memory import Lookup, MemoryBackend, MemoryImpl
from vllm_longctx.cpu.memory_runner import FocusedRunner, TopKRunner
from vllm_longctx.cpu.sliding import LambdaBackend, LambdaImpl, scratch_layout
from vllm_longctx.cpu.window import SteppedBackend
from vllm_longctx.engine.kv_cache import LambdaSpec, MemorySpec, MiddleSpec, SteppedSpec, WindowSpec
from vllm_longctx.engine.layers import take_over_rotary, with_spec
from vllm_longctx.engine.lookup import TopK
from vllm_longctx.engine.lora import with_slots
from vllm_longctx.engine.waiting import wait_patiently
from vllm_longctx.processes import end_without_collecting
from vllm_longctx.rotary import NoRotation, Rotary
from vllm_longctx.startup.engine_args import memory_blocks, trained_length


class LongContextCPUWorker(CPUWorker):
    model_runner: LongContextRunner

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any):
        super().__init__(with_slots(vllm_config), *args, **kwargs)

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        take_over_attention(self.model_runner.get_model(), self.vllm_config)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(with_scratch_room(kv_cache_config, self.vllm_config))
        layers = self.vllm_config.compilation_config.static_forward_context
        for group in kv_cache_config.kv_cache_groups:
            if isinstance(group.kv_cache_spec, MemorySpec) and group.kv_cache_spec.memory_blocks is not None:
                for name in group.layer_names:
                    layers[name].kv_cache = host_memory(layers[name].kv_cache, group.kv_cache_spec.memory_blocks)
        if isinstance(self.model_runner, FocusedRunner):
            self.model_runner.look_into_memory()

    def init_device(self) -> None:
        super().init_device()
        config = active_config(self.vllm_config)
        runner: type[LongContextRunner] = LongContextRunner
        if config.adaptation is not None:
            wait_patiently()
            runner = AdaptingRunner
        elif config.windows is not None:
            runner = FocusedRunner
        elif config.top_k_layers:
            runner = TopKRunner
        self.model_runner.__class__ = runner  # vLLM names its class in the code; see seams

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        self.model_runner.begin_step(scheduler_output)
        clear_last_blocks(self.model_runner, scheduler_output)
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        with seeds_of_finished_prompts(self.model_runner):
            output = super().sample_tokens(grammar_output)
        seconds = take_selection_seconds(self.model_runner)
        if output.req_ids:  # else it may be vLLM's one empty output, which all steps share
            output.longctx_selection_seconds = seconds
            output.longctx_failed_adapters = self.model_runner.take_failed_adapters()
            output.longctx_swap_seconds = self.model_runner.take_swap_seconds()
        return output

    def shutdown(self) -> None:
        end_without_collecting()
        super().shutdown()


def clear_last_blocks(runner: CPUModelRunner, scheduler_output: SchedulerOutput) -> None:
    """Clear the last of the blocks that each request gets in this step: all others are written to their end in it.

    vLLM's CPU kernel multiplies unused slots by a weight of zero, and NaN or infinity that a request before has left there
    would become this one's output. vLLM's own clearing (`new_block_ids_to_zero`) is of all new blocks, and on the CPU of full
    attention only.
    """
    given = [(request.block_ids, request.num_computed_tokens) for request in scheduler_output.scheduled_new_reqs]
    cached = scheduler_output.scheduled_cached_reqs
    for name, block_ids, computed in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
        if block_ids is not None:
            given.append((block_ids, computed if name in cached.resumed_req_ids else 0))  # else it is no whole table
    layers = runner.compilation_config.static_forward_context
    for number, group in enumerate(runner.kv_cache_config.kv_cache_groups):
        tables = [(block_ids[number], computed) for block_ids, computed in given]
        # A prompt that comes in parts has a whole table whose last block may hold what is computed already.
        block_size = group.kv_cache_spec.block_size
        last = [table[-1] for table, computed in tables if table and (len(table) - 1) * block_size >= computed]
        if last:
            for name in group.layer_names:
                layers[name].kv_cache.index_fill_(0, torch.tensor(last), 0)


@contextmanager
def seeds_of_finished_prompts(runner: CPUModelRunner) -> Iterator[None]:
    """Hide the generators of seeded requests whose prompt is not read to its end while tokens are sampled.

    vLLM samples a token for them too, discards it, and rewinds the generator by its offset; CPU generators have none, and the
    engine dies. Long prompts always come in chunks, so here every seeded one would. Hidden, nothing is drawn at all.
    """
    generators = runner.input_batch.generators
    unfinished = runner.discard_request_mask.np[: runner.input_batch.num_reqs].nonzero()[0].tolist()
    hidden = {row: generators.pop(row) for row in unfinished if row in generators}
    try:
        yield
    finally:
        generators.update(hidden)


def take_selection_seconds(runner: CPUModelRunner) -> float:
    """Seconds spent on tables, scratch blocks and plans, all KV cache groups together, since the last call."""
    builders = [group.get_metadata_builder() for groups in runner.attn_groups for group in groups]
    seconds = sum(builder.seconds for builder in builders)
    for builder in builders:
        builder.seconds = 0.0
    return seconds


def take_over_attention(model: nn.Module, vllm_config: VllmConfig) -> None:
    """Give every attention layer of a loaded model Λ attention or stepped windows, and exact rotary angles."""
    layers, parents, rotary = take_over_rotary(model, vllm_config, CPUAttentionBackendImpl)
    config = active_config(vllm_config)
    if config.windows is not None:
        take_over_focused(layers, parents, config, memory_blocks(config, vllm_config))
    elif config.slides:
        take_over_lambda(layers, config, rotary)
    else:
        most_tokens = trained_length(vllm_config.model_config)
        backend = with_spec(SteppedBackend, lambda spec: SteppedSpec.from_attention_spec(spec, most_tokens))
        for layer in layers.values():
            layer.attn_backend = backend


def take_over_lambda(layers: dict[str, Attention], config: LongContextConfig, rotary: Rotary | None) -> None:
    attention, geometry, top_k_layers = config.attention, config.geometry, config.top_k_layers
    sliding = with_spec(LambdaBackend, lambda spec: LambdaSpec.from_attention_spec(spec, geometry))
    kept = with_spec(LambdaBackend, MiddleSpec.of)
    for name, layer in layers.items():
        top_k = None
        if extract_layer_index(name) in top_k_layers:
            assert attention.top_k is not None and attention.top_k_insert_at is not None
            top_k = TopK(attention.top_k, attention.top_k_insert_at)
        layer.impl = LambdaImpl(layer.impl, geometry, rotary, top_k)
        layer.attn_backend = sliding if top_k is None else kept


def take_over_focused(
    layers: dict[str, Attention], parents: dict[str, nn.Module], config: LongContextConfig, memory_blocks: int | None
) -> None:
    """Memory layers keep all blocks, the others those of the window."""
    windows, attention = config.windows, config.attention
    assert windows is not None and attention.mem_layers is not None
    window = with_spec(SteppedBackend, lambda spec: WindowSpec.of(spec, windows))
    memory = with_spec(MemoryBackend, lambda spec: MemorySpec.of(spec, windows, memory_blocks))
    for name, layer in layers.items():
        if extract_layer_index(name) not in attention.mem_layers:
            layer.attn_backend = window
            continue
        layer.attn_backend = memory
        if attention.top_k is not None:
            layer.impl = MemoryImpl(layer.impl, Lookup(attention.top_k, attention.lookup_share))
        if not attention.mem_positionals:
            parents[name].rotary_emb = NoRotation()


def host_memory(cache: Tensor, num_blocks: int) -> Tensor:
    """A KV cache like a layer's in vLLM's pool, of its own; the operating system gives the pages as they are written."""
    return torch.zeros((num_blocks, *cache.shape[1:]), dtype=cache.dtype)


def with_scratch_room(kv_cache_config: KVCacheConfig, vllm_config: VllmConfig) -> KVCacheConfig:
    """The same pool, with room for scratch blocks behind each layer's blocks; the scheduler never hears of them."""
    if not kv_cache_config.kv_cache_tensors or not active_config(vllm_config).has_scratch:
        return kv_cache_config
    (tensor,) = kv_cache_config.kv_cache_tensors
    num_blocks = kv_cache_config.num_blocks
    if tensor.layer_stride != num_blocks * tensor.block_stride or tensor.offset:
        raise RuntimeError(f"longctx expects a KV cache of layers one behind the other, not {tensor}")
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    layer = vllm_config.compilation_config.static_forward_context[tensor.layers[0]]
    scratch = scratch_layout(vllm_config, layer.impl, spec.block_size, num_blocks)
    room = scratch.num_blocks * tensor.block_stride
    tensor = copy(tensor)
    tensor.size += room * len(tensor.layers)
    tensor.layer_stride += room
    config = copy(kv_cache_config)
    config.kv_cache_tensors = [tensor]
    return config
