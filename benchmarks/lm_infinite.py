"""Table "Speed" of benchmarks/README.md: prefill and decode of LM-Infinite against stock vLLM, side by side
in one run.

    python benchmarks/lm_infinite.py --json OUT.json --plot OUT.png python benchmarks/lm_infinite.py --batch
    16 --lengths 1024,32768,131072,1000000 --stock-up-to 0 --json OUT.json

All engines are up at the same time and take turns, round by round; figures are medians over rounds. Stock
vLLM's RoPE table is enlarged, or it could not run past the trained length at all; it is spared lengths above
`--stock-up-to`, which would take it hours. Each engine also runs at the window's own length (n_global +
n_local tokens), the speed that Λ attention should keep at any length.

`sliding` is stock vLLM again, with a plain sliding window of n_global + n_local tokens in each layer: as many
keys for each query as Λ attention has, at every length.

Texts are random tokens. Prefill is the time to the first token of one request. Decode is the median time
between tokens of `--batch` requests at once: their prompts share the text that was just read, from the prefix
cache, but for their last 1,024 tokens, more than a window, so that no two read the same keys. Above
`--stock-up-to` the text is the same in every round, and read in the first one only.
"""

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from load import add_requests, random_tokens
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoConfig

from vllm_longctx.cli.engine import (
    METHODS,
    STOCK,
    PremiseError,
    method_engine,
    model_path,
    running_engine,
)
from vllm_longctx.cli.options import JsonOut
from vllm_longctx.cli.output import console, plot, write_json

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

OWN_TOKENS = 1024


def token_times(engine: "LLMEngine", prompts: Sequence[list[int]], written: int) -> list[float]:
    """Seconds from the start to each step's tokens, from the first step in which every prompt is read."""
    return [seconds for seconds, _ in token_steps(engine, prompts, written)]


def token_steps(engine: "LLMEngine", prompts: Sequence[list[int]], written: int) -> list[tuple[float, int]]:
    """The same, each with the number of requests that got tokens in that step."""
    add_requests(engine, prompts, written)
    started: set[str] = set()
    start, times = time.perf_counter(), []
    while engine.has_unfinished_requests():
        outputs = engine.step()
        started |= {o.request_id for o in outputs}
        if len(started) == len(prompts) and outputs:
            times.append((time.perf_counter() - start, len(outputs)))
    return times


def prefill_speed(engine: "LLMEngine", text: list[int]) -> float:
    """Tokens/s of one prompt that the engine has not seen."""
    return len(text) / token_times(engine, [text], 1)[0]


def decode_speed(engine: "LLMEngine", text: list[int], batch: int, written: int) -> float:
    """Tokens/s of `batch` requests that have read `text`, all but its end.

    Raises PremiseError if they did not decode at once: the pool may be too small for them.
    """
    own = min(len(text), OWN_TOKENS)
    prompts = [text[: len(text) - own] + random_tokens(engine, own, random.random()) for _ in range(batch)]
    steps = token_steps(engine, prompts, written)
    gaps = [after - before for (before, n), (after, m) in pairwise(steps) if n == m == batch]
    if not gaps:
        raise PremiseError(f"{batch} requests never decoded at once; lower --batch or the lengths")
    return batch / statistics.median(gaps)


def main(
    model: str = "booklm",
    lengths: Annotated[str, typer.Option(help="Context lengths in tokens.")] = (
        "1024,2048,4096,8192,16384,32768,131072,1000000"
    ),
    stock_up_to: Annotated[int, typer.Option(help="Longest context of stock vLLM, in tokens.")] = 32768,
    batch: Annotated[int, typer.Option(help="Requests that decode at once.")] = 1,
    rounds: int = 3,
    written: int = 128,
    sliding: Annotated[bool, typer.Option(help="Run stock vLLM with a plain sliding window, too.")] = True,
    dtype: str = "float32",
    enforce_eager: bool = False,
    max_num_batched_tokens: int = 2048,
    json_out: JsonOut = None,
    plot_out: Annotated[Path | None, typer.Option("--plot")] = None,
) -> None:
    sizes = sorted(
        (int(x) for x in lengths.split(",")), reverse=True
    )  # the longest first: reading it empties the cache
    kwargs: dict[str, Any] = {
        "dtype": dtype,
        "enforce_eager": enforce_eager,
        "max_num_seqs": batch,
        "max_num_batched_tokens": max_num_batched_tokens,
        "enable_prefix_caching": True,
        "kv_cache_memory_bytes": 3
        << 30,  # or a round's shorter texts push the longest out of the prefix cache
    }
    stock_longest = max(stock_up_to, OWN_TOKENS) + 2 * written
    longest = max(sizes) + 2 * written
    figures: dict[tuple[str, str, int], list[float]] = {}
    with ExitStack() as stack:
        stock, _ = stack.enter_context(method_engine(model, None, stock_longest, **kwargs))
        ours, _ = stack.enter_context(method_engine(model, METHODS["lm-infinite"], longest, **kwargs))
        attention = ours.vllm_config.additional_config["longctx"]["attention"]
        window = attention["n_global"] + attention["n_local"]
        engines = {"stock": stock, "longctx": ours}
        if sliding:
            engines["sliding"] = stack.enter_context(sliding_engine(model, window, longest, kwargs))
        progress = stack.enter_context(Progress(console=console))
        plan = [
            (n, name, engine)
            for n in [*sizes, window]
            for name, engine in engines.items()
            if name != "stock" or n <= max(stock_up_to, window)
        ]
        task = progress.add_task("warming up", total=len(plan) * rounds)
        for engine in engines.values():
            decode_speed(engine, random_tokens(engine, OWN_TOKENS, 0.5), batch, 8)
        for number in range(rounds):
            for length, name, engine in plan:
                progress.update(task, description=f"round {number + 1}: {name} at {length:,}", advance=1)
                text = random_tokens(engine, length, f"{length}, {number if length <= stock_up_to else 0}")
                if number == 0 or length <= stock_up_to:
                    figures.setdefault(("prefill", name, length), []).append(prefill_speed(engine, text))
                figures.setdefault(("decode", name, length), []).append(
                    decode_speed(engine, text, batch, written)
                )
    medians = {key: statistics.median(values) for key, values in figures.items()}
    rows = [row(medians, length, window) for length in [window, *sorted(sizes)]]
    print_table(rows, batch)
    result = {"attention": attention, "batch": batch, "dtype": dtype, "rounds": rounds, "rows": rows}
    write_json(json_out, result)
    if plot_out is not None:
        plot(plot_out, curves(rows), "context (tokens)", "milliseconds per token", yscale="log")


@contextmanager
def sliding_engine(model: str, window: int, longest: int, kwargs: dict[str, Any]) -> "Iterator[LLMEngine]":
    """Stock vLLM with a sliding window of so many tokens in each layer.

    Raises PremiseError at the end if it kept more than a window: then the model took no notice.
    """
    layers = AutoConfig.from_pretrained(model_path(model)).num_hidden_layers
    overrides = {
        "max_position_embeddings": longest,
        "sliding_window": window,
        "layer_types": ["sliding_attention"] * layers,
    }
    with running_engine(model, STOCK, longest, hf_overrides=overrides, **kwargs) as (engine, meter):
        yield engine
        block = engine.vllm_config.cache_config.block_size
        most = kwargs["max_num_seqs"] * (window // block + 2) + kwargs["max_num_batched_tokens"] // block + 2
        if meter.peak > most:
            raise PremiseError(f"{meter.peak} blocks were in use where windows need {most}: it has no window")


NAMES = ("stock", "sliding", "longctx")


def row(medians: dict[tuple[str, str, int], float], length: int, window: int) -> dict[str, float]:
    """Medians over rounds, the ratios to stock at the same length where it ran, and those to stock at the
    window's length.
    """
    result: dict[str, float] = {"length": length}
    for what in ("prefill", "decode"):
        for name in NAMES:
            if (what, name, length) in medians:
                result[f"{name}_{what}"] = medians[what, name, length]
        ours = medians[what, "longctx", length]
        if (what, "stock", length) in medians:
            result[f"{what}_ratio"] = ours / medians[what, "stock", length]
        if (what, "sliding", length) in medians:
            result[f"{what}_ratio_to_sliding"] = ours / medians[what, "sliding", length]
        result[f"{what}_ratio_to_window"] = ours / medians[what, "stock", window]
    return result


def curves(rows: list[dict[str, float]]) -> dict[str, tuple[list[float], list[float]]]:
    """Cost of a token against the context's length."""
    result = {}
    for what in ("prefill", "decode"):
        for name in NAMES:
            points = [(r["length"], 1000 / r[key]) for r in rows if (key := f"{name}_{what}") in r]
            result[f"{what}, {name}"] = [x for x, _ in points], [y for _, y in points]
    return result


def print_table(rows: list[dict[str, float]], batch: int) -> None:
    headers = [f"{what}: stock" if c == "stock" else c for what in ("prefill", "decode") for c in COLUMNS]
    table = Table("context", *headers, title=f"tokens/s, decode with batch {batch}")
    for r in rows:
        cells = [
            f"{r[key]:{form}}" if (key := column.format(what)) in r else ""
            for what in ("prefill", "decode")
            for column, form in COLUMNS.values()
        ]
        table.add_row(f"{r['length']:,.0f}", *cells)
    Console(width=140).print(table)


COLUMNS = {
    "stock": ("stock_{}", ",.0f"),
    "longctx": ("longctx_{}", ",.0f"),
    "×": ("{}_ratio", ".2f"),
    "× stock at window": ("{}_ratio_to_window", ".2f"),
    "× sliding": ("{}_ratio_to_sliding", ".2f"),
}


if __name__ == "__main__":
    typer.run(main)
