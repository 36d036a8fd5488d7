"""`make demo`, on few tokens: it prints its own lines, and all others are in the log that it names."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documentation import ROOT

# By the model: its trained length, options that make it short, and what only its demo shows.
DEMOS = {
    "booklm": (512, {"prompt": 100, "write": 20}, "writes 20 tokens"),
    "smollm2": (8192, {}, "The last answer:"),
}


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("model", DEMOS)
def test_the_demo_prints_its_own_lines(model: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if model == "smollm2":
        request.getfixturevalue("smollm2")
    trained, more, shown = DEMOS[model]
    sizes = {"read": 1500, "stock": 700, "learn": 700, **more}
    words = [word for name, tokens in sizes.items() for word in (f"--{name}-tokens", str(tokens))]
    if model == "smollm2":
        words += ["--chat-turns", "2"]
    command = [sys.executable, str(ROOT / "benchmarks" / "demo.py"), "--model", model, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout
    printed = done.stdout + done.stderr
    assert not re.search(r"WARNING|INFO|EngineCore|pid=|Traceback|/site-packages/", printed), printed
    titles = (
        f"trained on {trained:,} tokens reads 1,500 tokens",
        "NLL, nats per token",
        shown,
        "perplexity",
    )
    assert all(title in printed for title in titles), printed
    assert "demo.log" in done.stdout.splitlines()[0]
    log = (tmp_path / "demo.log").read_text()
    assert "vllm" in log and "force killing" not in log
    assert (tmp_path / "demo.png").stat().st_size > 10_000
