"""The memory limit of this process: the smallest limit that applies.

Limits come from control groups (versions 1 and 2, at every level of the hierarchy),
``ulimit -v``, ``ulimit -d``, and the machine's memory.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")
# By type of file system: files with a limit, the file with the usage, and the name of
# the page cache in the statistics. Above ``memory.high`` a group hardly makes progress.
GROUP_FILES = {
    "cgroup": (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_cache"),
    "cgroup2": (("memory.max", "memory.high"), "memory.current", "file"),
}


class Group(NamedTuple):
    """A control group that bounds memory; ``left_bytes`` are unused in it."""

    limit_bytes: int
    left_bytes: int


def memory_limit_bytes(root: Path = ROOT) -> int:
    """Return the maximum memory that this process can ever hold.

    Args:
        root: folder that contains ``proc`` and the mount points.
    """
    held = process_bytes(root) or 0
    limits = [machine_bytes(), *(group.limit_bytes for group in groups(root))]
    return min([*limits, *(held + left for left in _ulimits(root))])


def memory_left_bytes(root: Path = ROOT) -> int:
    """Return the bytes that this process can still allocate."""
    left = [group.left_bytes for group in groups(root)]
    free = _free_bytes(root)
    if free is None:
        free = machine_bytes() - (process_bytes(root) or 0)
    return max(0, min([free, *left, *_ulimits(root)]))


def machine_bytes() -> int:
    """Return the machine's memory."""
    if sys.platform == "darwin":
        value, size = ctypes.c_uint64(), ctypes.c_size_t(8)
        places = ctypes.byref(value), ctypes.byref(size)
        if not ctypes.CDLL(None).sysctlbyname(b"hw.memsize", *places, None, 0):
            return value.value
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def process_bytes(root: Path = ROOT) -> int | None:
    """Return this process's present physical memory, or None if it is not counted."""
    pages = _page_counts(root)
    return None if pages is None else pages[1] * os.sysconf("SC_PAGE_SIZE")


def groups(root: Path = ROOT) -> Iterator[Group]:
    """Yield the control groups that bound this process, innermost first."""
    for kind, mount, folder in group_folders(root):
        limit_names, usage_name, cache_name = GROUP_FILES[kind]
        while True:
            limits = [_number(folder / name) for name in limit_names]
            stated = [limit for limit in limits if limit is not None]
            if stated:
                taken = _number(folder / usage_name) or 0
                cache = _statistic(folder / "memory.stat", cache_name)
                left = min(stated) - max(0, taken - cache)
                yield Group(min(stated), max(0, left))
            if folder == mount:
                break
            folder = folder.parent


def group_folders(root: Path) -> Iterator[tuple[str, Path, Path]]:
    """Yield type, mount point and this process's folder of each memory hierarchy."""
    paths: dict[str, str] = {}
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            paths["cgroup2"] = path
        elif "memory" in controllers.split(","):
            paths["cgroup"] = path
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        kind, options = after.split(" ")[0], after.rpartition(" ")[2].split(",")
        if kind not in paths or (kind == "cgroup" and "memory" not in options):
            continue
        top, mount_point = map(_unescaped, before.split(" ")[3:5])
        mount = root / mount_point.lstrip("/")
        # In a container, groups above the mounted folder are not visible.
        inside = os.path.relpath(paths[kind], top)
        yield kind, mount, mount if ".." in inside.split("/") else mount / inside


def left_by_ulimit(root: Path = ROOT) -> int | None:
    """Return the bytes left by limits of address space and data, or None."""
    return min(_ulimits(root), default=None)


def _ulimits(root: Path) -> list[int]:
    """Return the bytes left by each limit of address space and data."""
    pages = _page_counts(root)
    found = []
    # Fields of /proc/self/statm: all mapped pages, and private ones.
    for name, field in ((resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5)):
        limit = resource.getrlimit(name)[0]
        if limit != resource.RLIM_INFINITY:
            used = 0 if pages is None else pages[field] * os.sysconf("SC_PAGE_SIZE")
            found.append(max(0, limit - used))
    return found


def _free_bytes(root: Path) -> int | None:
    """Return the bytes that Linux can allocate without killing, or None elsewhere."""
    found = memory_facts(root)
    try:
        return found["MemAvailable"] + found["SwapFree"]
    except KeyError:
        return None


def memory_facts(root: Path = ROOT) -> dict[str, int]:
    """Return Linux's counts of the machine's memory in bytes; empty elsewhere."""
    lines = "\n".join(_lines(root / "proc/meminfo"))
    found = re.findall(r"^(\w+): +(\d+) kB$", lines, re.MULTILINE)
    return {name: 1024 * int(n) for name, n in found}


def _page_counts(root: Path) -> list[int] | None:
    lines = _lines(root / "proc/self/statm")
    return [int(n) for n in lines[0].split()] if lines else None


def _number(path: Path) -> int | None:
    """Return the number in a file, or None for no number or ``max``."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _statistic(path: Path, name: str) -> int:
    found = (line.split() for line in _lines(path))
    return next((int(n) for key, n in found if key == name), 0)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []


def _unescaped(text: str) -> str:
    """Return a path from mountinfo, which writes blanks as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
