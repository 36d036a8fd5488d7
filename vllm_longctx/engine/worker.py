"""The worker's life on every platform: when layers are made, the KV cache is bound, a step begins and is
reported.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.worker_base import WorkerBase

from vllm_longctx import refusals
from vllm_longctx.config import LongContextError
from vllm_longctx.engine.adapted_layers import AdaptedLayers
from vllm_longctx.engine.kv_cache import layer_spec
from vllm_longctx.engine.layers import LayerSite, engine_backend, find_layers, plan
from vllm_longctx.engine.lora import with_slots
from vllm_longctx.engine.platform import Platform
from vllm_longctx.engine.positions import TOKENS, Run
from vllm_longctx.engine.rows import StepTimes
from vllm_longctx.engine.self_check import self_check
from vllm_longctx.engine.step import StepInfo, StepReport
from vllm_longctx.engine.waiting import limit_reader_sleep
from vllm_longctx.modes import BACKENDS, Role, load
from vllm_longctx.processes import end_without_collecting
from vllm_longctx.settings import Settings, active_settings
from vllm_longctx.temp_lora.client import trainer_bytes

logger = init_logger("vllm.longctx")


class ReportedOutput(AsyncModelRunnerOutput):
    """vLLM's, whose copies to the host are under way, and the report of the step beside it."""

    def __init__(self, output: AsyncModelRunnerOutput, report: StepReport):
        self.output, self.report = output, report

    def get_output(self) -> ModelRunnerOutput:
        output = self.output.get_output()
        self.report.send_with(output)
        return output

    def get_kv_connector_output(self) -> Any:  # vLLM 0.33 asks for it
        output: Any = self.output
        return output.get_kv_connector_output()


class LongContextWorkerBase(WorkerBase, Platform):
    """Mixed into vLLM's worker of a platform, before it.

    platform: The folder of this package with its classes.
    less_for_the_trainer: What else to do where the trainer finds no memory, for messages.
    sites: The model's attention layers, once they are made.
    """

    platform: str
    less_for_the_trainer: str
    stock_impl: Any
    settings: Settings
    sites: list[LayerSite]
    model_runner: Any
    device: torch.device  # once `init_device` has been called

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any):
        self.settings = active_settings(vllm_config)
        if self.settings.mode.adapts:
            limit_reader_sleep()
        super().__init__(with_slots(vllm_config), *args, **kwargs)

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        rows = self.new_rows()
        self.model_runner.leave_out_adapters(TOKENS)
        with refusals.reported(self.vllm_config):
            self.sites = self.make_layers(self.get_model(), rows)
        if self.rank == 0:
            logger.info("longctx: layers: %s", plan(self.sites))
        self.model_runner.begin(self.sites, rows)

    def make_layers(self, model: nn.Module, rows: StepTimes, run: Run | None = None) -> list[LayerSite]:
        """run: as of `find_layers`."""
        sites = find_layers(model, self.vllm_config, self.stock_impl, self.device, run)
        rotaries = list(dict.fromkeys(site.rotary for site in sites))
        rows.rotaries = [rotary for rotary in rotaries if rotary is not None]
        for site in sites:
            self.make_layer(site)
            kind = self.settings.mode.layers[site.role]
            make_spec = partial(layer_spec, kind, vllm_config=self.vllm_config)
            number = rotaries.index(site.rotary)
            site.layer.attn_backend = engine_backend(self.backend(site.role), rows, make_spec, number)
        return sites

    def backend(self, role: Role) -> Any:
        return load(f"{self.platform}.{BACKENDS[role]}")

    def make_layer(self, site: LayerSite) -> None:
        site.layer.impl = self.backend(site.role).make_layer(site)

    def determine_available_memory(self) -> int:
        """Bytes for the KV cache, beside what layers and the trainer need."""
        available: int = super().determine_available_memory()  # type: ignore[misc]  # of the platform's worker
        if self.cache_config.kv_cache_memory_bytes:  # then the user has said what the KV cache gets
            return available
        available = self.beside_layers(available)
        return self._beside_trainer(available) if self.settings.mode.adapts else available

    def _beside_trainer(self, available: int) -> int:
        need = trainer_bytes(self.vllm_config, self.device) // self.workers_on_device()
        if need >= available:
            raise LongContextError(
                f"longctx.adaptation: the trainer needs {need / 2**30:.2f} GiB beside each worker, on "
                f"{self.device}, but there are no more than {available / 2**30:.2f} GiB for it and the KV "
                "cache; lower adaptation.slots, adaptation.rank or adaptation.block_tokens, "
                f"{self.less_for_the_trainer}"
            )
        return available - need

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)  # type: ignore[misc]  # of the platform's worker
        self.bind_kv_cache(kv_cache_config)
        runner = self.model_runner
        with refusals.reported(self.vllm_config):
            self_check(self.sites, runner.attn_groups, runner.rows, self.vllm_config, self.rank == 0)

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        self.begin_step(scheduler_output, StepInfo.of(scheduler_output))
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        if isinstance(output, AsyncModelRunnerOutput):
            return ReportedOutput(output, self.report_step())
        # An output without requests may be vLLM's one empty output, which all steps share.
        if isinstance(output, ModelRunnerOutput) and output.req_ids:
            self.report_step().send_with(output)
        return output

    def report_step(self) -> StepReport:
        """What happened since the last report. Does not wait for the device."""
        runner = self.model_runner
        return StepReport(
            runner.rows.take_selection_seconds(), runner.take_swap_seconds(), runner.take_failed_adapters()
        )

    def adapted_layers(self) -> AdaptedLayers:
        """The layers that Temp-LoRA adapts here. Called by its scheduler as the engine starts."""
        return self.model_runner.lora_manager.adapted

    def shutdown(self) -> None:
        end_without_collecting()
        super().shutdown()
