"""Diffs in patches/ apply to the installed vLLM and leave Python behind. Each brings a test for vLLM's own
tree, which passes with the diff and fails without it.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import vllm
from packaging.version import Version
from vllm.platforms import current_platform

DIRECTORY = Path(__file__).parents[2] / "patches"
SITE_PACKAGES = Path(vllm.__file__).parents[1]


def of_this_vllm(patch: Path) -> Path:
    """Its variant in the folder of the newest version up to the installed one, or itself."""
    installed = Version(vllm.__version__)
    newest_first = sorted((Version(d.name) for d in DIRECTORY.iterdir() if d.is_dir()), reverse=True)
    variants = [DIRECTORY / str(v) / patch.name for v in newest_first if v <= installed]
    return next((variant for variant in variants if variant.exists()), patch)


PATCHES = [of_this_vllm(patch) for patch in sorted(DIRECTORY.glob("*.diff"))]
each_and_all = pytest.mark.parametrize(
    "patches", [*([p] for p in PATCHES), PATCHES], ids=[*(p.stem for p in PATCHES), "all"]
)


def written_tests(patches: list[Path]) -> list[str]:
    return [f for p in patches for f in re.findall(r"^\+\+\+ b/(tests/\S+)", p.read_text(), re.MULTILINE)]


def changes_no_behaviour(patch: Path) -> bool:
    return patch.read_text().startswith("[Doc]")


def patched(patches: list[Path], directory: Path) -> list[str]:
    """Applies them in order to copies of vLLM's files in `directory`; the names of the files."""
    files = sorted({f for p in patches for f in re.findall(r"^--- a/(\S+)", p.read_text(), re.MULTILINE)})
    assert files
    for file in files:
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        (directory / file).unlink(missing_ok=True)  # a link to the installed one
        shutil.copy(SITE_PACKAGES / file, directory / file)
    for patch in patches:
        command = ["git", "apply", "--verbose", str(patch)]
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return files


def run_tests(files: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    """With the vLLM in `directory`, and without our plugin."""
    path = os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "VLLM_PLUGINS": "", "OMP_NUM_THREADS": "1"}
    options = ["-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", "-c", os.devnull]
    options += ["--continue-on-collection-errors", "--rootdir", str(directory)]
    command = [sys.executable, "-m", "pytest", *options, *files]
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=3000
    )


@each_and_all
def test_they_apply(patches: list[Path], tmp_path: Path) -> None:
    files = patched(patches, tmp_path)
    for file in files:
        text = (tmp_path / file).read_text()
        assert text != (SITE_PACKAGES / file).read_text()
        ast.parse(text)
    # F: names that are not defined, imports that are not used
    ruff = [str(Path(sys.executable).parent / "ruff"), "check", "--isolated", "--no-cache", "--select", "F"]
    command = [*ruff, *files, *written_tests(patches)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_has_its_row() -> None:
    rows = re.findall(r"^\| \[(\d+)\]\((\S+)\) \|", (DIRECTORY / "README.md").read_text(), re.MULTILINE)
    assert rows == [(p.name[:4], p.name) for p in PATCHES]
    variants = {p.name for p in DIRECTORY.glob("*/*.diff")}
    assert variants <= {p.name for p in PATCHES}


def test_each_has_a_message_and_a_test() -> None:
    for patch in (*PATCHES, *DIRECTORY.glob("*/*.diff")):
        title, empty, *rest = patch.read_text().splitlines()
        assert re.match(r"(\[[\w /]+\])+ \w", title) and not empty and not rest[0].startswith("---"), patch
        assert len(written_tests([patch])) == 1 or "there is no test" in patch.read_text().replace(
            "\n", " "
        ), patch


@pytest.mark.slow  # each starts Python and vLLM anew, and some of them an engine
@pytest.mark.skipif(not current_platform.is_cpu(), reason="its vLLM is one for the CPU")
class TestsOfTheirs:
    @each_and_all
    def test_they_pass(self, patches: list[Path], tmp_path: Path) -> None:
        if not (files := written_tests(patches)):
            pytest.skip("it changes documentation only")
        shutil.copytree(SITE_PACKAGES / "vllm", tmp_path / "vllm", copy_function=os.symlink)
        patched(patches, tmp_path)
        done = run_tests(files, tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr

    def test_they_fail_without_the_diffs(self, tmp_path: Path) -> None:
        patched(PATCHES, tmp_path)
        shutil.rmtree(tmp_path / "vllm")
        shutil.copytree(SITE_PACKAGES / "vllm", tmp_path / "vllm", copy_function=os.symlink)
        done = run_tests(written_tests(PATCHES), tmp_path)
        failed = set(re.findall(r"^(?:FAILED|ERROR) (tests/[^:\s]+)", done.stdout, re.MULTILINE))
        assert failed == set(written_tests([p for p in PATCHES if not changes_no_behaviour(p)])), done.stdout
