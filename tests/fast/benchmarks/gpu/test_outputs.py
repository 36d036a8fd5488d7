"""What whole engines write, compared with what is stored: differences, near ties, premises."""

import statistics
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gpu import outputs
from gpu.outputs import CASES, TOLERANCES, Difference, Tolerance, Written
from gpu.report import CPU, FULL, Record
from gpu.run_all import Setting

from vllm_longctx.cli.engine import PremiseError

EXPECTED = Written([1, 2, 3], [4, 5, 6], [-1.0, -2.0, -0.5, -0.25, -3.0], [2.0, 0.1, 2.0])
STRICT, LOOSE = Tolerance(0.01, 0.01), Tolerance(0.06, 0.06)


def test_equal_outputs_do_not_differ() -> None:
    assert Difference.between([EXPECTED], [EXPECTED], STRICT) == Difference(0, 0, 3, 3, None)


@pytest.mark.parametrize(
    ("change", "tolerance", "written", "wrong"),
    [
        ({"logprobs": [-1.0, -2.0, -0.5, -0.25, -3.005]}, STRICT, 3, None),
        ({"logprobs": [-1.0, -2.0, -0.5, -0.25, -3.02]}, STRICT, 3, "log-probabilities differ by 0.02"),
        ({"logprobs": [-1.02, -2.0, -0.5, -0.25, -3.0]}, STRICT, 3, "log-probabilities differ by 0.02"),
        ({"logprobs": [float("nan"), -2.0, -0.5, -0.25, -3.0]}, STRICT, 3, "log-probabilities differ by"),
        ({"tokens": [4, 9, 6]}, STRICT, 1, "request 0 wrote another token 1"),
        ({"tokens": [4, 9, 6]}, LOOSE, 1, None),  # the two best are near to each other
        ({"tokens": [9, 5, 6]}, LOOSE, 0, "request 0 wrote another token 0"),
        # behind another token is another text
        ({"tokens": [4, 9, 6], "logprobs": [-1.0, -2.0, -0.5, -9.0, -9.0]}, LOOSE, 1, None),
    ],
)
def test_differences_are_judged(
    change: dict[str, Any], tolerance: Tolerance, written: int, wrong: str | None
) -> None:
    found = Difference.between([replace(EXPECTED, **change)], [EXPECTED], tolerance)
    assert found.written == written
    assert found.wrong is None if wrong is None else wrong in str(found.wrong)


def test_another_request_is_not_compared() -> None:
    with pytest.raises(PremiseError, match="request 0 has another prompt"):
        Difference.between([replace(EXPECTED, prompt=[1, 2, 4])], [EXPECTED], STRICT)


def test_a_card_runs_graphs_and_eager_and_the_cpu_eager_alone() -> None:
    for name, case in CASES.items():
        on_card = outputs.outputs_plan(Setting(FULL, 1), name)
        assert {row["way"] for row in on_card} == {"graphs", "eager"}
        assert [row["way"] for row in outputs.outputs_plan(Setting(CPU, 0), name)] == ["eager"]
        assert ("float32" in {row["dtype"] for row in on_card}) != case.learns
        assert all(row["dtype"] in TOLERANCES for row in on_card)


def test_what_is_stored_is_what_the_cases_ask() -> None:
    tokens = outputs.text_tokens()
    for name, case in CASES.items():
        for written, request in zip(outputs.stored(name), case.requests, strict=True):
            assert written.prompt == tokens[request.start : request.start + request.prompt]
            assert len(written.tokens) == len(written.margins) == request.written
            scored = request.prompt - 1 if request.is_scored else 0
            assert len(written.logprobs) == scored + request.written


def test_modes_differ_by_more_than_is_tolerated() -> None:
    """Else a mode that did another one's work would pass."""
    pairs = [
        ("lm-infinite", "plain", "float32"),
        ("lm-infinite", "streaming", "float32"),
        ("lm-infinite", "top-k", "float32"),
        ("focused-all", "focused-top-k", "float32"),
        ("temp-lora-reuse", "temp-lora-recompute", "float32"),
        ("temp-lora-reuse", "temp-lora-keep", "float32"),
    ]
    for one, other, dtype in pairs:
        found = Difference.between(outputs.stored(one), outputs.stored(other), TOLERANCES[dtype])
        assert found.wrong is not None, (one, other)


class FakeEngine:
    def __init__(self, metrics: dict[str, int]):
        self.metrics = metrics

    def get_metrics(self) -> list[Any]:
        return [SimpleNamespace(name=f"vllm:longctx_{n}", value=v) for n, v in self.metrics.items()]


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Metrics and steps of an engine that writes nothing."""
    seen: dict[str, Any] = {"metrics": {}, "steps": Counter()}

    @contextmanager
    def running_engine(*args: Any, **kwargs: Any) -> Iterator[tuple[FakeEngine, Any]]:
        yield FakeEngine(seen["metrics"]), SimpleNamespace(reset=lambda: None, graph_modes=seen["steps"])

    @contextmanager
    def blocks_are_trained(*args: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(outputs, "running_engine", running_engine)
    monkeypatch.setattr(outputs, "blocks_are_trained", blocks_are_trained)
    monkeypatch.setattr(outputs, "written_together", lambda *args: [EXPECTED])
    return seen


def test_what_was_to_happen_must_have_happened(fake_engine: dict[str, Any]) -> None:
    case = CASES["temp-lora-recompute"]
    for trained, computed, reason in (
        (0, 10_000, "blocks_trained is 0"),
        (9, 10, "no window was computed again"),
        (9, 10_000, "no step was in a FULL graph"),
    ):
        fake_engine["metrics"] = {"blocks_trained": trained, "adapted_tokens": computed}
        with pytest.raises(PremiseError, match=reason):
            outputs.run(case, False, "bfloat16")
    outputs.run(case, True, "bfloat16")
    fake_engine["steps"] = Counter(FULL=3, NONE=2)
    assert outputs.run(case, False, "bfloat16") == ([EXPECTED], "3 FULL, 2 NONE")


def test_a_stage_fails_if_a_run_differs_and_has_void_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "stored", lambda name: [EXPECTED])
    setting, other = Setting(FULL, 1), replace(EXPECTED, logprobs=[-1.0, -2.0, -0.5, -0.25, -4.0])

    def run_as(found: dict[tuple[str, str], Any]) -> None:
        def run(case: Any, eager: bool, dtype: str) -> tuple[list[Written], str]:
            got = found.get((dtype, "eager" if eager else "graphs"), EXPECTED)
            if got is None:
                raise PremiseError("no step was in a FULL graph")
            return [got], "3 FULL"

        monkeypatch.setattr(outputs, "run", run)

    plan = outputs.outputs_plan(setting, "lm-infinite")
    run_as({("float32", "graphs"): None})
    record = Record(tmp_path / "a.json")
    outputs.outputs(record, plan, setting, "lm-infinite")
    record.finish()
    assert record.status == "partly void" and len(record.rows) == 4
    run_as({("float32", "graphs"): other})
    both = "float32, graphs against cpu: .*; float32, eager against graphs: "
    with pytest.raises(RuntimeError, match=both):
        outputs.outputs(Record(tmp_path / "b.json"), plan, setting, "lm-infinite")


def test_what_learns_differs_from_what_does_not_by_more_than_bfloat16_may() -> None:
    """Else weights that were never swapped would pass."""
    for name, case in CASES.items():
        if not case.learns:
            continue
        plain = [w.logprobs for w in outputs.stored("plain")]
        differences = []
        for written, request in zip(outputs.stored(name), case.requests, strict=True):
            for other, read in zip(plain, CASES["plain"].requests, strict=True):
                if other is not None and read.start == request.start:
                    shared = min(request.prompt, read.prompt) - 1
                    differences += [
                        abs(a - b) for a, b in zip(written.logprobs[:shared], other[:shared], strict=True)
                    ]
        assert statistics.fmean(differences) > 2 * TOLERANCES["bfloat16"].mean
