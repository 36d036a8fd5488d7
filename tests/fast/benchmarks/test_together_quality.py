"""The pure parts of benchmarks/together_quality.py, and what a run leaves in its file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import together_quality
from together_quality import BOTH, KV, WAYS, Goal, Report, Scale, configs, goal_of

from vllm_longctx.cli.engine import PremiseError
from vllm_longctx.config import LongContextConfig

SCALE = Scale("measure", "value", "", "")
MODES = (
    "sliding",
    "memory",
    "temp-lora",
    "temp-lora over sliding",
    "temp-lora over memory",
)


def test_ways_are_configurations() -> None:
    made = configs(json.loads(together_quality.RECIPE))
    assert tuple(LongContextConfig.parse(made[way]).mode.name for way in WAYS) == MODES
    assert all(
        ("adaptation" in (config or {})) == together_quality.learns(way) for way, config in made.items()
    )


@pytest.mark.parametrize(
    ("measure", "memory", "learned", "both", "goal"),
    [
        ("perplexity of books, 0 – 256", 30.0, 20.0, 20.004, Goal(20.0, True)),
        ("perplexity of books, 0 – 256", 30.0, 20.0, 20.006, Goal(20.0, False)),
        (KV, 3072.0, 40.0, 3072.0, Goal(40.0, False)),
        ("tokens/s read", 2000.0, 300.0, 2001.0, Goal(2000.0, True)),
        ("pass keys told, 1,024 tokens, %", 100.0, 0.0, 95.0, Goal(100.0, False)),
        ("pass keys told, 1,024 tokens, %", 100.0, None, 95.0, Goal(None, None)),
    ],
)
def test_both_together_are_compared_with_the_better_part(
    measure: str, memory: float, learned: float | None, both: float, goal: Goal
) -> None:
    found = {"lambda": 0.0, "memory": memory, "temp-lora": learned, BOTH: both}
    assert goal_of(measure, {way: value for way, value in found.items() if value is not None}) == goal


def test_a_row_is_void_where_a_premise_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def trained(engine: Any, least: int, most: int) -> Iterator[None]:
        yield
        if least > 2:
            raise PremiseError(f"2 blocks were trained where {least} to {most} should be")

    monkeypatch.setattr(together_quality, "blocks_are_trained", trained)
    monkeypatch.setattr(
        together_quality, "blocks_of_prompt", lambda engine, tokens: (tokens // 8, tokens // 8)
    )
    monkeypatch.setattr(together_quality, "bytes_per_block", lambda *_: 64)
    score = SimpleNamespace(nll=[1.0] * 15, tokens_per_s=8.0, kv_blocks_peak=3)
    monkeypatch.setattr(together_quality, "score_in", lambda *_, **__: score)
    monkeypatch.setattr(together_quality, "run_jobs", lambda engine, jobs, *_: [{"exact": 1.0}] * len(jobs))
    engine: Any = object()
    texts = {"books": {"one": [5] * 16, "two": [5] * 16}}
    trial: Any = SimpleNamespace(prompt=[5] * 24, place="outside")
    out, figure = tmp_path / "out.json", tmp_path / "out.png"
    report = Report("together_quality", SCALE, {}, out, None)
    for way in WAYS:
        rows, void = together_quality.measured(engine, engine, way, texts, [trial])
        report.add("tiny", way, rows=rows, void=void)
    assert not together_quality.show(report, "tiny", figure)
    printed = capsys.readouterr().out
    assert "temp-lora: 2 blocks were trained where 3 to 4 should be" in printed
    goals = json.loads(out.read_text())["goals"]
    assert goals["perplexity of books, 0 – 16"] == {"value": pytest.approx(2.718, abs=1e-3), "met": True}
    assert goals[KV] == {"value": 2 * 3 * 64 / 32, "met": True}
    assert goals["tokens/s read"] == {"value": 8, "met": True}
    assert goals["pass keys told, 24 tokens, %"] == {"value": None, "met": None}
    assert figure.stat().st_size > 10_000
