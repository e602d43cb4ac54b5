"""Launches of ``kernels/experts.metal``.

Letters: D model width, E experts, K experts of the token, N and F width of a routed and
of the shared expert, I and O input and output width of a projection, G quantisation
group. One projection of all experts is a matrix in slots, as ``slots.py`` describes it.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from ...device import SIMD
from ..ops.functions import linear, swiglu
from ..ops.moe import combined, noaux_topk
from .base import (
    Case,
    Given,
    Launch,
    ceil_div,
    dims,
    kernel,
    normal,
    one_row,
    require,
    require_part,
)
from .elementwise import activated
from .moe import (
    check_groups,
    check_routing,
    random_logits,
    random_weights,
    softmax_topk,
)
from .quant import check_rows, quantised, stored
from .slots import (
    Matrix,
    check_matrix,
    in_slot,
    matrix_inputs,
    numbers,
    random_matrix,
    row_lengths,
    types_of,
)


def _words_a_load(
    matrices: list[Matrix], n_rows: int, n_in: int, bits: int, group_size: int
) -> int:
    """Return the words of the widest aligned load that leaves no lane idle.

    A load has at most 32 values of one group, which share a scale. The kernel reads
    ``n_rows`` rows as one.
    """
    row_words = n_in * bits // 32
    words = min(4, bits, group_size * bits // 32)
    while words > 1:
        offsets = [row_words]
        for w, *_ in matrices:
            assert w is not None
            offsets += [w.base, w.array.shape[1]]
        if n_rows * row_words >= SIMD * words and all(n % words == 0 for n in offsets):
            break
        words //= 2
    return words


def _gate_up(given: Given) -> mx.array:
    x, rows = given.wide.x.reshape(-1), []
    x = x[given.x_at : given.x_at + (given.n_in or x.size)]
    for slot in numbers(given.slots):
        pair = (in_slot(given, m, slot, x.size) for m in (given.gate, given.up))
        opened, up = (linear(x[None], matrix)[0] for matrix in pair)
        rows.append(activated(opened, up, given.alpha, given.limit))
    return mx.stack(rows).astype(given.x.dtype)


def _slots(case: Case) -> mx.array:
    """Return K distinct slots of K + 1."""
    chosen = case.rng.permutation(case.k + 1)[: case.k]
    return mx.array(chosen.astype(np.uint32))


def _some_gate_up(case: Case) -> tuple[Any, ...]:
    shape, base = (case.n, case.i), case.get("base")
    gate, up = (random_matrix(case, case.k + 1, shape, case.bits) for _ in range(2))
    x = case.normal(case.i + 2 * base)
    given = x, _slots(case), gate, up, case.n, case.bits, case.g, base, case.i
    return (*given, *CLIPPED) if case.get("clipped") else given


# As in gpt-oss, with a lower limit, which products of samples exceed.
CLIPPED = (1.702, 0.5)


@kernel(
    reference=_gate_up,
    sample=_some_gate_up,
    sizes=[
        dict(k=1, i=32, n=1, bits=2, g=32, s=0),
        dict(k=2, i=576, n=23, bits=4, g=64, s=1, base=2),
        dict(k=2, i=1152, n=32, bits=4, g=128, s=1, base=4),
        dict(k=2, i=1088, n=5, bits=4, g=64, s=0),
        dict(k=10, i=1056, n=6, bits=8, g=32, s=0, base=3),
        dict(k=3, i=96, n=23, bits=4, g=32, s=1, base=4, floats=1, bias=1, clipped=1),
        dict(k=2, i=1088, n=5, bits=4, g=16, s=0, base=2, floats=1),
        dict(k=2, i=1024, n=8, bits=4, g=32, s=0, floats=1, bias=1, clipped=1),
        dict(k=2, i=64, n=17, bits=4, g=32, s=0, base=1, bias=1),
    ],
    large=dict(k=8, i=2048, n=768, bits=4, g=64, s=1),
    varying=(),
)
def experts_gate_up_swiglu(
    x: mx.array,
    slots: mx.array,
    gate: Matrix,
    up: Matrix,
    n_out: int,
    bits: int,
    group_size: int,
    x_at: int = 0,
    n_in: int | None = None,
    alpha: float = 1.0,
    limit: float = 0.0,
) -> Launch:
    """``silu(Wg x) * (Wu x)`` of the experts in ``slots``: ``[K, N]``.

    ``x`` is ``[I]`` or ``[1, I]``, or a row in which the ``n_in`` values begin at
    ``x_at``. ``slots`` is ``[K]`` or ``[1, K]``. A ``limit`` means ``clipped_swiglu``.
    """
    width, k = one_row("x", x), one_row("slots", slots)
    n_in = width if n_in is None else n_in
    inputs, template, types = _gate_and_up(
        x, gate, up, n_out, bits, group_size, x_at, n_in, alpha, limit
    )
    return Launch(
        "experts_gate_up_swiglu",
        {**inputs, "slots": slots},
        {"act": (k, n_out)},
        (256 * ceil_div(n_out, 16), k, 1),
        (256, 1, 1),
        template,
        types,
    )


def _gate_and_up(
    x: mx.array,
    gate: Matrix,
    up: Matrix,
    n_out: int,
    bits: int,
    group_size: int,
    x_at: int,
    n_in: int,
    alpha: float,
    limit: float,
) -> tuple[dict[str, Any], dict[str, int], dict[str, mx.Dtype]]:
    """Check arguments of a gate-and-up kernel; return inputs, template and types."""
    require_part("x_at", x_at, n_in, one_row("x", x))
    require("limit", limit >= 0, "0 or a bound", limit)
    rows = check_matrix("gate", gate, n_out, n_in, bits, group_size)
    up_rows = check_matrix("up", up, n_out, n_in, bits, group_size)
    require("up", up_rows == rows, f"rows as long as gate's {rows}", up_rows)
    inputs: dict[str, Any] = {"x": x, "x_at": x_at, "n_in": n_in, "n_out": n_out}
    inputs |= {"alpha": alpha, "limit": limit}
    words = _words_a_load([gate, up], 1, n_in, bits, group_size)
    template = {"BITS": bits, "G": group_size, "WORDS": words}
    for name, matrix in (("gate", gate), ("up", up)):
        parts, there = matrix_inputs(matrix, f"{name}_")
        inputs |= parts
        template |= there
    return {**inputs, **row_lengths(rows)}, template, types_of(gate, x.dtype)


def _routed_gate_up(given: Given) -> tuple[mx.array, mx.array, mx.array]:
    logits = given.x.reshape(1, -1)
    chosen, weights = softmax_topk(Given(**vars(given), logits=logits, normalize=True))
    chosen = chosen.astype(mx.uint32)
    return _gate_up(Given(**vars(given), slots=chosen)), chosen, weights


def _some_routed(case: Case) -> tuple[Any, ...]:
    shape, base = (case.n, case.i), case.get("base")
    gate, up = (random_matrix(case, case.e, shape, case.bits) for _ in range(2))
    logits = random_logits(case, 1)
    x = mx.concatenate([logits, case.normal(1, case.i + base)], 1)
    sizes = case.n, case.bits, case.g, case.e + base, case.i
    given = x, case.e, case.k, gate, up, *sizes
    return (*given, *CLIPPED) if case.get("clipped") else given


@kernel(
    reference=_routed_gate_up,
    sample=_some_routed,
    sizes=[
        dict(e=3, k=1, i=32, n=1, bits=2, g=32, s=0),
        dict(e=33, k=2, i=576, n=7, bits=4, g=64, s=1, base=2),
        dict(e=9, k=8, i=1152, n=18, bits=4, g=128, s=1, base=4),
        dict(e=65, k=10, i=1056, n=6, bits=8, g=32, s=0, base=3),
        dict(e=256, k=8, i=1088, n=5, bits=4, g=64, s=0),
        dict(e=512, k=10, i=1088, n=3, bits=4, g=64, s=0),
        dict(
            e=9, k=4, i=96, n=19, bits=4, g=32, s=1, base=4, floats=1, bias=1, clipped=1
        ),
        dict(e=5, k=2, i=64, n=5, bits=4, g=16, s=0, base=2, floats=1),
        dict(e=5, k=2, i=1024, n=8, bits=4, g=32, s=0, floats=1, bias=1, clipped=1),
    ],
    large=dict(e=128, k=8, i=2048, n=512, bits=4, g=64, s=0),
    varying=(),
)
def experts_route_gate_up(
    x: mx.array,
    n_experts: int,
    k: int,
    gate: Matrix,
    up: Matrix,
    n_out: int,
    bits: int,
    group_size: int,
    x_at: int,
    n_in: int,
    alpha: float = 1.0,
    limit: float = 0.0,
) -> Launch:
    """``silu(Wg x) * (Wu x)`` of the ``k`` best experts: ``[K, N]``, and the choice.

    ``x`` is a row ``[1, n]``: the logits come first, and the ``n_in`` values begin at
    ``x_at``. Expert e is in slot e. ``chosen`` and ``weights`` ``[1, K]`` are those of
    ``moe_softmax_topk``; the weights are divided by their sum. A ``limit`` means
    ``clipped_swiglu``.
    """
    _, n_experts = check_routing(x, k, n_experts)
    inputs, template, types = _gate_and_up(
        x, gate, up, n_out, bits, group_size, x_at, n_in, alpha, limit
    )
    n_slots = inputs["gate_w"].shape[0]
    require("gate", n_slots >= n_experts, f"{n_experts} slots", n_slots)
    return Launch(
        "experts_route_gate_up",
        {**inputs, "n_experts": n_experts, "k": k},
        {"act": (k, n_out), "chosen": (1, k), "weights": (1, k)},
        (256 * ceil_div(n_out, 16), k, 1),
        (256, 1, 1),
        {**template, "PER_LANE": ceil_div(n_experts, SIMD)},
        types,
    )


def _noaux_gate_up(given: Given) -> tuple[mx.array, mx.array, mx.array]:
    logits = given.x.reshape(1, -1)[:, : given.correction.size]
    form = given.k, given.n_group, given.topk_group, given.scale, given.normalize
    correction = given.correction.astype(mx.float32)
    chosen, weights = noaux_topk(logits.astype(mx.float32), correction, *form)
    chosen = chosen.astype(mx.uint32)
    act = _gate_up(Given(**vars(given), slots=chosen, alpha=1.0, limit=0.0))
    return act, chosen, weights


def _some_noaux(case: Case) -> tuple[Any, ...]:
    x, e, k, gate, up, *sizes = _some_routed(case)
    dtype = (case.dtype, mx.float32)[case.s]
    correction = normal(case.rng, dtype, e, scale=0.1)
    form = case.groups, case.best, 2.5, bool(case.get("normalize", 1))
    return x, correction, k, *form, gate, up, *sizes


@kernel(
    reference=_noaux_gate_up,
    sample=_some_noaux,
    sizes=[
        dict(e=3, k=1, i=32, n=1, bits=2, g=32, s=0, groups=1, best=1, normalize=0),
        dict(e=40, k=6, i=576, n=7, bits=4, g=64, s=1, base=2, groups=8, best=3),
        dict(e=9, k=8, i=1152, n=18, bits=4, g=128, s=1, base=4, groups=1, best=1),
        dict(e=64, k=10, i=1056, n=6, bits=8, g=32, s=0, base=3, groups=32, best=9),
        dict(e=256, k=8, i=1088, n=5, bits=4, g=64, s=1, groups=8, best=4),
        dict(e=384, k=8, i=96, n=19, bits=4, g=32, s=1, groups=1, best=1, floats=1),
    ],
    large=dict(e=128, k=8, i=2048, n=512, bits=4, g=64, s=0, groups=1, best=1),
    varying=(),
)
def experts_noaux_gate_up(
    x: mx.array,
    correction: mx.array,
    k: int,
    n_group: int,
    topk_group: int,
    scale: float,
    normalize: bool,
    gate: Matrix,
    up: Matrix,
    n_out: int,
    bits: int,
    group_size: int,
    x_at: int,
    n_in: int,
) -> Launch:
    """``silu(Wg x) * (Wu x)`` of the chosen experts: ``[K, N]``, and the choice.

    ``chosen`` and ``weights`` ``[1, K]`` are those of ``moe_noaux_topk``, whose bias is
    ``correction`` ``[E]``. The row ``x`` and the slots are as in
    ``experts_route_gate_up``. The matrices have no biases.
    """
    (n_experts,) = dims("correction", correction, 1)
    check_routing(x, k, n_experts)
    per_lane = check_groups(n_experts, k, n_group, topk_group)
    inputs, template, types = _gate_and_up(
        x, gate, up, n_out, bits, group_size, x_at, n_in, 1.0, 0.0
    )
    n_slots = inputs["gate_w"].shape[0]
    require("gate", n_slots >= n_experts, f"{n_experts} slots", n_slots)
    unbiased = gate[3] is None and up[3] is None
    require("gate", unbiased, "matrices without a bias of rows", "some with one")
    inputs = {name: value for name, value in inputs.items() if name not in _UNBIASED}
    template = {name: value for name, value in template.items() if name in _TEMPLATE}
    choice = {"n_group": n_group, "topk_group": topk_group, "scale": scale}
    return Launch(
        "experts_noaux_gate_up",
        {**inputs, "correction": correction, "n_experts": n_experts, "k": k, **choice},
        {"act": (k, n_out), "chosen": (1, k), "weights": (1, k)},
        (256 * ceil_div(n_out, 16), k, 1),
        (256, 1, 1),
        {**template, "PER_LANE": per_lane, "NORMALIZE": int(normalize)},
        {name: dtype for name, dtype in types.items() if name == "S"},
    )


# What ``_gate_and_up`` returns for kernels with biases of rows and a clipped SwiGLU.
_OF_ROWS = ("gate_bias", "up_bias", "gate_bias_base", "up_bias_base", "bias_row")
_UNBIASED = (*_OF_ROWS, "alpha", "limit")
_TEMPLATE = ("BITS", "G", "WORDS", "HAS_GATE_BIASES", "HAS_UP_BIASES")


def _down_sum(given: Given) -> mx.array:
    act, total = given.wide.act, mx.zeros(given.n_out)
    for j, slot in enumerate(numbers(given.slots)):
        down = in_slot(given, given.down, slot, act.shape[1])
        product = linear(act[j : j + 1], down)[0]
        total = total + given.weights.reshape(-1)[j] * product
    return total


def _some_down(case: Case) -> tuple[Any, ...]:
    down = random_matrix(case, case.k + 1, (case.d, case.n), case.bits)
    act, slots = case.normal(case.k, case.n), _slots(case)
    weights = random_weights(case.rng, case.k)
    return act, slots, weights, down, case.d, case.bits, case.g


@kernel(
    reference=_down_sum,
    sample=_some_down,
    sizes=[
        dict(k=1, n=32, d=1, bits=2, g=32, s=0),
        dict(k=10, n=96, d=13, bits=4, g=32, s=1, base=2),
        dict(k=3, n=512, d=18, bits=4, g=128, s=1, base=4),
        dict(k=2, n=512, d=5, bits=4, g=64, s=0),
        dict(k=8, n=64, d=9, bits=8, g=64, s=0, base=3),
        dict(k=3, n=160, d=19, bits=4, g=32, s=1, base=4, floats=1, bias=1),
        dict(k=4, n=96, d=5, bits=4, g=16, s=0, base=2, floats=1),
        dict(k=4, n=512, d=8, bits=4, g=32, s=0, floats=1, bias=1),
        dict(k=3, n=64, d=18, bits=4, g=64, s=0, base=1, bias=1),
    ],
    large=dict(k=8, n=768, d=2048, bits=4, g=64, s=1),
    varying=(),
)
def experts_down_sum(
    act: mx.array,
    slots: mx.array,
    weights: mx.array,
    down: Matrix,
    n_out: int,
    bits: int,
    group_size: int,
) -> Launch:
    """``sum(weights * (Wd act + bias))`` over the experts in ``slots``: ``[D]``.

    ``slots`` and ``weights`` are ``[K]`` or ``[1, K]``.
    """
    k, n_in = dims("act", act, 2)
    one_row("slots", slots, k)
    one_row("weights", weights, k)
    require("act", k * n_in < 1 << 31, "K * N < 2^31", k * n_in)
    lengths = check_matrix("down", down, n_out, n_in, bits, group_size)
    inputs, there = matrix_inputs(down)
    return Launch(
        "experts_down_sum",
        {
            "act": act,
            "slots": slots,
            "weights": weights,
            **inputs,
            **row_lengths(lengths),
            "k": k,
            "n_in": n_in,
            "n_out": n_out,
        },
        {"out": (n_out,)},
        (256 * ceil_div(n_out, 16), 1, 1),
        (256, 1, 1),
        {
            "BITS": bits,
            "G": group_size,
            "WORDS": _words_a_load([down], k, n_in, bits, group_size),
            **there,
        },
        types_of(down, act.dtype),
    )


def _down_rows(given: Given) -> mx.array:
    act, rows = given.wide.act, []
    for j, slot in enumerate(numbers(given.slots)):
        down = in_slot(given, given.down, slot, act.shape[1])
        rows.append(linear(act[j : j + 1], down)[0])
    return mx.stack(rows).astype(given.act.dtype)


def _some_down_rows(case: Case) -> tuple[Any, ...]:
    act, slots, _, *more = _some_down(case)
    return act, slots, *more


@kernel(
    reference=_down_rows,
    sample=_some_down_rows,
    sizes=[
        dict(k=1, n=32, d=1, bits=2, g=32, s=0),
        dict(k=10, n=96, d=13, bits=4, g=32, s=1, base=2),
        dict(k=3, n=512, d=18, bits=4, g=128, s=1, base=4),
        dict(k=3, n=512, d=5, bits=4, g=64, s=0),
        dict(k=2, n=2048, d=5, bits=4, g=64, s=0),
        dict(k=8, n=64, d=9, bits=8, g=64, s=0, base=3),
        dict(k=3, n=160, d=19, bits=4, g=32, s=1, base=4, floats=1, bias=1),
        dict(k=4, n=96, d=5, bits=4, g=16, s=0, base=2, floats=1),
        dict(k=4, n=512, d=8, bits=4, g=32, s=0, floats=1, bias=1),
        dict(k=2, n=1024, d=8, bits=4, g=32, s=0, floats=1, bias=1),
        dict(k=3, n=64, d=18, bits=4, g=64, s=0, base=1, bias=1),
    ],
    large=dict(k=8, n=768, d=2048, bits=4, g=64, s=1),
    varying=(),
)
def experts_down_rows(
    act: mx.array,
    slots: mx.array,
    down: Matrix,
    n_out: int,
    bits: int,
    group_size: int,
) -> Launch:
    """``Wd act + bias`` of the experts in ``slots``: ``[K, D]``.

    ``slots`` is ``[K]`` or ``[1, K]``.
    """
    k, n_in = dims("act", act, 2)
    one_row("slots", slots, k)
    require("act", k * n_in < 1 << 31, "K * N < 2^31", k * n_in)
    require("n_out", k * n_out < 1 << 31, "K * D < 2^31", k * n_out)
    lengths = check_matrix("down", down, n_out, n_in, bits, group_size)
    inputs, there = matrix_inputs(down)
    return Launch(
        "experts_down_rows",
        {
            "act": act,
            "slots": slots,
            **inputs,
            **row_lengths(lengths),
            "n_in": n_in,
            "n_out": n_out,
        },
        {"out": (k, n_out)},
        (256 * ceil_div(n_out, 16), k, 1),
        (256, 1, 1),
        {
            "BITS": bits,
            "G": group_size,
            "WORDS": _words_a_load([down], 1, n_in, bits, group_size),
            **there,
        },
        types_of(down, act.dtype),
    )


# Words, scales, biases and bits of a matrix that is not in slots.
Shared = tuple[mx.array, mx.array, mx.array, int]


def _combined(given: Given) -> mx.array:
    residual, shared, gate = given.wide.residual.reshape(-1), None, None
    total = _down_sum(Given(**vars(given), n_out=residual.size))
    if given.shared is not None:
        row, down = given.wide.row.reshape(-1), stored(given.group_size, *given.shared)
        width = given.shared[1].shape[1] * given.group_size
        pair = (row[at : at + width] for at in given.starts[:2])
        shared = linear(swiglu(*pair), down)
        gate = row[given.starts[2]] if len(given.starts) > 2 else None
    out = combined(residual, total, shared, gate)
    return out.reshape(given.residual.shape).astype(given.act.dtype)


def _some_combined(case: Case) -> tuple[Any, ...]:
    f, s, bits = case.f, case.s, case.shared_bits
    act, slots, weights, down, *_ = _some_down(case)
    row: Any = None
    starts: Any = None
    shared: Any = None
    if f:
        shared = (*quantised(case, case.d, f, bits, case.dtype), bits)
        starts = (s, 2 * s + f, 0) if s else (0, f, 2 * f)
        starts = starts[: 2 + case.get("gated", 1)]
        row = case.normal(*[1] * s, 2 * f + 1 + s)
    residual = case.normal(*[1] * s, case.d)
    more = row, starts, shared, residual, case.bits, case.g
    return act, slots, weights, down, *more


# As gpt-oss stores its experts.
FORM = {"floats": 1, "bias": 1}


@kernel(
    reference=_combined,
    sample=_some_combined,
    sizes=[
        dict(k=1, n=32, f=32, d=1, bits=2, shared_bits=4, g=32, s=0),
        dict(k=10, n=96, f=160, d=13, bits=4, shared_bits=8, g=32, s=1, base=2),
        dict(k=10, n=640, f=2304, d=18, bits=4, shared_bits=4, g=128, s=1, base=4),
        dict(k=2, n=512, f=512, d=5, bits=4, shared_bits=4, g=64, s=0),
        dict(k=8, n=64, f=64, d=9, bits=8, shared_bits=2, g=64, s=0, base=3),
        dict(k=3, n=96, f=64, d=13, bits=4, shared_bits=4, g=32, s=1, gated=0),
        dict(k=3, n=96, f=0, d=13, bits=4, shared_bits=4, g=32, s=1, base=2),
        dict(k=8, n=64, f=0, d=9, bits=8, shared_bits=8, g=64, s=0, base=3),
        dict(k=3, n=96, f=0, d=21, bits=4, shared_bits=4, g=32, s=1, base=4, **FORM),
        dict(k=4, n=512, f=0, d=8, bits=4, shared_bits=4, g=32, s=0, **FORM),
        dict(k=2, n=64, f=64, d=5, bits=4, shared_bits=8, g=32, s=0, floats=1),
        dict(k=2, n=64, f=0, d=18, bits=4, shared_bits=4, g=16, s=0, base=2, floats=1),
    ],
    large=dict(k=8, n=512, f=512, d=2048, bits=4, shared_bits=4, g=64, s=0),
    varying=(),
)
def experts_down_combine(
    act: mx.array,
    slots: mx.array,
    weights: mx.array,
    down: Matrix,
    row: mx.array | None,
    starts: tuple[int, ...] | None,
    shared: Shared | None,
    residual: mx.array,
    bits: int,
    group_size: int,
) -> Launch:
    """The sum of ``residual`` ``[D]``, the experts' sum and the shared expert's output.

    ``row`` holds the shared expert's projections: gate and up ``[F]``, and one value
    that gates its output. They begin at ``starts``, two numbers if there is no gate.
    ``shared`` is its down matrix ``[D, F]``, in groups of ``group_size`` like the
    experts'. Without a shared expert all three are None. Any row may be ``[1, n]``; the
    output has the shape of ``residual``.
    """
    n_out = one_row("residual", residual)
    launch = experts_down_sum(act, slots, weights, down, n_out, bits, group_size)
    if row is None and starts is None and shared is None:
        # Stand-ins: the kernel reads no value of a matrix without columns, and one
        # value of the row.
        shared = (launch.inputs["w"], residual, residual, bits)
        row, starts, n_shared = residual, (0, 0), 0
    else:
        row, starts, shared, n_shared = _checked_shared(
            row, starts, shared, n_out, group_size
        )
    w, scales, biases, shared_bits = shared
    more: dict[str, Any] = dict(
        zip(("gate_at", "up_at", "opens_at"), (*starts, 0), strict=False)
    )
    more |= {"shared": row}
    more |= {"shared_w": w, "shared_scales": scales, "shared_biases": biases}
    more |= {"residual": residual, "n_shared": n_shared}
    return Launch(
        "experts_down_combine",
        {**launch.inputs, **more},
        {"out": tuple(residual.shape)},
        (256 * ceil_div(n_out, 16), 1, 1),
        (256, 1, 1),
        {**launch.template, "SHARED_BITS": shared_bits, "GATED": int(len(starts) > 2)},
        launch.types,
    )


def _checked_shared(
    row: Any, starts: Any, shared: Any, n_out: int, group_size: int
) -> tuple[mx.array, tuple[int, ...], Shared, int]:
    """Check a shared expert's projections and matrix; return them and its width."""
    width = one_row("row", row)
    four = isinstance(shared, tuple) and len(shared) == 4
    require("shared", four, "words, scales, biases and bits", shared)
    w, scales, biases, bits = shared
    n_shared = dims("shared scales", scales, 2)[1] * group_size
    known = isinstance(starts, tuple) and len(starts) in (2, 3)
    require("starts", known, "where two or three parts begin", starts)
    for at, size in zip(starts, (n_shared, n_shared, 1), strict=False):
        require_part("starts", at, size, width)
    rows = check_rows(w, scales, biases, n_shared, bits, group_size)
    require("shared", rows == n_out, f"{n_out} rows", rows)
    return row, starts, shared, n_shared
