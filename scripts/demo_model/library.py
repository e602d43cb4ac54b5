"""Read the standard library: its files, its functions, and chats made of them."""

import ast
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

from .settings import HELD_OUT_ONE_IN

SKIPPED_FOLDERS = {"site-packages", "__pycache__"}
# Generated tables and reference prose, which no person wrote as code.
SKIPPED_NAMES = ("encodings/", "pydoc_data/", "_sysconfigdata", "config-")


def standard_library_files(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (relative path, text) of every distinct file that parses as Python."""
    seen = set()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if SKIPPED_FOLDERS & set(path.parts) or name.startswith(SKIPPED_NAMES):
            continue
        text = read_python(path)
        if text is None or is_a_table(text):
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            yield name, text


def read_python(path: Path) -> str | None:
    """Return the file's text with plain newlines, or None if it is not Python 3."""
    try:
        text = path.read_text(encoding="utf-8").replace("\r\n", "\n").strip()
        tree = ast.parse(text)
    except (UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
        return None
    return text + "\n" if tree.body else None


def is_a_table(text: str) -> bool:
    """Tell whether a text has so few letters that it must be data."""
    visible = [character for character in text if not character.isspace()]
    letters = sum("a" <= character.lower() <= "z" for character in visible)
    return letters < 0.55 * len(visible)


def is_held_out(name: str) -> bool:
    """Choose the held-out files by the hash of their path alone."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def is_test(name: str) -> bool:
    """Tell whether a file belongs to the standard library's own tests."""
    return bool({"test", "tests", "idle_test"} & set(name.split("/")))


def conversations(text: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield (question, answer): a docstring or a beginning, and the function."""
    for name, source, sentence in functions(text):
        if sentence and 10 <= len(sentence) <= 200:
            asked = rng.choice(
                [
                    f"{sentence}.",
                    f"Write a Python function. {sentence}.",
                    f"Write a Python function named {name}. {sentence}.",
                ]
            )
            yield asked, source
        elif rng.random() < 0.3:
            first_line = source.split("\n")[0]
            yield rng.choice(["def ", f"def {name}(", first_line]), source


def functions(text: str) -> Iterator[tuple[str, str, str | None]]:
    """Yield (name, dedented source, first docstring sentence) of functions."""
    lines = text.split("\n")
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef) or node.decorator_list:
            continue
        block = lines[node.lineno - 1 : node.end_lineno]
        if not 3 <= len(block) <= 50:
            continue
        source = "\n".join(remove_indent(line, node.col_offset) for line in block)
        docstring = ast.get_docstring(node) or ""
        sentence = " ".join(docstring.split("\n\n")[0].split())
        yield node.name, source, sentence.partition(". ")[0].rstrip(".") or None


def remove_indent(line: str, indent: int) -> str:
    """Drop up to `indent` leading blanks of a line."""
    return line[min(indent, len(line) - len(line.lstrip())) :]
