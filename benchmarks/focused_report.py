"""What focused.py has found: rows by model and method, their file, table and plot."""

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_longctx.cli.engine import model_path
from vllm_longctx.cli.output import console, plot, write_json

Row = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How rows become a table and a plot: their keys x, y and, where there are rows of several kinds, `by`.

    drawn: the kind that is plotted. factor: of y in the table.
    """

    x: str
    y: str
    xlabel: str
    ylabel: str
    by: str | None = None
    drawn: str | None = None
    factor: float = 1
    form: str = ".1f"
    yscale: str = "linear"


class Report:
    """What was found, by model and method, in a JSON file that is written again with every addition.

    Raises ValueError if the file is there and was made with other settings, which are the task's sizes.
    """

    def __init__(
        self,
        task: str,
        scale: Scale,
        settings: Mapping[str, Any],
        json_out: Path | None,
        plot_out: Path | None,
    ):
        self.about = {"task": task, "settings": dict(settings)}
        self.scale, self.json_out, self.plot_out = scale, json_out, plot_out
        self.results: list[dict[str, Any]] = []
        if json_out is None or not json_out.exists():
            return
        before = json.loads(json_out.read_text())
        for name, value in self.about.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{json_out} has {name} {before.get(name)}, not {value}; give the same, or another file"
                )
        self.results = before["results"]

    def add(self, model: str, method: str, **found: Any) -> None:
        """rows and attention, what the engine made of the configuration, or refused, its reason."""
        name = Path(model).name
        self.results = [r for r in self.results if (r["model"], r["method"]) != (name, method)]
        self.results.append({"model": name, "method": method, **found})
        write_json(self.json_out, {**self.about, "results": self.results})

    def refuse(self, model: str, method: str, error: Exception) -> None:
        reason = str(error).replace(model_path(model), Path(model).name)
        console.print(f"[yellow]{method} was refused:[/] {reason}", highlight=False)
        self.add(model, method, refused=reason)

    def rows(self, model: str, method: str) -> list[Row]:
        found = (r for r in self.results if (r["model"], r["method"]) == (Path(model).name, method))
        return next((r.get("rows", []) for r in found), [])

    def show(self) -> None:
        """The table of all that is in the file, and the plot."""
        scale, several = self.scale, len({r["model"] for r in self.results}) > 1
        names = [f"{r['model']}: {r['method']}" if several else r["method"] for r in self.results]
        columns = [
            {(row[scale.x], row.get(scale.by or "")): row for row in r.get("rows", [])} for r in self.results
        ]
        table = Table(scale.xlabel, *([scale.by] if scale.by else []), *names, title=self.about["task"])
        for x, by in sorted(
            {key for column in columns for key in column}, key=lambda key: (key[1] or "", key[0])
        ):
            cells = [self.cell(column.get((x, by))) for column in columns]
            table.add_row(f"{x:,}", *([by] if scale.by else []), *cells)
        Console(width=150).print(table)
        for name, result in zip(names, self.results, strict=True):
            if "refused" in result:
                Console().print(f"{name} was refused: {result['refused']}", highlight=False, markup=False)
        if self.plot_out is not None:
            curves = {}
            for name, column in zip(names, columns, strict=True):
                points = [(x, row[scale.y]) for (x, by), row in column.items() if by == scale.drawn]
                curves[name] = [x for x, _ in points], [y for _, y in points]
            plot(self.plot_out, curves, scale.xlabel, scale.ylabel, scale.yscale)

    def cell(self, row: Row | None) -> str:
        if row is None:
            return ""
        scale = self.scale
        value, error = row[scale.y] * scale.factor, row.get("error")
        return (
            f"{value:{scale.form}}"
            if error is None
            else f"{value:{scale.form}} ± {error * scale.factor:{scale.form}}"
        )


def averages(keys: Sequence[Row], scores: Sequence[dict[str, float]], y: str) -> list[Row]:
    """A row for each different key: its keys, the means of its scores, and half of y's 95 % interval."""
    groups: dict[tuple[Any, ...], list[dict[str, float]]] = defaultdict(list)
    for key, score in zip(keys, scores, strict=True):
        groups[tuple(key.items())].append(score)
    result = []
    for key, group in groups.items():
        means = {name: statistics.fmean(score[name] for score in group) for name in group[0]}
        spread = (
            [1.96 * statistics.stdev(score[y] for score in group) / len(group) ** 0.5]
            if len(group) > 1
            else [None]
        )
        result.append({**dict(key), "asked": len(group), **means, "error": spread[0]})
    return result
