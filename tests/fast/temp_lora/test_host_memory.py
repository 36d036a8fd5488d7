"""Free memory of the host, where control groups limit it: their files are put in place."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from vllm_longctx.temp_lora import host_memory
from vllm_longctx.temp_lora.host_memory import free_host_bytes

GIB = 1 << 30


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the control groups, on a host with 64 GiB available."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB))
    versions = {
        controllers: (tmp_path / controllers, *files)
        for controllers, (_, *files) in host_memory.VERSIONS.items()
    }
    monkeypatch.setattr(host_memory, "VERSIONS", versions)
    monkeypatch.setattr(host_memory, "CGROUP", tmp_path / "cgroup")
    return tmp_path


def group(path: Path, version: int, limit: str | int, usage: int, cache: int = 0) -> None:
    """A group with a limit, and its use in bytes, of which `cache` are twice in the file cache."""
    path.mkdir(parents=True, exist_ok=True)
    names, prefix = {
        1: (("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"),
        2: (("memory.max", "memory.current"), ""),
    }[version]
    for name, value in zip(names, (limit, usage), strict=True):
        (path / name).write_text(f"{value}\n")
    stat = f"{prefix}active_file {cache}\n{prefix}inactive_file {cache}\nanon 7\n"
    (path / "memory.stat").write_text(stat)


def test_without_limits_it_is_what_the_kernel_calls_available(root: Path) -> None:
    assert free_host_bytes() == 64 * GIB  # no file, as outside of Linux
    (root / "cgroup").write_text("9:name=systemd:/\n4:memory:/a\n1:cpu,cpuacct:/a\n0::/a\n")
    assert free_host_bytes() == 64 * GIB  # no groups to be seen
    group(root / "a", 2, "max", 5 * GIB)
    group(root / "memory" / "a", 1, 9223372036854771712, 5 * GIB)
    assert free_host_bytes() == 64 * GIB


@pytest.mark.parametrize(("version", "line"), [(1, "4:memory:/a/b"), (2, "0::/a/b")])
def test_the_tightest_limit_of_a_group_and_its_parents_counts(root: Path, version: int, line: str) -> None:
    groups = root / ("memory" if version == 1 else "")
    (root / "cgroup").write_text(line + "\n")
    group(groups / "a" / "b", version, 20 * GIB, 5 * GIB)
    assert free_host_bytes() == 15 * GIB
    group(groups / "a", version, 16 * GIB, 6 * GIB, cache=GIB)  # which gives way
    assert free_host_bytes() == 12 * GIB
    group(groups, version, 8 * GIB, 9 * GIB)
    assert free_host_bytes() == 0
    group(groups / "a" / "c", version, 1, 1)
    group(groups, version, 128 * GIB, 9 * GIB)
    assert free_host_bytes() == 12 * GIB


def test_a_container_that_sees_its_own_group_as_the_root(root: Path) -> None:
    (root / "cgroup").write_text("4:memory:/docker/0123\n")
    group(root / "memory", 1, 4 * GIB, GIB)
    assert free_host_bytes() == 3 * GIB
