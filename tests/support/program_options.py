"""Whether the programs of benchmarks/ and examples/ take the words of commands.

Loading one has effects, so this is for a process of its own: a fork, which need not import vLLM again.
"""

import functools
import importlib.util
import io
import re
import runpy
import sys
from contextlib import redirect_stdout, suppress
from types import ModuleType

import typer
from typer.main import get_command

from tests.support.documentation import ROOT, parse_options


@functools.cache
def load(path: str) -> ModuleType:
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "gpu")]
    spec = importlib.util.spec_from_file_location(path.removesuffix(".py").replace("/", "_"), ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def shown_options(path: str) -> set[str]:
    """Of a program that is run, by its help."""
    sys.argv = [path, "--help"]
    with redirect_stdout(io.StringIO()) as shown, suppress(SystemExit):
        runpy.run_path(str(ROOT / path), run_name="__main__")
    return set(re.findall(r"--[\w-]+", shown.getvalue()))


def complaint(words: list[str]) -> str | None:
    """What a program says to a command, whose first word is its path from the repository's root; None if it
    takes it.
    """
    try:
        if words[0].startswith("examples/"):
            unknown = {word for word in words if word.startswith("--")} - shown_options(words[0])
            return f"{words[0]} has no {unknown}" if unknown else None
        module = load(words[0])
        app = typer.Typer()
        if not hasattr(module, "app"):
            app.command()(module.main)
        parse_options(get_command(getattr(module, "app", app)), words[1:])
    except Exception as e:
        return repr(e)
    return None
