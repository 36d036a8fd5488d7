"""Prometheus metrics of long requests beside vLLM's own, under the same labels; README, "Watching a server"."""

from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats
from vllm.v1.metrics.utils import create_metric_per_engine

from vllm_longctx.config import KEY, active_config
from vllm_longctx.engine_args import trained_length

PREFIX = "vllm:longctx_"  # vLLM's own prefix: `LLM.get_metrics` shows, and a new engine unregisters, no other
SELECTION_BUCKETS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0)


@dataclass
class StepStats:
    """What a step did, on its way from the scheduler (`vllm_longctx.scheduler`) to the front end.

    live_blocks: KV blocks held by running requests past their window. freed_blocks: those that went back to the pool from
    requests that run on. tokens_past_trained: computed at positions past the trained length. selection_seconds:
    spent in `LambdaMetadataBuilder.build`; None in a step without a forward.
    """

    live_blocks: int = 0
    freed_blocks: int = 0
    tokens_past_trained: int = 0
    requests_past_trained: int = 0
    selection_seconds: float | None = None


class LongContextStatLogger(AggregateStatLoggerBase):
    """Stands before vLLM's loggers, which must not see our part of the statistics: it is taken out."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]):
        self.vllm_config, self.engine_indexes = vllm_config, engine_indexes
        model = vllm_config.model_config.served_model_name
        labels = {index: [model, str(index)] for index in engine_indexes}

        def per_engine(kind: type, name: str, documentation: str, **kwargs: Any) -> dict[int, Any]:
            metric = kind(PREFIX + name, documentation, labelnames=["model_name", "engine"], **kwargs)
            return create_metric_per_engine(metric, labels)

        self.live_blocks = per_engine(
            Gauge,
            "live_kv_blocks",
            "KV blocks held by running requests that are past their window.",
            multiprocess_mode="mostrecent",
        )
        self.requests_past_trained = per_engine(
            Gauge,
            "num_requests_past_trained",
            "Running requests of which more tokens are computed than the model was trained on.",
            multiprocess_mode="mostrecent",
        )
        self.freed_blocks = per_engine(Counter, "freed_kv_blocks", "KV blocks freed from the middle of requests that run on.")
        self.tokens_past_trained = per_engine(
            Counter, "tokens_past_trained", "Tokens computed at positions past the model's trained length."
        )
        self.selection_seconds = per_engine(
            Histogram,
            "selection_time_seconds",
            "Histogram of the time per engine step in which a worker selects what its queries see.",
            buckets=SELECTION_BUCKETS,
        )

    def log_engine_initialized(self) -> None:
        config = active_config(self.vllm_config)
        info = {
            "method": config.attention.method,
            "trained_length": trained_length(self.vllm_config.model_config),
            **vars(config.geometry),
        }
        gauge = Gauge(
            PREFIX + "config_info",
            "Information of the longctx configuration.",
            labelnames=["engine", *info],
            multiprocess_mode="mostrecent",
        )
        for index in self.engine_indexes:
            gauge.labels(engine=str(index), **info).set(1)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is None or not scheduler_stats.kv_connector_stats:
            return
        step = StepStats(**scheduler_stats.kv_connector_stats[KEY])
        scheduler_stats.kv_connector_stats = None
        self.live_blocks[engine_idx].set(step.live_blocks)
        self.requests_past_trained[engine_idx].set(step.requests_past_trained)
        self.freed_blocks[engine_idx].inc(step.freed_blocks)
        self.tokens_past_trained[engine_idx].inc(step.tokens_past_trained)
        if step.selection_seconds is not None:
            self.selection_seconds[engine_idx].observe(step.selection_seconds)
