"""Every measure of speed in ten minutes, beside its goal (`make bench-quick`).

    python benchmarks/quick.py --json OUT.json

Runs the benchmarks one after another, as processes of their own, with small sizes, and reads their JSON.
Figures of a machine that does something else meanwhile are worth nothing, and these sizes are too small for
the record: they tell whether something got slower. A row is void where its benchmark failed, as it does when
a premise does not hold; the reason is printed below the table.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_longctx.cli.options import JsonOut
from vllm_longctx.cli.output import console, tables, write_json

HERE = Path(__file__).parent
Result = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A measure.

    figure: Of a benchmark's result. goal: What it should be. unit: Of both. at_most: Whether less is better.
    """

    what: str
    figure: Callable[[Result], float]
    goal: float
    unit: str = " ×"
    at_most: bool = False

    def is_met(self, value: float) -> bool:
        return value <= self.goal if self.at_most else value >= self.goal


def at(result: Result, key: str, value: float, figure: str, rows: str = "rows") -> float:
    """A figure of the row in which `key` has this value."""
    (row,) = (row for row in result[rows] if row[key] == value)
    return float(row[figure])


def ratio(result: Result, key: str, many: int, few: int, figure: str = "longctx") -> float:
    return at(result, key, many, figure) / at(result, key, few, figure)


def decode(length: int, what: str, to: str) -> Callable[[Result], float]:
    return lambda result: at(result, "length", length, f"{what}_ratio_to_{to}")


def lookup(length: int, queries: int, way: str, other: str) -> Callable[[Result], float]:
    def figure(result: Result) -> float:
        (row,) = (r for r in result["costs"] if (r["length"], r["queries"]) == (length, queries))
        return float(row[other] / row[way])

    return figure


# By benchmark and its options: what is read from its JSON.
STAGES: dict[str, list[Row]] = {
    "temp_lora.py --streams 8 --written 256 --rounds 1 --enforce-eager": [
        Row(
            "one stream that learns, to the official loop",
            lambda r: r["tokens_per_s"]["longctx 1"] / r["tokens_per_s"]["official"],
            1.5,
        ),
        Row("eight streams that learn, to the official loop", lambda r: r["ratios"]["to official"], 4.5),
        Row(
            "four that do not learn, beside four that do",
            lambda r: 100 * r["ratios"]["bystanders to idle trainer"],
            95,
            " %",
        ),
        Row("empty steps while all requests are held", lambda r: r["empty_steps_per_s"], 0.5, "/s", True),
    ],
    "lm_infinite.py --lengths 4096,32768 --rounds 1 --written 64 --stock-up-to 1024 --enforce-eager": [
        Row("Λ decode at 522, of stock", decode(522, "decode", "window"), 0.97),
        Row("Λ decode at 4,096, of stock at the window", decode(4096, "decode", "window"), 0.97),
        Row("Λ decode at 32,768, of stock at the window", decode(32768, "decode", "window"), 0.97),
        Row("Λ prefill at 4,096, of a plain sliding window", decode(4096, "prefill", "sliding"), 0.95),
        Row("Λ prefill at 32,768, of a plain sliding window", decode(32768, "prefill", "sliding"), 0.95),
    ],
    "lm_infinite.py --lengths 4096 --rounds 1 --batch 16 --written 64 --stock-up-to 1024 --enforce-eager "
    "--no-sliding": [
        Row("Λ decode at 4,096, batch 16, of stock at the window", decode(4096, "decode", "window"), 0.97)
    ],
    "lookup.py --lengths 16384,131072 --prefill-lengths 131072 --rounds 3": [
        Row("memory decode at 131,072, `blocks` against `all`", lookup(131072, 1, "blocks", "all"), 10),
        Row("memory decode at 16,384, `blocks` against `all`", lookup(16384, 1, "blocks", "all"), 1),
        Row(
            "512 queries at 131,072, time of `blocks` against `all`",
            lookup(131072, 512, "all", "blocks"),
            1.5,
            at_most=True,
        ),
    ],
    "penalties.py --lengths 1000,100000 --rounds 10": [
        Row(
            "time with penalties, 100,000 tokens to 1,000",
            lambda r: ratio(r, "tokens", 100_000, 1000),
            1.05,
            at_most=True,
        )
    ],
    "detokenizer.py --lengths 10000,300000": [
        Row(
            "front end with `stop`, 300,000 tokens to 10,000",
            lambda r: ratio(r, "tokens", 300_000, 10_000),
            1.05,
            at_most=True,
        )
    ],
    "fairness.py --long 50000 --rounds 1": [
        Row("a short request's wait, in steps", lambda r: r["waits_in_steps"]["median"], 3, "", True),
        Row("what the long prompt loses", lambda r: 100 * r["long_prompt_loses"], 15, " %", True),
        Row("tokens of 1,500 still cached", lambda r: r["still_cached"], 1472, ""),
    ],
    "growth.py --tokens 400000": [
        Row(
            "time per token written, 400,000 tokens to 100,000",
            lambda r: r["written_400000"] / r["written_100000"],
            1.05,
            at_most=True,
        ),
        Row(
            "time per token read, 400,000 tokens to 100,000",
            lambda r: r["read_400000"] / r["read_100000"],
            1.05,
            at_most=True,
        ),
    ],
}


def run(command: str, out: Path) -> tuple[Result | None, str]:
    """A benchmark's result, or None and the last line that it said."""
    name, *options = command.split()
    process = [sys.executable, str(HERE / name), *options, "--json", str(out)]
    done = subprocess.run(process, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(out.read_text(encoding="utf-8")), ""
    said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return None, f"{name} ended with code {done.returncode}: {said[-1] if said else 'it said nothing'}"


def rows_of(command: str, result: Result | None) -> Iterator[Result]:
    for row in STAGES[command]:
        value = None if result is None else row.figure(result)
        met = value is not None and row.is_met(value)
        yield {"what": row.what, "value": value, "goal": row.goal, "unit": row.unit, "met": met}


def main(
    only: Annotated[str, typer.Option(help="Run the benchmarks whose name has this in it.")] = "",
    json_out: JsonOut = None,
) -> None:
    table = Table("measure", "now", "goal", "", title="quick sizes: not for the record")
    all_rows: list[Result] = []
    void: list[str] = []
    began = time.monotonic()
    chosen = [command for command in STAGES if only in command]
    with tempfile.TemporaryDirectory() as directory:
        for number, command in enumerate(chosen):
            with console.status(f"{number + 1} of {len(chosen)}: {command}"):
                result, why = run(command, Path(directory, f"{number}.json"))
            void += [why] if why else []
            for row, made in zip(STAGES[command], rows_of(command, result), strict=True):
                now = "void" if made["value"] is None else f"{made['value']:,.2f}{row.unit}"
                limit = f"{'≤' if row.at_most else '≥'} {row.goal:,g}{row.unit}"
                table.add_row(row.what, now, limit, "met" if made["met"] else "")
                all_rows.append({**made, "command": command})
    tables().print(table)
    for why in void:
        Console().print(why, markup=False)
    Console().print(f"{time.monotonic() - began:,.0f} s")
    write_json(json_out, {"rows": all_rows, "void": void})
    if void:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
