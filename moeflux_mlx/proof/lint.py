"""Find code that clang accepts, but Apple's compiler refuses or reads differently.

The simulator compiles kernels with clang, so a kernel that passes there may still fail
on Apple hardware. These rules close most of that gap without a Mac. They read tokens,
not a syntax tree, and stay silent in doubtful cases.

Unsuffixed literals such as ``1.0`` are ``float`` in Metal and in the simulator, so they
are not double arithmetic and not a finding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..engine.metal.library import metal_files
from ..engine.metal.tokens import Scan, scan
from . import lint_rules as rules
from .lint_bfloat import implicit_bfloat


class Finding(NamedTuple):
    """A line that a rule refuses."""

    file: str
    line: int
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.rule}: {self.message}"


@dataclass(frozen=True)
class Rule:
    """A rule: its name, the fault, and a function that yields lines and details."""

    name: str
    what: str
    how: Callable[[Scan], Iterator[tuple[int, str]]]


RULES = (
    Rule("lambda", "lambdas need Metal 4", rules.lambdas),
    Rule("recursion", "functions cannot call themselves", rules.recursion),
    Rule("goto", "there is no goto", rules.words("goto")),
    Rule("double", "there is no double and no long long", rules.doubles),
    Rule("static", "locals cannot be static", rules.static_locals),
    Rule("global", "variables of a program are constant", rules.program_variables),
    Rule(
        "threadgroup",
        "threadgroup memory is declared in kernels",
        rules.threadgroup_outside_kernels,
    ),
    Rule(
        "initialiser",
        "threadgroup memory starts without a value",
        rules.threadgroup_initialisers,
    ),
    Rule("32KiB", "threadgroup memory is limited", rules.threadgroup_bytes),
    Rule("pointer", "pointers and references name a space", rules.without_space),
    Rule(
        "member",
        "member functions end with thread or another space from Metal 4.1 on",
        rules.members_without_space,
    ),
    Rule("function-pointer", "there are no function pointers", rules.function_pointers),
    Rule(
        "host-c++",
        "not in Metal's C++",
        rules.words(
            "virtual new delete try catch throw typeid dynamic_cast thread_local"
        ),
    ),
    Rule("std", "Metal's library is metal::", rules.std),
    Rule("string", "there are no strings", rules.strings),
    Rule("array", "an array's size is known to the compiler", rules.variable_arrays),
    Rule("buffer", "buffers are 0 to 30, each once", rules.buffer_indices),
    Rule("31-buffers", "a kernel takes at most 31 buffers", rules.too_many_buffers),
    Rule("bfloat", "float becomes bfloat only by a cast", implicit_bfloat),
    Rule("cast", "write float4(x): (float4)x copies bits in clang", rules.vector_casts),
    Rule("attribute", "no such attribute", rules.unknown_attributes),
    Rule("library", "not in Metal's library", rules.unknown_functions),
)


def check(path_or_text: Path | str, name: str | None = None) -> list[Finding]:
    """Return the findings of all rules in a file or a text, by line.

    Included headers in the same folder contribute known names.

    Args:
        path_or_text: a ``Path``, or Metal source as ``str``.
        name: the file's name in findings.
    """
    if isinstance(path_or_text, Path):
        source = scan(path_or_text.read_text(errors="replace"))
        _add_includes(source, path_or_text.parent)
        name = name or str(path_or_text)
    else:
        source = scan(path_or_text)
    found = {
        Finding(name or "<text>", line, rule.name, f"{rule.what}: {detail}")
        for rule in RULES
        for line, detail in rule.how(source)
    }
    return sorted(found)


def _add_includes(source: Scan, folder: Path) -> None:
    """Add the declarations of headers in the same folder, which are checked alone."""
    waiting, seen = list(source.includes), set()
    while waiting:
        path = folder / waiting.pop()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        header = scan(path.read_text(errors="replace"))
        waiting += header.includes
        source.headers.append(header)


def main(arguments: Sequence[str]) -> int:
    """Print the findings of files, by default our own; return 1 if there are any."""
    paths = [Path(name) for name in arguments] or metal_files()
    found = [finding for path in paths for finding in check(path)]
    for finding in found:
        print(finding)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
