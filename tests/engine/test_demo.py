"""`make demo`, on few tokens: it prints its own lines, and all others are in the log that it names."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documentation import ROOT

SIZES = {"read": 1500, "stock": 700, "prompt": 100, "write": 20, "learn": 700}


@pytest.mark.slow
@pytest.mark.alone
def test_the_demo_prints_its_own_lines(tmp_path: Path) -> None:
    words = [word for name, tokens in SIZES.items() for word in (f"--{name}-tokens", str(tokens))]
    command = [sys.executable, str(ROOT / "benchmarks" / "demo.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout
    printed = done.stdout + done.stderr
    assert not re.search(r"WARNING|INFO|EngineCore|pid=|Traceback|/site-packages/", printed), printed
    titles = ("reads 1,500 tokens", "NLL, nats per token", "writes 20 tokens", "perplexity")
    assert all(title in printed for title in titles), printed
    assert "demo.log" in done.stdout.splitlines()[0]
    log = (tmp_path / "demo.log").read_text()
    assert "vllm" in log and "force killing" not in log
    assert (tmp_path / "demo.png").stat().st_size > 10_000
