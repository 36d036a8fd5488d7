"""Private seams of vLLM have a diff in patches/ and are looked for."""

import re
from pathlib import Path

import pytest
import vllm
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

from tests.support.signatures import touched
from vllm_longctx import seams
from vllm_longctx.config import LongContextError
from vllm_longctx.seams import SEAMS

PATCHES = Path(__file__).parents[2] / "patches"


def test_every_seam_names_its_diff() -> None:
    named = {seam.patch for seam in SEAMS if seam.patch is not None}
    assert named <= {p.name for p in PATCHES.glob("*.diff")}
    assert all(s.what.startswith("torch.") for s in SEAMS if s.patch is None)


def test_every_seam_says_why_it_stays() -> None:
    page = (PATCHES.parent / "docs" / "design" / "seams.md").read_text()
    rows = re.findall(r"^\| (\d{4}(?:, \d{4})*) \|", page, re.MULTILINE)
    assert {n for row in rows for n in row.split(", ")} == {s.patch[:4] for s in SEAMS if s.patch is not None}


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
