"""benchmarks/gpu without a GPU: sizes, plans, resuming, verdicts; the kernel stages themselves, interpreted,
on tiny shapes.
"""

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import typer
from gpu import checks, engines, kernels, models, outputs, report, run_all, streams
from gpu.models import GIB, GQA_8B, LLAMA_2_7B, TINY, TINY_GQA, Shape
from gpu.report import CPU, FULL, QUICK, SMOKE, Record
from gpu.run_all import Setting, Stage
from typer.testing import CliRunner

from vllm_longctx.cli.engine import PremiseError
from vllm_longctx.config import LongContextConfig
from vllm_longctx.cuda import host_memory
from vllm_longctx.modes import MODES

H100, H200 = Setting(FULL, 79 * GIB), Setting(FULL, 139 * GIB)
TINY_SIZES = Setting(CPU, 6 * GIB)


def test_sizes_are_those_of_the_models() -> None:
    assert LLAMA_2_7B.weights == pytest.approx(6.738e9, rel=1e-3) and GQA_8B.weights == pytest.approx(
        8.03e9, rel=1e-3
    )
    assert LLAMA_2_7B.kv_bytes == 512 * 1024 and GQA_8B.kv_bytes == 128 * 1024
    assert LLAMA_2_7B.lora_weights(64) == pytest.approx(160e6, rel=0.01)


@pytest.mark.parametrize("shape", [TINY, TINY_GQA])
def test_a_written_model_is_the_shape(shape: Shape, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(models.write_model(shape, tmp_path))
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config)
    norms = (2 * shape.layers + 1) * shape.hidden
    assert sum(p.numel() for p in net.parameters()) == shape.weights + norms
    assert config.max_position_embeddings == shape.trained


@pytest.mark.parametrize("shape", [LLAMA_2_7B, GQA_8B])
@pytest.mark.parametrize("length", [4096, 32768, 131072])
def test_the_common_batch_is_the_largest_that_fits(shape: Shape, length: int) -> None:
    batch, pool = shape.common_batch(length, H100.memory), shape.pool_bytes(H100.memory)
    one = (length + 2 * models.WRITTEN) * shape.kv_bytes
    assert batch * one <= pool and (batch == models.LARGEST_BATCH or (batch + 1) * one > pool)


def test_layers_are_halved_only_until_a_long_request_fits() -> None:
    assert LLAMA_2_7B.common_batch(131072, H100.memory) == 0
    assert LLAMA_2_7B.thin(131072, H100.memory) == replace(LLAMA_2_7B, layers=16)
    assert LLAMA_2_7B.thin(131072, H200.memory) == LLAMA_2_7B
    assert GQA_8B.thin(131072, H100.memory) == GQA_8B


def test_the_rank_is_the_largest_whose_streams_fit() -> None:
    assert streams.rank_for(H100, 8) == 64 == streams.rank_for(H200, 16)
    assert streams.rank_for(H100, 16) < 64


@pytest.mark.parametrize("setting", [H100, H200, TINY_SIZES])
@pytest.mark.parametrize(("number", "thin"), [(0, None), (0, 131072), (1, None)])
def test_every_decode_has_what_it_is_compared_with(setting: Setting, number: int, thin: int | None) -> None:
    """Else a verdict would be owed for ever."""
    stock, ours = (engines.engine_plan(setting, number, name, thin) for name in ("stock", "longctx"))
    for row in ours:
        if row["what"] == "decode":
            assert any(
                r["what"] == "decode" and r["length"] == r["window"] and r["batch"] == row["batch"]
                for r in stock
            )
            assert not row["common"] or row in stock
    assert all(row["length"] <= 131072 for row in stock)


def test_counted_traffic_and_work_are_of_what_a_query_sees() -> None:
    inside, beyond = (
        r
        for r in kernels.decode_plan(H100)
        if r["shape"] == GQA_8B.name and r["batch"] == 16 and r["length"] < 2e4
    )
    assert (
        inside["bytes"] == 16 * 4096 * 2 * 8 * 128 * 2
        and beyond["bytes"] == 16 * (10 + 8192) * 2 * 8 * 128 * 2
    )
    assert kernels.flops(TINY, 3, 2) == 4 * TINY.heads * TINY.head_size * (2 + 3)
    assert kernels.flops(TINY, 5000, 2) == 4 * TINY.heads * TINY.head_size * 2 * TINY.window


def test_a_steps_tokens_decide_whether_the_goal_for_memory_can_be_reached() -> None:
    held = {tokens: LLAMA_2_7B.held_blocks(tokens) for tokens in engines.STEPS}
    assert held == {4096: 385, 8192: 641}
    assert 4096 / held[engines.BATCHED_TOKENS] > 7.5 > 4096 / held[8192]
    # As `benchmarks/million.py` has found for booklm, one step in flight of 2,048 tokens.
    assert replace(TINY, trained=512).held_blocks(2048, steps=1) == 81
    (row,) = (
        r
        for r in engines.engine_plan(H100, 0, "longctx", 131072)
        if r["what"] == "prefill" and r["length"] == 131072
    )
    assert row["blocks_at_4096_a_step"] == 385 and row["blocks_at_8192_a_step"] == 641


def record_of(tmp_path: Path, name: str, status: str = "done", rows: Any = (), **facts: Any) -> Record:
    (tmp_path / "stages").mkdir(exist_ok=True)
    record = Record(tmp_path / "stages" / f"{name}.json", status=status, rows=list(rows), facts=facts)
    record.save()
    return record


def engine_rows(setting: Setting, number: int, method: str, thin: int | None = None) -> list[dict[str, Any]]:
    """As if a second went by for each 1,024 tokens of KV that a query sees, and nothing else cost time."""
    rows = engines.engine_plan(setting, number, method, thin)
    for row in rows:
        seen = row["length"] if method == "stock" else min(row["length"], row["window"])
        row |= {"tokens_per_s": 1024 / seen, "kv_bytes": seen * 1000}
    return rows


def test_nothing_is_reached_before_it_is_measured() -> None:
    assert {t.verdict for t in report.targets({})} == {"owed"}


def test_targets_are_judged_by_the_worst(tmp_path: Path) -> None:
    records = {
        "environment": record_of(tmp_path, "environment", copy_bytes_per_s=3e12),
        "tests": record_of(tmp_path, "tests", failed=0),
        "checks": record_of(
            tmp_path, "checks", rows=[{"error_to_tolerance": 0.5}, {"error_to_tolerance": 1.5}]
        ),
        "sequential": record_of(tmp_path, "sequential", tokens_per_s=10.0),
        "temp-lora": record_of(
            tmp_path,
            "temp-lora",
            rows=[
                {"what": what, "streams": 8, "tokens_per_s": x}
                for what, x in (("learning", 95.0), ("no training", 400.0))
            ],
            swap_ms=2.0,
            decode_step_ms=10.0,
        ),
        "trainer-memory": record_of(tmp_path, "trainer-memory", trainer_bytes=2 * GIB, weight_bytes=12 * GIB),
    }
    for name, number, thin in (("7b", 0, None), ("7b-128k", 0, 131072), ("8b", 1, None)):
        for method in ("stock", "longctx"):
            rows = engine_rows(H100, number, method, thin)
            records[f"{name}-{method}"] = record_of(tmp_path, f"{name}-{method}", rows=rows)
    rows = [{**r, "splits": 1, "longctx_ms": 1000 * r["bytes"] / 2.7e12} for r in kernels.decode_plan(H100)]
    records["decode"] = record_of(tmp_path, "decode", status="failed", rows=rows)
    found = {t.name: t for t in report.targets(records)}
    verdicts = [t.verdict for t in found.values()]
    assert verdicts == ["reached", "missed", "owed", *["reached"] * 7]
    assert found["decode at 32K, 7B, × stock"].found == pytest.approx(32768 / 4106)
    assert found["decode at any length, of stock at the window's"].found == pytest.approx(1)
    assert found["KV memory at 128K, 7B, stock over ours"].found == pytest.approx(131072 / 4106)
    rows[-1]["longctx_ms"] *= 2  # one of many is slow
    records["decode"] = record_of(tmp_path, "decode", rows=rows)
    share = next(t for t in report.targets(records) if t.stages == "decode")
    assert share.verdict == "missed" and share.found == pytest.approx(0.45)
    assert {t.verdict for t in report.targets({n: replace(r, size=QUICK) for n, r in records.items()})} == {
        "owed"
    }
    text = report.markdown(records, [(s.name, s.about) for s in run_all.STAGES])
    assert all(f"| {s.name} | {s.about} |" in text for s in run_all.STAGES)
    assert "| prefill | Λ attention of a prompt's chunk in one layer against FlashAttention | owed |" in text


def test_what_a_failed_stage_has_found_is_no_verdict(tmp_path: Path) -> None:
    """A trainer that has died makes decoding faster."""
    rows = [{"what": "learning", "streams": 8, "tokens_per_s": 900.0}]
    facts = {"swap_ms": 1.0, "decode_step_ms": 10.0}
    records = {
        "sequential": record_of(tmp_path, "sequential", tokens_per_s=30.0),
        "temp-lora": record_of(tmp_path, "temp-lora", status="failed", rows=rows, **facts),
        "tests": record_of(tmp_path, "tests", status="failed", failed=0),
        "checks": record_of(tmp_path, "checks", status="failed", rows=[{"error_to_tolerance": 0.1}]),
        "trainer-memory": record_of(tmp_path, "trainer-memory", "failed", trainer_bytes=1, weight_bytes=2),
    }
    for name, number in (("7b", 0), ("8b", 1)):
        for method in ("stock", "longctx"):
            ours = engine_rows(H100, number, method)
            records[f"{name}-{method}"] = record_of(tmp_path, f"{name}-{method}", "failed", rows=ours)
    assert {t.verdict for t in report.targets(records)} == {"owed"}
    records["temp-lora"].finish()
    verdicts = {t.name: t.verdict for t in report.targets(records)}
    assert verdicts["Temp-LoRA, 8 streams, × the sequential loop"] == "reached"
    assert verdicts["swap at rank 64, of a decode step"] == "reached"
    for name, rows, facts in (("checks", [{"error_to_tolerance": 2.0}], {}), ("tests", [], {"failed": 3})):
        records[name] = record_of(tmp_path, name, "failed", rows=rows, **facts)
    assert [t.verdict for t in report.targets(records)][:2] == ["missed", "missed"]


def test_a_void_row_is_no_verdict_and_the_others_are(tmp_path: Path) -> None:
    records = {}
    for method in ("stock", "longctx"):
        rows = engine_rows(H100, 0, method)
        if method == "longctx":
            (void,) = (r for r in rows if r["length"] == 16384 and r["batch"] == 16 and r["what"] == "decode")
            void["void"] = "3 preemptions"
        records[f"7b-{method}"] = record_of(tmp_path, f"7b-{method}", rows=rows)
        records[f"8b-{method}"] = record_of(tmp_path, f"8b-{method}", rows=engine_rows(H100, 1, method))
    records["7b-longctx"].finish()
    verdicts = {t.name: t.verdict for t in report.targets(records)}
    assert records["7b-longctx"].status == "partly void"
    assert "1 of " in str(records["7b-longctx"].error) and "3 preemptions" in str(records["7b-longctx"].error)
    assert verdicts["decode at 32K, 7B, × stock"] == "reached"
    assert verdicts["decode at any length, of stock at the window's"] == "owed"
    del void["void"]
    records["7b-longctx"].finish()
    assert {t.name: t.verdict for t in report.targets(records)}[
        "decode at any length, of stock at the window's"
    ] == "reached"


@pytest.mark.parametrize(
    ("what", "at_once", "preemptions", "void"),
    [
        ("decode", 16, 0, {}),
        ("decode", 15, 0, {"void": "15 of 16 requests decoded at once"}),
        ("decode", 16, 2, {"void": "2 preemptions"}),
        ("prefill", None, 1, {"void": "1 preemptions"}),
        ("most at once", 5, 9, {}),
    ],
)
def test_a_row_of_another_load_than_it_says_is_void(
    what: str, at_once: int | None, preemptions: int, void: dict[str, str]
) -> None:
    assert engines.why_void({"what": what, "batch": 16}, at_once, preemptions) == void


class Metric:
    name = "vllm:longctx_swap_time_seconds"
    sum, count = 1.0, 4


class Learns:
    def get_metrics(self) -> list[Metric]:
        return [Metric()]


def test_streams_that_did_not_learn_are_void(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def engine(*args: Any) -> Iterator[Learns]:
        yield Learns()

    def learning_speed(
        llm: Learns, prompts: list[Any], tokens: int, block: int, options: Any, n: int
    ) -> float:
        if n == 4:
            raise PremiseError("1 block failed")
        return 100.0 * n

    monkeypatch.setattr(streams, "check_plugin", lambda: None)
    monkeypatch.setattr(streams, "random_tokens", lambda *args: [1])
    monkeypatch.setattr(streams, "engine", engine)
    monkeypatch.setattr(streams, "learning_speed", learning_speed)
    record = Record(tmp_path / "a.json")
    streams.learning(record, streams.learning_plan(TINY_SIZES, 8), TINY_SIZES, 8)
    assert [row.get("void") for row in record.rows] == [None, None, "1 block failed", None, None, None]
    assert "swap_ms" not in record.facts
    record = Record(tmp_path / "b.json")
    plan = [row for row in streams.learning_plan(TINY_SIZES, 8) if row["streams"] != 4]
    streams.learning(record, plan, TINY_SIZES, 8)
    assert record.facts["swap_ms"] == 250 and record.facts["decode_step_ms"] == 10


def test_a_record_is_whole_after_every_row(tmp_path: Path) -> None:
    record = Record(tmp_path / "a.json")
    record.note(a=1)
    record.add(b=2)
    assert Record.load(record.path) == record and Record.load(tmp_path / "b.json") is None


def fake_plan(setting: Setting, fail: bool) -> list[dict[str, Any]]:
    return [{"n": 1}]


def fake(record: Record, plan: list[dict[str, Any]], setting: Setting, fail: bool) -> None:
    record.add(**plan[0])
    if fail:
        raise ValueError(f"{__file__}: the reason\nmore")


def test_a_stage_that_fails_keeps_its_rows_and_one_line_of_the_reason(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    for fail, status in ((True, "failed"), (False, "done")):
        stage = Stage("tests", {CPU: 1}, "", f"{__name__}:fake", (fail,))
        assert run_all.work(stage, tmp_path, TINY_SIZES) == int(fail)
        record = run_all.load(tmp_path)["tests"]
        assert record.status == status and record.rows == [{"n": 1}]
        assert record.error == ("ValueError: test_run_all.py: the reason" if fail else None)


def test_a_process_is_ended_at_its_limit_with_its_children(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    pid_file = tmp_path / "pid"
    child = "import pathlib, subprocess, sys; p = subprocess.Popen(['sleep', '60'])"
    tell = f"pathlib.Path({str(pid_file)!r}).write_text(str(p.pid)); p.wait()"
    record = run_all.supervise("decode", [sys.executable, "-c", f"{child}; {tell}"], tmp_path, 1.5, FULL)
    assert (record.status, record.error) == (
        "failed",
        "cut off after 2 s",
    ) and 1 < record.seconds < 60  # the child would sleep on
    time.sleep(0.1)
    pid = int(pid_file.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    record = run_all.supervise(
        "decode", [sys.executable, "-c", "import sys; sys.exit(3)"], tmp_path, 10, FULL
    )
    assert (record.status, record.error) == ("failed", "ended with code 3")


def test_the_same_command_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def supervise(name: str, command: list[str], out: Path, limit_s: float, size: str) -> Record:
        assert command[-2:] == ["--stage", name] and limit_s > 0
        started.append(name)
        return record_of(out, name, status="failed" if name == "decode" and len(started) < 4 else "done")

    monkeypatch.setattr(run_all, "supervise", supervise)
    chosen = [s for s in run_all.STAGES if s.name in ("environment", "decode", "lookup")]
    run_all.run(chosen[:2], tmp_path, [], 10, FULL)
    run_all.run(chosen, tmp_path, [], 10, FULL)
    assert started == ["environment", "decode", "lookup", "decode"]  # the new one before the one that failed
    run_all.run(chosen, tmp_path, ["lookup"], 10, FULL)
    run_all.run(chosen, tmp_path, ["lookup"], 0, FULL)  # no time
    assert started[4:] == ["lookup"]


runner, app = CliRunner(), typer.Typer()
app.command()(run_all.main)


def test_what_it_would_do_can_be_read_without_a_gpu() -> None:
    listed = runner.invoke(app, ["--list"], env={"COLUMNS": "200"})
    assert listed.exit_code == 0 and all(name in listed.output for name in run_all.NAMES)
    for words, lines in (([], 100), (["--quick"], 30), (["--smoke"], 40), (["--cpu"], 11)):
        dry = runner.invoke(app, ["--dry", *words])
        assert dry.exit_code == 0 and len(dry.output.splitlines()) > lines
    assert runner.invoke(app, ["--smoke", "--quick", "--list"]).exit_code == 2
    assert runner.invoke(app, ["--smoke", "--only", "8b-stock", "--list"]).exit_code == 2
    assert runner.invoke(app, ["--only", "decodes"]).exit_code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_what_is_owed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = runner.invoke(
        app, ["--out", str(tmp_path / "out"), "--only", "decode,tests"], env={"COLUMNS": "300"}
    )
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert "tests, decode" in result.stderr and "H100" in result.stderr


def test_other_sizes_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    record_of(tmp_path, "decode")
    result = runner.invoke(app, ["--out", str(tmp_path), "--quick"], env={"COLUMNS": "300"})
    assert result.exit_code == 2 and "results of size full, not quick" in result.stderr


@pytest.mark.parametrize(
    ("size", "words", "minutes"), [(SMOKE, ["--smoke"], 4), (QUICK, ["--quick"], 10), (FULL, [], 45)]
)
def test_what_it_is_thought_to_take_fits_its_minutes_and_is_shown(
    size: str, words: list[str], minutes: int
) -> None:
    stages = [s for s in run_all.STAGES if size in s.seconds]
    seconds = run_all.estimated_seconds(stages, size)
    assert run_all.MINUTES[size] == minutes and seconds < 0.9 * 60 * minutes
    shown = runner.invoke(app, [*words, "--list"], env={"COLUMNS": "200"}).output
    assert f"{seconds:.0f}" in shown and all(s.name in shown for s in stages)


def test_smoke_has_every_mode_and_one_bandwidth() -> None:
    smoke = [s for s in run_all.STAGES if SMOKE in s.seconds]
    modes = {LongContextConfig.parse(case.section).mode.name for case in outputs.CASES.values()}
    assert modes == {mode.name for mode in MODES if "check_together" not in mode.checks}  # which no GPU runs
    assert {f"mode-{name}" for name in outputs.CASES} | {"environment", "decode"} == {s.name for s in smoke}
    (decode,) = kernels.decode_plan(Setting(SMOKE, 139 * GIB))
    assert (decode["shape"], decode["batch"]) == (GQA_8B.name, 16)
    assert outputs.POOL_BYTES == 2 * GIB


def test_what_was_done_elsewhere_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call on a machine that is lent begins with an empty folder."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    earlier, out = tmp_path / "earlier", tmp_path / "out"
    earlier.mkdir()
    record_of(earlier, "decode")
    monkeypatch.setattr(run_all, "supervise", lambda name, command, out, *args: record_of(out, name))
    words = ["--out", str(out), "--resume", str(earlier), "--only", "decode,lookup"]
    result = runner.invoke(app, words)
    assert result.exit_code == 0 and "1 of 2 stages were done before" in result.stderr
    assert {path.stem for path in (out / "stages").iterdir()} == {"decode", "lookup"}
    empty = runner.invoke(app, ["--out", str(out), "--resume", str(tmp_path)], env={"COLUMNS": "300"})
    assert empty.exit_code == 2 and "holds no stages" in empty.stderr


def test_nothing_is_begun_that_would_go_past_the_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: dict[str, float] = {}

    def supervise(name: str, command: list[str], out: Path, limit_s: float, size: str) -> Record:
        begun[name] = limit_s
        return record_of(out, name)

    monkeypatch.setattr(run_all, "supervise", supervise)
    (tmp_path / "stages").mkdir()
    chosen = [s for s in run_all.STAGES if s.name in ("environment", "mode-plain", "8b-stock")]
    run_all.run(chosen, tmp_path, [], 65 / 60, FULL)
    assert list(begun) == ["mode-plain", "environment"]
    assert begun["environment"] == pytest.approx(50) and begun["mode-plain"] == pytest.approx(65, abs=1)


def test_stages_without_times_run_beside_each_other_and_end_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stages").mkdir()
    chosen = [s for s in run_all.STAGES if s.name in ("mode-plain", "mode-streaming", "mode-top-k")]
    barrier = threading.Barrier(len(chosen))

    def supervise(name: str, command: list[str], out: Path, limit_s: float, size: str) -> Record:
        barrier.wait(20)
        if name == "mode-plain":
            raise KeyboardInterrupt
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        return kept(name, command, out, limit_s, size)

    kept, start = run_all.supervise, time.monotonic()
    monkeypatch.setattr(run_all, "supervise", supervise)
    with pytest.raises(KeyboardInterrupt):
        run_all.run(chosen, tmp_path, [], 10, SMOKE)
    run_all.stopped.clear()
    assert time.monotonic() - start < 50
    assert [r.error for r in run_all.load(tmp_path).values()] == ["stopped"] * 2


def test_the_exit_code_says_whether_all_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run_all, "run", lambda *args: None)
    record_of(tmp_path, "decode")
    for only, code in (("decode", 0), ("decode,lookup", 1)):
        assert runner.invoke(app, ["--out", str(tmp_path), "--only", only]).exit_code == code
    assert "owed" in (tmp_path / "results.md").read_text() and (tmp_path / "results.json").is_file()


def test_pytests_last_line_is_understood() -> None:
    assert checks.outcome("x\n1 failed, 20 passed, 2 skipped in 3.0s\n") == {
        "passed": 20,
        "failed": 1,
        "skipped": 2,
    }
    assert checks.outcome("") == {"passed": 0, "failed": 0, "skipped": 0}


def test_requests_pass_through_the_pool_each_from_its_own_place() -> None:
    pool = kernels.Pool.of(TINY_GQA, False)
    tables = pool.tables(16384, 3, 2)
    assert [t.shape for t in tables] == [(3, 16384 // kernels.BLOCK_SIZE)] * 2
    assert len({int(t[row, 0]) for t in tables for row in range(3)}) == 6
    assert all(len(t[0].unique()) == len(pool.numbers) for t in tables)
    assert [c.stride()[1:3] for c in (pool.caches[0], pool.slots_first[0])] == [
        (128, 32 * 128),
        (2 * 128, 128),
    ]


class Steps:
    """An engine of which each step gives so many outputs, and takes a second."""

    def __init__(self, counts: list[int], monkeypatch: pytest.MonkeyPatch):
        self.counts, self.now = counts, 0.0
        monkeypatch.setattr(engines.time, "perf_counter", lambda: self.now)

    def add_request(self, *args: Any) -> None: ...

    def has_unfinished_requests(self) -> bool:
        return bool(self.counts)

    def step(self) -> list[None]:
        self.now += 1 if self.counts[0] == 3 else 10
        return [None] * self.counts.pop(0)


def test_decoding_is_timed_while_most_requests_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engines.decoding(Steps([0, 1, 2, 2, 3, 3, 3, 2, 2, 1], monkeypatch), [[1]] * 3, 4) == (1, 3)


@pytest.fixture
def one_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of host and device."""
    monkeypatch.setattr(host_memory, "mapped", lambda pages: pages)
    monkeypatch.setattr(host_memory.HostMemory, "release", lambda self: None)


@pytest.mark.usefixtures("interpretable", "one_thread", "one_memory", "sorted_by_numpy")
@pytest.mark.parametrize(
    ("stage", "length"), [("decode", 200), ("prefill", 200), ("lookup", 200), ("memory", 700)]
)
def test_a_kernel_stage_runs_as_planned(stage: str, length: int, tmp_path: Path) -> None:
    record = Record(tmp_path / "a.json")
    planned = next(
        row for row in getattr(kernels, f"{stage}_plan")(TINY_SIZES) if row["shape"] == TINY_GQA.name
    )
    small = {
        **planned,
        "length": length,
        **({"queries": min(planned["queries"], 32)} if "queries" in planned else {}),
    }
    getattr(kernels, stage)(record, [small], TINY_SIZES)
    (row,) = record.rows
    times = [value for name, value in row.items() if name.endswith("_ms")]
    assert small.items() <= row.items() and times and min(times) > 0
    assert report.rows_table(record.rows).count("\n") == 3 and json.dumps(row)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("queries", [1, 40])
def test_a_kernel_check_passes_and_sees_a_wrong_distance(
    queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_longctx.cuda.kernels.lambda_tile import View

    small = replace(TINY_GQA, trained=64)
    tolerated = checks.ROUNDINGS * torch.finfo(torch.float16).eps
    assert checks.lambda_error(small, torch.float16, 3000, queries) < tolerated / 2
    assert checks.lambda_error(small, torch.float16, 50, queries) < tolerated / 2  # inside the window
    monkeypatch.setattr(View, "query_turn", lambda self, positions: self.ceiling - 1 - positions)
    assert checks.lambda_error(small, torch.float16, 3000, queries) > tolerated


@pytest.mark.usefixtures("one_thread", "one_memory", "sorted_by_numpy")
def test_a_kernel_check_of_the_lookup_passes() -> None:
    torch.manual_seed(0)
    found = checks.lookup_error(TINY_GQA, torch.float16, 700, 1)
    torch.manual_seed(0)
    assert checks.CHECKS["lookup in host memory"](TINY_GQA, torch.float16, 700, 1) == found < 1e-3
