"""The project's Markdown pages: their code blocks, the commands in them, their links and headings."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in (
        "*.md",
        "docs/**/*.md",
        "examples/*.md",
        "benchmarks/**/*.md",
        "patches/*.md",
        "tests/*.md",
        "vllm_longctx/**/*.md",
    )
    for path in ROOT.glob(pattern)
)
FENCE = re.compile(r"(?:^<!-- (\w+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]+))?\)")
COMMANDS = "|".join(("make", "python", "pip", "vllm", "vllm-longctx"))
INLINE = re.compile(rf"`((?:{COMMANDS}) [^`]+)`")


def parse_options(command: Any, words: list[str]) -> dict[str, Any]:
    """Options as a command of click's would get them.

    Raises click's exceptions for words that it does not take.
    """
    if hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    return command.make_context(command.name, words).params


@dataclass(frozen=True)
class Block:
    """A fenced block.

    marker: of the comment `<!-- marker -->` in front of it; quick ones are run for real.
    """

    page: Path
    language: str
    text: str
    marker: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.text.strip().splitlines()[0][:60]}"


def blocks(page: Path) -> Iterator[Block]:
    for marker, language, text in FENCE.findall(page.read_text(encoding="utf-8")):
        yield Block(page, language, text, marker)


def commands(block: str) -> Iterator[list[str]]:
    """The words of each command of a shell block; variables before a command and an `&` behind it are left
    out.
    """
    line = ""
    for part in block.splitlines():
        line += part.removesuffix("\\") + ("" if part.endswith("\\") else "\n")
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a quotation that goes on in the next line
            continue
        if part.endswith("\\"):
            continue
        line = ""
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        if words:
            yield words[:-1] if words[-1] == "&" else words


def inline_commands(page: Path) -> Iterator[list[str]]:
    """The words of each command in a page's prose, but for those that are only named, as `vllm run-batch`."""
    for text in INLINE.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        words = shlex.split(text)
        named = 3 if words[:2] == ["vllm", "bench"] else 2
        if "…" not in text and (len(words) > named or words[0] in ("make", "python")):
            yield words


def links(page: Path) -> Iterator[tuple[str, str]]:
    """(path, anchor) of each link to a file or a heading of the project."""
    yield from LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    words = (
        re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)) for heading in headings
    )
    return {word.strip().lower().replace(" ", "-") for word in words}
