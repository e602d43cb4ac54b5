"""Products with a quantised matrix that are right where MLX's own are wrong."""

from __future__ import annotations

import mlx.core as mx

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
    """Return ``x`` ``[..., I]`` times a quantised matrix ``[..., O, I]``.

    Arguments, result and errors are those of ``mx.quantized_matmul``. A matrix that MLX
    would multiply wrongly is unpacked first; its rows are as long as one group.
    """
    form = group_size, bits, mode
    if not device.multiplies_wrongly(scales.shape[-1], bits or 4, mode):
        return _of_mlx(x, w, scales, biases, transpose, *form, stream=stream)
    matrix = mx.dequantize(w, scales, biases, *form, stream=stream)
    return mx.matmul(x, matrix.swapaxes(-1, -2) if transpose else matrix, stream=stream)


def mend() -> None:
    """Replace ``mx.quantized_matmul`` on a device where some of its results are wrong.

    MLX's and mlx-lm's modules, adapters and attention over quantised caches call it.
    """
    if device.multiplies_wrongly(1, 4, "affine"):
        mx.quantized_matmul = quantized_matmul  # type: ignore[assignment]
