"""Records of which kernels were found right, where: shipped ones and this machine's.

A record holds the fingerprint of every kernel that agreed with its reference. Change
the kernel or its launch, and the record no longer speaks of it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..config import cache_folder
from ..device import machine_name, mlx_version
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
        """What ran the kernels: executor, machine and MLX."""
        return self.executor, self.machine, self.mlx

    def holds(self, name: str) -> bool:
        """Tell whether the kernel, as it is now, was found right."""
        return self.kernels.get(name) == fingerprint(name, self.executor)


def fingerprint(name: str, executor: str) -> str:
    """Return a digest of a kernel's source with all it uses, and of its launch."""
    texts = [KERNELS[name].source]
    if executor == "cuda":
        texts.append(cuda.header(library(), library()[name]))
    return library().fingerprint(name, *texts)


def own_path(executor: str) -> Path:
    """Return where this machine's own record is."""
    return cache_folder() / f"verified-{executor}.json"


def with_earlier(record: Record, path: Path, examined: Collection[str]) -> Record:
    """Add what the record at ``path``, if any, says of kernels not examined now.

    That is a record of the same executor, machine and MLX.
    """
    earlier = _read(path)
    if earlier is None or earlier.where != record.where:
        return record
    kept = {n: digest for n, digest in earlier.kernels.items() if n not in examined}
    return replace(record, kernels={**kept, **record.kernels})


def save(record: Record, path: Path | None = None) -> Path:
    """Write a record, by default where ``is_verified`` looks for this machine's."""
    path = path or own_path(record.executor)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(record), indent=1, sort_keys=True) + "\n")
    return path


def records() -> list[Record]:
    """Return the shipped records and this machine's own; unreadable ones are none."""
    return list(_readable(kernels_folder() / "verified")) + list(
        _readable(cache_folder())
    )


def _readable(folder: Path) -> Iterator[Record]:
    for path in sorted(folder.glob("*.json")):
        record = _read(path)
        if record is not None:
            yield record


def _read(path: Path) -> Record | None:
    try:
        return Record(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


@functools.cache
def is_verified(executor: str) -> bool:
    """Tell whether every kernel, as it is now, was found right on this machine."""
    record = _read(own_path(executor))
    if record is None or record.where != (executor, machine_name(), mlx_version()):
        return False
    return all(record.holds(name) for name in KERNELS)
