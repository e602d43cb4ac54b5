"""Products with a quantised matrix that are right where MLX's own are wrong."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from . import device

_of_mlx = mx.quantized_matmul


def quantized_matmul(
    x: mx.array,
    w: mx.array,
    /,
    scales: mx.array,
    biases: mx.array | None = None,
    transpose: bool = True,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    *,
    stream: mx.Stream | mx.Device | None = None,
) -> mx.array:
    """Return ``x`` ``[..., I]`` times quantised matrices ``[..., O, I]``.

    Arguments, result and errors are those of ``mx.quantized_matmul``. Matrices that MLX
    would multiply wrongly, or not at all, are unpacked first.
    """
    form = group_size, bits, mode
    wrong = device.multiplies_wrongly(scales.shape[-1], bits or 4, mode)
    if w.ndim > 2 and device.repeats_first_matrix():
        # Parts of caches have gaps, the matrices of a module's heads have none.
        wrong = wrong or w.ndim > 3 or _repeats(x, w)
    if not wrong:
        return _of_mlx(x, w, scales, biases, transpose, *form, stream=stream)
    matrix = mx.dequantize(w, scales, biases, *form, stream=stream)
    return mx.matmul(x, matrix.swapaxes(-1, -2) if transpose else matrix, stream=stream)


def _repeats(x: mx.array, w: mx.array) -> bool:
    """Tell whether several matrices are repeated to match the batch of ``x``."""
    batch = np.broadcast_shapes(x.shape[:-2], w.shape[:-2])
    return 1 < math.prod(w.shape[:-2]) < math.prod(batch)


def mend() -> None:
    """Replace ``mx.quantized_matmul`` on a device where some of its results are wrong.

    MLX's and mlx-lm's modules, adapters and attention over quantised caches call it.
    """
    # This includes Hopper, where ``multiplies_wrongly``.
    if device.repeats_first_matrix():
        mx.quantized_matmul = quantized_matmul  # type: ignore[assignment]
