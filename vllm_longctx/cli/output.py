"""What commands and benchmarks show and write: progress, mistakes, JSON files and plots."""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

console = Console(stderr=True)
PIPED_WIDTH = 200  # characters; tables of figures are narrower


def tables() -> Console:
    """Standard output: as wide as the terminal, and wide enough for whole tables where there is none."""
    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if has_width else PIPED_WIDTH)


@contextmanager
def errors_for_users() -> Iterator[None]:
    """A user's mistake is one line on stderr and exit code 2, not a traceback."""
    try:
        yield
    except (ValueError, OSError) as e:
        console.print(f"[bold red]error:[/] {e}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


class CountColumn(MofNCompleteColumn):
    """How many of how many are done; nothing where that is not known."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


def counting() -> Progress:
    """A bar on stderr that says how many of how many are done."""
    columns = TextColumn("{task.description}"), BarColumn(), CountColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console)


def write_json(path: Path | None, result: Any) -> None:
    """Nothing without a path."""
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")


@contextmanager
def figure(path: Path, **axes_settings: Any) -> Iterator[Any]:
    """Axes of matplotlib's to draw on; at the end they are written to a PNG, PDF or SVG file.

    axes_settings: for `Axes.set`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(figsize=(8, 4.5))
    yield axes
    axes.set(**axes_settings)
    axes.grid(alpha=0.3)
    axes.legend()
    drawn.tight_layout()
    drawn.savefig(path, dpi=120)
    pyplot.close(drawn)


def plot(
    path: Path,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    yscale: str = "linear",
) -> None:
    """Curves by name, (x, y) each; x is logarithmic."""
    with figure(path, xlabel=xlabel, ylabel=ylabel, xscale="log", yscale=yscale) as axes:
        for name, (x, y) in curves.items():
            axes.plot(x, y, marker="o", markersize=3, label=name)
