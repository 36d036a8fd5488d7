"""Prometheus metrics of long requests beside vLLM's own, under the same labels; see docs/metrics.md."""

import contextlib
import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats
from vllm.v1.metrics.utils import create_metric_per_engine

from vllm_longctx.config import KEY
from vllm_longctx.models.properties import trained_length
from vllm_longctx.settings import active_settings

PREFIX = "vllm:longctx_"  # vLLM's own prefix: `LLM.get_metrics` shows, and a new engine unregisters, no other
SELECTION_BUCKETS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0)
TRAIN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
LOSS_BUCKETS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 8.0, 12.0)

# By field of `StepStats`, what it is exported as: name, documentation and, of a histogram, buckets.
Exported = dict[str, tuple[Any, ...]]
GAUGES: Exported = {
    "live_blocks": ("live_kv_blocks", "KV blocks held by running requests that are past their window."),
    "requests_past_trained": (
        "num_requests_past_trained",
        "Running requests of which more tokens are computed than the model was trained on.",
    ),
}
COUNTERS: Exported = {
    "freed_blocks": ("freed_kv_blocks", "KV blocks freed from the middle of requests that run on."),
    "tokens_past_trained": (
        "tokens_past_trained",
        "Tokens computed at positions past the model's trained length.",
    ),
}
HISTOGRAMS: Exported = {
    "selection_seconds": (
        "selection_time_seconds",
        "Histogram of the time per engine step in which a worker selects what its queries see.",
        SELECTION_BUCKETS,
    ),
}
MEMORY_GAUGES: Exported = {
    "memory_usage": (
        "memory_usage_perc",
        "Memory-usage of the memory layers' own blocks. 1 means 100 percent usage.",
    ),
}
ADAPTATION_GAUGES: Exported = {
    "slots_in_use": ("adapter_slots_in_use", "Slots of requests that adapt."),
    "held_requests": ("num_requests_held", "Requests that wait for a version of their adapter."),
    "saving_requests": (
        "num_requests_saving",
        "Requests that have ended and wait for their adapter to be saved.",
    ),
    "train_queue": ("train_queue_blocks", "Blocks that are being trained or wait for it."),
    "versions_behind": ("versions_behind", "Blocks read or written that no version has been trained on yet."),
}
ADAPTATION_COUNTERS: Exported = {
    "idle_steps": ("idle_steps", "Engine steps in which every request waited for the trainer."),
    "adapted_tokens": ("adapted_tokens", "Tokens computed for requests that adapt, those of new passes too."),
    "blocks_trained": ("blocks_trained", "Blocks that became a version of an adapter."),
    "blocks_remembered": ("blocks_remembered", "Blocks that were not trained: their version was remembered."),
    "train_failures": ("train_failures", "Blocks that could not be trained."),
    "trainer_restarts": ("trainer_restarts", "Times the trainer process was started again."),
    "adapters_saved": ("adapters_saved", "Adapters saved."),
    "save_failures": ("save_failures", "Adapters that a request asked to save and that were not saved."),
}
ADAPTATION_HISTOGRAMS: Exported = {
    "swap_seconds": (
        "swap_time_seconds",
        "Histogram of the time to put a version into all layers.",
        SELECTION_BUCKETS,
    ),
    "hold_seconds": (
        "hold_time_seconds",
        "Histogram of the time a request waits for a version.",
        TRAIN_BUCKETS,
    ),
    "train_seconds": ("train_time_seconds", "Histogram of the time to train a block.", TRAIN_BUCKETS),
}

# Of the front end, hence without an engine. Registered by `export_ignored_fields`, since a new engine
# unregisters it.
_ignored_fields = Counter(
    PREFIX + "ignored_fields",
    "Fields of requests that vLLM does not know.",
    labelnames=["route", "field"],
    registry=None,
)
# Clients choose the names of fields; those that are odd, or too many, share a label.
FIELD_NAME = re.compile(r"[A-Za-z0-9_.\[\]-]{1,80}")
MAX_FIELDS = 100
_seen_fields: defaultdict[str, set[str]] = defaultdict(set)  # by route


def export_ignored_fields() -> None:
    with contextlib.suppress(ValueError):  # it is registered
        REGISTRY.register(_ignored_fields)


def count_ignored_field(route: str, name: str) -> str | None:
    """Its label, if it is the route's first of its kind in this process. route: as vLLM declares it."""
    seen = _seen_fields[route]
    if not FIELD_NAME.fullmatch(name) or (len(seen) >= MAX_FIELDS and name not in seen):
        name = "other"
    _ignored_fields.labels(route=route, field=name).inc()
    if name in seen:
        return None
    seen.add(name)
    return name


@dataclass
class StepStats:
    """What a step did, on its way from the scheduler (`vllm_longctx.scheduling.scheduler`) to the front end.

    live_blocks: KV blocks held by running requests past their window. freed_blocks: those that went back to
    the pool from requests that run on. tokens_past_trained: computed at positions past the trained length.
    selection_seconds: see `StepReport`; None in a step without a forward. memory_usage: share in use of the
    memory layers' own pool of blocks, None where they have none.
    """

    live_blocks: int = 0
    freed_blocks: int = 0
    tokens_past_trained: int = 0
    requests_past_trained: int = 0
    selection_seconds: float | None = None
    memory_usage: float | None = None

    # Requests that adapt: slots in use, requests held, requests that wait for their save, blocks at the
    # trainer, versions that are not trained yet, steps in which all waited, tokens computed; adapters saved,
    # and not; each swap of a slot, hold, and trained block in seconds, its loss before and after.
    slots_in_use: int = 0
    held_requests: int = 0
    saving_requests: int = 0
    train_queue: int = 0
    versions_behind: int = 0
    idle_steps: int = 0
    adapted_tokens: int = 0
    blocks_trained: int = 0
    blocks_remembered: int = 0
    train_failures: int = 0
    trainer_restarts: int = 0
    adapters_saved: int = 0
    save_failures: int = 0
    swap_seconds: list[float] = field(default_factory=list)
    hold_seconds: list[float] = field(default_factory=list)
    train_seconds: list[float] = field(default_factory=list)
    losses: list[tuple[float, float]] = field(default_factory=list)


class LongContextStatLogger(AggregateStatLoggerBase):
    """Stands before vLLM's loggers, which must not see our part of the statistics: it is taken out."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]):
        self.vllm_config, self.engine_indexes = vllm_config, engine_indexes
        model = vllm_config.model_config.served_model_name
        labels: dict[int, list[object]] = {index: [model, str(index)] for index in engine_indexes}

        def per_engine(kind: type, name: str, documentation: str, **kwargs: Any) -> dict[int, Any]:
            metric = kind(PREFIX + name, documentation, labelnames=["model_name", "engine"], **kwargs)
            return create_metric_per_engine(metric, labels)

        settings = active_settings(vllm_config)
        gauges, counters, histograms = GAUGES, COUNTERS, HISTOGRAMS
        if settings.attention.memory_limit_gib is not None:
            gauges = gauges | MEMORY_GAUGES
        if settings.mode.adapts:
            gauges, counters = gauges | ADAPTATION_GAUGES, counters | ADAPTATION_COUNTERS
            histograms = histograms | ADAPTATION_HISTOGRAMS
        self.gauges = {
            f: per_engine(Gauge, *texts, multiprocess_mode="mostrecent") for f, texts in gauges.items()
        }
        self.counters = {f: per_engine(Counter, *texts) for f, texts in counters.items()}
        self.histograms = {
            f: per_engine(Histogram, n, text, buckets=b) for f, (n, text, b) in histograms.items()
        }
        about = "Histogram of a block's loss in nats per token, {} it was trained on."
        self.losses = [
            per_engine(Histogram, f"block_loss_{when}", about.format(when), buckets=LOSS_BUCKETS)
            for when in (("before", "after") if settings.mode.adapts else ())
        ]

    def log_engine_initialized(self) -> None:
        settings = active_settings(self.vllm_config)
        info = {
            "method": settings.attention.method,
            "trained_length": trained_length(self.vllm_config.model_config),
            **vars(settings.geometry),
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
        for name, gauge in self.gauges.items():
            if (value := getattr(step, name)) is not None:
                gauge[engine_idx].set(value)
        for name, counter in self.counters.items():
            counter[engine_idx].inc(getattr(step, name))
        for name, histogram in self.histograms.items():
            values = getattr(step, name)
            for value in values if isinstance(values, list) else [] if values is None else [values]:
                histogram[engine_idx].observe(value)
        for pair in step.losses:
            for metric, loss in zip(self.losses, pair, strict=True):
                metric[engine_idx].observe(loss)
