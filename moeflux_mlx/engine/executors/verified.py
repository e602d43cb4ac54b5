"""Records of verified kernels: the shipped ones and this machine's.

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
from ...system.files import RECORD_BYTES, read_json, replacing, short
from ...system.volume import in_turn
from ..launch import KERNELS
from ..metal import cuda
from ..metal.library import kernels_folder, library


@dataclass(frozen=True)
class Record:
    """The fingerprints, by kernel, of the kernels that one machine verified."""

    executor: str
    machine: str
    date: str
    mlx: str
    kernels: Mapping[str, str]

    @property
    def where(self) -> tuple[str, str, str]:
        """The executor, machine and MLX that ran the kernels."""
        return self.executor, self.machine, self.mlx

    def holds(self, name: str) -> bool:
        """Return whether the kernel's present code was verified."""
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


def lost(record: Record, path: Path, examined: Collection[str]) -> Record | None:
    """Return the record at ``path`` if ``save`` would drop entries of it."""
    earlier = _read(path)
    if earlier is None or earlier.where == record.where:
        return None
    return earlier if set(earlier.kernels) - set(examined) else None


def remember(record: Record, examined: Collection[str]) -> None:
    """Write a record to this machine's own file, which ``verified_kernels`` reads.

    Entries of kernels that were not examined stay.
    """
    path = private.made() / _own_name(record.executor)
    _update(path, record, examined, only_private=True)
    verified_kernels.cache_clear()


def save(record: Record, path: Path, examined: Collection[str]) -> None:
    """Write a record to a file; its entries of kernels not examined now stay.

    A record of another executor, machine or MLX leaves none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _update(path, record, examined, only_private=False)


def _update(
    path: Path, record: Record, examined: Collection[str], *, only_private: bool
) -> None:
    # Two doctors at once, for different kernels, keep the entries of both.
    with in_turn(path.parent):
        earlier = None
        if not only_private or private.is_private(path):
            earlier = _read(path)
        if earlier is not None and earlier.where == record.where:
            known = earlier.kernels.items()
            kept = {name: digest for name, digest in known if name not in examined}
            record = replace(record, kernels={**kept, **record.kernels})
        text = json.dumps(asdict(record), indent=1, sort_keys=True) + "\n"
        with replacing(path, 0o600 if only_private else 0o666) as file:
            file.write(text.encode())


def records() -> list[Record]:
    """Return the shipped records and this machine's own; skip unreadable ones."""
    shipped = sorted((kernels_folder() / "verified").glob("*.json"))
    own = private.found()
    kept = filter(private.is_private, sorted(own.glob("*.json")) if own else ())
    return [record for path in (*shipped, *kept) if (record := _read(path))]


def _read(path: Path) -> Record | None:
    """Return a record; None if there is none or, with a warning, if it is invalid."""
    try:
        record = Record(**read_json(path, RECORD_BYTES))
        pairs = dict(record.kernels).items()
        texts = (*record.where, record.date, *(text for pair in pairs for text in pair))
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a value that is not text")
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
    """Return the kernels whose present code was verified on this machine."""
    folder = private.found()
    path = folder / _own_name(executor) if folder else None
    # This file decides that kernels replace MLX's operations, so it must be private.
    record = _read(path) if path and private.is_private(path) else None
    if record is None or record.where != (executor, machine_name(), mlx_version()):
        return frozenset()
    return frozenset(filter(record.holds, KERNELS))
