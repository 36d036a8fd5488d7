"""lm_eval's scores through the plugin, where lm_eval is installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documentation import ROOT


@pytest.mark.slow
def test_inside_the_trained_length_scores_are_those_of_stock_vllm(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not in this environment: pip install lm_eval==0.4.13")
    out = tmp_path / "out.json"
    sizes = ["--questions", "8", "--topics", "3", "--characters", "800", "--max-model-len", "512"]
    command = [sys.executable, str(ROOT / "benchmarks" / "harness.py"), "--model", "booklm", *sizes]
    done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    scores = json.loads(out.read_text())["scores"]
    stock = scores.pop("stock vLLM")
    assert len(scores) == 2 and stock["topics"] > 1
    for found in scores.values():
        assert found["order"] == stock["order"]
        assert found["topics"] == pytest.approx(stock["topics"], rel=1e-4)
