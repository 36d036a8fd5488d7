"""Whether the programs of benchmarks/ take the words of commands.

In a process of its own, since loading one has effects:

    python -m tests.support.benchmark_options < COMMANDS.json > COMPLAINTS.json

Commands are lists of words, the first a path from the repository's root; a complaint is a text, or null.
"""

import importlib.util
import json
import sys
from types import ModuleType

import typer
from typer.main import get_command

from tests.support.documentation import ROOT, parse_options


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.removesuffix(".py").replace("/", "_"), ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def complaint(words: list[str]) -> str | None:
    try:
        module = load(words[0])
        app = typer.Typer()
        if not hasattr(module, "app"):
            app.command()(module.main)
        parse_options(get_command(getattr(module, "app", app)), words[1:])
    except Exception as e:
        return repr(e)
    return None


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "gpu")]
    print(json.dumps([complaint(words) for words in json.load(sys.stdin)]))
