"""Texts to read: the files of a directory, or the Python documentation topics that are on every machine."""

import pydoc_data.topics
from pathlib import Path


def python_topics() -> str:
    """The language reference as plain text, about 173,000 tokens of booklm."""
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))


def read_all(directory: Path | None) -> dict[str, str]:
    """Texts by name: every .txt file of a directory if one is given, and the Python topics."""
    files = [] if directory is None else sorted(directory.glob("*.txt"))
    if directory is not None and not files:
        raise SystemExit(f"{directory} holds no .txt files")
    texts = {f.stem: f.read_text(encoding="utf-8", errors="replace") for f in files}
    return {**texts, "python topics": python_topics()}
