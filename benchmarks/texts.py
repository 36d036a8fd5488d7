"""Texts to read: the files of a directory, or manuals that are on every machine."""

import inspect
import pydoc_data.topics
from pathlib import Path


def python_topics() -> str:
    """The language reference as plain text, about 173,000 tokens of booklm."""
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))


def torch_functions() -> str:
    """What torch says of its functions, about 280,000 tokens of booklm."""
    import torch

    functions = {name: value for name, value in vars(torch).items() if inspect.isroutine(value)}
    documented = {name: text for name, value in functions.items() if (text := inspect.getdoc(value))}
    return "\n\n".join(f"torch.{name}\n{documented[name]}" for name in sorted(documented))


def read_directory(directory: Path) -> dict[str, str]:
    """Every .txt file's text by name."""
    files = sorted(directory.glob("*.txt"))
    if not files:
        raise SystemExit(f"{directory} holds no .txt files; give a directory with one text per .txt file")
    return {f.stem: f.read_text(encoding="utf-8", errors="replace") for f in files}


def read_all(directory: Path | None) -> dict[str, str]:
    """Texts by name: every .txt file of a directory if one is given, and the Python topics."""
    return {**({} if directory is None else read_directory(directory)), "python topics": python_topics()}
