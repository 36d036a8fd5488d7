"""Trained versions on disk, under their addresses: they outlive the trainer, and engines can share them.

An entry is a directory with the tensors as safetensors, and a JSON that says whose they are and what they
must be. It is there as a whole or not at all. Nothing of an entry is used that its checksum does not confirm.
"""

import json
import logging
import os
import platform
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from vllm_longctx.files import remove_directory, whole_directory
from vllm_longctx.trainer.trainer import State

logger = logging.getLogger("longctx.trainer")  # vLLM's is not loaded here; warnings go to standard error

TENSORS, ABOUT = "version.safetensors", "version.json"
PREFIX = ".writing-"  # no entry's name begins with a dot
NAME_BYTES, ABOUT_BYTES = 200, 2000  # what an entry has beside each tensor, and in its JSON
ENTRY = re.compile(r"([0-9a-f]{64})-([0-9a-f]{16})")  # an address, and who has trained it


@dataclass(frozen=True)
class Entry:
    """used: When it was last used, in ns. nbytes: Of its files."""

    path: Path
    used: int
    nbytes: int


def trained_by(device: torch.device) -> str:
    """Names all that decides a version beside its address: what trains elsewhere is not equal to the last
    bit.
    """
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability()
    made = [f"{package} {version(package)}" for package in ("vllm-longctx", "torch", "transformers", "peft")]
    return ", ".join([*made, platform.machine(), name])


def file_bytes(state: State) -> int:
    """What an entry takes, at most."""
    return state.nbytes + NAME_BYTES * len(state.tensors) + ABOUT_BYTES


class VersionFiles:
    """A directory of versions, which several trainers may use at once. The least recently used goes first.

    directory: It is made.
    limit: Bytes of all entries together. Trainers that write at the same time may exceed it by one entry
        each.
    trainer: See `trained_by`. Entries of others are never read, but count, and go like any.

    addresses: Of the entries for this trainer, when `refresh` last looked.
    """

    def __init__(self, directory: Path, limit: int, trainer: str):
        self._directory, self._limit, self._trainer = directory, limit, trainer
        self._suffix = blake2b(trainer.encode(), digest_size=8).hexdigest()
        self._strange: set[str] = set()
        self._seen_at: int | None = None
        self._fails = False
        self.addresses: set[bytes] = set()
        with suppress(OSError):  # then there is nothing, and each write says why
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def refresh(self) -> tuple[set[bytes], set[bytes]]:
        """Look for entries that came or went, whoever wrote them. Returns their addresses: new, and gone."""
        before = self.addresses
        try:
            changed_at = self._directory.stat().st_mtime_ns
            if changed_at != self._seen_at:
                found = [match for name in os.listdir(self._directory) if (match := self._match(name))]
                self.addresses = {bytes.fromhex(m[1]) for m in found if m[2] == self._suffix}
                is_settled = time.time_ns() - changed_at > 10**9  # else it may change and look the same
                self._seen_at = changed_at if is_settled else None
        except OSError:
            self.addresses = set()
        return self.addresses - before, before - self.addresses

    def _match(self, name: str) -> re.Match[str] | None:
        match = ENTRY.fullmatch(name)
        if match is None and not name.startswith(".") and name not in self._strange:
            self._strange.add(name)
            self._skip(self._directory / name, "it is no version")
        return match

    def has(self, address: bytes) -> bool:
        return self._path(address).is_dir()

    def get(self, address: bytes) -> State | None:
        """None for what is not there, or is not what was written. What is damaged is removed."""
        path = self._path(address)
        try:
            about = json.loads((path / ABOUT).read_bytes())
            content = (path / TENSORS).read_bytes()
            owned = {"address": address.hex(), "trainer": self._trainer}
            if not isinstance(about, dict) or {key: about.get(key) for key in owned} != owned:
                raise ValueError("it is of another version or trainer")
            if blake2b(content, digest_size=32).hexdigest() != about.get("checksum"):
                raise ValueError("its checksum differs")
            state = State.of(load(content))
            os.utime(path)
        except FileNotFoundError as e:
            if self.has(address):  # else it has gone, by another trainer perhaps
                self.remove(address, f"it lacks {Path(e.filename).name}")
            return None
        except (OSError, MemoryError) as e:
            self._skip(path, str(e))
            return None
        except (ValueError, KeyError, IndexError, RecursionError, SafetensorError) as e:
            self.remove(address, str(e))
            return None
        return state

    def put(self, address: bytes, state: State) -> bool:
        """Write a version, unless it is there. False if it cannot be written.

        The log says why, once until the next one is written.
        """
        path = self._path(address)
        try:
            if self.has(address):
                return True
            if (needed := file_bytes(state)) > self._limit:
                raise OSError(f"it has {needed} bytes, more than adaptation.cache_dir_gib")
            self._make_room(needed)
            with whole_directory(path, PREFIX) as new:
                save_file(state.tensors, new / TENSORS)
                checksum = blake2b((new / TENSORS).read_bytes(), digest_size=32).hexdigest()
                about = {"address": address.hex(), "trainer": self._trainer, "checksum": checksum}
                (new / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
        except (OSError, SafetensorError, MemoryError) as e:  # a full disk is either of the first two
            if not self._fails:
                logger.warning("longctx: a version is not kept in %s: %s", self._directory, e)
            self._fails = True
            return False
        self._fails = False
        return True

    def remove(self, address: bytes, reason: str) -> None:
        """Of a version that cannot be used. reason: For the log."""
        path = self._path(address)
        self._skip(path, reason)
        with suppress(OSError):
            remove_directory(path, PREFIX)

    def _make_room(self, nbytes: int) -> None:
        """Remove the least recently used until so many bytes fit."""
        entries = sorted(self._entries(), key=lambda entry: entry.used)
        excess = sum(entry.nbytes for entry in entries) + nbytes - self._limit
        for entry in entries:
            if excess <= 0:
                return
            remove_directory(entry.path, PREFIX)
            excess -= entry.nbytes

    def _entries(self) -> list[Entry]:
        entries = []
        for name in os.listdir(self._directory):
            if ENTRY.fullmatch(name):
                path = self._directory / name
                with suppress(OSError):  # gone, by another trainer
                    used = path.stat().st_mtime_ns
                    entries.append(Entry(path, used, sum(f.stat().st_size for f in path.iterdir())))
        return entries

    def _path(self, address: bytes) -> Path:
        return self._directory / f"{address.hex()}-{self._suffix}"

    def _skip(self, path: Path, reason: str) -> None:
        logger.warning("longctx: skipped %s among remembered versions: %s", path, reason)
