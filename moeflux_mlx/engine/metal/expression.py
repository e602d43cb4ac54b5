"""Constant integer expressions in Metal source."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping

_TOKEN = re.compile(
    r"\s*(?:(0[xX][0-9a-fA-F]+|\d+)[uUlL]*\b|(\w+)"
    r"|(<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%<>()?:!]))"
)


def _divide(a: int, b: int) -> int:
    """Divide as C does, rounding towards zero."""
    return a // b if (a < 0) == (b < 0) else -(-a // b)


Binary = Callable[[int, int], int]
# From the lowest precedence to the highest.
_LEVELS: tuple[Mapping[str, Binary], ...] = (
    {"||": lambda a, b: int(bool(a) or bool(b))},
    {"&&": lambda a, b: int(bool(a) and bool(b))},
    {"==": operator.eq, "!=": operator.ne},
    {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge},
    {"<<": operator.lshift, ">>": operator.rshift},
    {"+": operator.add, "-": operator.sub},
    {"*": operator.mul, "/": _divide, "%": lambda a, b: a - b * _divide(a, b)},
)
_UNARY: Mapping[str, Callable[[int], int]] = {
    "-": operator.neg,
    "+": operator.pos,
    "!": operator.not_,
}
_CASTS = ("int", "uint", "short", "ushort", "long", "ulong")


def evaluate(expression: str, known: Mapping[str, int]) -> int:
    """Compute a constant C expression of integers.

    Raises:
        ValueError: it has more than numbers, known names, casts such as ``int(N)`` and
            ``+ - * / % << >> < <= > >= == != && || ! ?:``.
    """
    reader = _Reader(expression, known)
    value = reader.choice()
    if reader.token:
        raise ValueError(f"cannot read {expression.strip()!r}")
    return value


class _Reader:
    """Parses by recursive descent; it computes both sides of ``?:``."""

    def __init__(self, text: str, known: Mapping[str, int]):
        self.text, self.known, self.at = text.rstrip(), known, 0
        self.token = ""
        self.advance()

    def advance(self) -> str:
        """Move to the next token; return the one before, "" at the end."""
        left = self.token
        found = _TOKEN.match(self.text, self.at)
        if found is None and self.at < len(self.text):
            raise ValueError(f"cannot read {self.text[self.at :].strip()!r}")
        self.token = (found[1] or found[2] or found[3]) if found else ""
        self.at = found.end() if found else self.at
        return left

    def take(self, token: str) -> None:
        if self.advance() != token:
            raise ValueError(f"expected {token!r} in {self.text!r}")

    def choice(self) -> int:
        condition = self.binary(0)
        if self.token != "?":
            return condition
        self.advance()
        first = self.choice()
        self.take(":")
        second = self.choice()
        return first if condition else second

    def binary(self, level: int) -> int:
        if level == len(_LEVELS):
            return self.unary()
        value = self.binary(level + 1)
        while self.token in _LEVELS[level]:
            operation = _LEVELS[level][self.advance()]
            try:
                value = int(operation(value, self.binary(level + 1)))
            except ZeroDivisionError:
                raise ValueError(f"division by zero in {self.text!r}") from None
        return value

    def unary(self) -> int:
        token = self.advance()
        if token in _UNARY:
            return int(_UNARY[token](self.unary()))
        if token == "(" or (token in _CASTS and self.token == "("):
            if token != "(":
                self.advance()
            value = self.choice()
            self.take(")")
            return value
        if token in ("true", "false"):
            return int(token == "true")
        if token[:1].isdigit():
            return int(token, 16 if token[:2] in ("0x", "0X") else 10)
        if token not in self.known:
            raise ValueError(f"{token or 'the end'!r} is not a known number")
        return int(self.known[token])
