"""MkDocs hooks: files outside of docs/ that pages link to are part of the site, under their path in the
repository.
"""

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).parents[1]
DOCS = "docs/"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def path_of(file: File) -> str:
    """Its path in the repository."""
    return normpath(relpath(str(file.abs_src_path), REPOSITORY.as_posix()))


def links(markdown: str, path: str) -> set[str]:
    """Paths in the repository of what a page links to."""
    return {normpath(join(dirname(path), link)) for link in LINK.findall(markdown)}


def on_files(files: Files, config: Any) -> Files:
    pending = [path_of(file) for file in files.documentation_pages()]
    known = set(pending)
    for path in pending:
        for target in links((REPOSITORY / path).read_text(encoding="utf-8"), path) - known:
            if (REPOSITORY / target).is_file() and not target.startswith(DOCS):
                known.add(target)
                files.append(File.generated(config, target, abs_src_path=str(REPOSITORY / target)))
                if target.endswith(".md"):
                    pending.append(target)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are in the site, where docs/ is the root."""
    path = path_of(page.file)
    here = dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = normpath(join(dirname(path), match[1]))
        return relpath(target.removeprefix(DOCS), here or ".")

    return LINK.sub(moved, markdown)
