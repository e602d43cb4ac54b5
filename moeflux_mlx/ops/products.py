"""Matrix products of dense and quantised weights: the only place that multiplies.

All are MLX's own operations, with one measured exception: on a Linux CPU, large
float32 products go through NumPy's BLAS over the same memory, because MLX's wheel
there links the reference BLAS. Gradients and tracing keep working: the product is an
``mx.custom_function``, and where there is no value yet MLX's own product is used.
"""

from __future__ import annotations

import functools
import math

import mlx.core as mx
import numpy as np

from ..executors import device
from ..weights import ExpertWeights, Weight


def matmul(a: mx.array, b: mx.array) -> mx.array:
    """Multiply ``a`` ``[..., M, K]`` by ``b`` ``[..., K, N]``."""
    macs = a.size * b.shape[-1]
    if macs < device.BLAS_MIN_MACS or not _blas_can(a, b):
        return a @ b
    try:
        mx.eval(a, b)
    except ValueError:  # inside mx.compile or mx.vmap nothing has a value
        return a @ b
    return _blas_matmul(a, b)


def _blas_can(a: mx.array, b: mx.array) -> bool:
    both_f32 = a.dtype == mx.float32 and b.dtype == mx.float32
    return both_f32 and device.on_cpu() and device.has_slow_cpu_blas()


@mx.custom_function
def _blas_matmul(a: mx.array, b: mx.array) -> mx.array:
    return mx.array(np.matmul(np.asarray(a), np.asarray(b)))


@_blas_matmul.vjp
def _blas_matmul_vjp(primals, cotangent, _):  # type: ignore[no-untyped-def]
    return mx.vjp(mx.matmul, list(primals), [cotangent])[1]


def linear(x: mx.array, weight: Weight) -> mx.array:
    """Return ``x`` ``[..., I]`` times the transpose of ``weight`` ``[O, I]``."""
    q = weight.quantization
    if q is None and _fits_eager(x, weight):
        return matmul(x, weight.w.T)
    if q is None:
        return x @ weight.w.T
    if _unpack_first(x, weight):
        return matmul(x, dequantize(weight).T)
    scales, biases = _scales_like(x, weight)
    return mx.quantized_matmul(
        x,
        weight.w,
        scales,
        biases,
        transpose=True,
        group_size=q.group_size,
        bits=q.bits,
        mode=q.mode,
    )


def _fits_eager(x: mx.array, weight: Weight) -> bool:
    """Tell whether a result is small enough to compute it even if nobody needs it.

    A prompt's logits are dropped by most callers: MLX's laziness spares them.
    """
    rows = x.size // x.shape[-1]
    return rows * weight.w.shape[0] * 4 <= device.EAGER_MAX_BYTES


def _unpack_first(x: mx.array, weight: Weight) -> bool:
    rows = x.size // x.shape[-1]
    return (
        rows >= device.DEQUANTIZE_MIN_ROWS
        and _fits_eager(x, weight)
        and x.dtype == mx.float32
        and device.on_cpu()
        and device.has_slow_cpu_blas()
    )


def _scales_like(x: mx.array, weight: Weight) -> tuple[mx.array, mx.array | None]:
    scales, biases = weight.scales, weight.biases
    assert scales is not None
    if scales.dtype not in (x.dtype, mx.uint8):
        scales = scales.astype(x.dtype)
        biases = None if biases is None else biases.astype(x.dtype)
    return scales, biases


def gather_linear(
    x: mx.array, weight: Weight, slots: mx.array, *, in_order: bool = False
) -> mx.array:
    """Multiply each row by the matrix of its slot; ``in_order``: slots never fall.

    Args:
        x: ``[N, K, I]`` or ``[N, 1, I]``.
        weight: ``[n_slots, O, I]``.
        slots: ``[N, K]``.

    Returns:
        ``[N, K, O]``.
    """
    rows = x[..., None, :]
    q = weight.quantization
    if q is None:
        out = mx.gather_mm(
            rows, weight.w.swapaxes(-1, -2), rhs_indices=slots, sorted_indices=in_order
        )
        return out.squeeze(-2)
    assert weight.scales is not None
    if weight.scales.dtype not in (x.dtype, mx.uint8):
        # MLX would convert the scales of every slot; convert those in use.
        weight = Weight(
            weight.w[slots].flatten(0, 1),
            weight.scales[slots].flatten(0, 1),
            None if weight.biases is None else weight.biases[slots].flatten(0, 1),
            q,
        )
        slots = mx.arange(slots.size, dtype=mx.uint32).reshape(slots.shape)
    scales, biases = _scales_like(x, weight)
    out = mx.gather_qmm(
        rows,
        weight.w,
        scales,
        biases,
        rhs_indices=slots,
        transpose=True,
        group_size=q.group_size,
        bits=q.bits,
        mode=q.mode,
        sorted_indices=in_order,
    )
    return out.squeeze(-2)


def gated_mlp(x: mx.array, experts: ExpertWeights, slot: int) -> mx.array:
    """Apply one expert, down(silu(gate x) * (up x)), to rows ``[M, D]``."""
    act = swiglu(linear(x, experts.gate[slot]), linear(x, experts.up[slot]))
    return linear(act, experts.down[slot])


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return ``silu(gate) * up``."""
    return gate * mx.sigmoid(gate) * up


def dequantize(weight: Weight) -> mx.array:
    """Unpack ``weight`` to dense; float32 where its scales are on a CPU."""
    q = weight.quantization
    assert q is not None and weight.scales is not None
    on_cpu = device.on_cpu() and device.has_slow_cpu_blas()
    if on_cpu and q.mode == "affine" and q.bits in (2, 4, 8):
        try:
            return _table_dequantize(weight)
        except ValueError:  # traced: no values to look up
            pass
    scales, biases = weight.scales, weight.biases
    if on_cpu and q.mode == "affine":
        scales = scales.astype(mx.float32)
        biases = None if biases is None else biases.astype(mx.float32)
    return mx.dequantize(
        weight.w, scales, biases, group_size=q.group_size, bits=q.bits, mode=q.mode
    )


def _table_dequantize(weight: Weight) -> mx.array:
    """Unpack 16 bits at a time through a table: 4 times MLX's speed on a CPU."""
    q = weight.quantization
    assert q is not None and weight.scales is not None and weight.biases is not None
    scales = weight.scales.astype(mx.float32)
    biases = weight.biases.astype(mx.float32)
    mx.eval(weight.w, scales, biases)
    packed = np.ascontiguousarray(np.asarray(weight.w)).view(np.uint16)
    shape = (*scales.shape, q.group_size)
    values = np.take(_table(q.bits), packed, axis=0).reshape(shape)
    values *= np.asarray(scales)[..., None]
    values += np.asarray(biases)[..., None]
    return mx.array(values.reshape(*scales.shape[:-1], math.prod(shape[-2:])))


@functools.cache
def _table(bits: int) -> np.ndarray:
    words = np.arange(1 << 16, dtype=np.uint32)
    shifts = range(0, 16, bits)
    columns = [(words >> shift) & ((1 << bits) - 1) for shift in shifts]
    return np.stack(columns, axis=-1).astype(np.float32)
