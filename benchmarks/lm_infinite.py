"""Table "Speed" of the README: prefill and decode of LM-Infinite against stock vLLM, side by side in one run.

    python benchmarks/lm_infinite.py --json OUT.json --plot OUT.png

Both engines are up at the same time and take turns, round by round; figures are medians over rounds. Stock vLLM's RoPE table
is enlarged, or it could not run past the trained length at all. Prompts are random tokens; prefill is the time to the first
token, decode the median time between tokens after it. Each engine also runs at the window's own length (n_global + n_local
tokens), the speed that Λ attention should keep at any length.
"""

import json
import random
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vllm_longctx.cli.engine import console, plot, running_engine

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine


def measure(engine: "LLMEngine", length: int, batch: int, written: int) -> tuple[float, float]:
    """(prefill tokens/s, decode tokens/s) of `batch` prompts of `length` random tokens at once."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        max_tokens=written, temperature=0, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )
    vocab = engine.vllm_config.model_config.get_vocab_size()
    for number in range(batch):
        ids = [random.randrange(3, vocab) for _ in range(length)]
        engine.add_request(f"{number}-{random.random()}", tokens_input(ids), params)
    start, prefill, started, ticks = time.perf_counter(), 0.0, set(), []
    while engine.has_unfinished_requests():
        outputs = engine.step()
        started |= {o.request_id for o in outputs}
        if len(started) == batch and outputs:
            ticks.append(time.perf_counter())
            prefill = prefill or ticks[0] - start
    gaps = [after - before for before, after in pairwise(ticks)]
    return batch * length / prefill, batch / statistics.median(gaps)


def main(
    model: str = "booklm",
    lengths: Annotated[str, typer.Option(help="Context lengths in tokens.")] = "1024,2048,4096,8192,16384,32768",
    batch: int = 1,
    rounds: int = 3,
    written: int = 64,
    dtype: str = "float32",
    enforce_eager: bool = False,
    max_num_batched_tokens: int = 2048,
    json_out: Annotated[Path | None, typer.Option("--json")] = None,
    plot_out: Annotated[Path | None, typer.Option("--plot")] = None,
) -> None:
    sizes = [int(x) for x in lengths.split(",")]
    longest = max(sizes) + written
    kwargs: dict[str, Any] = {
        "dtype": dtype,
        "enforce_eager": enforce_eager,
        "max_num_seqs": batch,
        "max_num_batched_tokens": max_num_batched_tokens,
    }
    enlarged = {"max_position_embeddings": longest}
    config = {"longctx": {"preset": "lm-infinite"}}
    stock_context = running_engine(model, {}, longest, hf_overrides=enlarged, **kwargs)
    ours_context = running_engine(model, config, longest, **kwargs)
    figures: dict[tuple[str, int], list[tuple[float, float]]] = {}
    with stock_context as (stock, _), ours_context as (ours, _), Progress(console=console) as progress:
        attention = ours.vllm_config.additional_config["longctx"]["attention"]
        window = attention["n_global"] + attention["n_local"]
        plan = [(name, n) for n in [window, *sizes] for name in ("stock", "longctx")]
        task = progress.add_task("warming up", total=len(plan) * rounds)
        for engine in (stock, ours):
            measure(engine, min(sizes), batch, 8)
        for number in range(rounds):
            for name, length in plan:
                progress.update(task, description=f"round {number + 1}: {name} at {length:,}", advance=1)
                figure = measure(stock if name == "stock" else ours, length, batch, written)
                figures.setdefault((name, length), []).append(figure)
    rows = [row(figures, length, window) for length in [window, *sizes]]
    print_table(rows, batch)
    if json_out is not None:
        result = {"attention": attention, "batch": batch, "dtype": dtype, "rows": rows}
        json_out.write_text(json.dumps(result, indent=1) + "\n")
    if plot_out is not None:
        x = [r["length"] for r in rows]
        curves = {
            f"{what}, {name}": (x, [r[f"{name}_{what}"] for r in rows]) for what in ("prefill", "decode") for name in NAMES
        }
        plot(plot_out, curves, "context (tokens)", "tokens/s", yscale="log")


NAMES = ("stock", "longctx")


def row(figures: dict[tuple[str, int], list[tuple[float, float]]], length: int, window: int) -> dict[str, float]:
    """Medians over rounds, the ratios to stock at the same length, and those to stock at the window's length."""
    result: dict[str, float] = {"length": length}
    for which, what in enumerate(("prefill", "decode")):
        for name in NAMES:
            result[f"{name}_{what}"] = statistics.median(f[which] for f in figures[name, length])
        result[f"{what}_ratio"] = result[f"longctx_{what}"] / result[f"stock_{what}"]
        at_window = statistics.median(f[which] for f in figures["stock", window])
        result[f"{what}_ratio_to_window"] = result[f"longctx_{what}"] / at_window
    return result


def print_table(rows: list[dict[str, float]], batch: int) -> None:
    columns = ["stock", "longctx", "×", "× stock at window"]
    headers = [f"{what}: {c}" if c == "stock" else c for what in ("prefill", "decode") for c in columns]
    table = Table("context", *headers, title=f"tokens/s, batch {batch}")
    for r in rows:
        cells = [
            text
            for what in ("prefill", "decode")
            for text in (
                f"{r[f'stock_{what}']:,.0f}",
                f"{r[f'longctx_{what}']:,.0f}",
                f"{r[f'{what}_ratio']:.2f}",
                f"{r[f'{what}_ratio_to_window']:.2f}",
            )
        ]
        table.add_row(f"{r['length']:,.0f}", *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
