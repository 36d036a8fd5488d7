"""vLLM's model runners for GPUs: both of them where windows slide, Model Runner V2 where they step."""

from typing import Any

from vllm.config import VllmConfig

from vllm_longctx.cuda.lora import DeviceSlotLoRAManager
from vllm_longctx.cuda.rows import StepRows
from vllm_longctx.engine.runner import RunnerBase
from vllm_longctx.modes import BASE_RUNNER, Mode, load


class LongContextRunner(RunnerBase):
    """Mixed into a model runner of vLLM's, before it.

    Methods of vLLM's that are overridden: see `vllm_longctx.seams`.
    """

    rows: StepRows
    lora_manager_class = DeviceSlotLoRAManager


def runner_class(mode: Mode, vllm_config: VllmConfig) -> type[Any]:
    """Raises RuntimeError where the mode needs Model Runner V2 and vLLM has chosen the other."""
    stock: type
    if vllm_config.use_v2_model_runner:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        stock = GPUModelRunner
    else:
        from vllm.v1.worker import gpu_model_runner

        stock = gpu_model_runner.GPUModelRunner
    if mode.runner == BASE_RUNNER:
        return type(f"LongContext{stock.__name__}", (LongContextRunner, stock), {})
    runner = load(f"cuda.{mode.runner}")
    if not issubclass(runner, stock):
        raise RuntimeError(f"longctx cannot run mode {mode.name} on vLLM's {stock.__module__}")
    return runner
