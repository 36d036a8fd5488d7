"""examples/ray_corpus.py on a cluster of Ray's on this machine, and Ray Serve LLM."""

import json
import os
import pydoc_data.topics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.support.documentation import ROOT
from tests.support.engines import wait_until

pytest.importorskip("ray", reason="needs Ray (pip install --no-deps -r requirements/ray.txt)")
pytestmark = [pytest.mark.slow, pytest.mark.alone]

BOOKS = 6
QUIET = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
ENGINE = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 100_000_000, "max_num_seqs": 4}


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("books")
    texts = sorted(pydoc_data.topics.topics.values(), key=len)[-BOOKS:]
    for number, text in enumerate(texts):
        (directory / f"book-{number}.txt").write_text(text[:12_000])
    return directory


@contextmanager
def reading(books: Path, out: Path, log: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, ROOT / "examples" / "ray_corpus.py", books, out, "--at-once", "1", *words]
    with log.open("w") as file:
        program = subprocess.Popen(
            [*command, "--engine", json.dumps(ENGINE)], stdout=file, stderr=file, env=QUIET
        )
    try:
        yield program
    finally:
        program.terminate()
        program.wait(60)


def actors(program: subprocess.Popen[bytes]) -> list[psutil.Process]:
    children = psutil.Process(program.pid).children(recursive=True)
    return [child for child in children if "MapWorker" in " ".join(child.cmdline())]


def written(out: Path) -> dict[str, int]:
    """When each result was."""
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.json")}


def test_a_killed_actors_books_are_read_again_and_none_twice(books: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    cores = len(os.sched_getaffinity(0))
    with reading(books, out, log, "--actors", str(min(cores, 2)), "--write", "5") as program:
        wait_until(lambda: bool(written(out)) or program.poll() is not None, 600)
        before = written(out)
        assert before and len(before) < BOOKS, log.read_text()[-3000:]
        actors(program)[0].kill()
        assert program.wait(900) == 0, log.read_text()[-3000:]
    after = written(out)
    assert len(after) == BOOKS and all(after[name] == at for name, at in before.items())
    assert f"{BOOKS} books, " in log.read_text()
    for path in out.glob("*.json"):
        result = json.loads(path.read_text())
        assert 2 < result["nll"] < 6 and result["tokens"] > 1000 and result["written"]
    with reading(books, out, log, "--actors", "1") as program:  # without an engine
        assert program.wait(120) == 0
    assert f"{BOOKS} of {BOOKS} books are done" in log.read_text()
    assert written(out) == after


def test_adapters_are_saved(books: Path, tmp_path: Path) -> None:
    few, out = tmp_path / "few", tmp_path / "out"
    few.mkdir()
    (few / "book-0.txt").write_text((books / "book-0.txt").read_text()[:3000])
    with reading(few, out, tmp_path / "log", "--preset", "temp-lora-quality") as program:
        assert program.wait(900) == 0, (tmp_path / "log").read_text()[-3000:]
    assert json.loads((out / "book-0.json").read_text())["adapter"] == "book-0"
    assert (out / "adapters" / "book-0" / "adapter_model.safetensors").is_file()
