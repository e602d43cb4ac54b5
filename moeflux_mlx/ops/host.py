"""Products with matrices on the host: packed values are looked up in tables.

NumPy has neither bfloat16 nor packed values, and MLX unpacks on a CPU value by value,
up to 30 times slower than what follows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from .. import device
from ..weights import Quantization, Weight

# A field is a run of bits with a whole number of values, few enough for a table.
FIELD_BITS = {2: 8, 3: 12, 4: 8, 5: 10, 6: 12, 8: 8}
# A byte of values that are one, and a scale that is one, where scales are bytes.
ONES = {"mxfp4": (0x22, 0x7F), "mxfp8": (0x38, 0x7F), "nvfp4": (0x22, 0x38)}


def host_linear(x: np.ndarray, weight: Weight) -> np.ndarray:
    """Return ``x`` ``[..., I]`` times the transpose of ``weight`` ``[O, I]``."""
    if weight.quantization is None:
        return x @ widen(weight.w).T
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) >= device.UNPACK_MIN_ROWS:
        return _unpacked_product(x, weight)
    (out,) = row_products(rows, [weight[None]], [0] * len(rows))
    return out.reshape(*x.shape[:-1], -1)


def _unpacked_product(x: np.ndarray, weight: Weight) -> np.ndarray:
    step = max(1, device.UNPACKED_BLOCK_BYTES // (4 * x.shape[-1]))
    n_out = weight.w.shape[-2]
    if n_out <= step:
        return x @ unpack(weight).T
    out = np.empty((*x.shape[:-1], n_out), np.float32)
    for start in range(0, n_out, step):
        block = slice(start, start + step)
        np.matmul(x, unpack(weight[block]).T, out=out[..., block])
    return out


def row_products(
    x: np.ndarray,
    stacks: Sequence[Weight],
    slots: Sequence[int] | np.ndarray,
    n_total: int | None = None,
) -> list[np.ndarray]:
    """Multiply row i of ``[K, I]`` by ``stack[slots[i]]`` ``[O, I]`` of each stack.

    Packed values are looked up a block at a time, small enough for the cache, and
    scaled after the products with each group: ``s (q . x) + b sum(x)``.

    Args:
        n_total: how many rows there are in all, if these are some of them: the bits
            of a row are then the same whichever others come with it.

    Returns:
        ``[K, O]`` for each stack; all have the same shape and quantisation.
    """
    q = stacks[0].quantization
    if q is None:
        return [
            np.stack([host_linear(r, stack[s]) for r, s in zip(x, slots, strict=True)])
            for stack in stacks
        ]
    n_out, n_groups = stacks[0].scales.shape[1:]
    slots = np.asarray(slots)
    grouped = x.reshape(len(x), n_groups, q.group_size, 1)
    scales = np.stack([_scales(s.scales[slots], q) for s in stacks])
    out = np.zeros((len(stacks), len(x), n_out), np.float32)
    if q.mode == "affine":
        biases = np.stack([widen(s.biases[slots]) for s in stacks])
        out = (biases @ grouped.sum(2))[..., 0]
    n_values = (n_total or len(x)) * x.shape[1] * len(stacks)
    step = max(8, device.HOST_BLOCK_VALUES // n_values)
    for start in range(0, n_out, step):
        rows = slice(start, min(start + step, n_out))
        packed = [s.w[slots] if step >= n_out else s.w[slots, rows] for s in stacks]
        values = _values(np.concatenate(packed), q)
        shape = (len(stacks), len(x), -1, n_groups, q.group_size)
        dots = (values.reshape(shape).swapaxes(2, 3) @ grouped)[..., 0]
        out[:, :, rows] += np.einsum("skgo,skog->sko", dots, scales[:, :, rows])
    return list(out)


def unpack(weight: Weight) -> np.ndarray:
    """Return a quantised weight of NumPy arrays as float32 ``[..., O, I]``."""
    q = weight.quantization
    assert q is not None
    scales = _scales(weight.scales, q)
    values = _values(weight.w, q).reshape(*scales.shape, q.group_size)
    values *= scales[..., None]
    if weight.biases is not None:
        values += widen(weight.biases)[..., None]
    return values.reshape(*scales.shape[:-1], math.prod(values.shape[-2:]))


def widen(x: Any) -> np.ndarray:
    """Return float32 of float32 or float16 values, or of bfloat16 ones as bits."""
    if x.dtype == np.uint16:
        return np.left_shift(x, 16, dtype=np.uint32).view(np.float32)
    return x.astype(np.float32, copy=False)


def _scales(scales: np.ndarray, q: Quantization) -> np.ndarray:
    return widen(scales) if q.mode == "affine" else _scale_table(q)[scales]


def _values(packed: np.ndarray, q: Quantization) -> np.ndarray:
    """Return packed values, unscaled, as float32; trailing axes are as they come."""
    fields = _fields(packed, q.bits)
    if q.mode == "affine" and q.bits == FIELD_BITS[q.bits]:
        return fields.astype(np.float32)
    return np.take(_value_table(q), fields, axis=0, mode="clip")


def _fields(packed: np.ndarray, bits: int) -> np.ndarray:
    """Cut words into fields ``[..., n]``, bytes where those hold whole values."""
    octets = np.ascontiguousarray(packed).view(np.uint8)
    width = FIELD_BITS[bits]
    if width == 8:
        return octets
    n_bits = math.lcm(width, 8)
    octets = octets.reshape(*octets.shape[:-1], -1, n_bits // 8)
    fields = np.empty((*octets.shape[:-1], n_bits // width), np.uint16)
    for i in range(n_bits // width):
        first, shift = divmod(i * width, 8)
        pair = np.left_shift(octets[..., first + 1], 8, dtype=np.uint16)
        pair |= octets[..., first]
        pair >>= shift
        fields[..., i] = pair & ((1 << width) - 1)
    return fields.reshape(*fields.shape[:-2], -1)


@functools.cache
def _value_table(q: Quantization) -> np.ndarray:
    """Map a field to its values; small enough to stay in the cache."""
    width = FIELD_BITS[q.bits]
    if q.mode != "affine":
        codes = np.arange(256, dtype=np.uint8).reshape(-1, q.group_size * q.bits // 8)
        ones = np.full((len(codes), 1), ONES[q.mode][1], np.uint8)
        return _decoded(codes, ones, q).reshape(256, -1)
    fields = np.arange(1 << width, dtype=np.uint32)
    columns = [(fields >> at) & ((1 << q.bits) - 1) for at in range(0, width, q.bits)]
    return np.stack(columns, axis=-1).astype(np.float32)


@functools.cache
def _scale_table(q: Quantization) -> np.ndarray:
    """Map a scale that is one byte to its value."""
    scales = np.arange(256, dtype=np.uint8)[:, None]
    ones = np.full((256, q.group_size * q.bits // 8), ONES[q.mode][0], np.uint8)
    return _decoded(ones, scales, q)[:, 0].copy()


def _decoded(codes: np.ndarray, scales: np.ndarray, q: Quantization) -> np.ndarray:
    """Let MLX say what bytes mean, so that there is one definition of its modes."""
    words = mx.array(np.ascontiguousarray(codes).view(np.uint32))
    values = mx.dequantize(
        words,
        mx.array(scales),
        group_size=q.group_size,
        bits=q.bits,
        mode=q.mode,
        dtype=mx.float32,
    )
    return np.array(values)
