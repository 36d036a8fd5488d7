"""vLLM's CUDA worker for an engine with a long-context configuration, with either of vLLM's model runners."""

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu_worker import Worker

from vllm_longctx.config import LongContextError
from vllm_longctx.cuda.host_memory import HostMemory, allocate_apart, check_host_memory
from vllm_longctx.cuda.lora import share_weights
from vllm_longctx.cuda.memory import pool_beside_lookups
from vllm_longctx.cuda.rows import StepRows
from vllm_longctx.cuda.runner import runner_class
from vllm_longctx.cuda.sliding import LambdaImpl
from vllm_longctx.engine.step import StepInfo
from vllm_longctx.engine.worker import LongContextWorkerBase
from vllm_longctx.models.properties import model_dtype
from vllm_longctx.modes import Role
from vllm_longctx.settings import Lookup


class LongContextWorker(LongContextWorkerBase, Worker):
    platform = "cuda"
    less_for_the_trainer = "raise gpu_memory_utilization, or name another GPU in adaptation.trainer.device"
    stock_impl = LambdaImpl
    host_memory: HostMemory | None = None

    def init_device(self) -> None:
        check_host_memory(self.vllm_config)
        super().init_device()

    def _make_model_runner(self) -> Any:
        return runner_class(self.settings.mode, self.vllm_config)(self.vllm_config, self.device)

    def new_rows(self) -> StepRows:
        return StepRows(self.scheduler_config.max_num_seqs, self.device)

    def backend(self, role: Role) -> Any:
        return super().backend(role).for_settings(self.settings)

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        if self.settings.mode.adapts:
            manager = self.model_runner.lora_manager
            manager.device_slots = share_weights(
                self.get_model(), self.vllm_config, self.device, manager.adapted.modules
            )

    def determine_available_memory(self) -> int:
        left = super().determine_available_memory()
        if not self.cache_config.kv_cache_memory_bytes:
            # What is left, vLLM suggests as --kv-cache-memory and stores in its start-up plan.
            self.total_consumed += self.available_kv_cache_memory_bytes - left
            self.available_kv_cache_memory_bytes = left
        return left

    def beside_layers(self, available: int) -> int:
        attention, limit = self.settings.attention, self.settings.attention.memory_limit_gib
        if attention.top_k is None:
            return available
        lookup, specs = Lookup(attention.top_k, attention.lookup_share), self.get_kv_cache_spec().values()
        left = pool_beside_lookups(available, lookup, model_dtype(self.model_config).itemsize, specs)
        if left <= 0:
            remedy = (
                ""
                if limit is None
                else f", or lower attention.memory_limit_gib = {limit}, whose summaries are among them"
            )
            raise LongContextError(
                f"lookups need {(available - left) / 2**30:.2f} GiB of GPU memory, but beside the model "
                f"there are {available / 2**30:.2f} GiB for them and the KV cache; "
                f"raise gpu_memory_utilization{remedy}"
            )
        return left

    def workers_on_device(self) -> int:
        return 1

    def bind_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        self.host_memory = allocate_apart(self.sites, self.model_runner.kv_cache_config)
        self.model_runner.bind_kv_cache()

    def begin_step(self, scheduler_output: SchedulerOutput, info: StepInfo) -> None:
        self.model_runner.begin_step(scheduler_output, info)

    def shutdown(self) -> None:
        super().shutdown()
        if self.host_memory is not None:
            self.host_memory.release()
            self.host_memory = None
