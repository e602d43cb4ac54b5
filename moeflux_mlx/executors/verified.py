"""Records of which kernels were found right, where: shipped ones and this machine's.

A record holds the fingerprint of every kernel that agreed with its reference. Change
the kernel or its launch, and the record no longer speaks of it.
"""

from __future__ import annotations

import functools
import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import cache_folder
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

    def holds(self, name: str) -> bool:
        """Tell whether the kernel, as it is now, was found right."""
        return self.kernels.get(name) == fingerprint(name, self.executor)


def fingerprint(name: str, executor: str) -> str:
    """Return a digest of a kernel's source with all it uses, and of its launch."""
    texts = [KERNELS[name].source]
    if executor == "cuda":
        texts.append(cuda.header(library(), library()[name]))
    return library().fingerprint(name, *texts)


def machine_name() -> str:
    """Name the device that MLX computes on."""
    info: dict[str, Any] = {}
    if mx.metal.is_available() or mx.cuda.is_available():
        info = mx.device_info()
    return str(info.get("device_name") or _processor())


def mlx_version() -> str:
    """Return the version of the installed MLX."""
    return metadata.version("mlx")


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
        line = next(x for x in text.splitlines() if x.startswith("model name"))
        return line.partition(":")[2].strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _own_path(executor: str) -> Path:
    return cache_folder() / f"verified-{executor}.json"


def save(record: Record, path: Path | None = None) -> Path:
    """Write a record, by default where ``is_verified`` looks for this machine's."""
    path = path or _own_path(record.executor)
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
    record = _read(_own_path(executor))
    if record is None or (record.machine, record.mlx) != (
        machine_name(),
        mlx_version(),
    ):
        return False
    return all(record.holds(name) for name in KERNELS)
