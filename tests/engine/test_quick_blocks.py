"""The blocks of README and docs/ that are marked as quick, run as they stand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documentation import PAGES, Block, blocks

QUICK = [block for page in PAGES for block in blocks(page) if block.marker == "quick"]
# One that compiles nothing; the others make the same calls.
SHOWN = [
    block if "enforce_eager=True" in block.text else pytest.param(block, marks=pytest.mark.slow)
    for block in QUICK
]


@pytest.mark.parametrize("block", SHOWN, ids=str)
def test_a_quick_block_runs(block: Block, tmp_path: Path) -> None:
    command = (
        [sys.executable, "-c", block.text] if block.language == "python" else ["bash", "-ec", block.text]
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=400, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.split()) > 10
