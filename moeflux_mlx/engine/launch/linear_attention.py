"""Launches of ``kernels/linear_attention.metal``.

Letters: N = B sequences x T tokens, Hk key heads, Hv value heads, dk and dv their
widths, W the convolution's width, C its channels.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from ... import device
from ...device import SIMD
from ..ops import linear_attention as ops
from ..ops.norm import gated_rms_norm, unit_qk
from .base import (
    FLOATS,
    Case,
    Given,
    Launch,
    ceil_div,
    dims,
    expect,
    in_float32,
    kernel,
    normal,
    require,
    require_part,
)

ROWS = 4
MAX_WIDTH = 8
MAX_KEY_DIM = 256
MAX_VALUE_DIM = 256
# The chunked form keeps the keys and queries of a chunk in threadgroup memory.
MAX_CHUNKED_KEY_DIM = 192
# In decoding: simdgroups per threadgroup, which has one value head, and values of the
# state that a simdgroup holds. A lane needs a register for every 32.
DECODE_SIMDGROUPS, HELD_VALUES = (
    (16, 2048) if device.has_many_registers() else (8, 1024)
)
FLOAT32 = mx.float32
# Wider tolerances: sums of many products, then a recurrence over tokens.
RECURRENT = {mx.float32: 3e-5, mx.float16: 1e-3, mx.bfloat16: 6e-3}


def _sequences(n: int, n_seqs: int) -> int:
    """Return the tokens of each sequence."""
    fits = n_seqs >= 1 and n % n_seqs == 0
    require("x", fits, f"rows of {n_seqs} sequences", n)
    return n // n_seqs


def _decay_beta(given: Given) -> tuple[mx.array, mx.array]:
    return ops.decay_beta(**vars(given.wide))


def _some_gates(case: Case) -> tuple[Any, ...]:
    alpha = case.normal(case.n, case.h, scale=12.0)
    vectors = [normal(case.rng, case.other, case.h) for _ in range(2)]
    # Softplus at zero, where its series converges slowest.
    alpha[::2] = -vectors[1].astype(case.dtype)
    mask = mx.array(case.rng.random(case.n) < 0.5) if case.masked else None
    return alpha, case.normal(case.n, case.h), *vectors, mask


@kernel(
    reference=_decay_beta,
    sample=_some_gates,
    sizes=[
        dict(n=1, h=1, s=0, masked=0),
        dict(n=5, h=7, s=1, masked=1),
        dict(n=37, h=32, s=0, masked=0),
        dict(n=3, h=64, s=1, masked=1),
    ],
    large=dict(n=2048, h=32, s=0, masked=0),
    varying=("n",),
    tolerance=dict.fromkeys(FLOATS, 5e-6),
)
def compute_decay_beta(
    alpha: mx.array,
    b: mx.array,
    a_log: mx.array,
    dt_bias: mx.array,
    mask: mx.array | None = None,
) -> Launch:
    """Float32 decay and beta ``[N, Hv]`` of ``alpha`` and ``b``; mask bool ``[N]``."""
    n_tokens, n_heads = dims("alpha", alpha, 2)
    expect("b", b, (n_tokens, n_heads))
    expect("a_log", a_log, (n_heads,))
    expect("dt_bias", dt_bias, (n_heads,))
    if mask is not None:
        expect("mask", mask, (n_tokens,))
    n = n_tokens * n_heads
    require("alpha", n < 1 << 31, "N * Hv < 2^31", n)
    return Launch(
        "compute_decay_beta",
        {
            "alpha": alpha,
            "b": b,
            "a_log": a_log,
            "dt_bias": dt_bias,
            "mask": mask,
            "n": n,
            "n_heads": n_heads,
        },
        dict.fromkeys(("g", "beta"), (n_tokens, n_heads)),
        (256 * ceil_div(n, 256), 1, 1),
        (256, 1, 1),
        {"HAS_MASK": int(mask is not None)},
    )


_by_kind = in_float32(ops.part_key_heads)


def _some_by_key(case: Case) -> tuple[Any, ...]:
    width = 2 * case.hk * case.dk + 2 * case.hv * case.dv
    rows = case.normal(case.n, width), case.normal(case.n, 2 * case.hv)
    return *rows, case.hk, case.dk


@kernel(
    reference=_by_kind,
    sample=_some_by_key,
    sizes=[
        dict(n=1, hk=1, hv=1, dk=1, dv=1),
        dict(n=3, hk=2, hv=6, dk=5, dv=7),
        dict(n=2, hk=3, hv=3, dk=32, dv=19),
    ],
    large=dict(n=2048, hk=16, hv=32, dk=128, dv=128),
    varying=(),
)
def part_key_heads(
    qkvz: mx.array, ba: mx.array, num_k_heads: int, key_dim: int
) -> Launch:
    """Rows grouped by key head as q, k and v ``[N, C]``, z, b and alpha."""
    n, width = dims("qkvz", qkvz, 2)
    _, gates = dims("ba", ba, 2)
    known = isinstance(num_k_heads, int) and num_k_heads >= 1
    known = known and gates % (2 * num_k_heads) == 0
    require("num_k_heads", known, f"a divisor of half of {gates}", num_k_heads)
    expect("ba", ba, (n, gates))
    heads, keys = gates // 2, num_k_heads * key_dim
    dv, rest = divmod(width - 2 * keys, gates)
    require("qkvz", dv >= 1 and not rest, f"{2 * keys} and {gates} times dv", width)
    return Launch(
        "part_key_heads",
        {
            "qkvz": qkvz,
            "ba": ba,
            "n_key_heads": num_k_heads,
            "per_key": heads // num_k_heads,
            "dk": key_dim,
            "dv": dv,
        },
        {
            "qkv": (n, 2 * keys + heads * dv),
            "z": (n, heads * dv),
            "b": (n, heads),
            "a": (n, heads),
        },
        (256 * ceil_div(width + gates, 256), n, 1),
        (256, 1, 1),
    )


def _conv(given: Given) -> mx.array:
    wide = given.wide
    inputs = ops.conv_inputs(wide.x, wide.state, wide.mask)
    out = ops.convolved(inputs, wide.weight)
    return out.reshape(given.x.shape).astype(given.x.dtype)


def _some_conv(case: Case) -> tuple[Any, ...]:
    b, t = case.b, case.t
    x, state = case.normal(b * t, case.c), case.normal(b, case.w - 1, case.c)
    weight = normal(case.rng, case.other, case.c, case.w)
    mask = mx.array(case.rng.random((b, t)) < 0.6) if case.masked else None
    return x, state, weight, mask


@kernel(
    reference=_conv,
    sample=_some_conv,
    sizes=[
        dict(b=1, t=1, c=1, w=4, masked=0, s=0),
        dict(b=2, t=11, c=37, w=4, masked=1, s=1),
        dict(b=1, t=17, c=65, w=2, masked=0, s=0),
        dict(b=3, t=2, c=33, w=4, masked=0, s=0),
    ],
    large=dict(b=1, t=2048, c=8192, w=4, masked=0, s=0),
    varying=("n_tokens",),
)
def conv1d_step(
    x: mx.array, state: mx.array, weight: mx.array, mask: mx.array | None = None
) -> Launch:
    """Causal convolution and SiLU of ``[N, C]`` after ``state`` ``[B, W - 1, C]``.

    ``weight`` is ``[C, W]``, the oldest tap first; ``mask`` bool ``[B, T]``.
    """
    n, channels = dims("x", x, 2)
    _, width = dims("weight", weight, 2)
    require("weight", 2 <= width <= MAX_WIDTH, f"a width of 2 to {MAX_WIDTH}", width)
    expect("weight", weight, (channels, width))
    n_seqs = dims("state", state, 3)[0]
    expect("state", state, (n_seqs, width - 1, channels))
    t = _sequences(n, n_seqs)
    if mask is not None:
        expect("mask", mask, (n_seqs, t))
    return Launch(
        "conv1d_step",
        {
            "x": x,
            "state": state,
            "weight": weight,
            "mask": mask,
            "n_tokens": t,
            "n_channels": channels,
        },
        {"out": (n, channels)},
        (64 * ceil_div(channels, 64), ceil_div(t, 8), n_seqs),
        (64, 1, 1),
        {"W": width, "HAS_MASK": int(mask is not None)},
    )


def _conv_state(given: Given) -> mx.array:
    wide = given.wide
    inputs = ops.conv_inputs(wide.x, wide.state, wide.mask)
    after = ops.last_inputs(inputs, given.state.shape[1], given.lengths)
    return after.astype(given.state.dtype)


def _some_state(case: Case) -> tuple[Any, ...]:
    x, state, _, mask = _some_conv(case.but(s=0))
    lengths = None
    if case.ends:
        ends = case.rng.integers(-1, case.t + 2, case.b)
        lengths = mx.array(ends.astype(np.int32))
    return x, state, mask, lengths


@kernel(
    reference=_conv_state,
    sample=_some_state,
    sizes=[
        dict(b=1, t=1, c=1, w=4, masked=0, ends=0),
        dict(b=5, t=6, c=37, w=4, masked=1, ends=1),
        dict(b=2, t=2, c=65, w=4, masked=0, ends=1),
        dict(b=9, t=9, c=5, w=3, masked=1, ends=0),
    ],
    large=dict(b=64, t=64, c=8192, w=4, masked=0, ends=0),
    varying=("n_tokens",),
)
def conv1d_state_update(
    x: mx.array,
    state: mx.array,
    mask: mx.array | None = None,
    lengths: mx.array | None = None,
) -> Launch:
    """The last ``W - 1`` inputs ``[B, W - 1, C]`` after the chunk ``[N, C]``.

    ``lengths`` int32 ``[B]`` says how many tokens of the chunk count.
    """
    n, channels = dims("x", x, 2)
    n_seqs, history, _ = dims("state", state, 3)
    require("state", history < MAX_WIDTH, f"at most {MAX_WIDTH - 1} inputs", history)
    expect("state", state, (n_seqs, history, channels))
    t = _sequences(n, n_seqs)
    if mask is not None:
        expect("mask", mask, (n_seqs, t))
    if lengths is not None:
        expect("lengths", lengths, (n_seqs,))
    return Launch(
        "conv1d_state_update",
        {
            "x": x,
            "state": state,
            "mask": mask,
            "lengths": lengths,
            "n_tokens": t,
            "n_channels": channels,
            "n_history": history,
        },
        {"out": (n_seqs, history, channels)},
        (64 * ceil_div(channels, 64), history, n_seqs),
        (64, 1, 1),
        {"HAS_MASK": int(mask is not None), "HAS_LENGTHS": int(lengths is not None)},
    )


def _delta_rule(given: Given) -> tuple[mx.array, mx.array]:
    state, out = ops.delta_rule(**vars(given.wide))
    return state, out.astype(given.qkv.dtype)


def _some_delta(case: Case) -> tuple[Any, ...]:
    n, hv, dv, dk, keys = case.b * case.t, case.hv, case.dv, case.dk, case.hk * case.dk
    qkv = case.normal(n, 2 * keys + hv * dv)
    scaled = qkv[:, : 2 * keys] * dk**-0.5
    qkv = mx.concatenate([scaled, qkv[:, 2 * keys :]], axis=1)
    state = normal(case.rng, FLOAT32, case.b, hv, dv, dk, scale=0.3)
    low = 1e-30 if case.get("strong") else 0.2
    decay = np.exp(case.rng.uniform(np.log(low), 0, (n, hv)))
    beta = mx.array(case.rng.random((n, hv), np.float32))
    return qkv, state, mx.array(decay.astype(np.float32)), beta, case.hk


def _check_delta(
    qkv: mx.array,
    state: mx.array,
    g: mx.array,
    beta: mx.array,
    num_k_heads: int,
    max_key_dim: int,
) -> tuple[int, int, int, int, int]:
    """Return T, B, Hv, dv and dk."""
    n, _ = dims("qkv", qkv, 2)
    n_seqs, heads, dv, dk = dims("state", state, 4)
    known = dk % SIMD == 0 and dk <= max_key_dim
    require("state", known, f"dk a multiple of {SIMD}, at most {max_key_dim}", dk)
    divides = isinstance(num_k_heads, int) and num_k_heads >= 1
    divides = divides and heads % num_k_heads == 0
    require("num_k_heads", divides, f"a divisor of {heads}", num_k_heads)
    expect("qkv", qkv, (n, 2 * num_k_heads * dk + heads * dv))
    expect("g", g, (n, heads))
    expect("beta", beta, (n, heads))
    return _sequences(n, n_seqs), n_seqs, heads, dv, dk


def _by_rows(n_seqs: int, heads: int, dv: int) -> Any:
    """Return grid and threadgroup of the forms that divide the state by rows."""
    return (SIMD, 4 * ceil_div(ceil_div(dv, ROWS), 4), n_seqs * heads), (SIMD, 4, 1)


@kernel(
    reference=_delta_rule,
    sample=_some_delta,
    sizes=[
        dict(b=1, t=1, hk=1, hv=1, dk=32, dv=1),
        dict(b=2, t=1, hk=2, hv=4, dk=128, dv=19),
        dict(b=1, t=1, hk=1, hv=2, dk=64, dv=33),
        dict(b=1, t=1, hk=1, hv=1, dk=256, dv=6),
    ],
    large=dict(b=1, t=1, hk=16, hv=32, dk=128, dv=128),
    varying=(),
    tolerance=RECURRENT,
)
def gated_delta_net_step(
    qkv: mx.array, state: mx.array, g: mx.array, beta: mx.array, num_k_heads: int
) -> Launch:
    """State ``[B, Hv, dv, dk]`` and rows ``[B, Hv * dv]`` after one token each."""
    t, n_seqs, heads, dv, dk = _check_delta(
        qkv, state, g, beta, num_k_heads, MAX_KEY_DIM
    )
    require("qkv", t == 1, "one token of each sequence", t)
    grid, threadgroup = _by_rows(n_seqs, heads, dv)
    return Launch(
        "gated_delta_net_step",
        {
            "qkv": qkv,
            "state": state,
            "g": g,
            "beta": beta,
            "n_key_heads": num_k_heads,
            "n_heads": heads,
            "dv": dv,
        },
        {"state_out": tuple(state.shape), "out": (n_seqs, heads * dv)},
        grid,
        threadgroup,
        {"DK": dk},
    )


@kernel(
    reference=_delta_rule,
    sample=_some_delta,
    sizes=[
        dict(b=1, t=1, hk=1, hv=1, dk=32, dv=1),
        dict(b=2, t=7, hk=2, hv=4, dk=128, dv=19),
        dict(b=1, t=5, hk=1, hv=1, dk=96, dv=6, strong=1),
        dict(b=1, t=33, hk=1, hv=1, dk=64, dv=5),
    ],
    large=dict(b=1, t=2048, hk=16, hv=32, dk=128, dv=128),
    varying=("n_tokens",),
    tolerance=RECURRENT,
)
def gated_delta_net_sequential(
    qkv: mx.array, state: mx.array, g: mx.array, beta: mx.array, num_k_heads: int
) -> Launch:
    """State ``[B, Hv, dv, dk]`` and rows ``[N, Hv * dv]``, token by token."""
    t, n_seqs, heads, dv, dk = _check_delta(
        qkv, state, g, beta, num_k_heads, MAX_KEY_DIM
    )
    grid, threadgroup = _by_rows(n_seqs, heads, dv)
    inputs = {"qkv": qkv, "state": state, "g": g, "beta": beta}
    return Launch(
        "gated_delta_net_sequential",
        inputs | _delta_sizes(t, num_k_heads, heads, dv),
        {"state_out": tuple(state.shape), "out": (n_seqs * t, heads * dv)},
        grid,
        threadgroup,
        {"DK": dk},
    )


def _delta_sizes(t: int, key_heads: int, heads: int, dv: int) -> dict[str, int]:
    return {"n_tokens": t, "n_key_heads": key_heads, "n_heads": heads, "dv": dv}


@kernel(
    reference=_delta_rule,
    sample=_some_delta,
    sizes=[
        dict(b=1, t=1, hk=1, hv=1, dk=32, dv=1),
        dict(b=2, t=19, hk=2, hv=4, dk=64, dv=37),
        dict(b=1, t=16, hk=1, hv=1, dk=128, dv=33),
        dict(b=1, t=41, hk=1, hv=1, dk=32, dv=40, strong=1),
    ],
    large=dict(b=1, t=2048, hk=16, hv=32, dk=128, dv=128),
    varying=("n_tokens",),
    tolerance=RECURRENT,
)
def gated_delta_net_chunkwise(
    qkv: mx.array, state: mx.array, g: mx.array, beta: mx.array, num_k_heads: int
) -> Launch:
    """State ``[B, Hv, dv, dk]`` and rows ``[N, Hv * dv]``, 16 tokens at a time."""
    t, n_seqs, heads, dv, dk = _check_delta(
        qkv, state, g, beta, num_k_heads, MAX_CHUNKED_KEY_DIM
    )
    inputs = {"qkv": qkv, "state": state, "g": g, "beta": beta}
    return Launch(
        "gated_delta_net_chunkwise",
        inputs | _delta_sizes(t, num_k_heads, heads, dv),
        {"state_out": tuple(state.shape), "out": (n_seqs * t, heads * dv)},
        (128, ceil_div(dv, 32), n_seqs * heads),
        (128, 1, 1),
        {"DK": dk},
    )


def _projections(
    rows: mx.array, starts: tuple[int, ...], num_k_heads: int, state: mx.array
) -> tuple[mx.array, ...]:
    """Return q, k and v as one, z, b and alpha, from rows in either order."""
    _, heads, dv, dk = state.shape
    channels = 2 * num_k_heads * dk + heads * dv
    sizes = [channels, heads * dv, heads, heads]
    if len(starts) == 2:
        sizes = [channels + heads * dv, 2 * heads]
    parts = zip(starts, sizes, strict=True)
    found = tuple(rows[:, at : at + size] for at, size in parts)
    if len(starts) == 4:
        return found
    qkvz, ba = found
    return ops.part_key_heads(qkvz, ba, num_k_heads, dk)


def _decode(given: Given) -> tuple[mx.array, ...]:
    wide, heads = given.wide, given.num_k_heads
    qkv, z, b, alpha = _projections(wide.rows, given.starts, heads, wide.state)
    inputs = ops.conv_inputs(qkv, wide.history, None)
    taps = wide.taps.reshape(wide.taps.shape[:2])
    conv = ops.convolved(inputs, taps).reshape(qkv.shape)
    dk = wide.state.shape[3]
    mixed = unit_qk(conv, heads, dk, heads * dk, wide.qk_eps)
    gates = ops.decay_beta(alpha, b, wide.a_log, wide.dt_bias, None)
    state, values = ops.delta_rule(mixed, wide.state, *gates, heads)
    out = gated_rms_norm(values, z, wide.norm, wide.eps)
    after = ops.last_inputs(inputs, wide.history.shape[1], None)
    return after.astype(given.rows.dtype), state, out.astype(given.rows.dtype)


def _some_decode(case: Case) -> tuple[Any, ...]:
    b, s, hv, dk, dv, w = case.b, case.s, case.hv, case.dk, case.dv, case.w
    channels = 2 * case.hk * dk + hv * dv
    starts: tuple[int, ...]
    starts = (s, s + channels, s + channels + hv * dv, 2 * s + channels + hv * (dv + 1))
    if case.get("by_key"):
        starts = (s, 2 * s + channels + hv * dv)
    rows = case.normal(b, 2 * s + channels + hv * (dv + 2) + s)
    history = case.normal(b, w - 1, channels)
    taps = normal(case.rng, case.other, channels, w, *[1] * s, scale=w**-0.5)
    vectors = [normal(case.rng, case.other, hv) for _ in range(2)]
    state = normal(case.rng, FLOAT32, b, hv, dv, dk, scale=0.3)
    norm = normal(case.rng, case.other, dv)
    # Large enough to show in the result.
    epsilons = (0.1, 0.5) if s else (1e-6, 1e-6)
    return rows, starts, history, taps, *vectors, state, norm, case.hk, *epsilons


def _places(
    starts: Any, n_key_heads: int, per_key: int, dk: int, dv: int, row_width: int
) -> dict[str, int]:
    """Return where values of the first key head begin in a row, and the strides."""
    keys, values = n_key_heads * dk, per_key * dv
    gates = n_key_heads * per_key
    sizes = [2 * keys + gates * dv, gates * dv, gates, gates]
    if isinstance(starts, tuple) and len(starts) == 2:
        sizes = [sizes[0] + sizes[1], 2 * gates]
    known = isinstance(starts, tuple) and len(starts) == len(sizes)
    require("starts", known, "where four parts begin, or two", starts)
    for at, size in zip(starts, sizes, strict=True):
        require_part("starts", at, size, row_width)
    if len(starts) == 4:
        q, z, b, a = starts
        k, v = q + keys, q + 2 * keys
        key_step, value_step, gate_step = dk, values, per_key
    else:
        q, b = starts
        k, v, z, a = q + dk, q + 2 * dk, q + 2 * dk + values, b + per_key
        key_step = value_step = 2 * dk + 2 * values
        gate_step = 2 * per_key
    names = ("q_at", "k_at", "v_at", "z_at", "b_at", "a_at")
    steps = {"key_step": key_step, "value_step": value_step, "gate_step": gate_step}
    return {**dict(zip(names, (q, k, v, z, b, a), strict=True)), **steps}


@kernel(
    reference=_decode,
    sample=_some_decode,
    sizes=[
        dict(b=1, hk=1, hv=1, dk=32, dv=1, w=4, s=0),
        dict(b=2, hk=2, hv=4, dk=64, dv=19, w=2, s=1),
        dict(b=1, hk=1, hv=3, dk=96, dv=67, w=3, s=0),
        dict(b=1, hk=1, hv=2, dk=256, dv=256, w=4, s=1),
        dict(b=1, hk=1, hv=1, dk=128, dv=21, w=4, s=0),
        dict(b=2, hk=2, hv=6, dk=32, dv=19, w=4, s=1, by_key=1),
    ],
    large=dict(b=1, hk=16, hv=32, dk=128, dv=128, w=4, s=0),
    varying=(),
    tolerance=RECURRENT,
)
def gated_delta_decode(
    rows: mx.array,
    starts: tuple[int, ...],
    history: mx.array,
    taps: mx.array,
    a_log: mx.array,
    dt_bias: mx.array,
    state: mx.array,
    norm: mx.array,
    num_k_heads: int,
    eps: float,
    qk_eps: float,
) -> Launch:
    """History, state and rows ``[B, Hv * dv]`` after one token of each sequence.

    ``rows`` ``[B, width]`` hold the projections: q, k and v ``[C]``, z ``[Hv * dv]``, b
    and alpha ``[Hv]``, which begin at ``starts``. With two ``starts`` they hold both
    rows that ``part_key_heads`` takes. ``history`` ``[B, W - 1, C]`` has the inputs
    before. ``taps`` is ``[C, W]`` or, as layers keep it, ``[C, W, 1]``, with the oldest
    tap first. ``norm`` is ``[dv]``, with epsilon ``eps``. ``qk_eps`` is added to the
    sums of squares of queries and keys.
    """
    n_seqs, row_width = dims("rows", rows, 2)
    _, heads, dv, dk = dims("state", state, 4)
    require("state", dk % SIMD == 0, f"dk a multiple of {SIMD}", dk)
    require("state", dk <= MAX_KEY_DIM, f"dk at most {MAX_KEY_DIM}", dk)
    require("state", dv <= MAX_VALUE_DIM, f"dv at most {MAX_VALUE_DIM}", dv)
    divides = isinstance(num_k_heads, int) and num_k_heads >= 1
    divides = divides and heads % num_k_heads == 0
    require("num_k_heads", divides, f"a divisor of {heads}", num_k_heads)
    expect("state", state, (n_seqs, heads, dv, dk))
    channels = 2 * num_k_heads * dk + heads * dv
    places = _places(starts, num_k_heads, heads // num_k_heads, dk, dv, row_width)
    flat = isinstance(taps, mx.array) and taps.ndim == 2
    width = dims("taps", taps, 2 if flat else 3)[1]
    require("taps", 2 <= width <= MAX_WIDTH, f"a width of 2 to {MAX_WIDTH}", width)
    expect("taps", taps, (channels, width) if flat else (channels, width, 1))
    expect("history", history, (n_seqs, width - 1, channels))
    for name, array in (("a_log", a_log), ("dt_bias", dt_bias)):
        expect(name, array, (heads,))
    expect("norm", norm, (dv,))
    rows_held = next(n for n in (8, 4) if n * dk <= HELD_VALUES)
    inputs: dict[str, Any] = {"rows": rows, "history": history, "taps": taps}
    inputs |= {"a_log": a_log, "dt_bias": dt_bias, "state": state, "norm": norm}
    inputs |= {"row_width": row_width, **places}
    inputs |= {"n_key_heads": num_k_heads, "n_heads": heads, "dv": dv}
    return Launch(
        "gated_delta_decode",
        {**inputs, "eps": eps, "qk_eps": qk_eps},
        {
            "history_out": tuple(history.shape),
            "state_out": tuple(state.shape),
            "out": (n_seqs, heads * dv),
        },
        (SIMD * DECODE_SIMDGROUPS, heads, n_seqs),
        (SIMD * DECODE_SIMDGROUPS, 1, 1),
        {"DK": dk, "W": width, "ROWS": rows_held, "SIMDGROUPS": DECODE_SIMDGROUPS},
    )
