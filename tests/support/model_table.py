"""The matrix in `docs/models.md`, from what a run of its tests found.

LONGCTX_MODEL_RESULTS=1 pytest tests/engine/test_models.py
python -m tests.support.model_table
"""

import json
import os
import re
from pathlib import Path

from tests.support.architectures import ARCHITECTURES
from tests.support.matrix import METHODS

RESULTS = Path(__file__).with_name("model_results.json")
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
TABLE = re.compile(r"(<!-- matrix -->\n).*?(<!-- /matrix -->)", re.DOTALL)
NAMES = {
    "lm_infinite": "`lm_infinite`",
    "streaming": "`streaming`",
    "top_k": "top-k branch",
    "memory": "memory",
}


def results() -> dict[str, dict[str, float | str]]:
    """By row and column: the largest difference of log-probabilities, in nats, or why it does not run."""
    found: dict[str, dict[str, float | str]] = json.loads(RESULTS.read_text())
    return found


def record(row: str, column: str, found: float | str) -> None:
    """Keep what a cell's test found, if the run is asked to."""
    if not os.environ.get("LONGCTX_MODEL_RESULTS"):
        return
    kept = results() if RESULTS.exists() else {}
    kept.setdefault(row, {})[column] = found if isinstance(found, str) else float(f"{found:.1e}")
    ordered = {r: {c: kept[r][c] for c in METHODS if c in kept[r]} for r in ARCHITECTURES if r in kept}
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")


def table() -> str:
    """Markdown: a row for each architecture, and the reasons for what does not run."""
    lines = [
        f"| model | its layers | {' | '.join(NAMES[c] for c in METHODS)} | largest difference |",
        "|---" * (len(METHODS) + 3) + "|",
    ]
    reasons: dict[str, dict[str, list[str]]] = {}
    for row, cells in results().items():
        marks = ["–" if isinstance(cells[c], str) else "✓" for c in METHODS]
        numbers = [x for x in cells.values() if not isinstance(x, str)]
        largest = f"{max(numbers):.0e}" if numbers else ""
        lines.append(f"| {row} | {ARCHITECTURES[row].about} | {' | '.join(marks)} | {largest} |")
        for column in METHODS:
            if isinstance(reason := cells[column], str):
                reasons.setdefault(reason, {}).setdefault(row, []).append(NAMES[column])
    lines += ["", "What has no ✓ is refused, with this in the message:", ""]
    for reason, rows in reasons.items():
        by_columns: dict[str, list[str]] = {}
        for row, columns in rows.items():
            by_columns.setdefault(", ".join(columns), []).append(row)
        where = "; ".join(f"{', '.join(names)} ({columns})" for columns, names in by_columns.items())
        lines.append(f"- “{reason}”: {where}")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    return TABLE.sub(lambda found: f"{found[1]}{table()}{found[2]}", page)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
