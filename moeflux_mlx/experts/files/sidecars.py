"""Which files of a checkpoint a pack takes along, and that they are the checkpoint's.

Nothing is followed out of the source. In a hub's cache a model is a folder of links to
``blobs`` of the same repository, which belongs to the source there.
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
# Where transformers looks for templates by name.
TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class SourceFiles:
    """Files that are copied, by name in the pack; and names of those that are not."""

    copied: dict[str, Path]
    left_out: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of all that is copied."""
        return sum(path.stat().st_size for path in self.copied.values())

    @property
    def code(self) -> tuple[str, ...]:
        """Names of files of Python, which run where a model's code is trusted."""
        return tuple(name for name in self.copied if name.endswith(".py"))


def source_files(directory: Path) -> SourceFiles:
    """Look at every file of a checkpoint that packing reads.

    Raises:
        ModelError: no directory, or a file is a link that leaves it, a pipe or the
            like; names it.
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
    """Open a file that ``source_files`` found, if it still is a plain one.

    Raises:
        ModelError: it is a link, a pipe or the like by now.
        OSError: it cannot be opened.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _no_file(path)
    return os.fdopen(fd, "rb", buffering=0)


def _roots(directory: Path) -> tuple[Path, ...]:
    """Return where the files of a checkpoint may lie."""
    real = directory.resolve()
    for folder in real.parents:
        blobs = folder.parent / "blobs"
        # A link there could lead to any folder.
        if folder.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink():
            return real, blobs
    return (real,)


def _inside(path: Path, roots: tuple[Path, ...]) -> Path:
    """Return the file itself that a name stands for."""
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:
        # Links that lead to each other: a RuntimeError before Python 3.13.
        raise _no_file(path) from error
    if not any(real.is_relative_to(root) for root in roots):
        raise ModelError(
            f"[pack] {path}: expected a file of the model but got a link to {real}, "
            "outside of it: put the file itself there"
        )
    if not real.is_file():
        raise _no_file(path)
    return real


def _no_file(path: Path) -> ModelError:
    return ModelError(
        f"[pack] {path}: expected a file but got a broken link, a pipe or something "
        "else: remove it"
    )
