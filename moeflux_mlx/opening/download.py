"""Find a model's directory, and download only the files that are read."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from functools import partial
from pathlib import Path

from huggingface_hub import snapshot_download
from mlx_lm import utils
from mlx_lm.utils import _download

from ..errors import ModelError
from ..experts.files.checkpoint import read_index
from ..experts.files.manifest import MANIFEST_NAME
from .hub import file_sizes, hub_errors

# Configuration, tokenizer and chat templates, but never code.
SMALL_FILES = (
    "*.json",
    "*.jsonl",
    "*.txt",
    "*.jinja",
    "*.tiktoken",
    "*.model",
)
WEIGHTS = "model*.safetensors"
PACKED_EXPERTS = "experts-*.bin"


def find_model(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """Return the local directory of a model; download a hub id.

    Raises:
        ModelError: the path holds no model, or the hub has no such id.
    """
    if not isinstance(path_or_repo, str | Path):
        raise ModelError(
            f"[load] expected a local directory or a hub id but got {path_or_repo!r}"
        )
    try:
        path = Path(path_or_repo)
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise ModelError(
            f"[load] expected a local directory but got {path_or_repo!r}: {error}"
        ) from error
    if not exists:
        path = _from_hub(str(path_or_repo), revision)
    if not (path / "config.json").is_file():
        raise ModelError(f"[load] {path}: expected a model directory with config.json")
    check_kinds(path)
    return path


def check_kinds(path: Path) -> None:
    """Raise ModelError for a FIFO or device, for which a library would wait."""
    for pattern in (*SMALL_FILES, "*.safetensors"):
        for file in path.glob(pattern):
            if file.exists() and not (file.is_file() or file.is_dir()):
                raise ModelError(
                    f"[load] {file}: expected a regular file but got a FIFO, a socket "
                    "or a device: remove it"
                )


def _from_hub(repo: str, revision: str | None) -> Path:
    """Download the small files, then the weights that they name."""
    with hub_errors("load", repo):
        if utils.snapshot_download is snapshot_download:
            try:
                file_sizes(repo, revision)
            except Exception:
                # mlx-lm's function would wait for ever, or ask for half a minute.
                if (kept := downloaded(repo, revision)) is not None:
                    return kept
                raise
        return _gather(lambda names: _download(repo, revision, allow_patterns=names))


def downloaded(repo: str, revision: str | None = None) -> Path | None:
    """Return a model's directory in the hub's cache if all files to read are there.

    A download of mlx-lm or of ours lacks the repository's other files.
    """
    get = partial(snapshot_download, repo, revision=revision, local_files_only=True)
    try:
        path = _gather(lambda names: Path(get(allow_patterns=names)))
    except Exception:
        return None
    return path if (path / "config.json").exists() and is_complete(path) else None


def _gather(get: Callable[[list[str]], Path]) -> Path:
    """Get the small files, then the weights that they name.

    Args:
        get: returns the directory that has the files with the given patterns.
    """
    names = weights_of(get([*SMALL_FILES]))
    path = get([*SMALL_FILES, *names])
    if not all(_is_there(path, name) for name in names):
        path = get([*SMALL_FILES, WEIGHTS])
    return path


def is_complete(path: Path) -> bool:
    """Tell whether a directory has all weights that will be read."""
    return all(_is_there(path, name) for name in weights_of(path))


def _is_there(path: Path, name: str) -> bool:
    return any(path.glob(name))


def weights_of(path: Path) -> list[str]:
    """Return patterns of the weights to read: those of the index, or all."""
    if (path / MANIFEST_NAME).is_file():
        return [WEIGHTS, PACKED_EXPERTS]
    names = {*read_index(path).values()}
    read = sorted(n for n in names if fnmatch.fnmatch(n, WEIGHTS) and "/" not in n)
    return read or [WEIGHTS]
