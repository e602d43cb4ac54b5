"""The small files of a checkpoint that a pack copies, checked to lie inside it.

No link may lead out of the checkpoint. In a hub's cache a model is a folder of links
into ``blobs`` of the same repository; there ``blobs`` is part of the checkpoint.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ...errors import ModelError
from .manifest import MANIFEST_NAME
from .model_file import MODEL_FILE

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz", ".h5"}
WEIGHT_SUFFIXES |= {".onnx", ".msgpack", ".ckpt", ".pkl"}
# The files that packing writes itself.
JOURNAL_NAME = "moeflux.partial.json"
OWN_NAMES = {"config.json", JOURNAL_NAME, MANIFEST_NAME, MODEL_FILE}
# The folder in which transformers looks for named templates.
TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class SourceFiles:
    """The files to copy, by their names in the pack, and the names of all others."""

    copied: dict[str, Path]
    left_out: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of all files to copy."""
        return sum(path.stat().st_size for path in self.copied.values())

    @property
    def code(self) -> tuple[str, ...]:
        """Names of Python files, which run if the user trusts the model's code."""
        return tuple(name for name in self.copied if name.endswith(".py"))


def source_files(directory: Path) -> SourceFiles:
    """Find and check every file of a checkpoint that packing reads.

    Raises:
        ModelError: not a directory, or a file is a link that leaves it, a pipe or
            another special file; names it.
    """
    if not directory.is_dir():
        raise ModelError(f"[pack] expected a directory but got {directory}")
    roots = _roots(directory)
    copied: dict[str, Path] = {}
    left_out = []
    for path in sorted(directory.iterdir()):
        name = path.name
        if name.startswith("."):
            continue
        if name == TEMPLATES and path.is_dir():
            templates = sorted(path.glob("*.jinja"))
            copied |= {f"{TEMPLATES}/{t.name}": _inside(t, roots) for t in templates}
        elif path.is_dir():
            left_out.append(f"{name}/")
        elif path.match("model*.safetensors"):
            _inside(path, roots)
        elif path.suffix in WEIGHT_SUFFIXES:
            left_out.append(name)
        else:
            inside = _inside(path, roots)
            if name not in OWN_NAMES and not name.endswith(".index.json"):
                copied[name] = inside
    return SourceFiles(copied, tuple(left_out))


def open_inside(path: Path) -> BinaryIO:
    """Open a file that ``source_files`` found, and check again that it is plain.

    Raises:
        ModelError: it is a special file now.
        OSError: it is a link now, or cannot be opened.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _no_file(path)
    return os.fdopen(fd, "rb", buffering=0)


def _roots(directory: Path) -> tuple[Path, ...]:
    """Return the folders that the files of a checkpoint may be in."""
    real = directory.resolve()
    for folder in real.parents:
        blobs = folder.parent / "blobs"
        # A ``blobs`` that is a link could lead to any folder.
        if folder.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink():
            return real, blobs
    return (real,)


def _inside(path: Path, roots: tuple[Path, ...]) -> Path:
    """Return a path with its links resolved, which must end inside ``roots``."""
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:
        # A loop of links is a RuntimeError before Python 3.13.
        raise _no_file(path) from error
    if not any(real.is_relative_to(root) for root in roots):
        raise ModelError(
            f"[pack] {path}: expected a file of the model but got a link to {real}, "
            "outside of the model: replace the link with the file"
        )
    if not real.is_file():
        raise _no_file(path)
    return real


def _no_file(path: Path) -> ModelError:
    return ModelError(
        f"[pack] {path}: expected a file but got a broken link, a pipe or something "
        "else: remove it"
    )
