"""Detect the running command of mlx-lm; some save a model, or divide it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import mlx.core as mx

from ..errors import ModelError

# Commands that save a model, and commands that change all of its matrices.
CONVERT, FUSE = "mlx_lm.convert", "mlx_lm.fuse"
SAVING = (CONVERT, FUSE)
DIVIDING_DATA = ("mlx_lm.evaluate", "mlx_lm.lora")
CHANGING = tuple(f"mlx_lm.quant.{n}" for n in ("awq", "dwq", "dynamic_quant", "gptq"))


def is_to_be_saved() -> bool:
    """Tell whether the running command of mlx-lm saves a model without calling it.

    Raises:
        ModelError: the command would change experts that are read from files.
    """
    for frame, name in _callers():
        _refuse_changing(frame, name)
        if name in SAVING:
            return True
    return False


def refuse_quantisers() -> None:
    """Refuse to let mlx-lm's quantisers change a model without its experts.

    Raises:
        ModelError: one of them calls this, as a command or as a function.
    """
    for frame, name in _callers():
        _refuse_changing(frame, name)


def _refuse_changing(frame: FrameType, name: str) -> None:
    # Python keeps all locals of a frame alive once its ``f_locals`` was read, such as
    # the caches of a user's function. So read no frame but mlx-lm's own.
    if name in CHANGING or (name == FUSE and _exports(frame)):
        command = name.rpartition(".")[2]
        raise ModelError(
            f"[{command}] expected a checkpoint with its experts among its parameters "
            "but they are read from files, nothing is written: run 'moeflux unpack "
            f"PACK DIR' if it is a pack, and mlx_lm.{command} on the plain checkpoint "
            "without a bound on memory"
        )


def divides_data() -> bool:
    """Tell whether the running command gives each rank a whole model and other data."""
    return any(name in DIVIDING_DATA for _, name in _callers())


def refuse_division_of_layers() -> None:
    """Refuse to load a pack whose layers mlx-lm would divide, because it has no index.

    Raises:
        ModelError: mlx-lm's ``sharded_load`` is loading with a process group for that.
    """
    for frame, name in _callers():
        asked = frame.f_locals.get("pipeline_group") if name == "mlx_lm.utils" else None
        if asked is not None:
            raise ModelError(
                "[pipeline] expected a plain checkpoint but got a pack, whose layers "
                "mlx-lm does not divide: run 'moeflux chat --pipeline', or generate or "
                "serve"
            )


def type_of_convert() -> Any:
    """Return the type to which ``mlx_lm.convert`` casts a model, or None."""
    for frame, name in _callers():
        if name == CONVERT and frame.f_code.co_name == "convert":
            found = frame.f_locals.get("dtype")
            return found if isinstance(found, mx.Dtype) else None
    return None


def _callers() -> Iterator[tuple[FrameType, str]]:
    """Yield the frames of the callers, innermost first, with their modules' names."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        spec = frame.f_globals.get("__spec__")
        yield frame, str(spec.name if spec else frame.f_globals.get("__name__"))
        frame = frame.f_back


def _exports(frame: FrameType) -> bool:
    """Tell whether ``mlx_lm.fuse`` also exports a GGUF file."""
    return bool(getattr(frame.f_locals.get("args"), "export_gguf", False))
