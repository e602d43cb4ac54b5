"""How much memory this process may take: the least of all that the system states.

Control groups state limits (version 1 and 2, at every level of the hierarchy), so do
``ulimit -v`` and ``ulimit -d``, and the machine has only so much.
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
# Files with a limit, with what is taken and the statistics' name of what is page cache,
# by the type of the file system. Above ``memory.high`` a group hardly runs any more.
GROUP_FILES = {
    "cgroup": (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_cache"),
    "cgroup2": (("memory.max", "memory.high"), "memory.current", "file"),
}


class Group(NamedTuple):
    """A control group that bounds memory; ``left_bytes`` nobody in it has taken."""

    limit_bytes: int
    left_bytes: int


def memory_limit_bytes(root: Path = ROOT) -> int:
    """Return the most that this process can ever hold in memory.

    Args:
        root: where ``proc`` and the mount points are looked for.
    """
    held = process_bytes(root) or 0
    limits = [machine_bytes(), *(group.limit_bytes for group in groups(root))]
    return min([*limits, *(held + left for left in _ulimits(root))])


def memory_left_bytes(root: Path = ROOT) -> int:
    """Return the bytes that this process can still take beside all others."""
    left = [group.left_bytes for group in groups(root)]
    free = _free_bytes(root)
    if free is None:
        free = machine_bytes() - (process_bytes(root) or 0)
    return max(0, min([free, *left, *_ulimits(root)]))


def machine_bytes() -> int:
    """Return the memory that the machine has."""
    if sys.platform == "darwin":
        value, size = ctypes.c_uint64(), ctypes.c_size_t(8)
        places = ctypes.byref(value), ctypes.byref(size)
        if not ctypes.CDLL(None).sysctlbyname(b"hw.memsize", *places, None, 0):
            return value.value
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def process_bytes(root: Path = ROOT) -> int | None:
    """Return the physical memory this process has now; None where nobody counts it."""
    pages = _page_counts(root)
    return None if pages is None else pages[1] * os.sysconf("SC_PAGE_SIZE")


def groups(root: Path = ROOT) -> Iterator[Group]:
    """Give the control groups that bound this process, the innermost first."""
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
    """Give type, mount point and this process's folder of hierarchies with memory."""
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
        # Groups above the mount's own top, as in a container, cannot be seen.
        inside = os.path.relpath(paths[kind], top)
        yield kind, mount, mount if ".." in inside.split("/") else mount / inside


def left_by_ulimit(root: Path = ROOT) -> int | None:
    """Return the bytes that limits of space and data leave; None where unlimited."""
    return min(_ulimits(root), default=None)


def _ulimits(root: Path) -> list[int]:
    """Return each limit's bytes of space and data left; none where unlimited."""
    pages = _page_counts(root)
    found = []
    # Their numbers in /proc/self/statm: all mapped pages, and private ones.
    for name, field in ((resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5)):
        limit = resource.getrlimit(name)[0]
        if limit != resource.RLIM_INFINITY:
            used = 0 if pages is None else pages[field] * os.sysconf("SC_PAGE_SIZE")
            found.append(max(0, limit - used))
    return found


def _free_bytes(root: Path) -> int | None:
    """Return the bytes that Linux can give without ending a process; None elsewhere."""
    found = memory_facts(root)
    try:
        return found["MemAvailable"] + found["SwapFree"]
    except KeyError:
        return None


def memory_facts(root: Path = ROOT) -> dict[str, int]:
    """Return Linux's counts of the machine's memory, in bytes; none elsewhere."""
    lines = "\n".join(_lines(root / "proc/meminfo"))
    found = re.findall(r"^(\w+): +(\d+) kB$", lines, re.MULTILINE)
    return {name: 1024 * int(n) for name, n in found}


def _page_counts(root: Path) -> list[int] | None:
    lines = _lines(root / "proc/self/statm")
    return [int(n) for n in lines[0].split()] if lines else None


def _number(path: Path) -> int | None:
    """Return the number in a file; None without one, or for ``max``."""
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
    """Return a path of mountinfo, which writes blanks as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
