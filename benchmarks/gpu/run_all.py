"""Everything that is owed on a GPU, by one command: checks of the kernels on the device, then measurements.

    python benchmarks/gpu/run_all.py --out DIR

Stages are independent: each runs in a process of its own under a time limit and writes DIR/stages/NAME.json
as it goes, so a failing one does not stop the others. The same command again goes on where it stopped: what
is done stays, what failed or was
cut off is tried again. In the end, or so far: DIR/results.md, results.json and cost.png. No network is
    needed.
"""

import contextlib
import importlib
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

BENCHMARKS = Path(__file__).resolve().parents[1]
for path in (BENCHMARKS, BENCHMARKS.parent):  # as a script it sees only its own directory
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))

from gpu.models import GIB  # noqa: E402
from gpu.report import Record, curves, markdown, number, targets  # noqa: E402

from vllm_longctx.cli.output import console, plot, write_json  # noqa: E402

LEAST_S = 30  # a stage is not started with less time left


@dataclass(frozen=True)
class Setting:
    """quick: tiny shapes.

    memory: of the card, bytes. cuda, engine_kwargs (of every engine): for runs without a GPU.
    """

    quick: bool
    memory: int
    cuda: bool = True
    engine_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """function: module:name; `name`_plan beside it says, without a GPU, what it will do.

    Both are called with `args`.
    """

    name: str
    minutes: float
    about: str
    function: str
    args: tuple[Any, ...] = ()

    def plan(self, setting: Setting) -> list[dict[str, Any]]:
        return self._find("_plan")(setting, *self.args)

    def run(self, record: Record, setting: Setting) -> None:
        self._find("")(record, self.plan(setting), setting, *self.args)

    def _find(self, suffix: str) -> Any:
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name + suffix)


K = 1024
STAGES = (
    Stage(
        "environment", 2, "the machine, and the bandwidth of a copy in its memory", "gpu.kernels:environment"
    ),
    Stage("tests", 8, "tests of kernels, backends and the trainer, compiled", "gpu.checks:tests"),
    Stage("checks", 4, "kernels at real shapes and lengths against float64", "gpu.checks:checks"),
    Stage("decode", 3, "Λ decode of one layer against FlashAttention", "gpu.kernels:decode"),
    Stage(
        "prefill",
        3,
        "Λ attention of a prompt's chunk in one layer against FlashAttention",
        "gpu.kernels:prefill",
    ),
    Stage(
        "flash-merge",
        3,
        "FlashAttention and an LSE merge in the place of Λ kernels",
        "gpu.flash_merge:flash_merge",
    ),
    Stage("lookup", 3, "looking up a memory in one layer", "gpu.kernels:lookup"),
    Stage(
        "memory", 4, "queries of a memory layer, its KV on the GPU and in host memory", "gpu.kernels:memory"
    ),
    Stage("7b-stock", 5, "stock vLLM, Llama-2-7B's shape", "gpu.engines:engine", (0, "stock")),
    Stage("7b-longctx", 6, "LM-Infinite, Llama-2-7B's shape", "gpu.engines:engine", (0, "longctx")),
    Stage(
        "7b-128k-stock",
        4,
        "stock at 128K, as many layers as fit",
        "gpu.engines:engine",
        (0, "stock", 128 * K),
    ),
    Stage(
        "7b-128k-longctx",
        4,
        "LM-Infinite at 128K, as many layers",
        "gpu.engines:engine",
        (0, "longctx", 128 * K),
    ),
    Stage("temp-lora", 5, "streams that learn, 1 to 8 at once, and swaps", "gpu.streams:learning", (8,)),
    Stage("sequential", 3, "the official loop, one stream after another", "gpu.streams:sequential"),
    Stage("trainer-memory", 4, "memory that the trainer adds", "gpu.streams:trainer_memory"),
    Stage("8b-stock", 6, "stock vLLM, an 8B shape with GQA", "gpu.engines:engine", (1, "stock")),
    Stage("8b-longctx", 6, "LM-Infinite, an 8B shape with GQA", "gpu.engines:engine", (1, "longctx")),
    Stage("temp-lora-16", 4, "16 streams that learn", "gpu.streams:learning", (16,)),
)
NAMES = [stage.name for stage in STAGES]
WANTED = (
    "They want one NVIDIA GPU of compute capability 9.0 (H100 with 80 GB, or H200), vLLM 0.32.0 for CUDA, "
    "this project "
    "installed beside it, and about half an hour; benchmarks/gpu/README.md says how to bring both to a host "
    "without a network."
)


def main(
    out: Annotated[
        Path | None, typer.Option(help="Directory for results; what is in it is not done again.")
    ] = None,
    only: Annotated[str, typer.Option(help="Stages to run, separated by commas.")] = ",".join(NAMES),
    again: Annotated[str, typer.Option(help="Stages to do again although they are done.")] = "",
    minutes: Annotated[
        float, typer.Option(help="For everything; what does not fit into them is left for the next call.")
    ] = 45,
    quick: Annotated[bool, typer.Option(help="Tiny shapes: does everything run?")] = False,
    list_stages: Annotated[bool, typer.Option("--list", help="Name the stages.")] = False,
    dry: Annotated[bool, typer.Option(help="Say what each stage would do, without a GPU.")] = False,
    memory_gib: Annotated[float, typer.Option(help="Of the card, for --dry.")] = 79,
    stage: Annotated[str | None, typer.Option(hidden=True, help="Run this one here and now.")] = None,
) -> None:
    chosen = [s for s in STAGES if s.name in checked(only)]
    redo = checked(again)
    if list_stages:
        table = Table("stage", "minutes at most", "what")
        for s in STAGES:
            table.add_row(s.name, f"{s.minutes:g}", s.about)
        Console().print(table)
        return
    if dry:
        for s in chosen:
            Console().rule(f"{s.name}: {s.about}")
            for row in s.plan(Setting(quick, int(memory_gib * GIB))):
                Console().print("  " + ", ".join(f"{k} {number(v)}" for k, v in row.items()))
        return
    import torch

    if not torch.cuda.is_available():
        console.print(
            "[bold red]no CUDA GPU here.[/] Owed are the stages " + ", ".join(s.name for s in chosen) + "."
        )
        console.print(WANTED, soft_wrap=True)
        raise typer.Exit(2)
    if out is None:
        raise typer.BadParameter("--out DIR says where the results go")
    (out / "stages").mkdir(parents=True, exist_ok=True)
    if stage is not None:
        setting = Setting(quick, torch.cuda.get_device_properties(0).total_memory)
        raise typer.Exit(work(next(s for s in STAGES if s.name == stage), out, setting))
    if any(record.quick != quick for record in load(out).values()):
        raise typer.BadParameter(
            f"{out} has results {'without' if quick else 'of'} --quick; give another --out"
        )
    try:
        run(chosen, out, redo, minutes, quick)
    finally:
        summarise(out)
    records = load(out)
    raise typer.Exit(0 if all(s.name in records and records[s.name].status == "done" for s in chosen) else 1)


def checked(names: str) -> list[str]:
    found = [name for name in names.split(",") if name]
    for name in found:
        if name not in NAMES:
            raise typer.BadParameter(f"there is no stage {name!r}; stages: {', '.join(NAMES)}")
    return found


def load(out: Path) -> dict[str, Record]:
    found = {name: Record.load(out / "stages" / f"{name}.json") for name in NAMES}
    return {name: record for name, record in found.items() if record is not None}


def run(chosen: list[Stage], out: Path, again: list[str], minutes: float, quick: bool) -> None:
    """Each stage in a process of its own, as long as time is left; what was tried before comes last."""
    before, end = load(out), time.monotonic() + 60 * minutes
    todo = [s for s in chosen if s.name in again or s.name not in before or before[s.name].status != "done"]
    console.print(f"{len(chosen) - len(todo)} of {len(chosen)} stages were done before")
    for stage in sorted(todo, key=lambda s: s.name in before and s.name not in again):
        left = end - time.monotonic()
        if left < LEAST_S:
            console.print(f"{stage.name}: no time left; the same command again goes on here")
            continue
        console.print(f"[bold]{stage.name}[/]: {stage.about}; at most {min(60 * stage.minutes, left):.0f} s")
        command = [
            sys.executable,
            __file__,
            "--out",
            str(out),
            "--stage",
            stage.name,
            *(["--quick"] if quick else []),
        ]
        record = supervise(stage.name, command, out, min(60 * stage.minutes, left), quick)
        console.print(f"  {record.status} after {record.seconds:.0f} s. {record.error or ''}", markup=False)


def supervise(name: str, command: list[str], out: Path, limit_s: float, quick: bool) -> Record:
    """Run a stage's process; kill all of it at the limit. Its record, with what it found until then."""
    path, log = out / "stages" / f"{name}.json", out / "logs" / f"{name}.txt"
    log.parent.mkdir(exist_ok=True)
    record = Record(path, quick)
    record.save()
    paths = [str(BENCHMARKS), str(BENCHMARKS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    start, error = time.monotonic(), None
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
        try:
            if process.wait(limit_s):
                error = f"ended with code {process.returncode}"
        except subprocess.TimeoutExpired:
            error = f"cut off after {limit_s:.0f} s"
        finally:  # its engines and trainers with it, also at Ctrl-C
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    record = Record.load(path) or record
    record.seconds = time.monotonic() - start
    if error is not None and record.status != "partly void":
        record.error, record.status = record.error or error, "failed"
    record.save()
    return record


def work(stage: Stage, out: Path, setting: Setting) -> int:
    """In the stage's process: run it. Its exit code."""
    record = Record(out / "stages" / f"{stage.name}.json", setting.quick)
    record.save()
    try:
        stage.run(record, setting)
    except Exception as e:
        traceback.print_exc()
        record.status, record.error = "failed", one_line(e)
        record.save()
        return 1
    record.finish()
    return int(record.status != "done")


def one_line(error: Exception) -> str:
    """What to tell of an error, without this machine's directories."""
    return re.sub(r"(/[^/\s:'\"]+)+/", "", f"{type(error).__name__}: {error}".splitlines()[0])[:300]


def summarise(out: Path) -> None:
    """results.md, results.json and the plot, of the records there are; the targets on the terminal."""
    records = load(out)
    (out / "results.md").write_text(markdown(records, [(s.name, s.about) for s in STAGES]))
    write_json(out / "results.json", {n: r.dump() for n, r in records.items()})
    if found := curves(records):
        plot(
            out / "cost.png",
            found,
            "context (tokens)",
            "milliseconds per decoded token, batch 1",
            yscale="log",
        )
    table = Table("target", "wanted", "found", "verdict", "stages")
    for target in targets(records):
        table.add_row(*target.cells)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
