"""Versions on disk: what is read is what was written, whatever happens to the files, whoever shares them."""

import errno
import json
import logging
import os
import random
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_longctx.trainer import version_files
from vllm_longctx.trainer.trainer import State
from vllm_longctx.trainer.version_cache import VersionCache
from vllm_longctx.trainer.version_files import ABOUT, TENSORS, VersionFiles

MUCH = 1 << 30


def name(number: int) -> bytes:
    return bytes([number]) * 32


def state(number: int, floats: int = 8) -> State:
    weights = [torch.full((2, floats // 2), number + 0.25), torch.full((floats,), -1.0 * number)]
    moments = [{"step": torch.tensor(1.0), "exp_avg": w + 1, "exp_avg_sq": w * w} for w in weights]
    return State(weights, moments, torch.arange(5, dtype=torch.uint8) + number)


def files(directory: Path, limit: int = MUCH, trainer: str = "this one") -> VersionFiles:
    return VersionFiles(directory, limit, trainer)


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, "longctx.trainer")
    return caplog


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version_files.logger, "disabled", True)
    monkeypatch.setattr("vllm_longctx.files._sync_one", lambda path: None)


def test_versions_are_read_again_after_a_restart(tmp_path: Path) -> None:
    written = files(tmp_path / "a" / "b")
    assert written.put(name(1), state(1)) and written.put(name(2), state(2))
    read = files(tmp_path / "a" / "b")
    assert read.refresh() == ({name(1), name(2)}, set()) and read.refresh() == (set(), set())
    found = read.get(name(1))
    assert found is not None and read.get(name(3)) is None
    for one, other in ((found.tensors, state(1).tensors), (found.moments, state(1).moments)):
        assert one.keys() == other.keys()
        assert all(one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def nest(path: Path) -> None:
    path.write_text("[" * 100_000)


DAMAGE = {
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "flipped": flip,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "away": lambda path: path.unlink(),
    "nested": nest,
    "a list": lambda path: path.write_text("[1]"),
    "no checksum": lambda path: path.write_text(
        json.dumps({"address": name(1).hex(), "trainer": "this one"})
    ),
}


@pytest.mark.parametrize("file", [TENSORS, ABOUT])
@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_skipped_with_one_line_and_written_anew(
    tmp_path: Path, log: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    versions = files(tmp_path)
    versions.put(name(1), state(1))
    (entry,) = entries(tmp_path)
    DAMAGE[damage](tmp_path / entry / file)
    assert versions.get(name(1)) is None and versions.get(name(1)) is None
    (record,) = log.records
    assert f"skipped {tmp_path / entry} among remembered versions: " in record.getMessage()
    assert entries(tmp_path) == [] and versions.put(name(1), state(1))
    assert versions.get(name(1)) is not None


def test_every_bit_counts(tmp_path: Path, quiet: None) -> None:
    """Of one that is written again and again, each with another byte that differs."""
    versions = files(tmp_path)
    versions.put(name(1), state(1))
    (entry,) = entries(tmp_path)
    for file in (TENSORS, ABOUT):
        versions.put(name(1), state(1))
        content = (tmp_path / entry / file).read_bytes()
        for at in range(0, len(content), 23):
            versions.put(name(1), state(1))
            (tmp_path / entry / file).write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
            found = versions.get(name(1))
            assert found is None or found.digest == state(1).digest  # spaces of the JSON decide nothing


def test_entries_of_others_are_neither_read_nor_removed(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """An entry under another's name, a version of another trainer, and what is none at all."""
    other, versions = files(tmp_path, trainer="another"), files(tmp_path)
    other.put(name(1), state(1))
    assert versions.get(name(1)) is None and versions.refresh() == (set(), set()) and not log.records
    assert versions.put(name(1), state(2))
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "ab-cd").mkdir()
    versions.refresh()
    versions.refresh()
    lines = sorted(record.getMessage() for record in log.records)
    assert [line.partition(" among")[0].rpartition("/")[2] for line in lines] == ["ab-cd", "notes"]
    assert len(entries(tmp_path)) == 4
    log.clear()
    mine = next(path for path in tmp_path.iterdir() if path.name.endswith(versions._suffix))
    mine.rename(tmp_path / f"{name(2).hex()}-{versions._suffix}")
    assert versions.get(name(2)) is None
    assert "it is of another version or trainer" in log.text
    assert other.get(name(1)) is not None


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    versions = files(tmp_path)
    versions.put(name(0), state(0, 2000))
    each = version_files.file_bytes(state(0, 2000))
    assert versions._entries()[0].nbytes <= each
    versions = files(tmp_path, limit=3 * each)
    for number in (1, 2):
        versions.put(name(number), state(number, 2000))
    for age, number in ((30, 2), (20, 0), (10, 1)):
        path = versions._path(name(number))
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    assert versions.get(name(2)) is not None
    assert versions.put(name(3), state(3, 2000))
    kept = {number for number in range(4) if versions.has(name(number))}
    assert kept == {1, 2, 3}
    versions.refresh()
    assert sum(entry.nbytes for entry in versions._entries()) <= 3 * each
    assert not files(tmp_path, limit=each - 1).put(name(4), state(4, 2000)), "it alone is too large"
    assert {number for number in range(4) if versions.has(name(number))} == kept


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 100 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_only_what_is_written(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    versions = files(tmp_path)
    with full_disk():
        assert not versions.put(name(1), state(1)) and not versions.put(name(2), state(2))
    assert len(log.records) == 1 and "a version is not kept in" in log.text
    assert entries(tmp_path) == []
    assert versions.put(name(1), state(1)) and versions.get(name(1)) is not None


def test_a_directory_that_cannot_be_used_costs_only_what_is_written(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    versions = files(tmp_path / "file" / "below")
    assert versions.refresh() == (set(), set()) and versions.get(name(1)) is None
    assert not versions.put(name(1), state(1))
    assert "Not a directory" in log.text


@pytest.mark.parametrize("after", ["save_file", "write_text"])
def test_a_trainer_killed_while_it_writes_leaves_nothing_that_is_read(tmp_path: Path, after: str) -> None:
    pid = os.fork()
    if pid == 0:
        where: Any = version_files if after == "save_file" else Path
        real = getattr(where, after)

        def write(*args: Any, **kwargs: Any) -> None:
            real(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(where, after, write)
        files(tmp_path).put(name(1), state(1))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert len(entries(tmp_path)) == 1
    versions = files(tmp_path)
    assert versions.refresh() == (set(), set()) and versions.get(name(1)) is None
    for left in tmp_path.iterdir():
        os.utime(left, (0, 0))  # long ago
    assert versions.put(name(1), state(1)) and versions.get(name(1)) is not None
    assert len(entries(tmp_path)) == 1


def test_trainers_that_share_a_directory_never_read_anything_else(tmp_path: Path, quiet: None) -> None:
    """Each writes, reads and makes room; a version of one address differs in its last bit, as on a GPU."""
    size = version_files.file_bytes(state(0))
    errors: list[str] = []
    read = []

    def work(seed: int) -> None:
        rng, versions = random.Random(seed), files(tmp_path, limit=4 * size)
        for _ in range(60):
            number = rng.randrange(6)
            if rng.random() < 0.5:
                versions.put(name(number), state(number + 10 * seed))
            elif (found := versions.get(name(number))) is not None:
                digests = {state(number + 10 * seed).digest for seed in range(4)}
                read.append(number)
                if found.digest not in digests:
                    errors.append(f"{number} is {found}")
            versions.refresh()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and read
    assert all(not path.name.startswith(".") for path in tmp_path.iterdir())


def test_what_leaves_the_memory_goes_to_disk_if_its_text_needs_it(tmp_path: Path) -> None:
    """So a long text keeps few versions: those that it has passed over are gone."""
    each = state(0).nbytes
    cache = VersionCache(3 * each, files(tmp_path))
    for number in range(1, 7):  # a text that needs its newest version, and its first
        gone = cache.put(name(number), state(number), 1, [name(number), name(1)])
    assert gone == [name(4)]
    cache.put(name(7), state(7), 2, [name(7)])
    cache.put(name(8), state(8), 2, [name(7), name(8)])
    cache.put(name(9), state(9), 3, [name(9)])
    assert cache.files is not None
    assert {n for n in range(1, 10) if cache.files.has(name(n))} == {1, 6}
    found = cache.get(name(6))
    assert found is not None and found.digest == state(6).digest
    while cache.write_next():
        pass
    assert {n for n in range(1, 10) if cache.files.has(name(n))} == {1, 6, 7, 8, 9}


def test_what_is_too_large_for_the_memory_takes_nobodys_place(tmp_path: Path) -> None:
    made = files(tmp_path)
    made.put(name(1), state(1, 2000))
    cache = VersionCache(2 * state(0).nbytes, made)
    cache.put(name(2), state(2), 1, [])
    assert cache.get(name(1)) is not None and cache.get(name(2)) is not None


def test_nothing_is_written_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = VersionCache(MUCH, files(tmp_path))
    cache.put(name(1), state(1), 1, [name(1)])
    assert cache.write_next() and not cache.write_next()
    inode = next(tmp_path.iterdir()).stat().st_ino
    other = files(tmp_path)
    assert other.put(name(1), state(1)) and next(tmp_path.iterdir()).stat().st_ino == inode


def test_a_write_that_fails_is_tried_again_at_the_next_idle_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = VersionCache(MUCH, files(tmp_path))
    cache.put(name(1), state(1), 1, [name(1)])

    def no_space(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        assert not cache.write_next()
    assert entries(tmp_path) == [] and cache.get(name(1)) is not None
    assert cache.write_next()
