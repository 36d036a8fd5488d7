"""Everything that is owed on a GPU, by one command: checks of the kernels on the device, then measurements.

    python benchmarks/gpu/run_all.py --smoke --out DIR    # under four minutes: does every mode run right?
    python benchmarks/gpu/run_all.py --quick --out DIR    # under ten: the first speeds
    python benchmarks/gpu/run_all.py --out DIR            # all

Stages are independent: each runs in a process of its own under a time limit and writes DIR/stages/NAME.json
as it goes, so a failing one does not stop the others. The same command again goes on where it stopped: what
is done stays, what failed or was cut off is tried again. In the end, or so far: DIR/results.md, results.json
and cost.png. No network is needed.
"""

import contextlib
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
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
from gpu.report import CPU, FULL, QUICK, SMOKE, Record, curves, markdown, number, targets  # noqa: E402

from vllm_longctx.cli.output import console, plot, write_json  # noqa: E402

MINUTES = {SMOKE: 4.0, QUICK: 10.0, FULL: 45.0, CPU: 30.0}  # by default
AT_ONCE = 6  # stages of which nothing is timed
POLL_S = 0.1
OVER_ESTIMATE = 2.5  # a stage is ended after so many times the seconds that it is thought to take


stopped = threading.Event()  # no stage may go on


@dataclass(frozen=True)
class Setting:
    """size: SMOKE, QUICK, FULL, or CPU, with tiny shapes and without a GPU.

    memory: of the card, bytes. engine_kwargs: of every engine.
    """

    size: str
    memory: int
    engine_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.size != CPU


@dataclass(frozen=True)
class Stage:
    """function: module:name; `name`_plan beside it says, without a GPU, what it will do.

    Both are called with `args`.

    seconds: that it is thought to take, by size; none for a size that leaves it out. is_timed: whether its
    figures are times, so that nothing else may run beside it.
    """

    name: str
    seconds: dict[str, int]
    about: str
    function: str
    args: tuple[Any, ...] = ()
    is_timed: bool = True

    def plan(self, setting: Setting) -> list[dict[str, Any]]:
        return self._find("_plan")(setting, *self.args)

    def run(self, record: Record, setting: Setting) -> None:
        self._find("")(record, self.plan(setting), setting, *self.args)

    def _find(self, suffix: str) -> Any:
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name + suffix)


def whole(name: str, seconds: int, about: str, function: str, *args: Any, **sizes: int) -> Stage:
    """A stage of the whole run, and of the sizes that are named."""
    return Stage(name, {FULL: seconds, **sizes}, about, f"gpu.{function}", args)


def mode(name: str, seconds: int) -> Stage:
    """A row of the mode table, against what the CPU engine has stored."""
    sizes = {SMOKE: seconds, FULL: seconds, CPU: 120}
    about = f"{name}, against the CPU engine's outputs"
    return Stage(f"mode-{name}", sizes, about, "gpu.outputs:outputs", (name,), is_timed=False)


K = 1024
STAGES = (
    whole(
        "environment",
        20,
        "the machine, and the bandwidth of a copy in its memory",
        "kernels:environment",
        smoke=20,
        quick=20,
    ),
    mode("plain", 60),
    mode("lm-infinite", 60),
    mode("streaming", 60),
    mode("top-k", 60),
    mode("focused-all", 60),
    mode("focused-top-k", 60),
    mode("focused-blocks", 60),
    mode("focused-apart", 60),
    mode("windows", 60),
    mode("temp-lora-reuse", 70),
    mode("temp-lora-recompute", 70),
    mode("temp-lora-keep", 70),
    whole("tests", 180, "tests of kernels, backends and the trainer, compiled", "checks:tests"),
    whole("checks", 90, "kernels at real shapes and lengths against float64", "checks:checks"),
    whole(
        "decode",
        75,
        "Λ decode of one layer against FlashAttention",
        "kernels:decode",
        smoke=25,
        quick=45,
    ),
    whole(
        "prefill",
        75,
        "Λ attention of a prompt's chunk in one layer against FlashAttention",
        "kernels:prefill",
        quick=45,
    ),
    whole(
        "flash-merge",
        75,
        "FlashAttention and an LSE merge in the place of Λ kernels",
        "flash_merge:flash_merge",
    ),
    whole("lookup", 75, "looking up a memory in one layer", "kernels:lookup"),
    whole("memory", 90, "queries of a memory layer, its KV on the GPU and in host memory", "kernels:memory"),
    whole("7b-stock", 120, "stock vLLM, Llama-2-7B's shape", "engines:engine", 0, "stock", quick=90),
    whole("7b-longctx", 145, "LM-Infinite, Llama-2-7B's shape", "engines:engine", 0, "longctx", quick=100),
    whole(
        "7b-128k-stock",
        95,
        "stock at 128K, as many layers as fit",
        "engines:engine",
        0,
        "stock",
        128 * K,
    ),
    whole(
        "7b-128k-longctx",
        95,
        "LM-Infinite at 128K, as many layers",
        "engines:engine",
        0,
        "longctx",
        128 * K,
    ),
    whole(
        "temp-lora", 120, "streams that learn, 1 to 8 at once, and swaps", "streams:learning", 8, quick=110
    ),
    whole("sequential", 75, "the official loop, one stream after another", "streams:sequential", quick=75),
    whole("trainer-memory", 95, "memory that the trainer adds", "streams:trainer_memory"),
    whole("8b-stock", 145, "stock vLLM, an 8B shape with GQA", "engines:engine", 1, "stock"),
    whole("8b-longctx", 145, "LM-Infinite, an 8B shape with GQA", "engines:engine", 1, "longctx"),
    whole("temp-lora-16", 95, "16 streams that learn", "streams:learning", 16),
)
NAMES = [stage.name for stage in STAGES]
WANTED = (
    "They want one NVIDIA GPU of compute capability 9.0 (H100 with 80 GB, or H200), vLLM 0.32 or 0.33 for "
    "CUDA, this project installed beside it, and about half an hour; benchmarks/gpu/README.md says how to "
    "bring both to a host without a network."
)


def main(
    out: Annotated[
        Path | None, typer.Option(help="Directory for results; what is in it is not done again.")
    ] = None,
    only: Annotated[str, typer.Option(help="Stages to run, separated by commas.")] = "",
    again: Annotated[str, typer.Option(help="Stages to do again although they are done.")] = "",
    minutes: Annotated[
        float | None,
        typer.Option(
            help="No stage is begun that would go past them; the next call does it. By default 4, 10, 45."
        ),
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Does every mode run, and run right?")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="The first speeds.")] = False,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="The stages of modes without a GPU: against the CPU engine.")
    ] = False,
    resume: Annotated[
        Path | None, typer.Option(help="Directory of an earlier call; what was done there is not done again.")
    ] = None,
    list_stages: Annotated[
        bool, typer.Option("--list", help="Name the stages, and how long each takes.")
    ] = False,
    dry: Annotated[bool, typer.Option(help="Say what each stage would do, without a GPU.")] = False,
    memory_gib: Annotated[float, typer.Option(help="Of the card, for --dry.")] = 79,
    stage: Annotated[str | None, typer.Option(hidden=True, help="Run this one here and now.")] = None,
) -> None:
    sizes = [size for size, chosen in ((SMOKE, smoke), (QUICK, quick), (CPU, cpu)) if chosen] or [FULL]
    if len(sizes) > 1:
        raise typer.BadParameter(f"--{sizes[0]} and --{sizes[1]} are two sizes; give one")
    (size,) = sizes
    of_size = [s for s in STAGES if size in s.seconds]
    chosen = [s for s in STAGES if s.name in checked(only)] if only else of_size
    if missing := [s.name for s in chosen if s not in of_size]:
        raise typer.BadParameter(f"{', '.join(missing)}: not with --{size}; --{size} --list shows its stages")
    redo = checked(again)
    if list_stages:
        print_plan(chosen, size)
        return
    if dry:
        for s in chosen:
            Console().rule(f"{s.name}: {s.about}")
            for row in s.plan(Setting(size, int(memory_gib * GIB))):
                Console().print("  " + ", ".join(f"{k} {number(v)}" for k, v in row.items()))
        return
    import torch

    if size != CPU and not torch.cuda.is_available():
        console.print(
            "[bold red]no CUDA GPU here.[/] Owed are the stages " + ", ".join(s.name for s in chosen) + "."
        )
        console.print(WANTED, soft_wrap=True)
        raise typer.Exit(2)
    if out is None:
        raise typer.BadParameter("--out DIR says where the results go")
    (out / "stages").mkdir(parents=True, exist_ok=True)
    if stage is not None:
        memory = 0 if size == CPU else torch.cuda.get_device_properties(0).total_memory
        raise typer.Exit(work(next(s for s in STAGES if s.name == stage), out, Setting(size, memory)))
    if resume is not None:
        take_over(resume, out)
    for record in load(out).values():
        if record.size != size:
            raise typer.BadParameter(
                f"{out} has results of size {record.size}, not {size}; give another --out"
            )
    try:
        run(chosen, out, redo, MINUTES[size] if minutes is None else minutes, size)
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


def take_over(earlier: Path, out: Path) -> None:
    """Copy the records of an earlier call that are not in `out`.

    Raises typer.BadParameter if there are none.
    """
    records = load(earlier)
    if not records:
        raise typer.BadParameter(f"--resume {earlier} holds no stages/*.json of an earlier call")
    for name, record in records.items():
        if not (copy := out / "stages" / f"{name}.json").exists():
            shutil.copy(record.path, copy)


def print_plan(stages: Iterable[Stage], size: str) -> None:
    """Each stage, how long it is thought to take, and all of them together."""
    stages = list(stages)
    table = Table("stage", "seconds, estimated", "what")
    for s in stages:
        table.add_row(s.name, f"{s.seconds[size]}", s.about)
    table.add_section()
    beside = f", {AT_ONCE} of the modes at a time" if any(not s.is_timed for s in stages) else ""
    table.add_row("together", f"{estimated_seconds(stages, size):.0f}", f"{len(stages)} stages{beside}")
    Console().print(table)


def estimated_seconds(stages: Iterable[Stage], size: str) -> float:
    return sum(s.seconds[size] / (1 if s.is_timed else AT_ONCE) for s in stages)


def run(chosen: list[Stage], out: Path, again: list[str], minutes: float, size: str) -> None:
    """Each stage in a process of its own, as long as time is left; what was tried before comes last.

    Stages of which nothing is timed run beside each other, before the others.
    """
    before, end = load(out), time.monotonic() + 60 * minutes
    todo = [s for s in chosen if s.name in again or s.name not in before or before[s.name].status != "done"]
    console.print(f"{len(chosen) - len(todo)} of {len(chosen)} stages were done before; to be done now:")
    print_plan(todo, size)
    todo.sort(key=lambda s: s.name in before and s.name not in again)

    def begin(stage: Stage) -> None:
        left = end - time.monotonic()
        if left < stage.seconds[size]:
            console.print(f"{stage.name}: no time left; the same command again goes on here")
            return
        limit = min(OVER_ESTIMATE * stage.seconds[size], left)
        console.print(f"[bold]{stage.name}[/]: {stage.about}; at most {limit:.0f} s")
        command = [sys.executable, __file__, "--out", str(out), "--stage", stage.name]
        command += [] if size == FULL else [f"--{size}"]
        record = supervise(stage.name, command, out, limit, size)
        console.print(
            f"  {stage.name}: {record.status} after {record.seconds:.0f} s. {record.error or ''}",
            markup=False,
        )

    with ThreadPoolExecutor(1 if size == CPU else AT_ONCE) as pool:
        try:
            list(pool.map(begin, [s for s in todo if not s.is_timed]))
        except BaseException:  # Ctrl-C reaches this thread alone
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for stage in todo:
        if stage.is_timed:
            begin(stage)


def supervise(name: str, command: list[str], out: Path, limit_s: float, size: str) -> Record:
    """Run a stage's process; kill all of it at the limit, or once `stopped` is set.

    Its record, with what it found until then.
    """
    path, log = out / "stages" / f"{name}.json", out / "logs" / f"{name}.txt"
    log.parent.mkdir(exist_ok=True)
    record = Record(path, size)
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
            while process.poll() is None and error is None:
                if stopped.wait(POLL_S):
                    error = "stopped"
                elif time.monotonic() - start > limit_s:
                    error = f"cut off after {limit_s:.0f} s"
            if process.returncode:
                error = f"ended with code {process.returncode}"
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
    record = Record(out / "stages" / f"{stage.name}.json", setting.size)
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
