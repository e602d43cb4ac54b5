"""Quantised matrices in the slots of a pool: the common ground of launches over them.

A matrix is ``Weight.records``: words, scales and biases, each ``[n_slots, row]`` with
the matrix ``[O, I]`` from ``base`` on in every row.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from ...experts.weights import Quantization, Records, Weight
from .base import Case, Given, dims, require

Matrix = tuple[Records, Records, Records]


def check_matrix(
    name: str, matrix: Matrix, n_out: int, n_in: int, bits: int, group_size: int
) -> tuple[int, int, int]:
    """Check that the matrix lies within every record; return the records' lengths."""
    require("bits", bits in (2, 4, 8), "2, 4 or 8", bits)
    require("group_size", group_size in (32, 64, 128), "32, 64 or 128", group_size)
    whole = n_in > 0 and n_in % group_size == 0
    require(name, whole, f"an input width in groups of {group_size}", n_in)
    require(name, n_out > 0, "a positive output width", n_out)
    require(name, n_out * n_in < 1 << 31, "O * I < 2^31", n_out * n_in)
    require(name, len(matrix) == 3, "words, scales and biases", len(matrix))
    n_words, n_groups = n_out * n_in * bits // 32, n_out * n_in // group_size
    n_slots, lengths = 0, []
    sizes = ("w", n_words), ("scales", n_groups), ("biases", n_groups)
    for (part, n), records in zip(sizes, matrix, strict=True):
        where = f"{name} {part}"
        require(where, isinstance(records, Records), "records", type(records).__name__)
        slots, length = dims(where, records.array, 2)
        n_slots = n_slots or slots
        require(where, slots == n_slots, f"{n_slots} slots", slots)
        base = records.base
        inside = isinstance(base, int) and 0 <= base <= length - n
        wanted = f"{n} values of a row of {length}"
        require(where, inside, wanted, f"base {base}")
        lengths.append(length)
    return lengths[0], lengths[1], lengths[2]


def in_slots(
    name: str, matrix: Matrix, n_out: int, n_in: int, bits: int, group_size: int
) -> dict[str, Any]:
    """Check a kernel's one matrix as ``check_matrix`` does; return its inputs."""
    w_row, s_row, b_row = check_matrix(name, matrix, n_out, n_in, bits, group_size)
    w, scales, biases = matrix
    return {
        "w": w.array,
        "scales": scales.array,
        "biases": biases.array,
        "w_base": w.base,
        "s_base": scales.base,
        "b_base": biases.base,
        "w_row": w_row,
        "s_row": s_row,
        "b_row": b_row,
    }


def random_matrix(
    case: Case, n_slots: int, shape: tuple[int, int], bits: int
) -> Matrix:
    """Return a matrix a slot, size ``base`` values from the start of its records."""
    rng, base = case.rng, case.get("base")
    n = shape[0] * shape[1]
    n_words, n_groups = n * bits // 32, n // case.g
    words = rng.integers(0, 1 << 32, (n_slots, n_words + 2 * base), np.uint32)
    scales = rng.uniform(0.5, 1.0, (n_slots, n_groups + base + base // 2))
    scales *= 2 / ((1 << bits) * shape[1] ** 0.5)
    biases = -scales * ((1 << bits) - 1) / 2 * rng.uniform(0.8, 1.2, scales.shape)
    return (
        Records(mx.array(words), base),
        Records(mx.array(scales.astype(np.float32)).astype(case.other), base),
        Records(mx.array(biases.astype(np.float32)).astype(case.other), base),
    )


def in_slot(
    given: Given, matrix: Matrix, slot: int, n_in: int, bits: int | None = None
) -> Weight:
    """Return one slot's matrix ``[O, I]`` as Ops have it, its scales in float32."""
    bits, group_size = given.bits if bits is None else bits, given.group_size
    widths = (n_in * bits // 32, n_in // group_size, n_in // group_size)
    w, scales, biases = (
        r.array[slot, r.base : r.base + given.n_out * width].reshape(-1, width)
        for r, width in zip(matrix, widths, strict=True)
    )
    wide = scales.astype(mx.float32), biases.astype(mx.float32)
    return Weight(w, *wide, Quantization(bits, group_size))


def numbers(x: mx.array) -> list[int]:
    """Return an array's integers, for references that go expert by expert."""
    return [int(n) for n in np.array(x).reshape(-1)]
