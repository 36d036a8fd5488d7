"""`vllm-longctx tune`: what first tokens and window of Λ attention cost on a model and a text.

A shorter window is faster and holds less KV. What it costs is loss, which depends on model and text. So the
text is read with every window, and the loss past the trained length compared token by token; then with the
window that is recommended and other numbers of first tokens.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from vllm_longctx.cli.engine import parse_lengths, read_text, running_engine, trained_tokens
from vllm_longctx.cli.options import BatchedTokens, Dtype, EnforceEager, JsonOut, Model
from vllm_longctx.cli.output import errors_for_users, tables, write_json
from vllm_longctx.cli.score import score_in, tokenize

WRITTEN = 33  # tokens, to see how fast it writes and what KV it holds then
GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True)
class Run:
    """What one configuration has shown.

    nll: mean, in nats, of the tokens past the trained length. kv_bytes: held by one request while it writes.
    kv_bytes_peak: the most, which is while it reads. Speeds in tokens/s, of one request alone.
    extra, error: by how much nll is above the best of all runs, and the standard error of that.
    """

    n_global: int
    n_local: int
    nll: float
    kv_bytes: int
    kv_bytes_peak: int
    read_per_s: float
    written_per_s: float
    extra: float = 0.0
    error: float = 0.0


def tune(
    text: Annotated[Path, typer.Option(help="Text file, longer than the trained length.")],
    model: Model = "booklm",
    max_tokens: Annotated[
        int | None, typer.Option(help="Read only the first tokens. Default: twice the trained length.", min=2)
    ] = None,
    n_local: Annotated[
        str | None,
        typer.Option(help="Windows to try. Default: the trained length, a half, a quarter and an eighth."),
    ] = None,
    n_global: Annotated[
        str, typer.Option(help="First tokens to try with the recommended window.")
    ] = "0,1,4,10",
    tolerance: Annotated[
        float, typer.Option(help="Nats per token that a recommended configuration may lose.", min=0.0)
    ] = 0.01,
    kv_gib: Annotated[
        float, typer.Option(help="GiB for the KV cache; it must hold the largest window.")
    ] = 1.0,
    json_out: JsonOut = None,
    dtype: Dtype = "auto",
    max_num_batched_tokens: BatchedTokens = 2048,
    enforce_eager: EnforceEager = False,
) -> None:
    """Print what windows and first tokens cost in loss, memory and speed, and recommend some."""
    with errors_for_users():
        words = read_text(text)
        globals_ = parse_lengths(n_global, "--n-global", least=0)
        trained = trained_tokens(model)
        if n_local is None:
            windows = [trained >> k for k in range(4)]
        else:
            windows = parse_lengths(n_local, "--n-local")[::-1]
        if windows[0] > trained:
            raise ValueError(
                f"--n-local {n_local}: the model was trained on {trained:,} tokens; give no more"
            )
        tokens = tokenize(model, words, max_tokens or 2 * trained)
        if len(tokens) <= trained + 1:
            raise ValueError(
                f"{len(tokens)} tokens of {text} are read, but the loss is compared past the trained length, "
                f"{trained}; give a longer text, or more --max-tokens"
            )
        kwargs: dict[str, Any] = {
            "dtype": dtype,
            "max_num_batched_tokens": max_num_batched_tokens,
            "enforce_eager": enforce_eager,
            "kv_cache_memory_bytes": round(kv_gib * GIB),
        }
        measured: dict[tuple[int, int], tuple[Run, list[float]]] = {}
        planned = len(windows) + len(globals_) - 1

        def measure(first: int, window: int) -> None:
            label = f"{len(measured) + 1} of {planned}: n_global {first}, n_local {window:,}"
            measured[first, window] = run(model, tokens, trained, first, window, label, **kwargs)

        for window in windows:
            measure(globals_[-1], window)
        chosen = recommended(compared(list(measured.values())), tolerance)
        for first in globals_[-2::-1]:
            measure(first, chosen.n_local)
        runs = compared(list(measured.values()))
    chosen = recommended(runs, tolerance)
    output = tables()
    output.print(run_table(runs, chosen))
    output.print(advice(chosen, tolerance), highlight=False, markup=False)
    write_json(
        json_out,
        {
            "model": model,
            "text": str(text),
            "tokens": len(tokens),
            "trained": trained,
            "tolerance": tolerance,
            "max_num_batched_tokens": max_num_batched_tokens,
            "runs": [asdict(r) for r in runs],
            "recommended": asdict(chosen),
        },
    )


def run(
    model: str, tokens: list[int], trained: int, n_global: int, n_local: int, label: str, **engine_kwargs: Any
) -> tuple[Run, list[float]]:
    """One configuration, and the NLL of every token past the trained length."""
    attention = {"method": "lm_infinite", "n_global": n_global, "n_local": n_local}
    config = {"longctx": {"attention": attention}}
    length = len(tokens) + WRITTEN
    with running_engine(model, config, length, **engine_kwargs) as (engine, meter):
        writing: list[tuple[float, int]] = []  # when each step since the text was read ended, and its blocks

        def watch(read: int) -> None:
            if read == len(tokens):
                writing.append((time.perf_counter(), meter.held))

        score = score_in(engine, meter, tokens, label, each_step=watch, written=WRITTEN)
        block_bytes = engine_kwargs["kv_cache_memory_bytes"] / meter.num_blocks
    nll = score.nll[trained - 1 :]
    times = [at for at, _ in writing]
    writing_s = times[-1] - times[0]
    reading_s = len(tokens) / score.tokens_per_s - writing_s
    result = Run(
        n_global,
        n_local,
        nll=statistics.fmean(nll),
        kv_bytes=round(max(held for _, held in writing[1:]) * block_bytes),
        kv_bytes_peak=round(score.kv_blocks_peak * block_bytes),
        read_per_s=len(tokens) / reading_s,
        written_per_s=(len(times) - 1) / writing_s,
    )
    return result, nll


def compared(measured: Sequence[tuple[Run, list[float]]]) -> list[Run]:
    """With what each loses against the best, token by token: texts differ more than windows do."""
    finite = [(run, nll) for run, nll in measured if math.isfinite(run.nll)]
    if not finite:
        raise ValueError("no configuration has a finite loss; see whether the model's --dtype is right")
    _, best = min(finite, key=lambda pair: pair[0].nll)
    runs = []
    for run, nll in measured:
        extra, error = loss(nll, best)
        runs.append(replace(run, extra=extra, error=error))
    return runs


def loss(nll: Sequence[float], best: Sequence[float]) -> tuple[float, float]:
    """Mean difference, in nats, and its standard error; NaN where a token's is not finite."""
    differences = [a - b for a, b in zip(nll, best, strict=True)]
    if not all(map(math.isfinite, differences)):
        return math.nan, math.nan
    return statistics.fmean(differences), statistics.stdev(differences) / len(differences) ** 0.5


def recommended(runs: Sequence[Run], tolerance: float) -> Run:
    """Of those that lose no more than `tolerance` nats, the one with the shortest window and then the fewest
    first tokens.
    """
    good = [run for run in runs if run.extra <= tolerance]
    return min(good, key=lambda run: (run.n_local, run.n_global))


def run_table(runs: Sequence[Run], chosen: Run) -> Table:
    table = Table(
        *("", "n_global", "n_local", "NLL", "loses", "KV, writing", "KV, reading", "reads", "writes"),
        title="NLL past the trained length, nats per token; KV of one request, MiB; tokens/s",
    )
    for run in sorted(runs, key=lambda run: (-run.n_local, -run.n_global)):
        table.add_row(
            "→" if run == chosen else "",
            str(run.n_global),
            f"{run.n_local:,}",
            f"{run.nll:.3f}",
            f"{run.extra:+.3f} ± {run.error:.3f}",
            f"{run.kv_bytes / MIB:,.1f}",
            f"{run.kv_bytes_peak / MIB:,.1f}",
            f"{run.read_per_s:,.0f}",
            f"{run.written_per_s:,.1f}",
        )
    return table


def advice(chosen: Run, tolerance: float) -> str:
    return (
        "Recommended: the shortest window, and then the fewest first tokens, that lose at most "
        f"{tolerance:g} nats per token (±: standard error):\n"
        f"""  --longctx '{{"attention": {{"n_global": {chosen.n_global}, "n_local": {chosen.n_local}}}}}'"""
    )
