"""Table "Penalties" of benchmarks/README.md: what a repetition penalty costs a step, by what was written.

    python benchmarks/penalties.py --json OUT.json --plot OUT.png

Milliseconds to apply the penalties of a batch to its logits, ours and vLLM's in turn: median over rounds.
Each request has a prompt and an output of that many random tokens, and writes one more token per step.
"""

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from vllm.v1.sample.sampler import Sampler

from vllm_longctx.cli.options import JsonOut
from vllm_longctx.cli.output import plot, write_json
from vllm_longctx.cpu.kernels.penalties import Penalties

Apply = Callable[[Tensor, Any, list[list[int]]], Tensor]


def milliseconds(apply: Apply, metadata: Any, outputs: list[list[int]], vocabulary: int) -> float:
    for tokens in outputs:
        tokens.append(random.randrange(vocabulary))
    logits = torch.randn(len(outputs), vocabulary)
    began = time.perf_counter()
    apply(logits, metadata, outputs)
    return 1e3 * (time.perf_counter() - began)


def main(
    lengths: str = "1000,10000,100000,300000",
    batch: int = 4,
    vocabulary: Annotated[int, typer.Option(help="Tokens; SmolLM2 has 49,152.")] = 49_152,
    rounds: int = 20,
    json_out: JsonOut = None,
    plot_out: Annotated[Path | None, typer.Option("--plot", help="Write the plot here.")] = None,
) -> None:
    torch.set_num_threads(1)
    rows = []
    for length in track([int(word) for word in lengths.split(",")], "lengths"):
        outputs = [random.choices(range(vocabulary), k=length) for _ in range(batch)]
        metadata = SimpleNamespace(
            no_penalties=False,
            prompt_token_ids=torch.randint(vocabulary, (batch, length)),
            presence_penalties=torch.zeros(batch),
            frequency_penalties=torch.zeros(batch),
            repetition_penalties=torch.full((batch,), 1.1),
        )
        ways: dict[str, Apply] = {"longctx": Penalties().apply, "vllm": Sampler.apply_penalties}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds + 1):
            for way, apply in ways.items():
                took = milliseconds(apply, metadata, outputs, vocabulary)
                if number:  # the first one counts what was there before
                    times[way].append(took)
        rows.append({"tokens": length} | {way: statistics.median(taken) for way, taken in times.items()})
    table = Table("tokens written and read", "longctx, ms", "vLLM, ms")
    for row in rows:
        table.add_row(f"{row['tokens']:,}", f"{row['longctx']:.2f}", f"{row['vllm']:.2f}")
    Console().print(table)
    write_json(json_out, {"batch": batch, "vocabulary": vocabulary, "rows": rows})
    if plot_out is not None:
        curves = {
            way: ([row["tokens"] for row in rows], [row[way] for row in rows]) for way in ("longctx", "vllm")
        }
        plot(plot_out, curves, "tokens written and read", "ms per step", "log")


if __name__ == "__main__":
    typer.run(main)
