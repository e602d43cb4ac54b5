"""Records of which kernels were found right, where: shipped ones and this machine's.

A record holds the fingerprint of every kernel that agreed with its reference. A change
to the code of the kernel or of its launch makes the entry stale; a change to a comment
does not.
"""

from __future__ import annotations

import ast
import functools
import inspect
import io
import json
import tokenize
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ...device import machine_name, mlx_version
from ...system import private
from ...system.files import RECORD_BYTES, read_json, short
from ..launch import KERNELS
from ..metal import cuda
from ..metal.library import kernels_folder, library


@dataclass(frozen=True)
class Record:
    """One machine's findings: kernel → fingerprint, for those that agreed."""

    executor: str
    machine: str
    date: str
    mlx: str
    kernels: Mapping[str, str]

    @property
    def where(self) -> tuple[str, str, str]:
        """The place that ran the kernels: executor, machine and MLX."""
        return self.executor, self.machine, self.mlx

    def holds(self, name: str) -> bool:
        """Tell whether the kernel, as it is now, was found right."""
        return self.kernels.get(name) == fingerprint(name, self.executor)


def fingerprint(name: str, executor: str) -> str:
    """Return a digest of a kernel's code with its helpers, and of its launch."""
    kernel = KERNELS[name]
    launch = without_words(inspect.getsource(kernel.build))
    texts = [launch, "compiled in", *sorted(kernel.fixed)]
    if executor == "cuda":
        texts.append(cuda.header(library(), library()[name]))
    return library().fingerprint(name, *texts)


def without_words(text: str) -> str:
    """Return Python code without its comments, docstrings and empty lines."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            first, last = node.body[0].lineno, node.body[0].end_lineno or 0
            lines[first - 1 : last] = [""] * (last - first + 1)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(filter(None, map(str.rstrip, lines)))


def _own_name(executor: str) -> str:
    return f"verified-{executor}.json"


def with_earlier(record: Record, path: Path, examined: Collection[str]) -> Record:
    """Add the entries of the record at ``path``, if any, for kernels not examined now.

    That is a record of the same executor, machine and MLX.
    """
    earlier = _read(path)
    if earlier is None or earlier.where != record.where:
        return record
    kept = {n: digest for n, digest in earlier.kernels.items() if n not in examined}
    return replace(record, kernels={**kept, **record.kernels})


def remember(record: Record, examined: Collection[str]) -> None:
    """Write a record where ``verified_kernels`` looks.

    Entries of kernels that were not examined stay.
    """
    path = private.made() / _own_name(record.executor)
    if private.is_private(path):
        record = with_earlier(record, path, examined)
    private.write_text(path, _text(record))
    verified_kernels.cache_clear()


def save(record: Record, path: Path) -> None:
    """Write a record to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_text(record))


def _text(record: Record) -> str:
    return json.dumps(asdict(record), indent=1, sort_keys=True) + "\n"


def records() -> list[Record]:
    """Return the shipped records and this machine's own; unreadable ones are none."""
    shipped = sorted((kernels_folder() / "verified").glob("*.json"))
    own = private.found()
    kept = filter(private.is_private, sorted(own.glob("*.json")) if own else ())
    return [record for path in (*shipped, *kept) if (record := _read(path))]


def _read(path: Path) -> Record | None:
    """Return a record, or None where there is none or, with a warning, nonsense."""
    try:
        record = Record(**read_json(path, RECORD_BYTES))
        pairs = dict(record.kernels).items()
        texts = (*record.where, record.date, *(text for pair in pairs for text in pair))
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("something else in place of a text")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        warnings.warn(
            f"[verified] {path}: expected a record of moeflux doctor but got "
            f"{short(error)}: run moeflux doctor again",
            stacklevel=2,
        )
        return None
    return record


@functools.cache
def verified_kernels(executor: str) -> frozenset[str]:
    """Return the kernels that, as they are now, were found right on this machine."""
    folder = private.found()
    path = folder / _own_name(executor) if folder else None
    # Kernels run instead of MLX's own operations on this file's word.
    record = _read(path) if path and private.is_private(path) else None
    if record is None or record.where != (executor, machine_name(), mlx_version()):
        return frozenset()
    return frozenset(filter(record.holds, KERNELS))
