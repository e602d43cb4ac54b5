"""The lint's rule against floats that become bfloats without a cast.

It guesses types from the names that a function declares.
"""

from __future__ import annotations

import re

from ..engine.metal.tokens import Function, Scan, Token, Tokens, matching
from .lint_rules import Found, statements, texts

_FLOAT = re.compile(r"(?:packed_)?float[234]?")
_FLOAT_LITERAL = re.compile(r"[\d.]+(e[+-]?\d+)?f|\d*\.\d*(e[+-]?\d+)?", re.I)
_BFLOAT = re.compile(r"(?:packed_)?bfloat(?:16_t|[234])?")


def implicit_bfloat(source: Scan) -> Found:
    """Find float expressions given to a bfloat, or to a template's output element."""
    for function in source.functions:
        wanted = {f for f in function.type_parameters if _is_output(function, f)}
        floats, narrow = _declared(function, wanted)
        given = [t.text for t in function.head if t.kind == "name"]
        returns = bool(given) and _is_narrow(given[-1], wanted)
        for whole in statements(function.body):
            statement = _without_condition(whole)
            yield from _narrowed(statement, wanted, floats, narrow)
            value = statement[1:] if texts(statement, 0, 1) == ["return"] else ()
            if returns and _is_float(value, floats):
                yield statement[0].line, " ".join(texts(statement, 0, 6))


def _without_condition(statement: Tokens) -> Tokens:
    """Return the statement after ``else``, ``if (...)`` or the end of ``for (...)``."""
    depth = 0
    for i, token in enumerate(statement):
        depth += (token.text == "(") - (token.text == ")")
        if depth < 0:
            return _without_condition(statement[i + 1 :])
    if texts(statement, 0, 1) == ["else"]:
        return _without_condition(statement[1:])
    if texts(statement, 0, 1) == ["if"]:
        return _without_condition(statement[matching(statement, 1) + 1 :])
    return statement


def _is_narrow(name: str, wanted: set[str]) -> bool:
    return name in wanted or bool(_BFLOAT.fullmatch(name))


def _is_output(function: Function, name: str) -> bool:
    for parameter in function.parameters:
        plain = [t.text for t in parameter]
        if {"device", name, "*"} <= set(plain) and "const" not in plain:
            return True
    return False


def _declared(function: Function, wanted: set[str]) -> tuple[set[str], set[str]]:
    """Return names declared as float values, and names that hold bfloat elements."""
    floats, narrow = set(), set()
    tokens = [t for p in function.parameters for t in (*p, Token(",", "mark", 0))]
    tokens += function.body
    for i in range(len(tokens) - 2):
        kind, name, after = tokens[i].text, tokens[i + 1], tokens[i + 2].text
        pointer = name.text in ("*", "&")
        if pointer:
            name, after = tokens[i + 2], " ".join(texts(tokens, i + 3, 1))
        if name.kind != "name" or (after not in ("=", ";", ",", "[", ")", ":", "")):
            continue
        if _FLOAT.fullmatch(kind):
            floats.add(name.text)
        elif _is_narrow(kind, wanted):
            narrow.add(name.text)
    return floats - narrow, narrow - floats


def _narrowed(
    statement: Tokens, wanted: set[str], floats: set[str], narrow: set[str]
) -> Found:
    """Find ``narrow[...] = float``, ``narrow = float`` and ``bfloat name = float``."""
    i = 0
    while i < len(statement) and not re.fullmatch(r"[-+*/]?=", statement[i].text):
        i = matching(statement, i) + 1 if statement[i].text in "([{" else i + 1
    if i >= len(statement) or i == 0:
        return
    left = [t.text for t in statement[:i]]
    declares = len(left) > 1 and statement[i - 1].kind == "name" and left[0] != "*"
    starred = "*" in left[1:] or "&" in left
    if declares and not starred:
        to_narrow = _is_narrow(left[-2], wanted)
    else:
        to_narrow = left[0] in narrow and not starred
        to_narrow = to_narrow or (
            left[0] == "*" and len(left) == 2 and left[1] in narrow
        )
    if to_narrow and _is_float(statement[i + 1 :], floats):
        yield statement[i].line, " ".join(texts(statement, 0, 8))


def _is_float(value: Tokens, floats: set[str]) -> bool:
    """Tell whether an expression is certainly float, by its text outside brackets."""
    plain = [t.text for t in value]
    depth = 0
    for i, text in enumerate(plain):
        depth += (text in "([{") - (text in ")]}")
        if text == "?" and depth == 0:
            return _is_float(value[i + 1 :], floats)
    i, before = 0, ""
    while i < len(value):
        text, here = plain[i], i
        i += 1
        if text == "(":
            end = matching(value, here)
            if _is_float(value[here + 1 : end], floats):
                return True
            i = end + 1
        elif value[here].kind == "name":
            member = before in (".", "->", "::")
            i, called = _after_postfix(value, i)
            if called == "template" and plain[here] in ("static_cast", "as_type"):
                text = plain[here + 2]
            if _FLOAT.fullmatch(text) or (not called and text in floats and not member):
                return True
        elif text in ("<", ">", "==", "!=", "<=", ">=", "&&", "||"):
            return False
        elif value[here].kind == "number" and _FLOAT_LITERAL.fullmatch(text):
            return True
        before = text
    return False


def _after_postfix(value: Tokens, i: int) -> tuple[int, str]:
    """Skip ``<...>``, ``(...)`` and ``[...]`` after a name; tell how it is called."""
    called = ""
    text = "".join(texts(value, i, 1))
    if text == "<":
        closing = next((j for j in range(i, len(value)) if value[j].text == ">"), i)
        if texts(value, closing + 1, 1) == ["("]:
            i, called = closing + 1, "template"
    while i < len(value) and value[i].text in ("(", "["):
        called = called or ("call" if value[i].text == "(" else "")
        i = matching(value, i) + 1
    return i, called
