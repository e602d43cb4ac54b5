"""Launches of ``kernels/quant.metal``.

Letters: T tokens, I and O input and output width, G quantisation group, K products. A
quantised matrix ``[O, I]`` is words ``[O, I * bits / 32]`` with scales and biases
``[O, I / G]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ...device import SIMD
from ...experts.weights import Quantization, Weight
from ..ops.functions import linear, rms_norm, swiglu
from .base import (
    Case,
    Given,
    Launch,
    ceil_div,
    dims,
    expect,
    kernel,
    normal,
    one_row,
    require,
    require_part,
)
from .slots import (
    FLOAT_MODES,
    GROUP_SIZES,
    Matrix,
    check_form,
    in_slot,
    in_slots,
    numbers,
    random_matrix,
)

# Columns of the input that the v3 kernels keep in threadgroup memory.
CACHED = 4096


def check_rows(
    w: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    n_in: int,
    bits: int,
    group: int,
) -> int:
    """Check a matrix and return its rows; one without biases has 4-bit floats."""
    check_form("x", n_in, bits, group, floats=biases is None)
    n_out = dims("w", w, 2)[0]
    expect("w", w, (n_out, n_in * bits // 32))
    expect("scales", scales, (n_out, n_in // group))
    if biases is not None:
        expect("biases", biases, (n_out, n_in // group))
    return n_out


def stored(
    group: int, w: mx.array, scales: mx.array, biases: mx.array | None, bits: int
) -> Weight:
    """Return a matrix as a ``Weight`` with float32 scales, unless these are bytes."""
    if biases is None:
        return Weight(w, scales, None, Quantization(bits, group, FLOAT_MODES[group]))
    wide = scales.astype(mx.float32), biases.astype(mx.float32)
    return Weight(w, *wide, Quantization(bits, group))


def stored_in(given: Given, bits: int | None = None) -> Weight:
    """Return the only matrix of a launch as a ``Weight``."""
    bits = given.bits if bits is None else bits
    return stored(given.group_size, given.w, given.scales, given.biases, bits)


def quantised(
    case: Case, o: int, i: int, bits: int, dtype: mx.Dtype | None = None
) -> tuple[mx.array, mx.array, mx.array]:
    """Return a random matrix ``[O, I]`` in groups of ``g``, scales in weights' type."""
    dense = normal(case.rng, mx.float32, o, i, scale=i**-0.5)
    w, scales, biases = mx.quantize(dense, group_size=case.g, bits=bits)
    dtype = dtype or case.other
    return w, scales.astype(dtype), biases.astype(dtype)


# One token.
def _matvec_reference(bits: int) -> Any:
    def reference(given: Given) -> mx.array:
        return linear(given.wide.x, stored_in(given, bits)).astype(given.x.dtype)

    return reference


def _matvec_sample(bits: int, n_tokens: bool) -> Any:
    def sample(case: Case) -> tuple[Any, ...]:
        x = case.normal(case.t, case.i) if n_tokens else case.normal(case.i)
        return x, *quantised(case, case.o, case.i, bits), case.g

    return sample


ONE_TOKEN = [
    dict(i=32, o=1, g=32, s=0),
    dict(i=192, o=11, g=64, s=1),
    dict(i=2176, o=9, g=128, s=1),
    dict(i=96, o=37, g=32, s=0),
]
LONG = [*ONE_TOKEN[:2], dict(i=4224, o=3, g=128, s=1)]
LARGE = dict(i=4096, o=14336, g=64, s=0)
MANY = [{**sizes, "t": t} for sizes, t in zip(ONE_TOKEN, (1, 3, 2, 7), strict=True)]


def _one_token(bits: int, sizes: Any = ONE_TOKEN) -> Any:
    return kernel(
        reference=_matvec_reference(bits),
        sample=_matvec_sample(bits, n_tokens=False),
        sizes=sizes,
        large=LARGE,
        varying=(),
    )


def _n_tokens(bits: int) -> Any:
    return kernel(
        reference=_matvec_reference(bits),
        sample=_matvec_sample(bits, n_tokens=True),
        sizes=MANY,
        large={**LARGE, "t": 4},
        varying=(),
    )


def _matvec(
    name: str,
    bits: int,
    arrays: tuple[mx.array, mx.array, mx.array, mx.array],
    group_size: int,
    per_group: int,
    n_threads: int,
    max_in: int | None = CACHED,
) -> Launch:
    """Return the launch for one token: ``n_threads`` for every ``per_group`` rows."""
    x, w, scales, biases = arrays
    (n_in,) = dims("x", x, 1)
    require("x", max_in is None or n_in <= max_in, f"a width up to {max_in}", n_in)
    n_out = check_rows(w, scales, biases, n_in, bits, group_size)
    inputs: dict[str, Any] = {"x": x, "w": w, "scales": scales, "biases": biases}
    inputs |= {"n_in": n_in}
    if name != "dequant_matvec_4bit_fast":
        inputs["n_out"] = n_out
    return Launch(
        name,
        inputs,
        {"out": (n_out,)},
        (n_threads * ceil_div(n_out, per_group), 1, 1),
        (n_threads, 1, 1),
        {"G": group_size},
    )


def _matvec_n_tokens(
    name: str,
    bits: int,
    arrays: tuple[mx.array, mx.array, mx.array, mx.array],
    group_size: int,
    per_group: int,
    n_threads: int,
    max_in: int | None = CACHED,
) -> Launch:
    """Return the launch for T tokens: ``n_threads`` for every ``per_group`` rows."""
    x, w, scales, biases = arrays
    n_tokens, n_in = dims("x", x, 2)
    require("x", max_in is None or n_in <= max_in, f"a width up to {max_in}", n_in)
    n_out = check_rows(w, scales, biases, n_in, bits, group_size)
    inputs: dict[str, Any] = {"x": x, "w": w, "scales": scales, "biases": biases}
    return Launch(
        name,
        {**inputs, "n_in": n_in, "n_out": n_out},
        {"out": (n_tokens, n_out)},
        (n_threads * ceil_div(n_out, per_group), n_tokens, 1),
        (n_threads, 1, 1),
        {"G": group_size},
    )


@_one_token(4, LONG)
def dequant_matvec_4bit(
    x: mx.array, w: mx.array, scales: mx.array, biases: mx.array, group_size: int
) -> Launch:
    """``W x`` of ``[I]``, one thread per row: the readable baseline."""
    name, arrays = "dequant_matvec_4bit", (x, w, scales, biases)
    return _matvec(name, 4, arrays, group_size, 64, 64, None)


@_one_token(4, LONG)
def dequant_matvec_4bit_fast(
    x: mx.array, w: mx.array, scales: mx.array, biases: mx.array, group_size: int
) -> Launch:
    """``W x`` of ``[I]`` of any length."""
    name, arrays = "dequant_matvec_4bit_fast", (x, w, scales, biases)
    return _matvec(name, 4, arrays, group_size, 1, 64, None)


@_one_token(4)
def dequant_matvec_4bit_v3(
    x: mx.array, w: mx.array, scales: mx.array, biases: mx.array, group_size: int
) -> Launch:
    """``W x`` of ``[I]``, I at most 4096."""
    name, arrays = "dequant_matvec_4bit_v3", (x, w, scales, biases)
    return _matvec(name, 4, arrays, group_size, 8, 256)


# For a matrix of at least so many rows, the rows of a threadgroup. More rows read x
# less often; enough threadgroups must remain for every core.
ROWS_FROM = ((65536, 64), (8192, 32), (1, 16))
ROWS = [
    dict(i=32, o=1, g=32, s=0),
    dict(i=32, o=2051, g=32, s=1),
    dict(i=576, o=12, g=64, s=1),
    dict(i=2176, o=9, g=128, s=1),
    dict(i=8320, o=19, g=64, s=0),
    dict(i=32, o=8195, g=32, s=0),
    dict(i=32, o=65537, g=32, s=0),
    dict(i=1024, o=8195, g=64, s=0),
]


@_one_token(4, ROWS)
def dequant_matvec_4bit_v4(
    x: mx.array, w: mx.array, scales: mx.array, biases: mx.array, group_size: int
) -> Launch:
    """``W x`` of ``[I]`` of any width, with 128-bit loads."""
    (n_in,) = dims("x", x, 1)
    n_out = check_rows(w, scales, biases, n_in, 4, group_size)
    sizes = _rows_and_words(n_in, n_out)
    return Launch(
        "dequant_matvec_4bit_v4",
        {
            "x": x,
            "w": w,
            "scales": scales,
            "biases": biases,
            "n_in": n_in,
            "n_out": n_out,
        },
        {"out": (n_out,)},
        (128 * ceil_div(n_out, sizes["ROWS"]), 1, 1),
        (128, 1, 1),
        {"G": group_size, **sizes},
    )


def _rows_and_words(n_in: int, n_out: int) -> dict[str, int]:
    """Return the rows of a threadgroup and the words of a load, by a matrix's shape."""
    rows = next(rows for least, rows in ROWS_FROM if n_out >= least)
    # The widest load that leaves no lane idle.
    words = next(n for n in (4, 2, 1) if n == 1 or n_in >= 8 * n * SIMD)
    return {"ROWS": rows, "WORDS": words}


def _added(given: Given) -> mx.array:
    product = linear(given.wide.x, stored_in(given)).reshape(given.residual.shape)
    if given.bias is not None:
        product = product + given.wide.bias
    return (given.wide.residual + product).astype(given.x.dtype)


def _some_added(case: Case) -> tuple[Any, ...]:
    bits = case.get("bits", 4)
    parts = quantised(case, case.o, case.i, bits)
    given = case.normal(case.i), *parts, case.normal(case.o), bits, case.g
    return (*given, case.normal(case.o)) if case.get("bias") else given


@kernel(
    reference=_added,
    sample=_some_added,
    sizes=[
        dict(i=32, o=1, g=32, s=0),
        dict(i=32, o=2051, g=32, s=1, bits=2),
        dict(i=576, o=12, g=64, s=1, bits=8),
        dict(i=8320, o=9, g=128, s=1),
        dict(i=32, o=8195, g=32, s=0),
        dict(i=1088, o=12, g=64, s=0),
        dict(i=64, o=19, g=32, s=1, bias=1),
    ],
    large=dict(i=4096, o=2048, g=64, s=0),
    varying=(),
)
def matvec_residual(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array,
    residual: mx.array,
    bits: int,
    group_size: int,
    bias: mx.array | None = None,
) -> Launch:
    """``residual + W x + bias``: rows ``[I]`` and ``[O]``, or both ``[1, n]``."""
    n_in = one_row("x", x)
    n_out = check_rows(w, scales, biases, n_in, bits, group_size)
    one_row("residual", residual, n_out)
    if bias is not None:
        expect("bias", bias, (n_out,))
    inputs: dict[str, Any] = {"x": x, "w": w, "scales": scales, "biases": biases}
    sizes = _rows_and_words(n_in, n_out)
    return Launch(
        "matvec_residual",
        {**inputs, "residual": residual, "bias": bias, "n_in": n_in, "n_out": n_out},
        {"out": tuple(residual.shape)},
        (128 * ceil_div(n_out, sizes["ROWS"]), 1, 1),
        (128, 1, 1),
        {"BITS": bits, "G": group_size, "HAS_BIAS": int(bias is not None), **sizes},
    )


# Words, scales, biases and bits.
Product = tuple[mx.array, mx.array, mx.array, int]
MAX_PRODUCTS = 2
# Parts of a row begin at multiples of this many values, for accesses of 16 bytes.
ALIGNED = 8


def norm_row(n_in: int, rows: Sequence[int]) -> list[int]:
    """Return the start of each part of the row of ``norm_matvecs``, and its width.

    Args:
        n_in: width of the norm, which is the last part.
        rows: rows of each matrix, the widths of the other parts.
    """
    starts = [0]
    for n in (*rows, n_in):
        starts.append(ALIGNED * ceil_div(starts[-1] + n, ALIGNED))
    return [*starts[:-1], starts[-2] + n_in]


def _norm_products(given: Given) -> mx.array:
    wide, parts = given.wide, []
    normed = rms_norm(wide.x.reshape(-1)[: wide.norm.size], wide.norm, wide.eps)
    for product, bias in zip(given.products, given.added, strict=False):
        part = linear(normed, stored(given.group_size, *product))
        parts.append(part if bias is None else part + bias.astype(mx.float32))
    *starts, width = norm_row(normed.size, [part.size for part in parts])
    out = mx.zeros(width)
    for start, part in zip(starts, (*parts, normed), strict=True):
        out[start : start + part.size] = part
    return out.reshape(*given.x.shape[:-1], -1).astype(given.x.dtype)


def _some_norm_products(case: Case) -> tuple[Any, ...]:
    products = [
        (*quantised(case, rows, case.i, bits), bits)
        for rows, bits in zip(case.o, case.bits, strict=True)
    ]
    weight = 1 + normal(case.rng, case.other, case.i, scale=0.1)
    width = case.i + case.get("more")
    x = case.normal(1, width) if case.s else case.normal(width)
    given = x, weight, products, 0.05, case.g
    bias = case.get("bias", ())
    each = zip(case.o, bias, strict=False)
    added = [case.normal(rows) if there else None for rows, there in each]
    return (*given, added) if bias else given


@kernel(
    reference=_norm_products,
    sample=_some_norm_products,
    sizes=[
        dict(i=32, o=(1,), bits=(4,), g=32, s=0),
        dict(i=32, o=(2051, 37), bits=(4, 2), g=32, s=0),
        dict(i=192, o=(16, 32), bits=(8, 4), g=64, s=1),
        dict(i=2176, o=(9, 2), bits=(4, 8), g=128, s=1),
        dict(i=8320, o=(3, 19), bits=(4, 8), g=64, s=0),
        dict(i=32, o=(8195, 1), bits=(2, 4), g=32, s=0),
        dict(i=96, o=(19, 5), bits=(4, 8), g=32, s=0, bias=(1, 1)),
        dict(i=64, o=(35, 7), bits=(4, 4), g=64, s=1, bias=(0, 1)),
        dict(i=64, o=(18,), bits=(8,), g=64, s=1, bias=(1,), more=5),
    ],
    large=dict(i=2048, o=(12352,), bits=(4,), g=64, s=0),
    varying=(),
)
def norm_matvecs(
    x: mx.array,
    norm: mx.array,
    products: Sequence[Product],
    eps: float,
    group_size: int,
    added: Sequence[mx.array | None] = (None,) * MAX_PRODUCTS,
) -> Launch:
    """A row of one or two products ``[O_i]`` with the norm of ``[I]``, then the norm.

    ``norm_row`` returns where each part begins; values between parts are 0. A row
    ``[1, I]`` gives ``[1, width]``. ``x`` may be longer: it then begins with the I
    values. ``added`` has a bias ``[O_i]`` or None for each product.
    """
    (n_in,) = dims("norm", norm, 1)
    require_part("x", 0, n_in, one_row("x", x))
    few = isinstance(products, list | tuple) and 1 <= len(products) <= MAX_PRODUCTS
    require("products", few, f"1 to {MAX_PRODUCTS} matrices", products)
    each = len(products) <= len(added) <= MAX_PRODUCTS
    require("added", each, f"{len(products)} biases or None", added)
    inputs: dict[str, Any] = {"x": x, "norm": norm, "eps": eps, "n_in": n_in}
    rows: list[int] = []
    template = {"G": group_size}
    for i, product in enumerate([*products, products[-1]][:MAX_PRODUCTS]):
        four = isinstance(product, tuple) and len(product) == 4
        require("products", four, "words, scales, biases and bits", product)
        n_out = check_rows(*product[:3], n_in, product[3], group_size)
        rows.append(n_out if i < len(products) else 0)
        inputs |= {f"w{i}": product[0], f"n{i}": rows[-1]}
        inputs |= {f"scales{i}": product[1], f"biases{i}": product[2]}
        bias = inputs[f"bias{i}"] = added[i] if i < len(products) else None
        if bias is not None:
            expect("added", bias, (n_out,))
        template |= {f"BITS{i}": product[3], f"HAS_BIAS{i}": int(bias is not None)}
    _, inputs["at1"], inputs["at_normed"], width = norm_row(n_in, rows)
    sizes = _rows_and_words(n_in, sum(rows))
    n_groups = 1 + sum(ceil_div(n, sizes["ROWS"]) for n in rows)
    return Launch(
        "norm_matvecs",
        inputs,
        {"out": (*x.shape[:-1], width)},
        (128 * n_groups, 1, 1),
        (128, 1, 1),
        {**template, **sizes},
    )


def _norm_swiglu(given: Given) -> mx.array:
    wide = given.wide
    normed = rms_norm(wide.x.reshape(-1)[: wide.norm.size], wide.norm, wide.eps)
    rounded = linear(normed, stored_in(given)).astype(given.x.dtype)
    out = swiglu(*mx.split(rounded.astype(mx.float32), 2))
    return out.reshape(*given.x.shape[:-1], -1).astype(given.x.dtype)


def _some_norm_swiglu(case: Case) -> tuple[Any, ...]:
    bits, width = case.get("bits", 4), case.i + case.get("more")
    weight = 1 + normal(case.rng, case.other, case.i, scale=0.1)
    x = case.normal(1, width) if case.s else case.normal(width)
    parts = quantised(case, 2 * case.o, case.i, bits)
    return x, weight, *parts, 0.05, bits, case.g


@kernel(
    reference=_norm_swiglu,
    sample=_some_norm_swiglu,
    sizes=[
        dict(i=32, o=1, g=32, s=0),
        dict(i=32, o=1029, g=32, s=0, bits=2),
        dict(i=192, o=35, g=64, s=1, bits=8),
        dict(i=2176, o=9, g=128, s=1, more=5),
        dict(i=8320, o=19, g=64, s=0),
        dict(i=1024, o=4099, g=64, s=0),
        dict(i=32, o=32801, g=32, s=0),
        dict(i=576, o=18, g=64, s=1),
    ],
    large=dict(i=4096, o=10944, g=64, s=0),
    varying=(),
)
def norm_gate_up_swiglu(
    x: mx.array,
    norm: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array,
    eps: float,
    bits: int,
    group_size: int,
) -> Launch:
    """``silu(Wg y) * (Wu y)`` ``[O]``, where y is the norm of ``[I]``.

    The matrix ``[2 O, I]`` holds the rows of Wg, then those of Wu. A row ``[1, I]``
    gives ``[1, O]``. ``x`` may be longer: it then begins with the I values.
    """
    (n_in,) = dims("norm", norm, 1)
    require_part("x", 0, n_in, one_row("x", x))
    n_rows = check_rows(w, scales, biases, n_in, bits, group_size)
    require("w", n_rows % 2 == 0, "as many rows of gate as of up", n_rows)
    n_out = n_rows // 2
    sizes = _rows_and_words(n_in, n_rows)
    inputs: dict[str, Any] = {"x": x, "norm": norm, "w": w, "scales": scales}
    return Launch(
        "norm_gate_up_swiglu",
        {**inputs, "biases": biases, "eps": eps, "n_in": n_in, "n_out": n_out},
        {"out": (*x.shape[:-1], n_out)},
        (256 * ceil_div(n_out, sizes["ROWS"]), 1, 1),
        (256, 1, 1),
        {"BITS": bits, "G": group_size, **sizes},
    )


@_one_token(4)
def dequant_matvec_4bit_v5(
    x: mx.array, w: mx.array, scales: mx.array, biases: mx.array, group_size: int
) -> Launch:
    """``W x`` of ``[I]``, I at most 4096, with a lookup table per group."""
    name, arrays = "dequant_matvec_4bit_v5", (x, w, scales, biases)
    return _matvec(name, 4, arrays, group_size, 8, 256)


@_one_token(8)
def dequant_matvec_8bit_v3(
    x: mx.array, w: mx.array, scales: mx.array, biases: mx.array, group_size: int
) -> Launch:
    """``W x`` of ``[I]`` in 8 bits, I at most 4096."""
    name, arrays = "dequant_matvec_8bit_v3", (x, w, scales, biases)
    return _matvec(name, 8, arrays, group_size, 8, 256)


@_n_tokens(8)
def dequant_matvec_8bit_v3_n_tokens(
    x: mx.array, w: mx.array, scales: mx.array, biases: mx.array, group_size: int
) -> Launch:
    """``x W^T`` of ``[T, I]``, bit for bit ``dequant_matvec_8bit_v3`` at T = 1."""
    name, arrays = "dequant_matvec_8bit_v3_n_tokens", (x, w, scales, biases)
    return _matvec_n_tokens(name, 8, arrays, group_size, 8, 256)


@_one_token(2, LONG)
def dequant_matvec_2bit(
    x: mx.array, w: mx.array, scales: mx.array, biases: mx.array, group_size: int
) -> Launch:
    """``W x`` of ``[I]`` in 2 bits."""
    name, arrays = "dequant_matvec_2bit", (x, w, scales, biases)
    return _matvec(name, 2, arrays, group_size, 4, 128, None)


# Several matrices.
Parts = tuple[mx.array, mx.array, mx.array]


def _gate_up(given: Given) -> mx.array:
    gate, up = (stored(given.group_size, *(*m, 4)) for m in (given.gate, given.up))
    x = given.wide.x
    return swiglu(linear(x, gate), linear(x, up)).astype(given.x.dtype)


def _some_gate_up(case: Case) -> tuple[Any, ...]:
    gate, up = (quantised(case, case.o, case.i, 4) for _ in range(2))
    return case.normal(case.i), gate, up, case.g


@kernel(
    reference=_gate_up, sample=_some_gate_up, sizes=ONE_TOKEN, large=LARGE, varying=()
)
def fused_gate_up_swiglu(
    x: mx.array, gate: Parts, up: Parts, group_size: int
) -> Launch:
    """``silu(Wg x) * (Wu x)`` of ``[I]``, I at most 4096; matrices in 4 bits."""
    (n_in,) = dims("x", x, 1)
    require("x", n_in <= CACHED, f"a width up to {CACHED}", n_in)
    for name, parts in (("gate", gate), ("up", up)):
        three = isinstance(parts, tuple) and len(parts) == 3
        require(name, three, "words, scales and biases", type(parts).__name__)
    n_out = check_rows(*gate, n_in, 4, group_size)
    others = check_rows(*up, n_in, 4, group_size)
    require("up", others == n_out, f"{n_out} rows", others)
    names = ("w", "scales", "biases")
    arrays = {f"gate_{n}": a for n, a in zip(names, gate, strict=True)}
    arrays |= {f"up_{n}": a for n, a in zip(names, up, strict=True)}
    return Launch(
        "fused_gate_up_swiglu",
        {"x": x, **arrays, "n_in": n_in, "n_out": n_out},
        {"out": (n_out,)},
        (256 * ceil_div(n_out, 8), 1, 1),
        (256, 1, 1),
        {"G": group_size},
    )


def _batched(given: Given) -> mx.array:
    flat, outs = (given.w, given.scales, given.biases), []
    n_out, n = given.n_out, given.n_out * given.x.shape[1]
    sizes = [n // 8, n // given.group_size, n // given.group_size]
    last = [part.size - size for part, size in zip(flat, sizes, strict=True)]
    for row, begins in zip(
        given.wide.x, np.minimum(np.array(given.offsets), last), strict=True
    ):
        places = zip(flat, begins.tolist(), sizes, strict=True)
        parts = [part[at : at + size].reshape(n_out, -1) for part, at, size in places]
        outs.append(linear(row, stored(given.group_size, *(*parts, 4))))
    return mx.stack(outs).astype(given.x.dtype)


def _some_batched(case: Case) -> tuple[Any, ...]:
    stacks = [quantised(case, case.o, case.i, 4) for _ in range(case.k + 1)]
    flat = [mx.concatenate([m[part].reshape(-1) for m in stacks]) for part in range(3)]
    order = case.rng.permutation(case.k + 1)[: case.k]
    n = case.o * case.i
    steps = np.array([n // 8, n // case.g, n // case.g])
    offsets = (order[:, None] * steps).astype(np.uint32)
    # Offsets past the end, with which the kernel must not read outside.
    offsets[-1] += case.s * 2**31
    return case.normal(case.k, case.i), *flat, mx.array(offsets), case.o, case.g


PRODUCTS = [
    dict(k=1, i=32, o=1, g=32, s=0),
    dict(k=3, i=64, o=11, g=64, s=1),
    dict(k=10, i=128, o=9, g=128, s=1),
]
PRODUCTS_LARGE = dict(k=8, i=2048, o=768, g=64, s=1)


@kernel(
    reference=_batched,
    sample=_some_batched,
    sizes=PRODUCTS,
    large=PRODUCTS_LARGE,
    varying=("w_last", "s_last", "b_last"),
)
def dequant_matvec_4bit_batched(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array,
    offsets: mx.array,
    n_out: int,
    group_size: int,
) -> Launch:
    """K products ``[K, O]`` of ``[K, I]`` with matrices anywhere in flat buffers.

    ``offsets`` uint32 ``[K, 3]`` has the first word, scale and bias of each matrix. The
    kernel clamps an offset to the last matrix that fits, since offsets are data.
    """
    k, n_in = dims("x", x, 2)
    require("x", n_in <= CACHED, f"a width up to {CACHED}", n_in)
    require("group_size", group_size in GROUP_SIZES, "32, 64 or 128", group_size)
    require("x", n_in % group_size == 0, f"a width in groups of {group_size}", n_in)
    require("n_out", isinstance(n_out, int) and n_out > 0, "a positive number", n_out)
    last = {}
    for name, flat, n in (
        ("w", w, n_out * n_in // 8),
        ("scales", scales, n_out * n_in // group_size),
        ("biases", biases, n_out * n_in // group_size),
    ):
        (length,) = dims(name, flat, 1)
        require(name, length >= n, f"at least {n} values", length)
        last[f"{name[0]}_last"] = length - n
    expect("offsets", offsets, (k, 3))
    inputs: dict[str, Any] = {"x": x, "w": w, "scales": scales, "biases": biases}
    return Launch(
        "dequant_matvec_4bit_batched",
        {**inputs, "offsets": offsets, "n_in": n_in, "n_out": n_out, **last},
        {"out": (k, n_out)},
        (256 * ceil_div(n_out, 8), k, 1),
        (256, 1, 1),
        {"G": group_size},
    )


def _experts(given: Given) -> mx.array:
    x, outs = given.wide.x, []
    for j, slot in enumerate(numbers(given.slots)):
        row = x if x.ndim == 1 else x[j]
        outs.append(linear(row, in_slot(given, given.matrix, slot, x.shape[-1], 4)))
    return mx.stack(outs).astype(given.x.dtype)


def _some_experts(case: Case) -> tuple[Any, ...]:
    matrix = random_matrix(case, case.k + 1, (case.o, case.i), 4)
    slots = mx.array(case.rng.permutation(case.k + 1)[: case.k].astype(np.uint32))
    x = case.normal(case.k, case.i) if case.get("each") else case.normal(case.i)
    return x, slots, matrix, case.o, case.g


@kernel(
    reference=_experts,
    sample=_some_experts,
    sizes=[
        dict(k=1, i=32, o=1, g=32, s=0),
        dict(k=3, i=64, o=11, g=64, s=1, each=1, base=3),
        dict(k=10, i=128, o=9, g=128, s=1, base=1),
    ],
    large=PRODUCTS_LARGE,
    varying=(),
)
def dequant_matvec_4bit_v3_experts(
    x: mx.array, slots: mx.array, matrix: Matrix, n_out: int, group_size: int
) -> Launch:
    """K products ``[K, O]`` with matrices in ``slots`` uint32 ``[K]`` of a pool.

    ``x`` is ``[I]``, shared by all, or ``[K, I]``; I is at most 4096.
    """
    (k,) = dims("slots", slots, 1)
    per_expert = isinstance(x, mx.array) and x.ndim == 2
    n_in = dims("x", x, 2 if per_expert else 1)[-1]
    if per_expert:
        expect("x", x, (k, n_in))
    require("x", n_in <= CACHED, f"a width up to {CACHED}", n_in)
    stored = in_slots("matrix", matrix, n_out, n_in, 4, group_size)
    return Launch(
        "dequant_matvec_4bit_v3_experts",
        {
            "x": x,
            "slots": slots,
            **stored,
            "n_in": n_in,
            "n_out": n_out,
        },
        {"out": (k, n_out)},
        (256 * ceil_div(n_out, 8), k, 1),
        (256, 1, 1),
        {"G": group_size, "PER_EXPERT": int(per_expert)},
    )


# Dense matrices.
def _dense_product(given: Given) -> mx.array:
    return linear(given.wide.x, Weight(given.wide.w)).astype(given.x.dtype)


def _some_dense(many: bool) -> Any:
    def sample(case: Case) -> tuple[Any, ...]:
        x = case.normal(case.t, case.i) if many else case.normal(case.i)
        return x, normal(case.rng, case.other, case.o, case.i, scale=case.i**-0.5)

    return sample


DENSE = [
    dict(i=1, o=1, s=0),
    dict(i=37, o=11, s=1),
    dict(i=130, o=9, s=1),
    dict(i=512, o=3, s=0),
]


@kernel(
    reference=_dense_product,
    sample=_some_dense(many=False),
    sizes=DENSE,
    large=dict(i=4096, o=14336, s=0),
    varying=(),
)
def bf16_matvec(x: mx.array, w: mx.array) -> Launch:
    """``W x`` of ``[I]`` with a dense matrix ``[O, I]``."""
    (n_in,) = dims("x", x, 1)
    n_out = dims("w", w, 2)[0]
    expect("w", w, (n_out, n_in))
    return Launch(
        "bf16_matvec",
        {"x": x, "w": w, "n_in": n_in, "n_out": n_out},
        {"out": (n_out,)},
        (128 * ceil_div(n_out, 4), 1, 1),
        (128, 1, 1),
    )


@kernel(
    reference=_dense_product,
    sample=_some_dense(many=True),
    sizes=[{**sizes, "t": t} for sizes, t in zip(DENSE, (1, 5, 3, 8), strict=True)],
    large=dict(i=4096, o=4096, s=0, t=64),
    varying=("n_tokens",),
)
def bf16_matmul_n_tokens(x: mx.array, w: mx.array) -> Launch:
    """``x W^T`` of ``[T, I]`` with a dense matrix ``[O, I]``."""
    n_tokens, n_in = dims("x", x, 2)
    n_out = dims("w", w, 2)[0]
    expect("w", w, (n_out, n_in))
    return Launch(
        "bf16_matmul_n_tokens",
        {"x": x, "w": w, "n_tokens": n_tokens, "n_in": n_in, "n_out": n_out},
        {"out": (n_tokens, n_out)},
        (128 * ceil_div(n_out, 4), ceil_div(n_tokens, 4), 1),
        (128, 1, 1),
    )


def _residual_and_dense(given: Given) -> mx.array:
    wide = given.wide
    out = wide.residual + linear(wide.x, Weight(wide.w)).reshape(wide.residual.shape)
    return (out if wide.bias is None else out + wide.bias).astype(given.x.dtype)


def _some_residual_dense(case: Case) -> tuple[Any, ...]:
    x, residual = (case.normal(*[1] * case.s, n) for n in (case.i, case.o))
    w = normal(case.rng, case.other, case.o, case.i, scale=case.i**-0.5)
    return x, w, residual, case.normal(case.o) if case.get("bias") else None


@kernel(
    reference=_residual_and_dense,
    sample=_some_residual_dense,
    sizes=[
        dict(i=8, o=1, s=0),
        dict(i=1032, o=11, s=1, bias=1),
        dict(i=2112, o=8, s=0, bias=1),
        dict(i=264, o=6, s=1),
    ],
    large=dict(i=4096, o=2880, s=0, bias=1),
    varying=(),
)
def dense_residual(
    x: mx.array, w: mx.array, residual: mx.array, bias: mx.array | None = None
) -> Launch:
    """``residual + W x + bias``, W dense: rows ``[I]`` and ``[O]``, or both ``[1, n]``.

    I is a multiple of 8.
    """
    n_in, n_out = one_row("x", x), one_row("residual", residual)
    _check_dense("w", w, n_out, n_in)
    if bias is not None:
        expect("bias", bias, (n_out,))
    return Launch(
        "dense_residual",
        {
            "x": x,
            "w": w,
            "residual": residual,
            "bias": bias,
            "n_in": n_in,
            "n_out": n_out,
        },
        {"out": tuple(residual.shape)},
        (128 * ceil_div(n_out, DENSE_ROWS), 1, 1),
        (128, 1, 1),
        {"HAS_BIAS": int(bias is not None)},
    )


# Rows of a dense matrix for a threadgroup, and values of a row that a thread loads.
DENSE_ROWS, DENSE_VALUES = 4, 8


def _check_dense(name: str, w: mx.array, n_out: int, n_in: int) -> None:
    """Check a dense matrix ``[O, I]`` whose rows are read in whole loads."""
    whole = f"a width that is a multiple of {DENSE_VALUES}"
    require(name, n_in % DENSE_VALUES == 0, whole, n_in)
    expect(name, w, (n_out, n_in))


def _norm_dense(given: Given) -> mx.array:
    wide, product = given.wide, given.product
    normed = rms_norm(wide.x.reshape(-1), wide.norm, wide.eps)
    first = linear(normed, Weight(wide.dense))
    parts = [first if wide.bias is None else first + wide.bias]
    if product is not None:
        parts.append(linear(normed, stored(given.group_size, *product)))
    *starts, width = norm_row(normed.size, [part.size for part in parts])
    out = mx.zeros(width)
    for start, part in zip(starts, (*parts, normed), strict=True):
        out[start : start + part.size] = part
    return out.reshape(*given.x.shape[:-1], -1).astype(given.x.dtype)


def _some_norm_dense(case: Case) -> tuple[Any, ...]:
    i, n = case.i, case.get("o")
    x = case.normal(1, i) if case.s else case.normal(i)
    weight = 1 + normal(case.rng, case.other, i, scale=0.1)
    dtype = mx.float32 if case.get("wide") else case.other
    dense = normal(case.rng, dtype, case.e, i, scale=i**-0.5)
    bias = case.normal(case.e) if case.get("bias") else None
    bits = case.get("bits", 4)
    product = (*quantised(case, n, i, bits), bits) if n else None
    return x, weight, dense, 0.05, bias, product, case.get("g", 64)


@kernel(
    reference=_norm_dense,
    sample=_some_norm_dense,
    sizes=[
        dict(i=8, e=1, s=0),
        dict(i=32, e=3, o=1, g=32, s=0),
        dict(i=1032, e=11, s=1, bias=1),
        dict(i=192, e=16, o=35, g=64, s=1, bits=8, wide=1),
        dict(i=2176, e=9, o=11, g=128, s=1, bias=1),
        dict(i=32, e=6, o=2051, g=32, s=0, bits=2),
        dict(i=4224, e=5, o=3, g=64, s=0),
    ],
    large=dict(i=4096, e=128, o=2816, g=64, s=0),
    varying=(),
)
def norm_dense_matvecs(
    x: mx.array,
    norm: mx.array,
    dense: mx.array,
    eps: float,
    bias: mx.array | None = None,
    product: Product | None = None,
    group_size: int = 64,
) -> Launch:
    """A row of a dense product ``[E]`` and a quantised one ``[O]``, if any, and a norm.

    Both multiply the norm of ``[I]``, the last part; ``norm_row`` returns where each
    part begins, and values between parts are 0. A row ``[1, I]`` gives ``[1, width]``.
    ``bias`` ``[E]`` is added to the dense product. I is a multiple of 8.
    """
    n_in, n_dense = one_row("x", x), dims("dense", dense, 2)[0]
    expect("norm", norm, (n_in,))
    _check_dense("dense", dense, n_dense, n_in)
    if bias is not None:
        expect("bias", bias, (n_dense,))
    w, scales, biases, bits, n_rows = None, None, None, 4, 0
    if product is not None:
        four = isinstance(product, tuple) and len(product) == 4
        require("product", four, "words, scales, biases and bits", product)
        w, scales, biases, bits = product
        n_rows = check_rows(w, scales, biases, n_in, bits, group_size)
    # A part without values takes no place.
    _, at_rows, at_normed, width = norm_row(n_in, [n_dense, n_rows])
    there = int(product is not None)
    sizes = _rows_and_words(n_in, max(n_rows, 1))
    n_groups = 1 + ceil_div(n_dense, DENSE_ROWS) + ceil_div(n_rows, sizes["ROWS"])
    inputs: dict[str, Any] = {"x": x, "norm": norm, "dense": dense, "bias": bias}
    inputs |= {"w": w, "scales": scales, "biases": biases}
    inputs |= {"eps": eps, "n_in": n_in, "n_dense": n_dense, "n_rows": n_rows}
    return Launch(
        "norm_dense_matvecs",
        {**inputs, "at_rows": at_rows, "at_normed": at_normed},
        {"out": (*x.shape[:-1], width)},
        (128 * n_groups, 1, 1),
        (128, 1, 1),
        {
            "BITS": bits,
            "G": group_size,
            "HAS_BIAS": int(bias is not None),
            **dict.fromkeys(("HAS_W", "HAS_SCALES", "HAS_BIASES"), there),
            **sizes,
        },
        {} if there else {"S": x.dtype},
    )


# Tiles.
def _qmm(given: Given) -> mx.array:
    return linear(given.wide.x, stored_in(given)).astype(given.x.dtype)


def _some_qmm(case: Case) -> tuple[Any, ...]:
    parts: tuple[mx.array | None, ...]
    if case.get("floats"):
        dense = normal(case.rng, mx.float32, case.o, case.i, scale=case.i**-0.5)
        parts = (*mx.quantize(dense, mode=FLOAT_MODES[case.g]), None)
    else:
        parts = quantised(case, case.o, case.i, case.bits)
    return case.normal(case.t, case.i), *parts, case.bits, case.g


@kernel(
    reference=_qmm,
    sample=_some_qmm,
    sizes=[
        dict(t=1, i=32, o=1, bits=2, g=32, s=0),
        dict(t=5, i=64, o=67, bits=4, g=64, s=1),
        dict(t=37, i=96, o=40, bits=8, g=32, s=0),
        dict(t=33, i=256, o=130, bits=4, g=128, s=1),
        dict(t=9, i=96, o=35, bits=4, g=32, floats=1),
        dict(t=3, i=64, o=5, bits=4, g=16, floats=1),
    ],
    large=dict(t=512, i=4096, o=4096, bits=4, g=64, s=0),
    varying=("n_tokens",),
)
def qmm_t(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    bits: int,
    group_size: int,
) -> Launch:
    """``x W^T`` of ``[T, I]`` in tiles; 2, 4 or 8 bits.

    Without ``biases`` values are 4-bit floats, as in ``slots.py``.
    """
    n_tokens, n_in = dims("x", x, 2)
    n_out = check_rows(w, scales, biases, n_in, bits, group_size)
    inputs: dict[str, Any] = {"x": x, "w": w, "scales": scales, "biases": biases}
    return Launch(
        "qmm_t",
        {**inputs, "n_tokens": n_tokens, "n_in": n_in, "n_out": n_out},
        {"out": (n_tokens, n_out)},
        (128 * ceil_div(n_out, 64), ceil_div(n_tokens, 32), 1),
        (128, 1, 1),
        {"BITS": bits, "G": group_size, "HAS_BIASES": int(biases is not None)},
        {} if biases is not None else {"S": mx.uint8},
    )
