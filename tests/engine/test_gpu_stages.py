"""benchmarks/gpu without a GPU: its stages of modes, in the CPU engine, by the command itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from gpu.outputs import CASES, TOLERANCES

from tests.support.documentation import ROOT

QUICK = "lm-infinite"
OTHERS = [pytest.param(name, marks=[pytest.mark.slow, pytest.mark.alone]) for name in CASES if name != QUICK]


@pytest.mark.parametrize("name", [QUICK, *OTHERS])
def test_a_mode_writes_what_is_stored(name: str, tmp_path: Path) -> None:
    stage = f"mode-{name}"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "run_all.py"), "--cpu"]
    command += ["--out", str(tmp_path), "--only", stage]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    log = (tmp_path / "logs" / f"{stage}.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log[-3000:]
    (row,) = json.loads((tmp_path / "results.json").read_text())[stage]["rows"]
    assert row["worst_from_cpu"] <= TOLERANCES["float32"].worst
    assert row["written_from_cpu"] == sum(request.written for request in CASES[name].requests)
    assert f"| {stage} |" in (tmp_path / "results.md").read_text()
