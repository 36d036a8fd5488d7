"""Each diff in patches/ applies to the installed vLLM and leaves Python behind; each private seam of vLLM's has one."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import vllm

from vllm_longctx.seams import SEAMS

PATCHES = sorted((Path(__file__).parents[1] / "patches").glob("*.diff"))
SITE_PACKAGES = Path(vllm.__file__).parents[1]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.stem)
def test_it_applies(patch: Path, tmp_path: Path) -> None:
    files = re.findall(r"^--- a/(\S+)", patch.read_text(), re.MULTILINE)
    assert files
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SITE_PACKAGES / file, tmp_path / file)
    command = ["git", "apply", "--verbose", str(patch)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for file in files:
        patched = (tmp_path / file).read_text()
        assert patched != (SITE_PACKAGES / file).read_text()
        ast.parse(patched)


def test_every_seam_names_its_diff() -> None:
    named = {seam.patch for seam in SEAMS if seam.patch is not None}
    assert named <= {p.name for p in PATCHES}
    assert [s.what for s in SEAMS if s.patch is None] == ["torch.ops.aten._scaled_dot_product_flash_attention_for_cpu"]
