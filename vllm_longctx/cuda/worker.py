"""The CUDA worker of an engine with a long-context configuration, for both of vLLM's model runners."""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from vllm_longctx.config import LongContextConfig, LongContextError, active_config
from vllm_longctx.cuda.host_memory import HostMemory, check_host_memory, keep_apart
from vllm_longctx.cuda.memory_runner import FocusedCUDARunner, TopKCUDARunner
from vllm_longctx.cuda.sliding import LambdaBackend, LambdaImpl
from vllm_longctx.cuda.top_k import TopKBackend, TopKImpl
from vllm_longctx.cuda.window import LookupBackend, SteppedBackend, SteppedImpl, pool_beside_lookups
from vllm_longctx.engine.kv_cache import LambdaSpec, MemorySpec, MiddleSpec, SteppedSpec, WindowSpec
from vllm_longctx.engine.layers import take_over_rotary, with_spec
from vllm_longctx.engine.lookup import Lookup, TopK
from vllm_longctx.engine.lora import Adapts, with_slots
from vllm_longctx.geometry import Geometry
from vllm_longctx.processes import end_without_collecting
from vllm_longctx.rotary import NoRotation, Rotary
from vllm_longctx.startup.engine_args import memory_blocks, trained_length


class ReportedOutput(AsyncModelRunnerOutput):
    """vLLM's, whose copies to the host are under way, with what the worker reports of the step beside it."""

    def __init__(self, output: AsyncModelRunnerOutput, report: dict[str, Any]):
        self.output, self.report = output, report

    def get_output(self) -> ModelRunnerOutput:
        output = self.output.get_output()
        vars(output).update(self.report)
        return output


class LongContextCUDAWorker(Worker):
    """Of both of vLLM's model runners it needs the manager of adapters only; more under windows and lookups, of V2."""

    host_memory: HostMemory | None = None

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any):
        super().__init__(with_slots(vllm_config), *args, **kwargs)

    def _make_model_runner(self) -> Any:
        runner = super()._make_model_runner()
        stock = type(runner)  # vLLM names its class in the code; see seams
        runner.__class__ = type(f"LongContext{stock.__name__}", (Adapts, stock), {})
        return runner

    def init_device(self) -> None:
        check_host_memory(self.vllm_config)
        super().init_device()
        config = active_config(self.vllm_config)
        if config.windows is not None or config.top_k_layers:
            if not isinstance(self.model_runner, GPUModelRunner):
                raise RuntimeError(f"longctx cannot take over {type(self.model_runner)}")
            self.model_runner.__class__ = TopKCUDARunner if config.windows is None else FocusedCUDARunner

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        take_over_attention(self.model_runner.get_model(), self.vllm_config, self.device)
        if isinstance(self.model_runner, FocusedCUDARunner):
            self.model_runner.count_from_windows()

    def determine_available_memory(self) -> int:
        available = super().determine_available_memory()
        config = active_config(self.vllm_config)
        lookup, limit = lookup_of(config), config.attention.memory_limit_gib
        if lookup is None or self.cache_config.kv_cache_memory_bytes:  # then the user has said what the KV cache gets
            return available
        left = pool_beside_lookups(available, lookup, self.model_config.dtype.itemsize, self.get_kv_cache_spec().values())
        if left <= 0:
            remedy = "" if limit is None else f", or lower attention.memory_limit_gib = {limit}, whose summaries are among them"
            raise LongContextError(
                f"lookups need {(available - left) / 2**30:.2f} GiB of GPU memory, but beside the model there are "
                f"{available / 2**30:.2f} GiB for them and the KV cache; raise gpu_memory_utilization{remedy}"
            )
        return left

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        self.model_runner.begin_step(scheduler_output)
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        is_async = isinstance(output, AsyncModelRunnerOutput)  # always by Model Runner V2, by V1 where steps are ahead
        if is_async or (isinstance(output, ModelRunnerOutput) and output.req_ids):  # else it may be vLLM's one empty output
            report = {
                "longctx_swap_seconds": self.model_runner.take_swap_seconds(),
                "longctx_failed_adapters": self.model_runner.take_failed_adapters(),
            }
            if is_async:
                return ReportedOutput(output, report)
            vars(output).update(report)
        return output

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        if isinstance(self.model_runner, FocusedCUDARunner):
            layers = self.vllm_config.compilation_config.static_forward_context
            self.host_memory = keep_apart(layers, self.model_runner.kv_cache_config)
            self.model_runner.look_into_memory()
        elif isinstance(self.model_runner, TopKCUDARunner):
            self.model_runner.warm_up()

    def shutdown(self) -> None:
        end_without_collecting()
        super().shutdown()
        if self.host_memory is not None:
            self.host_memory.release()
            self.host_memory = None


def take_over_attention(model: nn.Module, vllm_config: VllmConfig, device: torch.device) -> None:
    """Tell every attention layer of a loaded model what it sees, and give the model exact rotary angles."""
    layers, parents, rotary = take_over_rotary(model, vllm_config, LambdaImpl)
    config = active_config(vllm_config)
    if config.windows is not None:
        take_over_focused(layers, parents, vllm_config, rotary, device)
        return
    if config.slides:
        take_over_lambda(layers, config, rotary, device)
        return
    most_tokens = trained_length(vllm_config.model_config)
    backend = with_spec(SteppedBackend, lambda spec: SteppedSpec.from_attention_spec(spec, most_tokens))
    for layer in layers.values():
        layer.impl.take_over(config.geometry, rotary, device)
        layer.impl, layer.attn_backend = SteppedImpl(layer.impl), backend


def take_over_lambda(
    layers: dict[str, Attention], config: LongContextConfig, rotary: Rotary | None, device: torch.device
) -> None:
    """Layers with a top-k branch keep all blocks, the others those of first tokens and window."""
    attention, geometry = config.attention, config.geometry
    sliding = with_spec(LambdaBackend, lambda spec: LambdaSpec.from_attention_spec(spec, geometry))
    kept = with_spec(TopKBackend, MiddleSpec.of)
    for name, layer in layers.items():
        layer.impl.take_over(geometry, rotary, device)
        layer.attn_backend = sliding
        if extract_layer_index(name) in config.top_k_layers:
            assert attention.top_k is not None and attention.top_k_insert_at is not None
            layer.impl, layer.attn_backend = TopKImpl(layer.impl, TopK(attention.top_k, attention.top_k_insert_at)), kept


def take_over_focused(
    layers: dict[str, Attention],
    parents: dict[str, nn.Module],
    vllm_config: VllmConfig,
    rotary: Rotary | None,
    device: torch.device,
) -> None:
    """Memory layers keep all blocks, the others those of the window. A memory layer that sees all is plain attention."""
    config = active_config(vllm_config)
    windows, attention, lookup = config.windows, config.attention, lookup_of(config)
    assert windows is not None and attention.mem_layers is not None
    steps, blocks = vllm_config.max_concurrent_batches, memory_blocks(config, vllm_config)
    window = with_spec(SteppedBackend, lambda spec: WindowSpec.of(spec, windows, steps))
    seen = LambdaBackend if lookup is None else LookupBackend
    memory = with_spec(seen, lambda spec: MemorySpec.of(spec, windows, blocks))
    for name, layer in layers.items():
        layer.impl.take_over(Geometry(), rotary, device)
        is_memory = extract_layer_index(name) in attention.mem_layers
        layer.attn_backend = memory if is_memory else window
        if not is_memory or lookup is not None:
            layer.impl = SteppedImpl(layer.impl, lookup if is_memory else None)
        if is_memory and not attention.mem_positionals:
            parents[name].rotary_emb = NoRotation()


def lookup_of(config: LongContextConfig) -> Lookup | None:
    """Of memory layers, or those with a top-k branch; None where there are none or they see all."""
    attention = config.attention
    return None if attention.top_k is None else Lookup(attention.top_k, attention.lookup_share)
