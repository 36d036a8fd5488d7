"""The recipe for pip in docs/quickstart.md, followed as it stands in a fresh environment."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.documentation import PAGES, ROOT, blocks

WORKS = """
python -c "import transformers, vllm, vllm_longctx.plugin"
vllm --version
vllm-longctx doctor --model booklm
vllm-longctx generate --prompt "It was a dark night." --max-tokens 8 --dtype float32 --enforce-eager
"""

pytestmark = pytest.mark.alone


@pytest.mark.slow
def test_the_recipe_works(tmp_path: Path) -> None:
    (recipe,) = [block for page in PAGES for block in blocks(page) if block.marker == "recipe"]
    python = recipe.text.split()[0]
    if shutil.which(python) is None:
        pytest.skip(f"there is no {python}")
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    fresh = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        ["bash", "-ec", recipe.text + WORKS],
        cwd=tmp_path,
        env=fresh,
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "0.32.0" in done.stdout and "missing" not in done.stdout
    assert "wrote 8" in done.stderr
