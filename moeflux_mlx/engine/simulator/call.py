"""Calls of ``mx.fast.metal_kernel`` objects on the simulator."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import SimulatorError
from .program import Program, Size3

_LOCK = threading.Lock()
_PROGRAMS: dict[tuple[Any, ...], tuple[Any, Program]] = {}
# MLX puts inputs of fewer elements than this into constant memory.
_CONSTANT_BELOW = 8


def call(
    kernel: Any,
    *,
    inputs: Sequence[Any],
    template: Sequence[tuple[str, Any]] | None = None,
    grid: Size3,
    threadgroup: Size3,
    output_shapes: Sequence[Sequence[int]],
    output_dtypes: Sequence[mx.Dtype],
    init_value: float | None = None,
    checked: bool = False,
    numbers: str = "plain",
    seed: int = 0,
) -> list[mx.array]:
    """Run a kernel object of ``mx.fast.metal_kernel`` as MLX would call it.

    The source is the one that MLX writes for these inputs. Without ``init_value``,
    outputs start as NaN, or as a bit pattern for integers.

    Args:
        kernel: the object; arguments not listed here are those of its call.
        checked: look for races, bad accesses and uninitialised reads.
        numbers: how numbers are computed, one of ``compile.NUMBERS``.
        seed: order in which threads run.

    Raises:
        SimulatorError: the source does not compile, or the run found a fault.
    """
    arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
    options = {
        "template": list(template or []),
        "grid": tuple(grid),
        "threadgroup": tuple(threadgroup),
        "output_shapes": [tuple(s) for s in output_shapes],
        "output_dtypes": list(output_dtypes),
    }
    program = _program(kernel, arrays, options, checked, numbers)
    name = program.kernels[0]
    mx.eval(arrays)
    given = [_to_numpy(x) for x in arrays]
    outputs = [
        _fresh(shape, dtype, init_value)
        for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
    ]
    buffers = _bind(program, name, arrays, given, outputs)
    first = len(buffers) - len(outputs)
    unwritten = range(first, len(buffers)) if init_value is None else ()
    program.run(
        name, buffers, grid, threadgroup, seed=seed, uninitialised=tuple(unwritten)
    )
    return [_to_mlx(x, d) for x, d in zip(outputs, output_dtypes, strict=True)]


def _program(
    kernel: Any,
    arrays: list[mx.array],
    options: dict[str, Any],
    checked: bool,
    numbers: str,
) -> Program:
    key = (
        id(kernel),
        checked,
        numbers,
        tuple((x.dtype, x.ndim, x.size < _CONSTANT_BELOW) for x in arrays),
        tuple((name, str(value)) for name, value in options["template"]),
        tuple(options["output_dtypes"]),
    )
    with _LOCK:
        if key not in _PROGRAMS:
            source = written_source(kernel, arrays, options)
            # The kernel is kept alive, so that no other object gets its id.
            _PROGRAMS[key] = kernel, Program(source, checked=checked, numbers=numbers)
        return _PROGRAMS[key][1]


def written_source(kernel: Any, arrays: list[mx.array], options: dict[str, Any]) -> str:
    """Return the Metal source that MLX writes for a call, without running it."""

    def trace(*inputs: mx.array) -> Any:
        return kernel(inputs=list(inputs), verbose=True, **options)

    with tempfile.TemporaryDirectory() as folder:
        with _standard_output(Path(folder) / "out") as text:
            mx.export_function(str(Path(folder) / "trace.mlxfn"), trace, *arrays)
        printed = text.read_text()
    found = re.search(
        r"Generated source code for `[^`]*`:\s*```\n(.*)```", printed, re.S
    )
    if found is None:
        raise SimulatorError(f"[simulator] expected MLX to print a kernel: {printed!r}")
    return found[1]


@contextlib.contextmanager
def _standard_output(path: Path) -> Iterator[Path]:
    """Redirect the standard output of C++ to a file."""
    import sys

    sys.stdout.flush()
    saved = os.dup(1)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 1)
        try:
            yield path
        finally:
            _flush()
            os.dup2(saved, 1)
            os.close(saved)


@functools.cache
def _libc() -> Any:
    import ctypes

    return ctypes.CDLL(None)


def _flush() -> None:
    _libc().fflush(None)


def _to_numpy(x: mx.array) -> np.ndarray:
    bits = x.view(mx.uint16) if x.dtype == mx.bfloat16 else x
    return np.ascontiguousarray(np.array(bits, copy=False)).reshape(x.shape)


def _fresh(
    shape: Sequence[int], dtype: mx.Dtype, init_value: float | None
) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64))
    if init_value is not None:
        return _to_numpy(mx.full(tuple(shape), init_value).astype(dtype)).copy()
    # With all bits set, floats are NaN and integers an unlikely number.
    bytes_ = np.full(size * dtype.size, 0xFF, np.uint8)
    return bytes_.view(_numpy_dtype(dtype)).reshape(tuple(shape))


def _numpy_dtype(dtype: mx.Dtype) -> Any:
    names = {mx.bfloat16: np.uint16, mx.bool_: np.uint8}
    return names.get(dtype) or np.dtype(str(dtype).rsplit(".", 1)[-1])


def _to_mlx(x: np.ndarray, dtype: mx.Dtype) -> mx.array:
    array = mx.array(x)
    if dtype == mx.bfloat16:
        return array.view(mx.bfloat16)
    return array.astype(mx.bool_) if dtype == mx.bool_ else array


def _bind(
    program: Program,
    name: str,
    arrays: list[mx.array],
    given: list[np.ndarray],
    outputs: list[np.ndarray],
) -> list[np.ndarray]:
    """Return all buffers, with the shapes and strides that the body uses."""
    parameters = [p for p in program.parameters(name) if p.index >= 0]
    extra = len(parameters) - len(given) - len(outputs)
    if extra == 0:
        return [*given, *outputs]
    buffers: list[np.ndarray] = []
    rest = iter(zip(arrays, given, strict=True))
    current: tuple[str, mx.array] | None = None
    for p in parameters[: len(parameters) - len(outputs)]:
        suffix = current and p.name.removeprefix(current[0])
        if current and suffix == "_shape":
            buffers.append(np.array(current[1].shape, np.int32))
        elif current and suffix == "_strides":
            buffers.append(_strides(current[1]))
        elif current and suffix == "_ndim":
            buffers.append(np.array(current[1].ndim, np.int32))
        else:
            array, memory = next(rest)
            current = p.name, array
            buffers.append(memory)
    return [*buffers, *outputs]


def _strides(x: mx.array) -> np.ndarray:
    steps = [int(np.prod(x.shape[i + 1 :], dtype=np.int64)) for i in range(x.ndim)]
    return np.array(steps, np.int64)
