"""Parse and check arguments of commands early: numbers, input and output files."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ..errors import ConfigError
from ..system.files import read_file

# A thousand times the text that fits into the longest context of any model.
TEXT_BYTES = 1 << 30
MOST_COUNT = 2**31 - 1


class Parser(argparse.ArgumentParser):
    """A parser that raises its errors, so that they print in one line like all others.

    ``late``, if set, makes the real parser from the program's name when it is needed.
    """

    late: Callable[[str], argparse.ArgumentParser] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse like argparse, or with the parser that ``late`` makes."""
        if self.late is not None:
            return self.late(self.prog).parse_known_args(args, namespace)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError that points to the command's help."""
        name = self.prog.removeprefix("moeflux ")
        raise ConfigError(f"[{name}] {message}: see {self.prog} --help")


def integer(least: int, most: int = MOST_COUNT) -> Callable[[str], int]:
    """Return a parser for an integer from ``least`` to ``most``."""

    def parse(text: str) -> int:
        try:
            if len(text) < 32 and least <= (value := int(text)) <= most:
                return value
        except ValueError:
            pass
        raise _unusable(f"an integer from {least} to {most}", text)

    return parse


def number(least: float = 0.0, most: float = math.inf) -> Callable[[str], float]:
    """Return a parser for a finite number from ``least`` to ``most``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isfinite(value) and least <= value <= most:
            return value
        bounds = f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}"
        raise _unusable(f"a number of {bounds}", text)

    return parse


def one_of(*values: int) -> Callable[[str], int]:
    """Return a parser for one of the given integers."""

    def parse(text: str) -> int:
        if text in map(str, values):
            return int(text)
        raise _unusable(f"one of {', '.join(map(str, values))}", text)

    return parse


def check_number(flag: str, value: float, parse: Callable[[str], float]) -> None:
    """Raise ConfigError if ``parse`` refuses a number that argparse has accepted."""
    try:
        parse(str(value))
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"[{flag}] {error}") from error


def _unusable(expected: str, text: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"expected {expected} but got {text[:40]!r}")


def read_text(flag: str, path: Path) -> str:
    """Return the text of a file that a flag names.

    Raises:
        ConfigError: the file is missing, not a plain file, too large or not UTF-8.
    """
    try:
        return read_file(path, TEXT_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"[{flag}] cannot read {path}: {error}") from error


def check_output(flag: str, path: str | Path | None) -> None:
    """Raise ConfigError if the output file that a flag names cannot be written.

    Commands check this first, because writing follows minutes of work.
    """
    if path is None:
        return
    file = Path(path)
    if not str(path) or file.is_dir():
        raise ConfigError(f"[{flag}] expected a file to write but got {str(path)!r}")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise ConfigError(
            f"[{flag}] cannot write {file}: expected a folder that can be written: "
            f"make {file.parent} first"
        )
