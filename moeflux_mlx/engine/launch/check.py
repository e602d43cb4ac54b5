"""Compare a kernel with its reference, for tests and ``moeflux doctor``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from .base import Kernel, Launch

Run = Callable[[Launch], tuple[mx.array, ...]]
# In a result of fewer values than this, one that is rounded the other way weighs more
# than a limit for the RMS of many allows.
FEW_VALUES = 8


@dataclass(frozen=True)
class Result:
    """The errors of one kernel at one type and size.

    ``errors`` maps each output to its ``relative_error``.
    """

    kernel: str
    dtype: mx.Dtype
    sizes: Mapping[str, Any]
    errors: Mapping[str, float]
    limits: Mapping[str, float]

    @property
    def passed(self) -> bool:
        """Return whether every output is within its limit."""
        return all(e <= self.limits[name] for name, e in self.errors.items())

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in self.sizes.items())
        errors = ", ".join(
            f"{name}: error {e:.2e} (limit {self.limits[name]:.0e})"
            for name, e in self.errors.items()
        )
        return f"{self.kernel} {str(self.dtype).rsplit('.', 1)[-1]} [{sizes}] {errors}"


def relative_error(got: mx.array, expected: mx.array) -> float:
    """Return the RMS of the difference over that of ``expected``.

    For integers it is the share of unequal values. It is infinite for a wrong shape, or
    for a value that is not finite but should be, or the other way round.
    """
    if got.shape != expected.shape:
        return float("inf")
    if not mx.issubdtype(expected.dtype, mx.floating):
        return float(np.mean(np.array(got) != np.array(expected)))
    a = np.array(got.astype(mx.float32)).astype(np.float64)
    b = np.array(expected.astype(mx.float32)).astype(np.float64)
    # An infinity in both, such as a masked score, is right, and so is a NaN in both.
    same = (np.isinf(b) & (a == b)) | (np.isnan(b) & np.isnan(a))
    a[same] = b[same] = 0
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    return float(np.sqrt(np.mean((a - b) ** 2) / max(float(np.mean(b**2)), 1e-30)))


def check(
    kernel: Kernel, dtype: mx.Dtype, sizes: Mapping[str, Any], run: Run
) -> Result:
    """Run one case and compare every output with the reference."""
    args = kernel.arguments(dtype, **sizes)
    outputs, expected = run(kernel(*args)), kernel.expected(*args)
    names = [output.name for output in kernel.metal.outputs]
    errors, limits = {}, {}
    for name, got, wanted in zip(names, outputs, expected, strict=True):
        errors[name] = relative_error(got, wanted.astype(got.dtype))
        limits[name] = _limit(got, kernel.tolerance[dtype])
    return Result(kernel.name, dtype, sizes, errors, limits)


def _limit(got: mx.array, tolerance: float) -> float:
    """Return the ``relative_error`` that a result may have."""
    if not mx.issubdtype(got.dtype, mx.floating):
        return 0.0
    if got.size >= FEW_VALUES:
        return tolerance
    # A product rounded the other way, times a SwiGLU's slope, and one more rounding.
    return max(tolerance, 2 * mx.finfo(got.dtype).eps)


@dataclass(frozen=True)
class Timing:
    """Median time of one launch and the bytes of its inputs and outputs."""

    seconds: float
    n_bytes: int

    @property
    def gbps(self) -> float:
        """Achieved bandwidth in GB/s; every byte counts once."""
        return self.n_bytes / self.seconds / 1e9


def measure(kernel: Kernel, run: Run, repeats: int = 20) -> Timing:
    """Time a warm kernel at its large size, one launch at a time."""
    dtype = mx.bfloat16 if mx.bfloat16 in kernel.dtypes else kernel.dtypes[0]
    launch = kernel(*kernel.arguments(dtype, **kernel.large))
    arrays = [x for x in launch.inputs.values() if isinstance(x, mx.array)]
    mx.eval(arrays)
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        outputs = run(launch)
        mx.eval(outputs)
        times.append(time.perf_counter() - start)
    n_bytes = sum(x.nbytes for x in (*arrays, *outputs))
    return Timing(float(np.median(times[2:])), n_bytes)
