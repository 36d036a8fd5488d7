"""What pages say of the code: modes, roles and rooms, and the names of files, classes, keys and metrics."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from tests.support.documentation import FENCE, PAGES, ROOT
from vllm_longctx import metrics
from vllm_longctx.config import (
    OF_ATTENTION,
    AdaptationSection,
    AttentionSection,
    RequestOptions,
    ServingSection,
    TrainerSection,
)
from vllm_longctx.modes import BACKENDS, MODES

PACKAGE = ROOT / "vllm_longctx"
ARCHITECTURE = ROOT / "docs" / "design" / "architecture.md"
OF_CODE = [
    *sorted((ROOT / "docs" / "design").glob("*.md")),
    ROOT / "CONTRIBUTING.md",
    ROOT / "patches" / "README.md",
]
SECTIONS: dict[str, type[BaseModel]] = {
    "attention": AttentionSection,
    "adaptation": AdaptationSection,
    "adaptation.trainer": TrainerSection,
    "trainer": TrainerSection,
    "serving": ServingSection,
}


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def rows(page: Path, first_column: str) -> Iterator[list[str]]:
    """The cells of each row of the table whose first column has this name."""
    tables = prose(page).split("\n\n")
    (table,) = [table for table in tables if table.startswith(f"| {first_column} |")]
    for line in table.splitlines()[2:]:
        yield [cell.strip() for cell in line.split("|")[1:-1]]


def words(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_the_table_of_modes_is_that_of_the_code() -> None:
    shown = {
        name: (scheduler, layers, runner) for name, scheduler, layers, runner in rows(ARCHITECTURE, "mode")
    }
    assert list(shown) == [mode.name for mode in MODES]
    for mode in MODES:
        scheduler, runner = (path.rpartition(".")[2] for path in (mode.scheduler, mode.runner))
        layers = ", ".join(f"{role}: `{spec}`" for role, spec in mode.layers.items())
        ours = f"`{scheduler}`", layers, f"`{runner}`"
        assert shown[mode.name] == (("vLLM's",) * 3 if mode.is_plain else ours)


def test_the_table_of_roles_is_that_of_the_code() -> None:
    assert {role: words(backend) for role, _, backend in rows(ARCHITECTURE, "role")} == {
        str(role): [backend] for role, backend in BACKENDS.items()
    }


def rooms() -> list[set[str]]:
    """The rooms of each row, from the top of the table down."""
    return [{name.removesuffix("/") for name in words(names)} for names, _ in rows(ARCHITECTURE, "room")]


def room_of(module: str) -> str:
    return module.split(".")[1]


@functools.cache
def imports() -> set[tuple[str, str]]:
    """(room, room that it imports from)."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module == PACKAGE.name:
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                modules = [node.module]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            ours = [module for module in modules if module.startswith(f"{PACKAGE.name}.")]
            found |= {(room, room_of(module)) for module in ours if room_of(module) != "BOOKLM"}
    return found


def test_every_room_is_listed_once() -> None:
    modules = (path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file())
    there = {path.stem for path in modules}
    listed = [room for row in rooms() for room in sorted(row)]
    assert sorted(listed) == sorted(there - {"__init__"})


def test_rooms_import_from_their_own_row_and_below() -> None:
    level = {room: number for number, row in enumerate(rooms()) for room in row}
    assert not {(a, b) for a, b in imports() if level[a] > level[b]}
    assert not {("cpu", "cuda"), ("cuda", "cpu")} & imports()


def test_the_platforms_have_the_files_that_are_listed() -> None:
    listed = {name for files, _, _ in rows(ARCHITECTURE, "file") for name in words(files)}
    for platform in ("cpu", "cuda"):
        assert {path.stem for path in (PACKAGE / platform).glob("*.py")} - {"__init__"} == listed


@functools.cache
def sources() -> dict[str, str]:
    """The text of each file of ours, by its path with a slash in front."""
    folders = ("vllm_longctx", "tests", "docs", "benchmarks", "examples", "requirements")
    paths = [ROOT / "setup.py", *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    return {f"/{path.relative_to(ROOT)}": path.read_text(encoding="utf-8") for path in paths}


@pytest.mark.parametrize("page", OF_CODE, ids=lambda page: page.name)
def test_files_and_classes_that_are_named_are_there(page: Path) -> None:
    text = prose(page)
    for path in re.findall(r"`([\w./-]+\.py)`", text):
        assert any(name.endswith(f"/{path}") for name in sources()), path
    package = "\n".join(source for name, source in sources().items() if name.startswith("/vllm_longctx/"))
    for name in re.findall(r"`([A-Z]\w*[a-z]\w*[A-Z]\w*)`", text):  # CamelCase: a class
        assert re.search(rf"\b{name}\b", package), name


@pytest.mark.parametrize("page", OF_CODE, ids=lambda page: page.name)
def test_what_is_named_in_a_file_is_in_it(page: Path) -> None:
    """`a`, `b` and `c` in `file.py`."""
    for names, path in re.findall(r"((?:`[\w.]+`(?:, | and )?)+) in `([\w./]+\.py)`", prose(page)):
        text = "\n".join(source for name, source in sources().items() if name.endswith(f"/{path}"))
        for name in words(names):
            assert re.search(rf"\b{name.rpartition('.')[2]}\b", text), f"{name} in {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_keys_of_the_configuration_that_are_named_exist(page: Path) -> None:
    for section, key in re.findall(r"`((?:\w+\.)*\w+)\.(\w+)(?:: [^`]+)?`", prose(page)):
        if section in SECTIONS:
            assert key in SECTIONS[section].model_fields, f"{section}.{key}"


def test_options_of_a_request_are_all_on_the_pages_of_their_methods() -> None:
    def named(page: str, title: str) -> set[str]:
        section = prose(ROOT / "docs" / page).partition(f"## {title}\n")[2].partition("\n## ")[0]
        return set(words(section))

    options, of_attention = set(RequestOptions.model_fields), set(OF_ATTENTION)
    assert options - of_attention <= named("temp-lora.md", "What a request may set")
    chosen = "What a request may choose"
    assert of_attention <= named("lambda-attention.md", chosen) | named("memory.md", chosen)


def test_the_page_of_metrics_names_those_that_are_exported() -> None:
    exported = {
        prefix + suffix
        for kind, suffix in (("GAUGES", ""), ("COUNTERS", "_total"), ("HISTOGRAMS", ""))
        for group in ("", "MEMORY_", "ADAPTATION_")
        for prefix, *_ in getattr(metrics, group + kind, {}).values()
    }
    exported |= {"block_loss_before", "block_loss_after", "ignored_fields_total", "config_info"}
    page = prose(ROOT / "docs" / "metrics.md")
    lines = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    assert {name for line in lines for name in words(line)} == exported


def test_the_glossary_is_short() -> None:
    terms = [term for term, _ in rows(ROOT / "docs" / "glossary.md", "word")]
    assert terms == sorted(terms, key=lambda term: term.replace("Λ", "l").lower())
    assert len(terms) <= 22
