"""What README and docs/ tell a reader to do: every command parses, every configuration is valid, every link
leads somewhere.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import msgspec
import pytest
import vllm
import yaml
from typer.main import get_command
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.cli.benchmark import main as bench
from vllm.entrypoints.cli.run_batch import RunBatchSubcommand
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.support import program_options
from tests.support.documentation import (
    PAGES,
    ROOT,
    Block,
    anchors,
    blocks,
    commands,
    inline_commands,
    links,
    parse_options,
)
from vllm_longctx import BOOKLM, plugin
from vllm_longctx.cli.engine import longctx_config
from vllm_longctx.cli.main import app
from vllm_longctx.config import KEY, LongContextConfig, RequestOptions
from vllm_longctx.serving.adapters import ROUTE
from vllm_longctx.temp_lora.messages import Options

BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in BLOCKS if block.language == "bash"]
PYTHON = [block for block in BLOCKS if block.language == "python"]
DATA = [block for block in BLOCKS if block.language in ("json", "yaml")]
PROGRAMS = ("benchmarks/", "examples/")


@pytest.fixture(scope="module")
def vllm_parser() -> argparse.ArgumentParser:
    """That of the command `vllm`, with the plugin's flags."""
    plugin.register()
    parser = FlexibleArgumentParser()
    subparsers = parser.add_subparsers(dest="subparser")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["vllm", "bench"])  # or vLLM leaves out the commands below `bench`
        for command in (ServeSubcommand(), RunBatchSubcommand(), *bench.cmd_init()):
            command.subparser_init(subparsers)
    return parser


def parsed(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """Raises ValueError with the parser's own message instead of ending the process."""
    complaints: list[str] = []
    parsers = [parser]
    for one in parsers:
        one.error = complaints.append  # type: ignore[method-assign,assignment]
        subparsers = (a for a in one._actions if isinstance(a, argparse._SubParsersAction))
        parsers += [
            choice for action in subparsers for choice in action.choices.values() if choice not in parsers
        ]
    found = parser.parse_args(words)
    if complaints:
        raise ValueError(complaints[0])
    return found


def check_vllm(words: list[str], parser: argparse.ArgumentParser) -> None:
    parsed(parser, words[1:])


def check_longctx(words: list[str]) -> None:
    options = parse_options(get_command(app), words[1:])
    if "preset" in options:
        longctx_config(options["longctx"], options["preset"])


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, f"there is no {path}"
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def check_python(words: list[str]) -> None:
    if words[1:3] == ["-m", "vllm_longctx.trainer.sidecar"]:
        msgspec.json.decode(words[3], type=Options)
        return
    if words[1] in ("-c", "-m"):
        return
    path = ROOT / words[1]
    assert path.is_file(), f"there is no {words[1]}"
    if words[1].startswith(PROGRAMS):
        assert (complaint := complaints()[tuple(words[1:])]) is None, complaint


@functools.cache
def complaints() -> dict[tuple[str, ...], str | None]:
    """What the programs of benchmarks/ and examples/ say to each command on any page."""
    every = [words for block in SHELL for words in commands(block.text)]
    every += [words for page in PAGES for words in inline_commands(page)]
    asked = [words[1:] for words in every if words[0] == "python" and words[1].startswith(PROGRAMS)]
    with multiprocessing.get_context("fork").Pool(1, os.chdir, (ROOT,)) as pool:
        said = pool.map(program_options.complaint, asked)
    return dict(zip(map(tuple, asked), said, strict=True))


def check_make(words: list[str]) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = [word for word in words[1:] if "=" not in word]
    assert asked and set(asked) <= targets, f"make has no {set(asked) - targets}"


def check_pip(words: list[str]) -> None:
    """What is installed from the checkout is there."""
    assert words[1] in ("install", "download", "wheel", "show", "freeze"), words
    for word in words[2:]:
        if word.startswith("./") or word.startswith("requirements/"):
            assert (ROOT / word).exists(), f"there is no {word}"


def check_curl(words: list[str]) -> None:
    if any(ROUTE in word for word in words):
        fields = {word.partition("=")[0] for flag, word in itertools.pairwise(words) if flag == "-F"}
        assert fields == ({"config", "weights"} if "PUT" in words else set())
        return
    body = json.loads(words[words.index("-d") + 1])
    if KEY in body.get("vllm_xargs", {}):
        RequestOptions.parse(body["vllm_xargs"][KEY])


def check_lm_eval(words: list[str]) -> None:
    check_config(json.loads(words[words.index("--model_args") + 1]))


def check_config(arguments: Mapping[str, Any]) -> None:
    LongContextConfig.parse(arguments["additional_config"][KEY])


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "vllm-longctx": check_longctx,
    "python": check_python,
    "make": check_make,
    "pip": check_pip,
    "curl": check_curl,
    "lm_eval": check_lm_eval,
}
UNCHECKED = ("source", "export", "git", "python3.11", "cd")


def check(words: list[str], parser: argparse.ArgumentParser) -> None:
    name = Path(words[0]).name
    if name == "vllm":
        check_vllm(words, parser)
    elif name in CHECKS:
        CHECKS[name](words)
    else:
        assert name in (*UNCHECKED, "pytest", "ruff", "mypy"), f"nothing checks the command {name}"
        paths = [word for word in words[1:] if word.startswith(("tests/", "docs/"))]
        assert all((ROOT / path.split("::")[0]).exists() for path in paths), words


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_parse(
    block: Block, vllm_parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for words in commands(block.text):
        check(words, vllm_parser)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_prose_parse(page: Path, vllm_parser: argparse.ArgumentParser) -> None:
    for words in inline_commands(page):
        check(words, vllm_parser)


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_runs_up_to_the_engine(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the engine is real: arguments that it would refuse are refused here."""
    engine = MagicMock()
    engine.generate.return_value = [MagicMock(prompt_token_ids=[1])]

    def made(model: str, **arguments: Any) -> MagicMock:
        check_config(arguments)
        EngineArgs(model=BOOKLM if model == "MODEL" else model, **arguments)
        engine.llm_engine.vllm_config.additional_config = arguments["additional_config"]
        return engine

    sampling_params = vllm.SamplingParams

    def params(**arguments: Any) -> Any:
        RequestOptions.parse((arguments.get("extra_args") or {}).get(KEY, {}))
        return sampling_params(**arguments)

    monkeypatch.setattr(vllm, "LLM", made)
    monkeypatch.setattr(vllm, "SamplingParams", params)
    exec(compile(block.text, str(block), "exec"), {})


@pytest.mark.parametrize("block", DATA, ids=str)
def test_configurations_are_valid(block: Block) -> None:
    LongContextConfig.parse(yaml.safe_load(block.text)[KEY])


def test_the_configuration_of_the_examples_is_valid() -> None:
    LongContextConfig.parse(yaml.safe_load((ROOT / "examples" / "serve.yaml").read_text())[KEY])
    (application,) = yaml.safe_load((ROOT / "examples" / "ray_serve.yaml").read_text())["applications"]
    (llm,) = application["args"]["llm_configs"]
    engine = EngineArgs(model=BOOKLM, **llm["engine_kwargs"])
    LongContextConfig.parse(engine.additional_config[KEY])


def test_every_block_has_a_language_that_is_checked() -> None:
    assert {block.language for block in BLOCKS} <= {"bash", "python", "json", "yaml", "text"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and ROOT in (target, *target.parents), f"{path} is not there"
        assert not anchor or anchor in anchors(target), f"{target.name} has no heading {anchor}"


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120


def test_the_configuration_page_is_up_to_date() -> None:
    reference = load(ROOT / "docs" / "config_reference.py")
    text = reference.PAGE.read_text(encoding="utf-8")
    assert text == reference.page(text), "run: python docs/config_reference.py"


def test_the_picture_is_drawn_by_its_command(tmp_path: Path) -> None:
    load(ROOT / "docs" / "picture.py").main(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:24] == (ROOT / "docs" / "picture.png").read_bytes()[
        :24
    ]  # of one size


@pytest.mark.parametrize(
    "path", [p for p in sorted((ROOT / "examples").iterdir()) if p.suffix != ".md"], ids=lambda p: p.name
)
def test_examples_are_short(path: Path) -> None:
    most = 180 if path.name == "ray_corpus.py" else 60  # that one is a program to be run as it is
    assert len(path.read_text(encoding="utf-8").splitlines()) < most
