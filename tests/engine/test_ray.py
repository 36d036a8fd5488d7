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
from server import free_port

from tests.support.documentation import ROOT
from tests.support.engines import CHAT_TEMPLATE, wait_until

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


# Run in a process of its own, which starts Ray, serves, asks, and prints the answers.
SERVE = """
import json, sys
import httpx, ray, yaml
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app

arguments = yaml.safe_load(open("examples/ray_serve.yaml"))["applications"][0]["args"]["llm_configs"][0]
arguments["engine_kwargs"]["additional_config"]["longctx"]["serving"]["default_max_tokens"] = 6
arguments["engine_kwargs"] |= {"kv_cache_memory_bytes": 100_000_000, "chat_template": sys.argv[3]}
ray.init(num_cpus=4)  # of Ray's own counting
serve.start(http_options={"port": int(sys.argv[1])})
serve.run(build_openai_app({"llm_configs": [LLMConfig(**arguments)]}))
for more in json.loads(sys.argv[2]):
    body = {"model": "booklm", "ignore_eos": True, **more}
    route = "chat/completions" if "messages" in body else "completions"
    answer = httpx.post(f"http://127.0.0.1:{sys.argv[1]}/v1/{route}", json=body, timeout=300)
    print("ANSWER", json.dumps([answer.status_code, answer.json()]), flush=True)
serve.shutdown()
"""


def test_ray_serve_has_the_checks_and_limits_of_a_server() -> None:
    pytest.importorskip("ray.serve.llm")
    chat = {"messages": [{"role": "user", "content": "a b c"}]}
    asked = [
        chat,  # a completion without a limit writes 16 tokens, here and in vLLM
        {**chat, "max_tokens": 9},
        {"prompt": [5] * 3000, "max_tokens": 3},
        {**chat, "vllm_xargs": {"longctx": '{"temp_lora": true}'}},
        {**chat, "longctx": {"temp_lora": True}},
    ]
    command = [sys.executable, "-c", SERVE, str(free_port()), json.dumps(asked), CHAT_TEMPLATE]
    done = subprocess.run(command, env=QUIET, cwd=ROOT, capture_output=True, text=True, timeout=900)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert len(lines) == len(asked), done.stderr[-3000:]
    answers = [json.loads(line.removeprefix("ANSWER ")) for line in lines]
    assert [status for status, _ in answers] == [200, 200, 200, 400, 400]
    assert [body["usage"]["completion_tokens"] for _, body in answers[:3]] == [6, 9, 3]
    assert "this engine was started without adaptation" in str(answers[3])
    assert "options of ours stand in vllm_xargs" in str(answers[4])
