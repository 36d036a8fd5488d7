"""Directories that are on disk as a whole, or not at all: not even a loss of power leaves half of one."""

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's fcntl.h and fs.h
NEW_S = 60.0


@contextmanager
def whole_directory(path: Path, prefix: str) -> Iterator[Path]:
    """A directory to be filled, which at the end of the `with` takes the place of `path`, whatever that was,
    in one step.

    Returns once all of it is on disk. Raises OSError; then, or if the `with` raises, `path` is what it was.
    prefix: of names beside `path` that are in use meanwhile; what a process that was killed has left under
    such a name is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{prefix}*"):
        _remove_if_left(left)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent) as temporary, _opened(temporary) as fd:
        with suppress(OSError):  # NFS has no locks of directories; what is left there is not removed
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new = Path(temporary, "new")
        new.mkdir()
        yield new
        sync(new)
        _put(new, path)
        _sync_one(path.parent)


def remove_directory(path: Path, prefix: str) -> None:
    """Remove a directory, which others see as a whole or not at all. Nothing if there is none.

    Raises OSError. prefix: as of `whole_directory`.
    """
    with (
        tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent) as temporary,
        suppress(FileNotFoundError),
    ):
        path.rename(Path(temporary, "old"))


def sync(path: Path) -> None:
    """Wait until a file, or a directory and all that is in it, is on disk. Raises OSError."""
    for parent, _, files in os.walk(path):
        for name in files:
            _sync_one(Path(parent, name))
        _sync_one(Path(parent))
    if path.is_file():
        _sync_one(path)


def _sync_one(path: Path) -> None:
    with _opened(path) as fd:
        os.fsync(fd)


def _put(new: Path, path: Path) -> None:
    """path is what new was; what path was, if anything, is new."""
    if not os.path.lexists(path):
        new.rename(path)
        return
    try:
        _exchange(new, path)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOSYS):
            raise
        # Of a file system that cannot, as NFS. Killed right here, a process leaves the old one beside `path`.
        old = new.with_name("old")
        path.rename(old)
        new.rename(path)


def _exchange(one: Path, other: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))


@contextmanager
def _opened(path: str | Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def _remove_if_left(directory: Path) -> None:
    """If the process that had it locked has ended. One that is new may not be locked yet."""
    with suppress(OSError), _opened(directory) as fd:
        if time.time() - os.fstat(fd).st_mtime > NEW_S:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
