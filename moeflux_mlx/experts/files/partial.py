"""A folder that takes its name when all of it is written."""

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
    """Raise ExpertStoreError if a path to be written is taken."""
    if os.path.lexists(target):
        raise ExpertStoreError(f"[{part}] expected no {target} but it exists already")


@contextlib.contextmanager
def made_whole(target: Path, part: str) -> Iterator[Folder]:
    """Give ``target.partial``, which takes the target's name unless an error comes.

    It may be there from an earlier run.

    Args:
        target: absolute.
        part: the part of the program that writes, which errors begin with.

    Raises:
        ExpertStoreError: either name is somebody else's, or cannot be written.
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
            raise ExpertStoreError(f"[{part}] {target} appeared while it was made")
        if not folder.is_at(parent, partial.name):
            raise ExpertStoreError(f"[{part}] {partial} was replaced while it was made")
        parent.rename(partial.name, target.name)


@contextlib.contextmanager
def _own_folder(parent: Folder, path: Path) -> Iterator[Folder]:
    """Make or open the folder that is written to, and hold it."""
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
    """Return the names of the files of an earlier run.

    Raises:
        ExpertStoreError: a file is none of those that a run writes; names it.
    """
    names = folder.plain_names(frozenset({TEMPLATES}))
    if strange := sorted(set(names) - known):
        raise ExpertStoreError(
            f"[{folder.part}] {folder.path / strange[0]}: expected nothing but files "
            f"of an earlier run: move it, or remove {folder.path}"
        )
    return names


def remove_templates(folder: Folder) -> None:
    """Remove an earlier run's copies from the one folder inside."""
    if TEMPLATES in os.listdir(folder.fd):
        with folder.inner(TEMPLATES) as templates:
            for name in templates.plain_names():
                templates.remove(name)
        os.rmdir(TEMPLATES, dir_fd=folder.fd)
