"""Detect that another program changed a model's files while they were read."""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import ModelError
from .manifest import MANIFEST_NAME

READ_NAMES = ("config.json", MANIFEST_NAME)
READ_SUFFIXES = (".safetensors", ".bin")


class Unchanged:
    """A model's files as they are now, to compare with those after reading.

    Reading opens them by name more than once: for headers, for experts, and in mlx-lm
    for weights. If another model took their place meanwhile, it could mix the two.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._files = _files(directory)

    def check(self) -> None:
        """Compare the files with the present ones.

        Raises:
            ModelError: one was replaced, changed, added or removed; names it.
        """
        found = _files(self._directory)
        changed = {name for name, _ in self._files.items() ^ found.items()}
        for name in sorted(changed):
            raise ModelError(
                f"[model] {self._directory / name}: expected the same file from the "
                "first to the last byte read but another program changed it "
                "meanwhile: read the model again when it is complete"
            )


def _files(directory: Path) -> dict[str, tuple[int, ...]]:
    """Return what identifies the state of each file, by name."""
    try:
        names = os.listdir(directory)
    except OSError:
        # The reader will say so.
        return {}
    found: dict[str, tuple[int, ...]] = {}
    for name in names:
        if name in READ_NAMES or name.endswith(READ_SUFFIXES):
            try:
                status = os.stat(directory / name)
            except OSError:
                continue
            found[name] = (
                status.st_dev,
                status.st_ino,
                status.st_size,
                status.st_mtime_ns,
            )
    return found
