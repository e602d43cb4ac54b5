"""Whether the system itself runs short of memory, whoever takes it."""

from __future__ import annotations

import ctypes
import enum
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from .limits import ROOT, group_folders, groups, memory_facts

# macOS's names of its levels; Linux's stalls are brought to the same.
MACOS_LEVEL = b"kern.memorystatus_vm_pressure_level"
# Per cent of the last ten seconds in which tasks waited for memory: some of them, or
# all at once.
STALLED_PERCENT = 10.0
# Stalls alone may be a neighbour at its own limit, or files read again and again. The
# system is short where so little of its memory, or of a control group's, can be had.
SHORT_SHARE = 1 / 8


class Pressure(enum.IntEnum):
    """How short of memory the system is; the numbers are macOS's."""

    NORMAL = 1
    WARNING = 2
    CRITICAL = 4


def memory_pressure(root: Path = ROOT) -> Pressure:
    """Return how short of memory the system is, as it says itself.

    A level that cannot be read is no pressure.

    Args:
        root: where Linux's ``proc`` and the mount points are looked for.
    """
    if sys.platform == "darwin":
        return level_of(_macos_level())
    if not _is_short(root):
        return Pressure.NORMAL
    return max(map(_stalled, _files(root)), default=Pressure.NORMAL)


def level_of(number: int | None) -> Pressure:
    """Return the meaning of macOS's level; one that nobody knows is no pressure."""
    known = {int(level): level for level in Pressure}
    return known.get(number or 0, Pressure.NORMAL)


def _macos_level() -> int | None:
    value, size = ctypes.c_int32(), ctypes.c_size_t(4)
    places = ctypes.byref(value), ctypes.byref(size)
    try:
        failed = ctypes.CDLL(None).sysctlbyname(MACOS_LEVEL, *places, None, 0)
    except (OSError, AttributeError):
        return None
    return None if failed else value.value


def _is_short(root: Path) -> bool:
    facts = memory_facts(root)
    pairs = [(group.left_bytes, group.limit_bytes) for group in groups(root)]
    pairs.append((facts.get("MemAvailable", 1), facts.get("MemTotal", 1)))
    return any(left <= SHORT_SHARE * most for left, most in pairs)


def _files(root: Path) -> Iterator[Path]:
    """Give the files of stalls: the machine's, and those of our control groups."""
    yield root / "proc/pressure/memory"
    for kind, mount, folder in group_folders(root):
        if kind == "cgroup2":
            for level in (folder, *folder.parents):
                yield level / "memory.pressure"
                if level == mount:
                    break


def _stalled(path: Path) -> Pressure:
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return Pressure.NORMAL
    found = dict(re.findall(r"^(some|full) avg10=(\d+(?:\.\d+)?) ", text, re.MULTILINE))
    if float(found.get("full", 0)) >= STALLED_PERCENT:
        return Pressure.CRITICAL
    if float(found.get("some", 0)) >= STALLED_PERCENT:
        return Pressure.WARNING
    return Pressure.NORMAL
