"""Products with quantised matrices on the host.

Packed values are cut out of bytes or looked up in tables. NumPy has neither bfloat16
nor packed values, and on a CPU MLX unpacks value by value, up to 30 times slower.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ... import device
from ...experts.weights import Quantization, Weight

# Bits of a field: it holds a whole number of values, few enough for a table.
FIELD_BITS = {1: 8, 2: 8, 3: 12, 4: 8, 5: 10, 6: 12, 8: 8}
# A byte of values of 1.0, and the byte of a scale of 1.0, by mode.
ONES = {"mxfp4": (0x22, 0x7F), "mxfp8": (0x38, 0x7F), "nvfp4": (0x22, 0x38)}


def host_linear(x: np.ndarray, weight: Weight) -> np.ndarray:
    """Return ``x`` ``[..., I]`` times the transpose of ``weight`` ``[O, I]``."""
    if weight.quantization is None:
        return x @ widen(weight.w).T
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) >= device.UNPACK_MIN_ROWS:
        out = _unpacked_product(rows, weight)
    else:
        (out,) = row_products(rows, [weight[None]], [0] * len(rows))
    return out.reshape(*x.shape[:-1], -1)


def _unpacked_product(x: np.ndarray, weight: Weight) -> np.ndarray:
    """Multiply block by block, each small enough for the cache once unpacked."""
    n_out, n_in = weight.w.shape[0], x.shape[1]
    step = max(8, device.HOST_BLOCK_VALUES // n_in)
    out = np.empty((len(x), n_out), np.float32)
    for start in range(0, n_out, step):
        block = weight[start : start + step]
        values = unpack(block, _scratch.array((len(block.w), n_in), np.float32))
        np.matmul(x, values.T, out=out[:, start : start + step])
    return out


def row_products(
    x: np.ndarray, stacks: Sequence[Weight], slots: Sequence[int] | np.ndarray
) -> list[np.ndarray]:
    """Multiply row i of ``[K, I]`` by ``stack[slots[i]]`` ``[O, I]`` of each stack.

    Products of a quantisation group are scaled afterwards: ``s (q . x) + b sum(x)``.
    Several small matrices form one block; threads share the blocks of large ones. The
    bits of a row do not depend on the other rows.

    Args:
        stacks: matrices of the same shape and quantisation.

    Returns:
        ``[K, O]`` for each stack.
    """
    q = stacks[0].quantization
    if q is None:
        return [
            np.stack([host_linear(r, stack[s]) for r, s in zip(x, slots, strict=True)])
            for stack in stacks
        ]
    n_out, n_groups = stacks[0].scales.shape[1:]
    ids = [int(slot) for slot in slots]
    grouped = x.reshape(len(x), n_groups, q.group_size, 1)
    sums, n_planes = grouped.sum(2), _n_planes(q)
    partners = [grouped[:, :, i::n_planes] for i in range(n_planes)]
    out = np.empty((len(stacks), len(x), n_out), np.float32)

    def multiply(block: Block) -> None:
        chosen, which = stacks[block.stacks], block.which
        picked = ids[which]
        at = picked if len(picked) > 1 else slice(picked[0], picked[0] + 1)
        scales = _stack(_scales(s.scales[at, block.rows], q) for s in chosen)
        planes = _planes(_stack(s.w[at, block.rows] for s in chosen), q)
        shape = (*scales.shape, q.group_size // n_planes)
        dots = sum(
            plane.reshape(shape).swapaxes(2, 3) @ partner[which]
            for plane, partner in zip(planes, partners, strict=True)
        )
        product = np.einsum("skgo,skog->sko", dots[..., 0], scales)
        if q.mode == "affine":
            biases = _stack(widen(s.biases[at, block.rows]) for s in chosen)
            product += (biases @ sums[which])[..., 0]
        out[block.stacks, which, block.rows] = product

    blocks = [*_blocks(len(stacks), len(x), n_out, x.shape[1] // n_planes)]
    if out.size * x.shape[1] < device.HOST_THREADED_VALUES:
        for block in blocks:
            multiply(block)
    else:
        list(_threads().map(multiply, blocks))
    return list(out)


class Block(NamedTuple):
    """A block of several products: its stacks, the rows of ``x``, and the outputs."""

    stacks: slice
    which: slice
    rows: slice


def _blocks(n_stacks: int, n_rows: int, n_out: int, n_in: int) -> Iterator[Block]:
    """Divide products into blocks whose values, ``n_in`` per row, fit the cache."""
    step = max(8, device.HOST_BLOCK_VALUES // n_in)
    if n_stacks * n_out <= step:
        together = step // (n_stacks * n_out)
        for first in range(0, n_rows, together):
            which = slice(first, first + together)
            yield Block(slice(n_stacks), which, slice(n_out))
        return
    for stack, first in itertools.product(range(n_stacks), range(n_rows)):
        for start in range(0, n_out, step):
            one = slice(stack, stack + 1), slice(first, first + 1)
            yield Block(*one, slice(start, start + step))


def _stack(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """Stack arrays; do not copy a single one."""
    found = [*arrays]
    return found[0][None] if len(found) == 1 else np.stack(found)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(device.n_cores(), thread_name_prefix="moeflux-product")


if hasattr(os, "register_at_fork"):
    # The threads do not exist in a forked child.
    os.register_at_fork(after_in_child=_threads.cache_clear)


class Scratch(threading.local):
    """Memory that each thread reuses: new memory costs a page fault per page."""

    def __init__(self) -> None:
        self._held: dict[type, np.ndarray] = {}

    def array(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """Return an uninitialised array; the next one of its type reuses the memory."""
        n, held = math.prod(shape), self._held.get(dtype)
        if held is None or held.size < n:
            held = self._held[dtype] = np.empty(n, dtype)
        return held[:n].reshape(shape)


_scratch = Scratch()


def _n_planes(q: Quantization) -> int:
    """Return the number of planes that ``_planes`` yields: the values in a byte."""
    return 8 // q.bits if q.mode == "affine" and FIELD_BITS[q.bits] == 8 else 1


def _planes(packed: np.ndarray, q: Quantization) -> Iterator[np.ndarray]:
    """Yield packed values, unscaled, as float32: plane i of n has values i, i + n, ...

    All planes share memory that the thread's next product reuses.
    """
    fields, n_planes = _fields(packed, q.bits), _n_planes(q)
    if n_planes == 1:
        shape = (*packed.shape[:-1], packed.shape[-1] * 32 // q.bits)
        values = _scratch.array(shape, np.float32)
        _look_up(fields, q, values)
        yield values
        return
    values = _scratch.array(fields.shape, np.float32)
    octets = _scratch.array(fields.shape, np.uint8)
    for i in range(n_planes):
        np.right_shift(fields, i * q.bits, out=octets)
        np.bitwise_and(octets, (1 << q.bits) - 1, out=octets)
        np.copyto(values, octets)
        yield values


def unpack(weight: Weight, out: np.ndarray | None = None) -> np.ndarray:
    """Return a quantised weight of NumPy arrays as float32 ``[..., O, I]``.

    Args:
        out: write to this array of that shape.
    """
    q = weight.quantization
    assert q is not None
    scales = _scales(weight.scales, q)
    shape = (*scales.shape[:-1], scales.shape[-1] * q.group_size)
    out = np.empty(shape, np.float32) if out is None else out
    _look_up(_fields(weight.w, q.bits), q, out)
    groups = out.reshape(*scales.shape, q.group_size)
    groups *= scales[..., None]
    if weight.biases is not None:
        groups += widen(weight.biases)[..., None]
    return out


def widen(x: Any) -> np.ndarray:
    """Convert float32, float16, or the uint16 bits of bfloat16 to float32."""
    if x.dtype == np.uint16:
        return np.left_shift(x, 16, dtype=np.uint32).view(np.float32)
    return x.astype(np.float32, copy=False)


def _scales(scales: np.ndarray, q: Quantization) -> np.ndarray:
    return widen(scales) if q.mode == "affine" else _scale_table(q)[scales]


def _look_up(fields: np.ndarray, q: Quantization, out: np.ndarray) -> None:
    """Write the unscaled values of fields to ``out`` in order."""
    if q.mode == "affine" and q.bits == FIELD_BITS[q.bits]:
        np.copyto(out, fields.reshape(out.shape))
        return
    table = _value_table(q)
    values = out.reshape(*fields.shape, table.shape[1])
    np.take(table, fields, axis=0, mode="clip", out=values)


def _fields(packed: np.ndarray, bits: int) -> np.ndarray:
    """Cut words into fields ``[..., n]``: bytes, where these hold whole values."""
    octets = np.ascontiguousarray(packed).view(np.uint8)
    width = FIELD_BITS[bits]
    if width == 8:
        return octets
    n_bits = math.lcm(width, 8)
    octets = octets.reshape(*octets.shape[:-1], -1, n_bits // 8)
    fields = np.empty((*octets.shape[:-1], n_bits // width), np.uint16)
    for i in range(n_bits // width):
        # These widths and offsets keep every field within two bytes.
        first, shift = divmod(i * width, 8)
        pair = np.left_shift(octets[..., first + 1], 8, dtype=np.uint16)
        pair |= octets[..., first]
        pair >>= shift
        fields[..., i] = pair & ((1 << width) - 1)
    return fields.reshape(*fields.shape[:-2], -1)


@functools.cache
def _value_table(q: Quantization) -> np.ndarray:
    """Return the table from a field to its values; it fits the cache."""
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
    """Return the table from a scale of one byte to its value."""
    scales = np.arange(256, dtype=np.uint8)[:, None]
    ones = np.full((256, q.group_size * q.bits // 8), ONES[q.mode][0], np.uint8)
    return _decoded(ones, scales, q)[:, 0].copy()


def _decoded(codes: np.ndarray, scales: np.ndarray, q: Quantization) -> np.ndarray:
    """Unpack bytes by MLX, which thus alone defines its modes."""
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
