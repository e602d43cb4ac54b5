"""A folder under a temporary name, renamed when all of it is written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ...errors import ExpertStoreError
from ...system.volume import lock
from .folder import Folder, open_parent
from .sidecars import TEMPLATES
from .writer import disk_errors


def refuse_existing(target: Path, part: str) -> None:
    """Raise ExpertStoreError if ``target`` exists."""
    if os.path.lexists(target):
        raise ExpertStoreError(
            f"[{part}] expected no {target} but it exists: give another directory"
        )


@contextlib.contextmanager
def made_whole(target: Path, part: str) -> Iterator[Folder]:
    """Yield the folder ``target.partial``; without an error rename it to ``target``.

    The folder may exist from an earlier run.

    Args:
        target: absolute path.
        part: the writing command, with which errors begin.

    Raises:
        ExpertStoreError: ``target`` exists, the folder is not this user's own, or
            either cannot be written.
    """
    refuse_existing(target, part)
    partial = target.with_name(target.name + ".partial")
    with (
        disk_errors(partial, part),
        open_parent(partial, part) as parent,
        _own_folder(parent, partial) as folder,
    ):
        yield folder
        if os.path.lexists(target):
            raise ExpertStoreError(
                f"[{part}] expected no {target} but another program made it meanwhile: "
                "give another directory"
            )
        if not folder.is_at(parent, partial.name):
            raise ExpertStoreError(
                f"[{part}] {partial}: expected the folder of this run but another "
                "program replaced it: run the command again"
            )
        parent.rename(partial.name, target.name)


@contextlib.contextmanager
def _own_folder(parent: Folder, path: Path) -> Iterator[Folder]:
    """Make or open the folder to write to, and lock it."""
    if path.is_symlink():
        raise ExpertStoreError(
            f"[{parent.part}] {path}: expected a folder of an earlier run but got a "
            "link: remove it"
        )
    with parent.inner(path.name) as folder:
        if os.fstat(folder.fd).st_uid != os.geteuid():
            raise ExpertStoreError(
                f"[{parent.part}] {path}: expected a folder of an earlier run but "
                "another user made it: remove it"
            )
        lock(folder.fd, path, parent.part)
        yield folder


def check_names(folder: Folder, known: set[str]) -> list[str]:
    """Return the names of an earlier run's files.

    Raises:
        ExpertStoreError: there is a file that no run writes; names it.
    """
    names = folder.plain_names(frozenset({TEMPLATES}))
    if strange := sorted(set(names) - known):
        raise ExpertStoreError(
            f"[{folder.part}] {folder.path / strange[0]}: expected nothing but files "
            f"of an earlier run: move it, or remove {folder.path}"
        )
    return names


def remove_templates(folder: Folder) -> None:
    """Remove an earlier run's folder of templates."""
    if TEMPLATES in os.listdir(folder.fd):
        with folder.inner(TEMPLATES) as templates:
            for name in templates.plain_names():
                templates.remove(name)
        os.rmdir(TEMPLATES, dir_fd=folder.fd)
