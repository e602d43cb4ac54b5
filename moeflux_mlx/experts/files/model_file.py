"""``moeflux_model.py``: the file of a pack that stock mlx-lm runs."""

from __future__ import annotations

from pathlib import Path

from ...errors import ExpertStoreError
from .checkpoint import read_config
from .manifest import MANIFEST_NAME

MODEL_FILE = "moeflux_model.py"
SHIM = '''\
"""Load this packed model through moeflux-mlx; written by ``moeflux pack``."""

from moeflux_mlx.loading import pack_classes

Model, ModelArgs = pack_classes(__file__)
'''


def check_model_file(directory: Path) -> None:
    """Check that a pack names ``moeflux_model.py``, and that it is as packing wrote it.

    Raises:
        ExpertStoreError: the file is missing or changed, or another one is named.
    """
    name, path = read_config(directory).get("model_file"), directory / MODEL_FILE
    if name != MODEL_FILE:
        raise ExpertStoreError(
            f"[pack] {directory / 'config.json'}: expected model_file to be "
            f"{MODEL_FILE!r} but got {name!r}: pack the model again"
        )
    try:
        found = _contents(path)
    except OSError as error:
        raise ExpertStoreError(f"[pack] cannot read {path}: {error}") from error
    if found != SHIM.encode():
        raise ExpertStoreError(
            f"[pack] {path}: expected the file that moeflux pack writes but got "
            "another, which stock mlx-lm would run: pack the model again"
        )


def remove_model_file(directory: Path) -> None:
    """Remove ``moeflux_model.py`` from a directory that is not a pack."""
    path = directory / MODEL_FILE
    if not (directory / MANIFEST_NAME).exists() and _contents(path) == SHIM.encode():
        path.unlink()


def _contents(path: Path) -> bytes | None:
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        # Read at most one byte too many, so that a huge file is not read in full.
        return file.read(len(SHIM.encode()) + 1)
