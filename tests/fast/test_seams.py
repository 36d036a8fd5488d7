"""Diffs in patches/ apply to the installed vLLM and leave Python behind; private seams of vLLM have one and
are looked for.
"""

import ast
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import vllm
from packaging.version import Version
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

from tests.support.signatures import touched
from vllm_longctx import seams
from vllm_longctx.config import LongContextError
from vllm_longctx.seams import SEAMS

DIRECTORY = Path(__file__).parents[2] / "patches"
SITE_PACKAGES = Path(vllm.__file__).parents[1]


def of_this_vllm(patch: Path) -> Path:
    """Its variant in the folder of the newest version up to the installed one, or itself."""
    installed = Version(vllm.__version__)
    newest_first = sorted((Version(d.name) for d in DIRECTORY.iterdir() if d.is_dir()), reverse=True)
    variants = [DIRECTORY / str(v) / patch.name for v in newest_first if v <= installed]
    return next((variant for variant in variants if variant.exists()), patch)


PATCHES = [of_this_vllm(patch) for patch in sorted(DIRECTORY.glob("*.diff"))]


def patched(patches: list[Path], directory: Path) -> list[str]:
    """Applies them in order to copies of vLLM's files in `directory`; the names of the files."""
    files = sorted({f for p in patches for f in re.findall(r"^--- a/(\S+)", p.read_text(), re.MULTILINE)})
    assert files
    for file in files:
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SITE_PACKAGES / file, directory / file)
    for patch in patches:
        command = ["git", "apply", "--verbose", str(patch)]
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return files


@pytest.mark.parametrize(
    "patches", [*([p] for p in PATCHES), PATCHES], ids=[*(p.stem for p in PATCHES), "all"]
)
def test_they_apply(patches: list[Path], tmp_path: Path) -> None:
    files = patched(patches, tmp_path)
    for file in files:
        text = (tmp_path / file).read_text()
        assert text != (SITE_PACKAGES / file).read_text()
        ast.parse(text)
    # F: names that are not defined, imports that are not used
    command = [
        Path(sys.executable).parent / "ruff",
        "check",
        "--isolated",
        "--no-cache",
        "--select",
        "F",
        *files,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_has_its_row() -> None:
    rows = re.findall(r"^\| \[(\d+)\]\((\S+)\) \|", (DIRECTORY / "README.md").read_text(), re.MULTILINE)
    assert rows == [(p.name[:4], p.name) for p in PATCHES]
    variants = {p.name for p in DIRECTORY.glob("*/*.diff")}
    assert variants <= {p.name for p in PATCHES}


def test_every_seam_names_its_diff() -> None:
    named = {seam.patch for seam in SEAMS if seam.patch is not None}
    assert named <= {p.name for p in PATCHES}
    assert all(s.what.startswith("torch.") for s in SEAMS if s.patch is None)


def test_the_parameters_of_every_function_that_is_touched_are_known() -> None:
    version = vllm.__version__.partition("+")[0]
    known = {path: seams.known_parameters(path, version) for path in seams.SIGNATURES}
    assert touched() == {path: parameters for path, parameters in known.items() if parameters is not None}
    assert not seams.problems() and not [look for look in seams.hooks() if look.problem]


def test_a_seam_says_which_versions_functions_it_has() -> None:
    """Block tables of vLLM 0.33 leave out what a sliding window has left behind."""
    (seam,) = (s for s in SEAMS if s.patch == "0014-model-runner-of-plugins.diff")
    assert seam.variant() == vllm.__version__.partition("+")[0]
    (same,) = (s for s in SEAMS if s.patch == "0018-block-hashes-of-a-request.diff")
    assert same.variant() is None


def next_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "1.2.3")
    # Only in the newest that was tested.
    only_new = [p for p in seams.SIGNATURES if seams.known_parameters(p, seams.TESTED_VERSIONS[0]) is None]
    for path in only_new:
        monkeypatch.delitem(seams.SIGNATURES, path)


def test_an_untested_version_with_all_seams_starts_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    next_version(monkeypatch)
    with caplog.at_level("WARNING", "vllm.longctx"):
        seams.check_version()
    assert "vLLM is 1.2.3, but longctx was tested with 0.32.0 and 0.33.0" in caplog.text


def test_an_untested_version_is_refused_with_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    next_version(monkeypatch)
    monkeypatch.delattr(Scheduler, "_free_request")
    monkeypatch.setattr(SingleTypeKVCacheManager, "pop_blocks_for_free", lambda self, name: [])
    with pytest.raises(LongContextError, match=r"it lacks what .* install vllm==0.33.0 \(on a CPU") as e:
        seams.check_version()
    base = "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.pop_blocks_for_free"
    assert str(e.value).splitlines()[1:] == [
        "- vllm.v1.core.sched.scheduler:Scheduler._free_request is missing",
        f"- {base} is (self, name), and longctx knows (self, request_id)",
    ]


@pytest.mark.parametrize("version", ["0.31.9", "0.32.0rc1"])
def test_an_older_version_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(LongContextError, match=rf"vLLM is {version}, but .* with 0.32.0 and 0.33.0; install"):
        seams.check_version()


class Other:
    """What another vLLM might have in a class's place."""

    __slots__ = ()


@pytest.mark.parametrize(
    ("patch", "target"),
    [
        ("0011-scheduler-hooks-of-plugins.diff", "vllm.v1.core.sched.scheduler.Scheduler._free_request"),
        ("0011-scheduler-hooks-of-plugins.diff", "vllm.v1.core.sched.scheduler.Scheduler.__init__"),
        (
            "0012-roll-back-of-a-request.diff",
            "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager",
        ),
        ("0013-plugin-data-of-a-step.diff", "vllm.v1.core.sched.output.SchedulerOutput"),
        ("0014-model-runner-of-plugins.diff", "vllm.v1.worker.cpu_model_runner.CPUModelRunner"),
        ("0015-adapters-from-memory.diff", "vllm.lora.model_manager.LoRAModelManager"),
        ("0016-lora-per-segment-on-cpu.diff", "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"),
        ("0018-block-hashes-of-a-request.diff", "vllm.v1.request.Request.__init__"),
        ("0019-pool-of-its-own.diff", "vllm.v1.core.kv_cache_utils.KVCacheBlock"),
        ("0025-checks-and-refusals-at-engine-start.diff", "vllm.v1.engine.utils.CoreEngineProcManager"),
        (
            "0026-files-of-a-checkpoint.diff",
            "vllm.model_executor.model_loader.default_loader.DefaultModelLoader._prepare_weights",
        ),
        (
            "0017-slots-written-by-builders.diff",
            "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl",
        ),
    ],
)
def test_a_seam_that_changed_is_missing(patch: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (seam,) = (s for s in SEAMS if s.patch == patch)
    assert seam.present()
    if target.endswith("__init__"):
        monkeypatch.setattr(target, lambda self: None)
    elif target.rpartition(".")[2].startswith("_"):
        monkeypatch.delattr(target)
    else:
        monkeypatch.setattr(target, Other)
    assert not seam.present()


def test_patched_lora_operators_skip_tokens_without_an_adapter(tmp_path: Path) -> None:
    """Against one product a token; the stock ones give these tokens the last adapter."""
    (patch,) = (p for p in PATCHES if p.name.startswith("0016"))
    (file,) = patched([patch], tmp_path)
    ops = runpy.run_path(str(tmp_path / file))
    tokens = torch.tensor([0, 0, -1, 1, 1, 1, -1, 0])
    weights, x = torch.randn(2, 1, 3, 6), torch.randn(len(tokens), 6)
    indices, lengths = torch.unique_consecutive(tokens, return_counts=True)
    starts = lengths.cumsum(0) - lengths
    meta = (starts, lengths, indices, len(indices), int(lengths.max()), len(tokens))
    before = torch.randn(len(tokens), 8)
    product = torch.stack(
        [torch.zeros(3) if i < 0 else weights[i, 0] @ row for i, row in zip(tokens, x, strict=True)]
    )
    added = before.clone()
    added[:, 4:7] += product
    for name, given in (("sgmv_expand_slice", meta), ("bgmv_expand_slice", (tokens,))):
        y = before.clone()
        ops[name](x, weights, y, *given, 4, 3, True)
        torch.testing.assert_close(y, added)
    for name, given in (("sgmv_shrink", meta), ("bgmv_shrink", (tokens,))):
        y = torch.zeros(len(tokens), 3)
        ops[name](x, weights, y, *given, 0.5)
        torch.testing.assert_close(y, 0.5 * product)
