"""Table "Front end" of benchmarks/README.md: what a token costs the front end, by what was written before.

    python benchmarks/detokenizer.py --json OUT.json --plot OUT.png

Microseconds to turn one token into text, to look for stop strings and to give out what is new, as for a
stream: ours and vLLM's in turn, median over tokens. The text is written first, with tokens of booklm at
random.
"""

import random
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.v1.engine.detokenizer import BaseIncrementalDetokenizer, FastIncrementalDetokenizer

from vllm_longctx import BOOKLM
from vllm_longctx.cli.options import JsonOut
from vllm_longctx.cli.output import plot, write_json
from vllm_longctx.serving.written_text import keep_ends_of_texts

STOP = ["\n\nThe end", "###"]


class Stock(FastIncrementalDetokenizer):
    """vLLM's, in a process where ours is in force."""

    update = BaseIncrementalDetokenizer.update
    get_next_output_text = BaseIncrementalDetokenizer.get_next_output_text


def write(detokenizer: FastIncrementalDetokenizer, tokens: list[int]) -> list[float]:
    """Seconds for each token."""
    seconds = []
    for token in tokens:
        began = time.perf_counter()
        stopped = detokenizer.update([token], stop_terminated=False)
        detokenizer.get_next_output_text(finished=False, delta=True)
        seconds.append(time.perf_counter() - began)
        if stopped is not None:
            raise typer.Exit("a stop string was written, so the tokens behind it would cost nothing")
    return seconds


def main(
    lengths: str = "1000,10000,100000,300000",
    tokens: Annotated[int, typer.Option(help="So many are timed at each length.")] = 2000,
    json_out: JsonOut = None,
    plot_out: Annotated[Path | None, typer.Option("--plot", help="Write the plot here.")] = None,
) -> None:
    keep_ends_of_texts()
    tokenizer: Any = AutoTokenizer.from_pretrained(BOOKLM)
    forbidden = set(tokenizer.encode("#The end\n")) | set(tokenizer.all_special_ids)
    vocabulary = [token for token in range(len(tokenizer)) if token not in forbidden]
    request: Any = SimpleNamespace(
        sampling_params=SamplingParams(stop=STOP), request_id="", prompt_token_ids=vocabulary[:3]
    )
    rows: list[dict[str, float]] = []
    for length in track([int(word) for word in lengths.split(",")], "lengths"):
        text, rng = random.Random(0).choices(vocabulary, k=length), random.Random(1)
        ways = {"longctx": FastIncrementalDetokenizer(tokenizer, request), "vllm": Stock(tokenizer, request)}
        for detokenizer in ways.values():
            write(detokenizer, text)
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(0, tokens, 100):
            more = rng.choices(vocabulary, k=100)
            for way, detokenizer in ways.items():
                times[way] += write(detokenizer, more)
        rows.append({"tokens": length} | {way: 1e6 * statistics.median(took) for way, took in times.items()})
    table = Table("tokens written", "longctx, µs", "vLLM, µs")
    for row in rows:
        table.add_row(f"{row['tokens']:,}", f"{row['longctx']:.1f}", f"{row['vllm']:.1f}")
    Console().print(table)
    write_json(json_out, {"stop": STOP, "rows": rows})
    if plot_out is not None:
        curves = {
            way: ([row["tokens"] for row in rows], [row[way] for row in rows]) for way in ("longctx", "vllm")
        }
        plot(plot_out, curves, "tokens written", "µs per token", "log")


if __name__ == "__main__":
    typer.run(main)
