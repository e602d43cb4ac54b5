"""Metal text as tokens, functions and statements: a scan of any file.

``source.py`` reads our own kernels and refuses text that it cannot parse. The lint also
reads other people's files, so this scan never fails. It reads only the first branch of
an ``#if``: both branches together need not have matching braces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from .source import without_comments

_TOKEN = re.compile(
    r"""(?P<name>[A-Za-z_]\w*)
    |(?P<number>(?:0[xX][0-9a-fA-F']+|\.?\d(?:[eEpP][+-]|[\w.'])*)\w*)
    |(?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
    |(?P<mark>::|->|&&|\|\||\+\+|--|<<=|>>=|[-+*/%&|^=!<>]=|\S)""",
    re.X,
)
_DIRECTIVE = re.compile(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", re.M)
_QUALIFIERS = {"const", "device", "constant", "thread", "threadgroup", "noexcept"}
_OPEN, _CLOSE = "([{", ")]}"


class Token(NamedTuple):
    """One token; ``kind`` is ``name``, ``number``, ``string`` or ``mark``."""

    text: str
    kind: str
    line: int


Tokens = Sequence[Token]


@dataclass(frozen=True)
class Function:
    """A function with its body.

    ``head`` holds the tokens before its name, ``tail`` those between its parameters and
    its body.
    """

    name: Token
    template: Tokens
    head: Tokens
    parameters: tuple[Tokens, ...]
    tail: Tokens
    body: Tokens
    is_member: bool = False

    @property
    def is_kernel(self) -> bool:
        """Return whether the host launches it."""
        words = {t.text for t in self.head}
        return bool(words & {"kernel", "vertex", "fragment"})

    @property
    def type_parameters(self) -> tuple[str, ...]:
        """Names of the template's type parameters."""
        pairs = zip(self.template, self.template[1:], strict=False)
        return tuple(b.text for a, b in pairs if a.text in ("typename", "class"))


@dataclass
class Scan:
    """One file: its tokens, functions, and statements outside functions.

    ``program`` holds statements at program scope, ``members`` those within types.
    ``headers`` are the included files that were found.
    """

    tokens: list[Token] = field(default_factory=list)
    macros: list[Token] = field(default_factory=list)
    macro_names: set[str] = field(default_factory=set)
    includes: list[str] = field(default_factory=list)
    functions: list[Function] = field(default_factory=list)
    program: list[Tokens] = field(default_factory=list)
    members: list[Tokens] = field(default_factory=list)
    headers: list[Scan] = field(default_factory=list)

    @property
    def files(self) -> list[Scan]:
        """This file and its headers."""
        return [self, *self.headers]


def scan(text: str) -> Scan:
    """Scan Metal source."""
    result = Scan()
    text = _directives(without_comments(text), result)
    result.tokens = list(tokenize(text))
    _scope(result.tokens, 0, result, result.program)
    return result


def tokenize(text: str, line: int = 1) -> Iterator[Token]:
    """Cut text without comments into tokens."""
    at = 0
    for found in _TOKEN.finditer(text):
        line += text.count("\n", at, found.start())
        at = found.start()
        yield Token(found[0], str(found.lastgroup), line)


def _directives(text: str, result: Scan) -> str:
    """Remove directives, and all but the first branch of an ``#if``, from the text."""
    kept, at, branches = [], 0, ["taken"]
    for found in _DIRECTIVE.finditer(text):
        piece = text[at : found.start()]
        taken = all(branch == "taken" for branch in branches)
        kept.append(piece if taken else "\n" * piece.count("\n"))
        kept.append("\n" * found[0].count("\n"))
        at = found.end()
        words = found[0].strip()[1:].split(None, 2) or [""]
        if words[0].startswith("if"):
            branches.append("ahead" if words[1:] == ["0"] else "taken")
        elif words[0] in ("else", "elif"):
            branches[-1] = "taken" if branches[-1] == "ahead" else "behind"
        elif words[0] == "endif":
            branches = branches[:-1] or ["taken"]
        elif taken:
            _keep(words, found[0], text.count("\n", 0, found.start()) + 1, result)
    return "".join(kept) + text[at:]


def _keep(words: list[str], text: str, line: int, result: Scan) -> None:
    if words[0] == "include" and words[1:] and words[1].startswith('"'):
        result.includes.append(words[1].strip('"'))
    if words[0] == "define" and len(words) > 1:
        result.macro_names.add(words[1].split("(")[0])
        body = text[text.index(words[1]) + len(words[1]) :].replace("\\\n", " \n")
        result.macros += tokenize(body, line)


def _scope(
    tokens: Tokens, i: int, result: Scan, statements: list[Tokens], end: int = -1
) -> None:
    """Read declarations of a program, namespace or type from token ``i`` on."""
    end = len(tokens) if end < 0 else end
    begin = i
    while i < end:
        text = tokens[i].text
        if text == ";":
            statements.append(tokens[begin:i])
            begin = i = i + 1
        elif text == "{":
            closing = min(matching(tokens, i), end)
            if _braces(tokens, begin, i, closing, result):
                begin = closing + 1
            i = closing + 1
        elif text in "([":
            i = matching(tokens, i) + 1
        elif text in ("public", "private", "protected") and i + 1 < end:
            begin = i = i + 2
        else:
            i += 1


def _braces(tokens: Tokens, begin: int, i: int, closing: int, result: Scan) -> bool:
    """Read a block in braces; return whether the declaration ends with it."""
    template, first = _template(tokens, _after_macros(tokens, begin, i), i)
    head = tokens[first:i]
    words = [t.text for t in head]
    if "namespace" in words or words[:1] == ["extern"]:
        _scope(tokens, i + 1, result, result.program, closing)
        return True
    function = _function(template, head, tokens[i + 1 : closing])
    if function is not None:
        result.functions.append(function)
        return True
    if {"struct", "class", "union"} & set(words) and "=" not in words:
        n_before = len(result.functions)
        _scope(tokens, i + 1, result, result.members, closing)
        members = result.functions[n_before:]
        result.functions[n_before:] = [replace(f, is_member=True) for f in members]
    return False


def _after_macros(tokens: Tokens, begin: int, end: int) -> int:
    """Skip calls of macros without ``;``, and attributes written as calls."""
    while begin + 1 < end and tokens[begin + 1].text == "(":
        after = matching(tokens, begin + 1) + 1
        if after >= end or tokens[after].kind != "name":
            break
        if tokens[after].text in _QUALIFIERS:
            break
        begin = after
    return begin


def _template(tokens: Tokens, begin: int, end: int) -> tuple[Tokens, int]:
    if begin + 1 >= end or [t.text for t in tokens[begin : begin + 2]] != [
        "template",
        "<",
    ]:
        return (), begin
    depth = 0
    for i in range(begin + 1, end):
        depth += (tokens[i].text == "<") - (tokens[i].text == ">")
        if depth == 0:
            return tokens[begin + 2 : i], i + 1
    return (), begin


def _function(template: Tokens, head: Tokens, body: Tokens) -> Function | None:
    """Return the function with this head, ``name ( ... )``; None for other blocks."""
    i = 0
    while i < len(head):
        text = head[i].text
        named = _name_before(head, i) if text == "(" else -1
        if named >= 0:
            closing = matching(head, i)
            parameters = split(head[i + 1 : closing])
            tail = head[closing + 1 :]
            return Function(head[named], template, head[:named], parameters, tail, body)
        if text == "=" and "operator" not in [t.text for t in head[:i]]:
            return None
        i = matching(head, i) + 1 if text in "([" else i + 1
    return None


def _name_before(head: Tokens, i: int) -> int:
    """Return the index of a function's name; its parameters open at ``i``."""
    i -= 1
    if i >= 0 and head[i].text == ">":
        depth = 0
        while i >= 0:
            depth += (head[i].text == ">") - (head[i].text == "<")
            i -= 1
            if depth == 0:
                break
    if i < 0:
        return -1
    if any(t.text == "operator" for t in head[max(0, i - 2) : i + 1]):
        return i
    named = head[i].kind == "name" and head[i].text not in ("alignas", "decltype")
    return i if named and not head[i].text.startswith("__attribute") else -1


def matching(tokens: Tokens, i: int) -> int:
    """Return the index of the bracket that closes the one at ``i``, or the end."""
    depth = 0
    for j in range(i, len(tokens)):
        text = tokens[j].text
        depth += (text in _OPEN) - (text in _CLOSE)
        if depth == 0:
            return j
    return len(tokens)


def split(tokens: Tokens, mark: str = ",") -> tuple[Tokens, ...]:
    """Split at a mark outside brackets; for commas, also outside angle brackets."""
    parts, begin, depth, angles = [], 0, 0, 0
    for i, token in enumerate(tokens):
        depth += (token.text in _OPEN) - (token.text in _CLOSE)
        if mark == "," and token.kind == "mark":
            angles = max(0, angles + (token.text == "<") - (token.text == ">"))
        if token.text == mark and depth == 0 and angles == 0:
            parts.append(tokens[begin:i])
            begin = i + 1
    parts.append(tokens[begin:])
    return tuple(part for part in parts if part)
