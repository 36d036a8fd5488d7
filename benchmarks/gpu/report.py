"""What stages find, and what is made of it: records on disk, the issue's targets, tables. No GPU, no vLLM."""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu.costs import Cost
from gpu.models import GIB

# Sizes of a run. Targets are judged by whole ones. CPU: tiny shapes, and no GPU.
SMOKE, QUICK, FULL, CPU = "smoke", "quick", "full", "cpu"

Row = dict[str, Any]


@dataclass
class Record:
    """What one stage has found; on disk after every addition, so that nothing measured is lost.

    status: running, done, partly void or failed. error: one line, without the machine's paths; the log has
    the rest. A row is void if it has `void`, the reason for which its figures are not what they seem; the
    rows without it stand.
    """

    path: Path
    size: str = FULL
    status: str = "running"
    seconds: float = 0.0
    error: str | None = None
    facts: Row = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> "Record | None":
        """None if there is none."""
        return cls(path, **json.loads(path.read_text())) if path.is_file() else None

    @property
    def void_rows(self) -> list[Row]:
        return [row for row in self.rows if "void" in row]

    def finish(self) -> None:
        """The stage has done all that it was to do."""
        self.status = "done"
        if void := self.void_rows:
            self.status, self.error = (
                "partly void",
                f"{len(void)} of {len(self.rows)} rows are void, the first because {void[0]['void']}",
            )
        self.save()

    def dump(self) -> Row:
        return {name: value for name, value in vars(self).items() if name != "path"}

    def save(self) -> None:
        """Whole or not at all: a stage may be killed at any time."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.dump(), indent=1) + "\n")
        os.replace(part, self.path)

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        self.save()

    def note(self, **facts: Any) -> None:
        self.facts.update(facts)
        self.save()


Records = dict[str, Record]


@dataclass(frozen=True)
class Target:
    """found: of the same unit as `wanted`, None if it is still owed.

    at_most: a smaller figure is a better one.
    """

    name: str
    wanted: float
    found: float | None
    stages: str
    at_most: bool = False
    form: str = ".2f"

    @property
    def verdict(self) -> str:
        if self.found is None:
            return "owed"
        reached = self.found <= self.wanted if self.at_most else self.found >= self.wanted
        return "reached" if reached else "missed"

    @property
    def cells(self) -> list[str]:
        found = "" if self.found is None else f"{self.found:{self.form}}"
        return [
            self.name,
            f"{'≤' if self.at_most else '≥'} {self.wanted:{self.form}}",
            found,
            self.verdict,
            self.stages,
        ]


def rows_of(records: Records, stage: str, **wanted: Any) -> list[Row]:
    """The rows of a stage with these values. None of a void row, and none before the stage has done all.

    What a failed stage has found may rest on what failed, and the worst of a part could look like the worst
    of all.
    """
    record = records.get(stage)
    rows = record.rows if record and record.status in ("done", "partly void") else []
    return [r for r in rows if "void" not in r and all(r.get(k) == v for k, v in wanted.items())]


def fact(records: Records, stage: str, name: str) -> Any:
    """None unless the stage is done, as of `rows_of`."""
    record = records.get(stage)
    return record.facts.get(name) if record and record.status == "done" else None


def failures(records: Records, stage: str, counts: list[float], allowed: float) -> float | None:
    """The largest of a stage's counts of what is wrong.

    A stage that has not done all can show that something is wrong, but not that nothing is.
    """
    worst = max(counts, default=None)
    is_whole = stage in records and records[stage].status == "done"
    return worst if worst is not None and (is_whole or worst > allowed) else None


def copy_bandwidth(records: Records) -> float | None:
    """Bytes/s, read and written ones together."""
    return fact(records, "environment", "copy_bytes_per_s")


def bandwidth_share(row: Row, copy: float) -> float:
    """Of the copy bandwidth, a kernel's useful bytes per second."""
    return row["bytes"] / (row["longctx_ms"] / 1000) / copy


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def least(lists: list[list[float | None]]) -> float | None:
    """The smallest of all; None if a list is empty or has a gap."""
    found = [x for values in lists for x in values]
    return None if None in found or not all(lists) else min(found)  # type: ignore[type-var]


def decode_ratio(records: Records, ours: str, stock: str, length: int) -> float | None:
    """Tokens/s, ours over stock's, at the largest common batch."""
    mine = [r for r in rows_of(records, ours, what="decode", length=length) if r["common"]]
    if not mine:
        return None
    theirs = rows_of(records, stock, what="decode", length=length, batch=mine[-1]["batch"])
    return mine[-1]["tokens_per_s"] / theirs[-1]["tokens_per_s"] if theirs else None


def flat_ratios(records: Records, ours: str, stock: str) -> list[float | None]:
    """Of every decode past the window, to stock's at the window's length and the same batch; None for one
    that is void.
    """
    record = records.get(ours)
    result: list[float | None] = (
        [None for row in record.void_rows if row["what"] == "decode"] if record else []
    )
    for row in rows_of(records, ours, what="decode"):
        if row["length"] > row["window"]:
            theirs = rows_of(records, stock, what="decode", length=row["window"], batch=row["batch"])
            result.append(row["tokens_per_s"] / theirs[-1]["tokens_per_s"] if theirs else None)
    return result


def memory_ratio(records: Records, ours: str, stock: str, length: int) -> float | None:
    """KV memory at its peak while one prompt of `length` tokens is read, stock's over ours."""
    mine, theirs = (rows_of(records, stage, what="prefill", length=length) for stage in (ours, stock))
    return ratio(theirs[-1]["kv_bytes"], mine[-1]["kv_bytes"]) if mine and theirs else None


def targets(records: Records) -> list[Target]:
    """Those of the issue and the two sets of checks; found from whatever records there are of whole runs."""
    records = {name: record for name, record in records.items() if record.size == FULL}
    k, copy = 1024, copy_bandwidth(records)
    shares = [bandwidth_share(r, copy) for r in rows_of(records, "decode") if copy and r["batch"] >= 16]
    errors = [r["error_to_tolerance"] for r in records["checks"].rows] if "checks" in records else []
    failed = [records["tests"].facts["failed"]] if "tests" in records and records["tests"].facts else []
    flat = [flat_ratios(records, f"{shape}-longctx", f"{shape}-stock") for shape in ("7b", "8b")]
    streams = {r["streams"]: r["tokens_per_s"] for r in rows_of(records, "temp-lora", what="learning")}
    thin = "7b-128k-longctx", "7b-128k-stock", 128 * k
    times_sequential = ratio(streams.get(8), fact(records, "sequential", "tokens_per_s"))
    swap = ratio(fact(records, "temp-lora", "swap_ms"), fact(records, "temp-lora", "decode_step_ms"))
    added = ratio(*(fact(records, "trainer-memory", name) for name in ("trainer_bytes", "weight_bytes")))
    return [
        Target(
            "tests that fail on the device", 0, failures(records, "tests", failed, 0), "tests", True, ".0f"
        ),
        Target(
            "largest error against float64, of the tolerance",
            1,
            failures(records, "checks", errors, 1),
            "checks",
            True,
        ),
        Target("Λ decode at batch ≥ 16, of the copy bandwidth", 0.8, min(shares, default=None), "decode"),
        Target(
            "decode at 32K, 7B, × stock",
            2.72,
            decode_ratio(records, "7b-longctx", "7b-stock", 32 * k),
            "7b-*",
        ),
        Target("decode at 128K, 7B, × stock", 8, decode_ratio(records, *thin), "7b-128k-*"),
        Target("decode at any length, of stock at the window's", 0.95, least(flat), "7b-*, 8b-*"),
        Target("KV memory at 128K, 7B, stock over ours", 7.5, memory_ratio(records, *thin), "7b-128k-*"),
        Target(
            "Temp-LoRA, 8 streams, × the sequential loop", 9.31, times_sequential, "temp-lora, sequential"
        ),
        Target("swap at rank 64, of a decode step", 1, swap, "temp-lora", True),
        Target("memory the trainer adds, of the base weights", 1, added, "trainer-memory", True),
    ]


def number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(headers: list[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [headers, ["---"] * len(headers), *([number(x) for x in row] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def rows_table(rows: list[Row]) -> str:
    """Every key a column, in the order of their first appearance."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return table([key.replace("_", " ") for key in keys], ([row.get(key) for key in keys] for row in rows))


def readable(row: Row, copy: float | None) -> Row:
    """Memory in GiB; of a kernel the time that it could take at best; of a decode the share of the copy
    bandwidth, and the share that it could reach; how much faster the other way is.
    """
    memory = ("kv_bytes", "used_bytes")
    result = {
        k.replace("bytes", "GiB") if k in memory else k: v / GIB if k in memory else v for k, v in row.items()
    }
    if copy and "splits" in row:
        result["of_copy"] = bandwidth_share(row, copy)
    if copy and "operations" in row:
        best = Cost(result.pop("moved_bytes"), result.pop("operations")).seconds(copy)
        result["possible_ms"] = 1000 * best
        if "splits" in row:
            result["of_copy_possible"] = row["bytes"] / best / copy
    if "flash_merge_ms" in row:
        result["FlashAttention + LSE merge, × our kernel"] = row["longctx_ms"] / row["flash_merge_ms"]
    return result


def markdown(records: Records, stages: list[tuple[str, str]]) -> str:
    """stages: name and what it is about, of all there are."""
    facts = records["environment"].facts if "environment" in records else {}
    verdicts = table(["target", "wanted", "found", "verdict", "stages"], (t.cells for t in targets(records)))
    states = []
    for name, about in stages:
        record = records.get(name)
        states.append(
            [
                name,
                about,
                *((record.status, record.seconds, record.error) if record else ("owed", None, None)),
            ]
        )
    parts = ["# Measured on a GPU", table(list(facts), [facts.values()]), "## Targets", verdicts, "## Stages"]
    parts.append(table(["stage", "about", "status", "seconds", "error"], states))
    for name, about in stages:
        record = records.get(name)
        if record is None or name == "environment":
            continue
        parts.append(f"## {name}: {about}")
        if record.facts:
            parts.append(table(list(record.facts), [record.facts.values()]))
        if record.rows:
            parts.append(rows_table([readable(row, copy_bandwidth(records)) for row in record.rows]))
    return "\n\n".join(parts)


def curves(records: Records) -> dict[str, tuple[list[float], list[float]]]:
    """Milliseconds per decoded token against the context's length, one request's share of its batch's
    step.
    """
    found: dict[str, tuple[list[float], list[float]]] = {}
    for shape in ("7b", "8b"):
        for name in ("stock", "longctx"):
            points = [r for r in rows_of(records, f"{shape}-{name}", what="decode") if r["batch"] == 1]
            points.sort(key=lambda r: r["length"])
            if points:
                label = f"{shape}, {name}"
                found[label] = [r["length"] for r in points], [1000 / r["tokens_per_s"] for r in points]
    return found
