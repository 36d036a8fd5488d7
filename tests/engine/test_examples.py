"""The programs of examples/ as a user runs them, against two servers, and the dashboard against what these
servers export.
"""

import contextlib
import json
import pydoc_data.topics
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server import running_server

from tests.support.documentation import ROOT, blocks, commands
from tests.support.example_programs import EXAMPLES, assert_that_a_chat_goes_on, run
from vllm_longctx import BOOKLM
from vllm_longctx.cli.passkey import tells

BOOKLM_MEMORY = ROOT / "benchmarks" / "booklm-memory"
TRAINED = 512
QUICK = ["--dtype", "float32", "--enforce-eager", "--max-num-batched-tokens", "512"]

pytestmark = [pytest.mark.slow, pytest.mark.alone]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def book(workplace: Path) -> Path:
    path = workplace / "book.txt"
    path.write_text(
        "".join(pydoc_data.topics.topics[name] for name in ("exprlists", "typesseq", "formatstrings"))[:9000]
    )
    return path


@pytest.fixture(scope="module")
def address(workplace: Path) -> Iterator[str]:
    """booklm with examples/serve.yaml, in a directory where it may keep adapters."""
    flags = [
        "--config",
        str(EXAMPLES / "serve.yaml"),
        "--chat-template",
        str(EXAMPLES / "chat.jinja"),
        *QUICK,
    ]
    flags += ["--kv-cache-memory-bytes", "100000000"]
    with contextlib.chdir(workplace), running_server(BOOKLM, workplace / "log", *flags) as address:
        yield address


@pytest.fixture(scope="module")
def memory_address(workplace: Path) -> Iterator[str]:
    """booklm-memory, its memory in a pool of its own."""
    flags = ["--longctx", json.dumps({"attention": {"method": "focused", "memory_limit_gib": 0.05}}), *QUICK]
    flags += ["--max-model-len", "4096", "--kv-cache-memory-bytes", "100000000"]
    with running_server(str(BOOKLM_MEMORY), workplace / "memory_log", *flags) as address:
        yield address


def test_a_chat_goes_on_past_the_trained_length(address: str, book: Path) -> None:
    assert_that_a_chat_goes_on(address, book.read_text(), TRAINED)


def test_a_book_is_remembered_and_written_on(address: str, book: Path, workplace: Path) -> None:
    shown = run("remember_a_book.py", address, str(book), "--name", "topics", "--max-tokens", "40")
    assert "the adapter is saved as 'topics'" in shown
    assert (workplace / "adapters" / "topics" / "adapter_config.json").is_file()
    assert len(shown.split("\n", 1)[1].strip()) > 40


def test_the_loss_of_a_text_falls_by_learning(address: str, book: Path) -> None:
    shown = run("score_a_text.py", address, str(book))
    rows = [line.split() for line in shown.splitlines()[1:]]
    plain, learned = ([float(row[column]) for row in rows] for column in (-2, -1))
    assert len(rows) == 5 and int(rows[-1][2].replace(",", "")) > 4 * TRAINED
    assert learned[-1] < plain[-1] - 0.1


def test_a_memory_answers_about_a_document(memory_address: str, workplace: Path) -> None:
    """The made-up manual of examples/README.md, and its question."""
    (block,) = [block for block in blocks(EXAMPLES / "README.md") if "manual.txt" in block.text]
    (_, *made, _, name), (_, program, _, question) = commands(block.text)
    manual = workplace / name
    manual.write_text(subprocess.run([sys.executable, *made], capture_output=True, text=True).stdout)
    shown = run(Path(program).name, memory_address, str(manual), question)
    read, answer = shown.removeprefix("[read ").split(" tokens]\n")
    (key,) = set(re.findall(r"\d{5}", manual.read_text()))
    assert int(read.replace(",", "")) > 3 * TRAINED
    assert tells(answer, key), shown


def exported(address: str) -> dict[str, set[str]]:
    """Labels by the name of a sample."""
    families = text_string_to_metric_families(httpx.get(f"{address}/metrics").text)
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def test_the_dashboard_asks_for_what_the_servers_export(address: str, memory_address: str) -> None:
    model = httpx.get(f"{address}/v1/models").json()["data"][0]["id"]
    body = {"model": model, "prompt": "a", "max_tokens": 1, "mx_tokens": 1}  # a field that vLLM ignores
    assert httpx.post(f"{address}/v1/completions", json=body, timeout=60).status_code == 200
    samples = exported(address) | exported(memory_address)
    panels = json.loads((EXAMPLES / "grafana.json").read_text())["panels"]
    targets = [target for panel in panels for target in panel["targets"]]
    asked = set()
    for target in targets:
        names = re.findall(r"vllm:\w+", target["expr"])
        labels = {label for by in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in by.split(", ")}
        labels |= set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        assert names and target["expr"].count("(") == target["expr"].count(")")
        for name in names:
            assert name in samples, target["expr"]
            assert labels <= samples[name], target
        asked |= set(names)
    ours = {name for name in samples if name.startswith("vllm:longctx_") and not name.endswith("_created")}
    assert stems(ours) == {name for name in stems(asked) if name.startswith("vllm:longctx_")}


def stems(names: Iterable[str]) -> set[str]:
    """Without what a histogram's samples have behind its name."""
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
