"""The state of a running server, from its /metrics."""

import math
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from http.client import HTTPException

from prometheus_client.parser import text_string_to_metric_families
from rich.table import Table

# Printed in this order; each from an engine's samples by name, without the prefix.
ROWS: dict[str, Callable[[dict[str, float]], str]] = {
    "requests running": lambda m: f"{m['num_requests_running']:.0f}",
    "requests waiting": lambda m: f"{m['num_requests_waiting']:.0f}",
    "KV cache used": lambda m: f"{m['kv_cache_usage_perc']:.1%}",
    "requests past the trained length": lambda m: f"{m['longctx_num_requests_past_trained']:.0f}",
    "KV blocks of requests past their window": lambda m: f"{m['longctx_live_kv_blocks']:,.0f}",
    "KV blocks freed so far": lambda m: f"{m['longctx_freed_kv_blocks_total']:,.0f}",
    "tokens past the trained length so far": lambda m: f"{m['longctx_tokens_past_trained_total']:,.0f}",
    "tokens read and written so far": lambda m: (
        f"{m['prompt_tokens_total'] + m['generation_tokens_total']:,.0f}"
    ),
    "selection time per step": lambda m: _mean(m, "selection_time_seconds", _milliseconds, "no step yet"),
}
# Where memory layers have blocks of their own.
MEMORY_ROWS: dict[str, Callable[[dict[str, float]], str]] = {
    "memory of memory layers used": lambda m: f"{m['longctx_memory_usage_perc']:.1%}",
}
# Those of a server whose requests can adapt.
ADAPTATION_ROWS: dict[str, Callable[[dict[str, float]], str]] = {
    "adapter slots in use": lambda m: f"{m['longctx_adapter_slots_in_use']:.0f}",
    "requests held": lambda m: f"{m['longctx_num_requests_held']:.0f}",
    "requests waiting for their save": lambda m: f"{m['longctx_num_requests_saving']:.0f}",
    "blocks in training or waiting for it": lambda m: f"{m['longctx_train_queue_blocks']:.0f}",
    "blocks read or written but not trained yet": lambda m: f"{m['longctx_versions_behind']:,.0f}",
    "blocks trained so far": lambda m: f"{m['longctx_blocks_trained_total']:,.0f}",
    "blocks that could not be trained so far": lambda m: f"{m['longctx_train_failures_total']:,.0f}",
    "restarts of the trainer so far": lambda m: f"{m['longctx_trainer_restarts_total']:,.0f}",
    "adapters saved so far": lambda m: f"{m['longctx_adapters_saved_total']:,.0f}",
    "adapters that could not be saved so far": lambda m: f"{m['longctx_save_failures_total']:,.0f}",
    "time per swap": lambda m: _mean(m, "swap_time_seconds", _milliseconds, "no swap yet"),
    "time per hold": lambda m: _mean(m, "hold_time_seconds", _milliseconds, "no hold yet"),
    "training time per block": lambda m: _mean(m, "train_time_seconds", _milliseconds, "no block yet"),
    "loss per token before training": lambda m: _mean(
        m, "block_loss_before", "{:.3f}".format, "no block yet"
    ),
    "loss per token after training": lambda m: _mean(m, "block_loss_after", "{:.3f}".format, "no block yet"),
}


def live_state(url: str) -> Table:
    """One column for each engine of the server at `url`, with or without /metrics.

    Raises OSError if it cannot be read, ValueError if it is not a vLLM server that runs longctx.
    """
    url = url.rstrip("/").removesuffix("/metrics")
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    except (OSError, ValueError, HTTPException) as e:
        raise OSError(
            f"cannot read {url}/metrics: {e}; is a server up at this address (http://HOST:PORT)?"
        ) from None
    return state_table(url, text)


def state_table(url: str, text: str) -> Table:
    """text: what /metrics answers. Raises ValueError if it is not from a vLLM server that runs longctx."""
    try:
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    except ValueError:
        samples = []
    engines: dict[str, dict[str, float]] = defaultdict(
        lambda: defaultdict(lambda: math.nan)
    )  # nan: not exported
    info: dict[str, dict[str, str]] = {}
    for sample in samples:
        engine, name = sample.labels.get("engine"), sample.name.removeprefix("vllm:")
        if engine is None or name == sample.name:
            continue
        if name == "longctx_config_info":
            info[engine] = sample.labels
        elif sample.labels.keys() == {"engine", "model_name"}:
            engines[engine][name] = sample.value
            model = sample.labels["model_name"]
    if not engines:
        raise ValueError(
            f"{url}/metrics has no metrics of vLLM's: it is no vLLM server, or runs with --disable-log-stats"
        )
    if not info:
        raise ValueError(
            f"{url} serves {model} without longctx; start it with `vllm serve {model} --plugin longctx`"
        )
    order = sorted(engines, key=int)
    table = Table("", *(f"engine {e}" for e in order), title=f"{model} at {url}")
    for key in (k for k in info[order[0]] if k != "engine"):
        table.add_row(key, *(info[e][key] for e in order))
    table.add_section()
    parts = {"longctx_live_kv_blocks": ROWS, "longctx_memory_usage_perc": MEMORY_ROWS}
    parts["longctx_adapter_slots_in_use"] = ADAPTATION_ROWS
    for rows in (rows for metric, rows in parts.items() if metric in engines[order[0]]):
        for label, value in rows.items():
            table.add_row(label, *(value(engines[e]) for e in order))
        table.add_section()
    return table


def _mean(samples: dict[str, float], histogram: str, shown: Callable[[float], str], none: str) -> str:
    total, count = samples[f"longctx_{histogram}_sum"], samples[f"longctx_{histogram}_count"]
    return shown(total / count) if count else none


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"
