"""Table "Beside others" of benchmarks/README.md: every way to read past the trained length, on one model, the
same texts and the same machine, in one run.

    python benchmarks/peers.py --text FILE --model smollm2 --json OUT.json --plot OUT.png

Every peer runs in a process of its own, one after another (benchmarks/peer.py has their loops), with the same
KV budget where it has one. A peer that cannot run is a row with its reason.

- NLL of the last tokens of a text of `--length`.
- Pass keys, told by greedy decoding: inside the budget, and outside.
- Prefill and decode, tokens/s, at batch 1 and 8, of prompts of `--speed-tokens`.
- KV bytes of one request while it writes.

kvpress needs an older transformers: `--peers-python` names the interpreter of an environment with
requirements/peers.txt, in which the peers of transformers and llama.cpp run. Without it they run in this one,
and those that need what it does not have are rows with that reason. llama.cpp reads the model from `--gguf`.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from peer import BATCH, FIRST, PEERS, Task
from rich.table import Table

from vllm_longctx.cli.engine import model_path, read_text, tokenizer_of, trained_tokens
from vllm_longctx.cli.options import JsonOut
from vllm_longctx.cli.output import counting, errors_for_users, figure, tables, write_json
from vllm_longctx.cli.passkey import PLACES, tells
from vllm_longctx.cli.passkey import Task as PassKeys
from vllm_longctx.cli.score import tokenize
from vllm_longctx.geometry import Geometry

HERE = Path(__file__).parent
OURS = ("longctx", "stock")  # peers that need vLLM, and so this interpreter
QUICK = {"length": 640, "scored": 64, "speed_tokens": 256, "written": 8, "budget": 128, "chunk": 64}
LAST_WORDS = 300  # characters of what a peer says when it fails
MIB = 1 << 20


def main(
    text: Annotated[Path, typer.Option(help="Text file, at least --length tokens long.")],
    model: str = "smollm2",
    peers: Annotated[str, typer.Option(help="Some of the peers, separated by semicolons.")] = ";".join(PEERS),
    length: Annotated[int, typer.Option(help="Tokens of the text that are read.", min=2)] = 32768,
    scored: Annotated[int, typer.Option(help="Last tokens of it that are scored.", min=1)] = 1024,
    budget: Annotated[int, typer.Option(help="KV that a request may keep, in tokens.", min=64)] = 2048,
    trials: Annotated[int, typer.Option(help="Pass keys for each place.", min=1)] = 10,
    key_tokens: Annotated[
        int | None, typer.Option(help="Of a prompt with a pass key. Default: half the trained length.")
    ] = None,
    speed_tokens: Annotated[int, typer.Option(help="Of a prompt whose speed is measured.", min=2)] = 8192,
    written: Annotated[int, typer.Option(help="Tokens that are written after it.", min=2)] = 64,
    chunk: Annotated[int, typer.Option(help="Tokens that are computed at once.", min=1)] = 512,
    block_tokens: Annotated[int, typer.Option(help="Of Temp-LoRA.", min=1)] = 512,
    dtype: str = "float32",
    threads: int = os.cpu_count() or 1,
    peers_python: Annotated[
        Path, typer.Option(help="Interpreter with requirements/peers.txt, for peers without vLLM.")
    ] = Path(sys.executable),
    gguf: Annotated[Path | None, typer.Option(help="The model as a file of llama.cpp's.")] = None,
    hours: Annotated[float, typer.Option(help="After so long a peer is ended.")] = 2.0,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, to see that all runs.")] = False,
    json_out: JsonOut = None,
    plot_out: Annotated[Path | None, typer.Option("--plot", help="NLL against decode speed.")] = None,
) -> None:
    with errors_for_users():
        chosen = peers.split(";")
        for name in chosen:
            if name not in PEERS:
                raise ValueError(f"--peers: there is no peer {name!r}; peers: {'; '.join(PEERS)}")
        sizes: dict[str, Any] = {
            "length": length,
            "scored": scored,
            "speed_tokens": speed_tokens,
            "written": written,
            "budget": budget,
            "chunk": chunk,
        }
        if quick:
            sizes, trials, block_tokens = {**sizes, **QUICK}, 1, QUICK["chunk"]
        task, trial_places = planned(
            model, read_text(text), sizes, trials, key_tokens, block_tokens, dtype, threads, gguf
        )
    tokenizer = tokenizer_of(model)
    about = {"model": model, "text": text.name, "dtype": dtype, "threads": threads, "trials": trials, **sizes}
    rows: dict[str, dict[str, Any]] = {}
    with counting() as progress:
        shown = progress.add_task("peers", total=len(chosen))
        for name in chosen:
            progress.update(shown, description=name)
            python = Path(sys.executable) if name.startswith(OURS) else peers_python
            row = measured(name, task, python, 3600 * hours)
            answers = row.pop("answers", None)
            if answers is not None:
                told = [
                    tells(tokenizer.decode(a), key) for a, (_, key) in zip(answers, trial_places, strict=True)
                ]
                row["keys"] = {
                    place: statistics.fmean(
                        hit for hit, (where, _) in zip(told, trial_places, strict=True) if where == place
                    )
                    for place in PLACES
                }
            rows[name] = row
            progress.advance(shown)
            write_json(json_out, {**about, "peers": rows})
    tables().print(peer_table(rows))
    if plot_out is not None:
        draw(plot_out, rows)


def planned(
    model: str,
    words: str,
    sizes: dict[str, Any],
    trials: int,
    key_tokens: int | None,
    block_tokens: int,
    dtype: str,
    threads: int,
    gguf: Path | None,
) -> tuple[Task, list[tuple[str, str]]]:
    """What all peers do; and of each pass key its place, and the key. Raises ValueError for a short text."""
    trained, budget = trained_tokens(model), sizes["budget"]
    if budget > trained:
        raise ValueError(f"--budget {budget}: the model was trained on {trained:,} tokens; give no more")
    tokens = tokenize(model, words, None)
    needed = max(sizes["length"], sizes["speed_tokens"] + BATCH)
    if len(tokens) < needed:
        raise ValueError(f"the text has {len(tokens):,} tokens, but {needed:,} are read; give a longer one")
    found = PassKeys(tokenizer_of(model)).trials(
        key_tokens or max(trained // 2, 4 * budget), [Geometry(FIRST, budget - FIRST)], trials, 0
    )
    speed = [tokens[k : k + sizes["speed_tokens"]] for k in range(BATCH)]
    task = Task(
        model=str(Path(model_path(model)).absolute()),
        dtype=dtype,
        threads=threads,
        trained=trained,
        text=tokens[: sizes["length"]],
        scored=sizes["scored"],
        keys=[trial.prompt for trial in found],
        speed=speed,
        written=sizes["written"],
        budget=budget,
        chunk=sizes["chunk"],
        recipe=recipe(block_tokens, budget),
        gguf=None if gguf is None else str(gguf),
    )
    return task, [(trial.place, trial.key) for trial in found]


def recipe(block_tokens: int, budget: int) -> dict[str, Any]:
    """Of Temp-LoRA, for both loops: a block is trained behind as many tokens as before it."""
    context = budget - block_tokens
    return {
        "block_tokens": block_tokens,
        "context_tokens": context,
        "train_context_tokens": context,
        "window_tokens": budget,
        "rank": 16,
        "alpha": 16,
        "dropout": 0.05,
        "learning_rate": 2e-4,
        "adam_eps": 1e-7,
        "weight_decay": 0.0,
        "epochs": 2,
    }


def measured(name: str, task: Task, python: Path, seconds: float) -> dict[str, Any]:
    """A peer's row as far as it has come, and the reason for which it has not come to its end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(HERE.parent), str(HERE)))}
    environment["OMP_NUM_THREADS"] = str(task.threads)
    with tempfile.TemporaryDirectory() as temporary:
        given, out = Path(temporary, "task.json"), Path(temporary, "row.json")
        given.write_text(json.dumps(vars(task)))
        reason = None
        try:
            done = subprocess.run(
                [python, HERE / "peer.py", name, given, out],
                env=environment,
                capture_output=True,
                text=True,
                timeout=seconds,
            )
            if done.returncode != 0:
                said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
                reason = said[-1][-LAST_WORDS:]
        except subprocess.TimeoutExpired:
            reason = f"it was ended after {seconds / 3600:g} hours"
        except OSError as e:
            reason = str(e)
        row: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    return {**row, "reason": reason}


def peer_table(rows: dict[str, dict[str, Any]]) -> Table:
    batches = [f"{what}, {count}" for what in ("prefill", "decode") for count in (1, BATCH)]
    table = Table(
        *("", "NLL", *(f"key {place}" for place in PLACES), *batches, "KV, MiB"),
        title="NLL, nats per token; pass keys told; tokens/s at batch 1 and 8; KV of one request",
    )
    for name, row in rows.items():
        table.add_row(name, *cells(row))
    for name, row in rows.items():
        if row["reason"] is not None:
            table.caption = f"{table.caption or ''}{name}: {row['reason']}\n"
    return table


def cells(row: dict[str, Any]) -> list[str]:
    """Of a row; what a peer has no figure for is empty."""

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    keys = row.get("keys") or {}
    speeds = [
        (row.get(f"{what}_per_s") or {}).get(str(n)) for what in ("prefill", "decode") for n in (1, BATCH)
    ]
    held = row.get("kv_bytes")
    return [
        shown(row.get("nll"), ".3f"),
        *(shown(keys.get(place), ".0%") for place in PLACES),
        *(shown(speed, ",.1f") for speed in speeds),
        shown(None if held is None else held / MIB, ",.0f"),
    ]


def draw(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    with figure(path, xlabel=f"decode at batch {BATCH} (tokens/s)", ylabel="NLL (nats per token)") as axes:
        for name, row in rows.items():
            speed = (row.get("decode_per_s") or {}).get(str(BATCH))
            if row.get("nll") is not None and speed is not None:
                axes.scatter([speed], [row["nll"]], label=name)


if __name__ == "__main__":
    typer.run(main)
