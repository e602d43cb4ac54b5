"""Cut Metal text into declarations, without comments but with line numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ...errors import KernelError

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_IDENTIFIER = re.compile(r"\b[A-Za-z_]\w*")
_DIRECTIVES = ("include", "pragma", "define")


@dataclass(frozen=True)
class Place:
    """A line of a file, for errors."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    def error(self, message: str) -> KernelError:
        """Return the error to raise about this line."""
        return KernelError(f"[{self}] {message}")


@dataclass(frozen=True)
class Declaration:
    """A top-level declaration: its text without comments, and the name it declares.

    ``kind`` is ``function``, ``kernel``, ``type``, ``value``, ``macro``, ``include`` or
    ``using``.
    """

    kind: str
    name: str
    text: str
    place: Place

    @property
    def identifiers(self) -> frozenset[str]:
        """Every identifier in the text."""
        return frozenset(_IDENTIFIER.findall(self.text))


def without_comments(text: str) -> str:
    """Replace comments by spaces, so that lines and columns stay the same."""
    return _COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)


def compact(text: str) -> str:
    """Fold runs of spaces and drop empty lines, which no compiler sees."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "".join(f"{line}\n" for line in lines if line)


def declarations(path: Path) -> list[Declaration]:
    """Cut a ``.metal`` or ``.h`` file into its top-level declarations.

    Raises:
        KernelError: a declaration cannot be parsed; names file and line.
    """
    text = without_comments(path.read_text())
    found, start = [], 0
    while (begin := _skip_space(text, start)) < len(text):
        place = Place(path.name, text.count("\n", 0, begin) + 1)
        if text[begin] == "#":
            start = _end_of_directive(text, begin)
            item = _directive(text[begin:start], place)
        else:
            start = _end_of_declaration(text, begin, place)
            item = _declaration(text[begin:start], place)
        if item is not None:
            found.append(item)
    return found


def _skip_space(text: str, start: int) -> int:
    while start < len(text) and text[start].isspace():
        start += 1
    return start


def _end_of_directive(text: str, begin: int) -> int:
    end = begin
    while True:
        end = text.find("\n", end)
        if end < 0:
            return len(text)
        if text[end - 1] != "\\":
            return end
        end += 1


def _end_of_declaration(text: str, begin: int, place: Place) -> int:
    """Return the end of a declaration: after its ``;`` or its function's ``}``."""
    depth = 0
    for i in range(begin, len(text)):
        c = text[i]
        if c in "({[":
            depth += 1
        elif c in ")}]":
            depth -= 1
            if c == "}" and depth == 0 and _is_function(text[begin:i]):
                return i + 1
        elif c == ";" and depth == 0:
            return i + 1
    raise place.error("expected a declaration that ends but reached the end of file")


_FUNCTION_HEAD = re.compile(r"\)\s*(?:const\s*|\[\[[^\]]*\]\]\s*)*$")


def _is_function(text: str) -> bool:
    """Return whether a braced text is a function: its head ends in ``)``."""
    return _FUNCTION_HEAD.search(text[: text.index("{")]) is not None


def _directive(text: str, place: Place) -> Declaration | None:
    got = text.strip()
    words = got[1:].split(None, 2)
    if not words or words[0] not in _DIRECTIVES:
        raise place.error(f"expected #include, #pragma once or #define but got {got!r}")
    if words[0] == "pragma":
        if words[1:] != ["once"]:
            raise place.error(f"expected #pragma once but got {got!r}")
        return None
    if words[0] == "include":
        if len(words) != 2 or not re.fullmatch(r'<[\w./]+>|"[\w./]+"', words[1]):
            raise place.error(f"expected one file to include but got {got!r}")
        return Declaration("include", words[1], text, place)
    name = _IDENTIFIER.match(words[1]) if len(words) > 1 else None
    if name is None:
        raise place.error(f"expected a name after #define but got {got!r}")
    return Declaration("macro", name[0], text, place)


_NAME_RULES = (
    ("using", r"using\s+namespace\s+(\w+)\s*;"),
    ("type", r"using\s+(\w+)\s*="),
    ("type", r"(?:struct|enum\s+class|union)\s+(\w+)\s*(?:<[^{;]*>\s*)?[:{]"),
    ("type", r"typedef\s.*?(\w+)\s*;"),
    ("kernel", r"(?:\[\[\s*kernel\s*\]\]\s*|kernel\s+)void\s+(\w+)\s*\("),
    ("value", r"(?:constant|constexpr|static|inline|const)\b[^({;]*?(\w+)\s*(?:\[|=)"),
    ("function", r"(?:[\w:<>,&*\s]|\[\[[^\]]*\]\])*?(\w+)\s*\("),
)


def _declaration(text: str, place: Place) -> Declaration:
    got = " ".join(text.split())[:60]
    try:
        head = without_template(text)
    except ValueError as error:
        raise place.error(f"expected a template's parameters: {error}") from None
    for kind, rule in _NAME_RULES:
        found = re.match(rule, head, re.S)
        if found:
            _check_declaration(kind, found, head, place)
            return Declaration(kind, found[1], text, place)
    raise place.error(f"expected a declaration but got {got!r}")


def _check_declaration(
    kind: str, found: re.Match[str], head: str, place: Place
) -> None:
    """Refuse a kernel or a value that would be silently ignored."""
    if kind == "function" and re.search(r"\bkernel\b", found[0]):
        got = " ".join(found[0].split())
        raise place.error(f"expected '[[kernel]] void name(' but got {got!r}")
    if kind == "value" and len(split_commas(head)) > 1:
        got = " ".join(head.split())[:60]
        raise place.error(f"expected one value a declaration but got {got!r}")


def without_template(text: str) -> str:
    """Return a declaration's text after its ``template <...>``, if any."""
    found = re.match(r"template\s*<", text)
    if not found:
        return text
    return text[matching(text, found.end() - 1, "<>") + 1 :].lstrip()


def matching(text: str, begin: int, pair: str) -> int:
    """Return the place of the bracket that closes the one at ``begin``."""
    depth = 0
    for i in range(begin, len(text)):
        depth += (text[i] == pair[0]) - (text[i] == pair[1])
        if depth == 0:
            return i
    raise ValueError(f"no {pair[1]!r} closes {text[begin : begin + 40]!r}")


def split_commas(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth, begin = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{<") - (c in ")]}>")
        if c == "," and depth == 0:
            parts.append(text[begin:i])
            begin = i + 1
    parts.append(text[begin:])
    return [part for part in parts if part.strip()]
