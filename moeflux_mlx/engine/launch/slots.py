"""Quantised matrices in the slots of a pool, as launches take them.

A matrix is ``Weight.records``: words, scales, biases, and the bias of the product. Each
is ``[n_slots, row]``; in every row the values of the matrix ``[O, I]``, or of the bias
``[O]``, begin at ``base``. Without biases the packed values are 4-bit floats with
scales of one byte: ``mxfp4`` in groups of 32, ``nvfp4`` in groups of 16.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from ...device import SIMD
from ...experts.weights import Quantization, Records, Weight
from .base import Case, Given, dims, normal, require

Matrix = tuple[Records | None, ...]
GROUP_SIZES = (32, 64, 128)
# MLX's modes of 4-bit floats, by group size.
FLOAT_MODES = {32: "mxfp4", 16: "nvfp4"}
# The parts of a matrix, and the prefix of their bases and rows in kernels.
PARTS = {"w": "w", "scales": "s", "biases": "b", "bias": "bias"}


def is_floats(matrix: Matrix) -> bool:
    """Return whether packed values are 4-bit floats."""
    return len(matrix) == len(PARTS) and matrix[2] is None


def check_form(
    name: str, n_in: int, bits: int, group_size: int, *, floats: bool
) -> None:
    """Raise ShapeError unless kernels know the packing of ``n_in`` columns."""
    if floats:
        require("bits", bits == 4, "4 for floats", bits)
        known = group_size in FLOAT_MODES
        require("group_size", known, "32 or 16 for floats", group_size)
    else:
        require("bits", bits in (2, 4, 8), "2, 4 or 8", bits)
        require("group_size", group_size in GROUP_SIZES, "32, 64 or 128", group_size)
    width = max(group_size, SIMD)
    whole = n_in > 0 and n_in % width == 0
    require(name, whole, f"an input width in groups of {width}", n_in)


def check_matrix(
    name: str, matrix: Matrix, n_out: int, n_in: int, bits: int, group_size: int
) -> tuple[int, int, int, int]:
    """Check that a matrix lies within its records; return the records' lengths."""
    parts = isinstance(matrix, tuple) and len(matrix) == len(PARTS)
    require(name, parts, "words, scales, biases and bias", type(matrix).__name__)
    check_form(name, n_in, bits, group_size, floats=is_floats(matrix))
    require(name, n_out > 0, "a positive output width", n_out)
    require(name, n_out * n_in < 1 << 31, "O * I < 2^31", n_out * n_in)
    n_words, n_groups = n_out * n_in * bits // 32, n_out * n_in // group_size
    n_slots, lengths = 0, []
    sizes = zip(PARTS, (n_words, n_groups, n_groups, n_out), strict=True)
    for (part, n), records in zip(sizes, matrix, strict=True):
        if records is None and part in ("biases", "bias"):
            lengths.append(0)
            continue
        where = f"{name} {part}"
        is_records = isinstance(records, Records)
        require(where, is_records, "records", type(records).__name__)
        assert records is not None
        slots, length = dims(where, records.array, 2)
        n_slots = n_slots or slots
        require(where, slots == n_slots, f"{n_slots} slots", slots)
        base = records.base
        inside = isinstance(base, int) and 0 <= base <= length - n
        wanted = f"{n} values of a row of {length}"
        require(where, inside, wanted, f"base {base}")
        lengths.append(length)
    return lengths[0], lengths[1], lengths[2], lengths[3]


def matrix_inputs(
    matrix: Matrix, prefix: str = ""
) -> tuple[dict[str, Any], dict[str, int]]:
    """Return a checked matrix as inputs of a kernel, and ``HAS_X`` of optional ones.

    Args:
        prefix: prefix of their names in the kernel.
    """
    inputs: dict[str, Any] = {}
    for (part, short), records in zip(PARTS.items(), matrix, strict=True):
        inputs[f"{prefix}{part}"] = None if records is None else records.array
        inputs[f"{prefix}{short}_base"] = 0 if records is None else records.base
    there = {
        f"HAS_{prefix}{part}".upper(): int(records is not None)
        for part, records in zip(PARTS, matrix, strict=True)
        if part in ("biases", "bias")
    }
    return inputs, there


def row_lengths(lengths: tuple[int, ...]) -> dict[str, int]:
    """Return the lengths of records as inputs of a kernel."""
    names = (f"{short}_row" for short in PARTS.values())
    return dict(zip(names, lengths, strict=True))


def types_of(matrix: Matrix, dtype: mx.Dtype) -> dict[str, mx.Dtype]:
    """Return the type parameters that no other input determines.

    Args:
        dtype: type of the bias if there is none.
    """
    types = {"S": mx.uint8} if is_floats(matrix) else {}
    return types if matrix[3] is not None else {**types, "A": dtype}


def in_slots(
    name: str, matrix: Matrix, n_out: int, n_in: int, bits: int, group_size: int
) -> dict[str, Any]:
    """Check the matrix of a kernel for packed integers only; return its inputs."""
    lengths = check_matrix(name, matrix, n_out, n_in, bits, group_size)
    plain = matrix[2] is not None and matrix[3] is None
    require(name, plain, "biases of groups and no bias", "others")
    inputs = matrix_inputs(matrix)[0] | row_lengths(lengths)
    unknown = ("bias", "bias_base", "bias_row")
    return {key: value for key, value in inputs.items() if key not in unknown}


def random_matrix(
    case: Case, n_slots: int, shape: tuple[int, int], bits: int
) -> Matrix:
    """Return one random matrix per slot, ``base`` values into its records.

    With size ``floats`` packed values are 4-bit floats; with ``bias`` products have a
    bias.
    """
    rng, base, g = case.rng, case.get("base"), case.g
    n = shape[0] * shape[1]
    n_words, n_groups = n * bits // 32, n // g
    words = rng.integers(0, 1 << 32, (n_slots, n_words + 2 * base), np.uint32)
    width = (n_slots, n_groups + base + base // 2)
    other = case.other
    parts: list[Records | None] = [Records(mx.array(words), base)]
    if case.get("floats"):
        scales = _random_bytes(rng, width, shape[1], g)
        parts += [Records(mx.array(scales), base), None]
    else:
        of_groups = rng.uniform(0.5, 1.0, width) * 2 / ((1 << bits) * shape[1] ** 0.5)
        low = -of_groups * ((1 << bits) - 1) / 2 * rng.uniform(0.8, 1.2, width)
        for values in (of_groups, low):
            array = mx.array(values.astype(np.float32)).astype(other)
            parts.append(Records(array, base))
    added = None
    if case.get("bias"):
        added = Records(normal(rng, other, n_slots, shape[0] + 3 * base), base)
    return (*parts, added)


def _random_bytes(
    rng: np.random.Generator, shape: tuple[int, ...], n_in: int, group_size: int
) -> np.ndarray:
    """Return scales of 4-bit floats that keep products about as large as inputs."""
    exponent = round(np.log2(3 * n_in**0.5))
    if group_size == 32:
        return (127 - exponent + rng.integers(-1, 2, shape)).astype(np.uint8)
    # An e4m3 float: a sign, four bits of exponent, three of mantissa.
    scales = rng.integers(1, 8 * max(1, 8 - exponent), shape)
    return (scales | 128 * (rng.integers(0, 4, shape) == 0)).astype(np.uint8)


def in_slot(
    given: Given, matrix: Matrix, slot: int, n_in: int, bits: int | None = None
) -> Weight:
    """Return the matrix ``[O, I]`` of one slot as a ``Weight`` with float32 scales."""
    bits, group_size = given.bits if bits is None else bits, given.group_size
    n_groups = n_in // group_size
    widths = (n_in * bits // 32, n_groups, n_groups, 1)
    w, scales, biases, bias = (
        None
        if r is None
        else r.array[slot, r.base : r.base + given.n_out * width].reshape(-1, width)
        for r, width in zip(matrix, widths, strict=True)
    )
    assert scales is not None
    added = None if bias is None else bias.reshape(-1).astype(mx.float32)
    if biases is None:
        form = Quantization(bits, group_size, FLOAT_MODES[group_size])
        return Weight(w, scales, None, form, bias=added)
    wide = scales.astype(mx.float32), biases.astype(mx.float32)
    return Weight(w, *wide, Quantization(bits, group_size), bias=added)


def numbers(x: mx.array) -> list[int]:
    """Return an array's integers as a list, for references that loop over experts."""
    return [int(n) for n in np.array(x).reshape(-1)]
