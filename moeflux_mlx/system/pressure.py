"""The system's memory pressure, whichever process causes it."""

from __future__ import annotations

import ctypes
import enum
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from .limits import ROOT, group_folders, groups, memory_facts

# macOS's name for its level; Linux's stalls are mapped to the same levels.
MACOS_LEVEL = b"kern.memorystatus_vm_pressure_level"
# Percentage of the last ten seconds in which some tasks, or all, waited for memory.
STALLED_PERCENT = 10.0
# Another group at its own limit, or files that are read again and again, also cause
# stalls. So stalls count only if less than this share of memory is available.
SHORT_SHARE = 1 / 8


class Pressure(enum.IntEnum):
    """Levels of memory pressure, with macOS's numbers."""

    NORMAL = 1
    WARNING = 2
    CRITICAL = 4


def memory_pressure(root: Path = ROOT) -> Pressure:
    """Return the system's memory pressure; an unreadable level counts as none.

    Args:
        root: folder that contains Linux's ``proc`` and the mount points.
    """
    if sys.platform == "darwin":
        return level_of(_macos_level())
    if not _is_short(root):
        return Pressure.NORMAL
    return max(map(_stalled, _files(root)), default=Pressure.NORMAL)


def level_of(number: int | None) -> Pressure:
    """Return the meaning of macOS's level; an unknown one counts as no pressure."""
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
    """Yield the files with stalls of the machine and of our control groups."""
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
