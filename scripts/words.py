"""Extract the project's docstrings, comments and pages, and count words in them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FOLDERS = ("moeflux_mlx", "models", "kernels", "scripts", "tests", "docs", ".github")
SOURCES = {".py": "#", ".metal": "//", ".h": "//", "": "#"}
OF = re.compile(r"(?:^|[.:;!?]\s+|\|\s*)(Of\s[^.]*)")
WHAT = re.compile(r"\bwhat\b", re.IGNORECASE)


class Text(NamedTuple):
    """One docstring, block of comments or paragraph of a page."""

    path: str
    line: int
    kind: str
    text: str

    @property
    def n_words(self) -> int:
        """The number of words."""
        return len(re.findall(r"[A-Za-z']+", self.text))

    @property
    def n_what(self) -> int:
        """The number of times that ``what`` occurs."""
        return len(WHAT.findall(self.text))

    @property
    def begins_with_of(self) -> list[str]:
        """The sentences that begin with ``Of``."""
        return OF.findall(self.text)


def texts(root: Path) -> Iterator[Text]:
    """Yield every text in a working tree."""
    pages = sorted(root.glob("*.md"))
    files = [p for name in FOLDERS for p in sorted((root / name).rglob("*"))]
    for path in pages + files:
        if not path.is_file() or "__pycache__" in path.parts:
            continue
        name = path.relative_to(root).as_posix()
        if path.suffix == ".md":
            for line, text in _paragraphs(path.read_text()):
                yield Text(name, line, "page", text)
        elif path.suffix in SOURCES:
            yield from _of_source(name, path)


def _of_source(name: str, path: Path) -> Iterator[Text]:
    source = path.read_text(errors="replace")
    if path.suffix == ".py" or source.startswith("#!/usr/bin/env python"):
        for node in ast.walk(ast.parse(source)):
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                yield Text(name, getattr(node, "lineno", 1), "docstring", text)
    for line, text in _comments(source, SOURCES[path.suffix]):
        yield Text(name, line, "comment", text)


def _comments(source: str, mark: str) -> Iterator[tuple[int, str]]:
    """Yield each block of whole-line comments as one text."""
    block: list[str] = []
    for i, line in enumerate([*source.splitlines(), ""]):
        found = re.match(rf"\s*{mark}(?!!) ?(.*)", line)
        if found:
            block.append(found[1])
        elif block:
            yield i + 1 - len(block), " ".join(block)
            block = []


def _paragraphs(page: str) -> Iterator[tuple[int, str]]:
    """Yield a page's paragraphs and table rows, without code."""
    page = re.sub(
        r"```.*?```", lambda m: "\n" * m[0].count("\n"), page, flags=re.DOTALL
    )
    block: list[str] = []
    for i, line in enumerate([*page.splitlines(), ""]):
        if line.strip() and not line.startswith("|"):
            block.append(line.strip())
            continue
        if block:
            yield i + 1 - len(block), " ".join(block)
            block = []
        if line.startswith("|"):
            yield i + 1, line
