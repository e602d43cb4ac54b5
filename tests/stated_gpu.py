"""A stated GPU: a CPU computes, while all that asks about the device sees a GPU.

Ways, places of slots, compiled steps and lazy checks are those of a GPU, but MLX adds
up every row alone, and simulated kernels do so in one order. So where bits differ here,
they differ because of the structure of a call, not because of a GPU's arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
from test_staging import Runtime

from moeflux_mlx import device, products
from moeflux_mlx.engine import compiled_layers
from moeflux_mlx.engine.executors import EXECUTORS, compiled
from moeflux_mlx.engine.executors.sim import SimExecutor
from moeflux_mlx.engine.launch.prepared import Prepared
from moeflux_mlx.experts.pool import staging
from moeflux_mlx.experts.weights import leaves

OF_MLX = mx.quantized_matmul
# The fewest rows of MLX's kernels for several rows.
FEW_ROWS = 8
# Metal's limits on a stated Mac.
LIMITS = device.GpuLimits(1 << 30, 4 << 30)


class OnCuda(SimExecutor):
    """The simulator under the name of CUDA's executor, by which ways are preferred."""

    name = "cuda"
    compiles = True


class OnMetal(SimExecutor):
    """The simulator under the name of a Mac's executor."""

    name = "metal"


@contextmanager
def stated_gpu(kind: str) -> Iterator[None]:
    """State a GPU: ``cuda`` or ``metal``.

    The executor of that name runs simulated kernels. Matrices that the GPU's product
    does not take, or of which it would copy all slots, raise an error.
    """
    is_cuda = kind == "cuda"
    multiply = multiplying(OF_MLX) if is_cuda else OF_MLX
    with ExitStack() as stack:
        for owner, name, value in (
            (device, "on_cpu", lambda: False),
            (device, "returns_pages", lambda: False),
            (device, "gpu_limits", lambda: None if is_cuda else LIMITS),
            (mx.cuda, "is_available", lambda: is_cuda),
            (mx.metal, "is_available", lambda: not is_cuda),
            (staging, "_runtime", Runtime),
            (mx, "quantized_matmul", multiply),
            (products, "_of_mlx", multiply),
            (mx, "gather_mm", _gathering(mx.gather_mm)),
            (mx, "gather_qmm", _gathering(mx.gather_qmm)),
            (compiled, "Compiled", Replayed),
            (compiled_layers, "Compiled", Replayed),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        executor = OnCuda if is_cuda else OnMetal
        stack.enter_context(mock.patch.dict(EXECUTORS, {kind: executor}))
        yield


class Replayed:
    """Stands for a function that MLX compiled, which the simulator cannot be part of.

    MLX would replay the launches of the first call, so later ones must be the same.
    """

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self._launches: dict[Any, list[Any]] = {}

    def __call__(self, *args: Any) -> Any:
        made: list[Any] = []
        original = SimExecutor.call

        def call(executor: SimExecutor, built: Any, ready: Prepared) -> list[mx.array]:
            made.append((ready.instance, ready.grid, ready.numbers))
            return original(executor, built, ready)

        with mock.patch.object(SimExecutor, "call", call):
            out = self._function(*args)
        forms = tuple((x.shape, x.dtype) for x in leaves(args))
        first = self._launches.setdefault(forms, made)
        assert made == first, "MLX would replay other launches"
        return out


def multiplying(multiply: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Refuse matrices that MLX's product on CUDA refuses, or repeats wrongly."""

    def checked(
        x: mx.array, w: mx.array, scales: mx.array, *parts: Any, **options: Any
    ) -> mx.array:
        if w.ndim > 2:
            batch = math.prod(np.broadcast_shapes(x.shape[:-2], w.shape[:-2]))
            if math.prod(w.shape[:-2]) not in (1, batch):
                raise AssertionError("the first matrix would be repeated")
            for part in (w, scales, *parts[:1]):
                if part is not None:
                    _check_contiguous(part)
        return multiply(x, w, scales, *parts, **options)

    return checked


def _gathering(gather: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Refuse matrices that a GPU's product does not take, or copies for each slot.

    A product of few rows has other bits, as on a GPU, where it is another kernel's.
    """

    def checked(x: mx.array, w: mx.array, *parts: Any, **options: Any) -> mx.array:
        scales = parts[0] if parts and isinstance(parts[0], mx.array) else None
        if scales is not None and scales.dtype not in (x.dtype, mx.uint8):
            raise AssertionError(f"all slots become {x.dtype}: {scales.dtype}")
        if scales is None and w.dtype != x.dtype:
            raise AssertionError(f"all slots become {x.dtype}: {w.dtype}")
        for part in (w, *parts):
            if isinstance(part, mx.array) and not device.gathers_strided():
                _check_contiguous(part)
        out = gather(x, w, *parts, **options)
        return out if options["rhs_indices"].size >= FEW_ROWS else _nudged(out)

    return checked


def _nudged(out: mx.array) -> mx.array:
    """Move each value to a neighbouring one."""
    bits = mx.uint32 if out.dtype == mx.float32 else mx.uint16
    return mx.where(out == 0, out, (out.view(bits) ^ 1).view(out.dtype))


def _check_contiguous(array: mx.array) -> None:
    try:
        mx.eval(array)
    except ValueError:
        # A transformation traces it.
        return
    held = np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
    if not (held.flags.c_contiguous or held.swapaxes(-1, -2).flags.c_contiguous):
        raise AssertionError(f"expected contiguous matrices: {held.strides}")
