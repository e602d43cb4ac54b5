"""The functions of references, for arrays of MLX and of NumPy.

References run on MLX arrays everywhere. On a Linux CPU they also take NumPy arrays:
there MLX's library links the reference BLAS and hands every small operation to another
thread, which takes 50 times as long as NumPy for a product and 10 times for the rest.
The same code serves both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ... import device
from ...experts.compute.stacks import in_parts, lies_well
from ...experts.weights import ExpertWeights, Weight
from ...products import quantized_matmul
from .host import host_linear, row_products, unpack, widen

Array = Any


def namespace(x: Array) -> Any:
    """Return the module, ``numpy`` or ``mlx.core``, whose functions take ``x``."""
    return np if isinstance(x, np.ndarray) else mx


def to_host(x: Array) -> Array:
    """Return an MLX array as a NumPy view of its memory; bfloat16 becomes float32."""
    if not isinstance(x, mx.array):
        return x
    return np.asarray(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)


def to_device(x: Array) -> Array:
    """Return a NumPy array as an MLX array."""
    return mx.array(x) if isinstance(x, np.ndarray) else x


def detached(x: Array) -> Array:
    """Copy a part of an array, so that the rest of its memory can be freed."""
    return mx.contiguous(x) if isinstance(x, mx.array) else x.copy()


def float32(x: Array) -> Array:
    """Convert to float32."""
    if isinstance(x, mx.array):
        return x.astype(mx.float32)
    return x.astype(np.float32, copy=False)


def sigmoid(x: Array) -> Array:
    """Return ``1 / (1 + exp(-x))``."""
    if isinstance(x, mx.array):
        return mx.sigmoid(x)
    # Bounded, so that ``exp`` does not overflow float32.
    return 1 / (1 + np.exp(-np.maximum(x, -80)))


def silu(x: Array) -> Array:
    """Return ``x * sigmoid(x)``."""
    return x * sigmoid(x)


def softmax(x: Array) -> Array:
    """Return the softmax of the last axis, computed in float32."""
    if isinstance(x, mx.array):
        return mx.softmax(x, axis=-1, precise=True)
    grown = np.exp(x - x.max(axis=-1, keepdims=True))
    grown /= grown.sum(axis=-1, keepdims=True)
    return grown


def argsort(x: Array) -> Array:
    """Return the stable order of the last axis."""
    if isinstance(x, mx.array):
        return mx.argsort(x, axis=-1)
    return np.argsort(x, axis=-1, kind="stable")


def take_columns(x: Array, indices: Array) -> Array:
    """Return the entries ``indices`` ``[N, K]`` of each row of ``[N, E]``."""
    if isinstance(x, mx.array):
        return mx.take_along_axis(x, indices, axis=-1)
    return x[np.arange(len(x))[:, None], indices]


def rms_norm(x: Array, weight: Array | None, eps: float) -> Array:
    """Return ``x * rsqrt(mean(x^2) + eps) * weight`` over the last axis."""
    if isinstance(x, mx.array):
        return mx.fast.rms_norm(x, weight, eps)
    scale = 1 / np.sqrt(np.vecdot(x, x) / x.shape[-1] + eps)
    normed = x * scale[..., None]
    return normed if weight is None else normed * weight


def rope(
    x: Array,
    dims: int,
    inv_freq: Array,
    start: Array,
    scale: float = 1.0,
    *,
    pairs: bool = False,
) -> Array:
    """Rotate the first ``dims`` channels of ``[B, H, T, d]``, as ``RopeNTokens`` does.

    Args:
        start: ``[B]``, the position of each sequence's first token.
        scale: factor of the rotated channels.
        pairs: neighbouring channels form pairs, not channels of two halves.
    """
    if isinstance(x, mx.array):
        if scale != 1.0:
            x = x.at[..., :dims].multiply(scale)
        freqs = mx.reciprocal(inv_freq)
        return mx.fast.rope(
            x, dims, traditional=pairs, base=None, scale=1.0, offset=start, freqs=freqs
        )
    positions = (start[:, None] + np.arange(x.shape[2])).astype(np.float32)
    angles = positions[:, None, :, None] * to_host(inv_freq)
    cos, sin = np.cos(angles), np.sin(angles)
    if scale != 1.0:
        cos, sin = cos * np.float32(scale), sin * np.float32(scale)
    half = dims // 2
    if pairs:
        first, second = x[..., 0:dims:2], x[..., 1:dims:2]
        turned = first * cos - second * sin, first * sin + second * cos
        neighbours = np.stack(turned, axis=-1).reshape(*x.shape[:-1], dims)
        return np.concatenate([neighbours, x[..., dims:]], axis=-1)
    first, second = x[..., :half], x[..., half:dims]
    rotated = [first * cos - second * sin, first * sin + second * cos, x[..., dims:]]
    return np.concatenate(rotated, axis=-1)


# Queries of one block on the host: bounds the score matrix, and skips hidden rows.
QUERY_BLOCK = 256


def score_bytes(n_heads: int, t: int, s: int) -> int:
    """Return the bytes of the scores of T queries over S rows on the host."""
    n_scores = min(t, QUERY_BLOCK) * s
    # A float32 score and a byte of its mask.
    return 5 * max(n_scores, min(n_heads * n_scores, device.HOST_SCORES))


def attention(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    mask: Array | None,
    *,
    beside: tuple[Array, Array] | None = None,
    sinks: Array | None = None,
) -> Array:
    """Attend causally, or as ``mask`` ``[B or 1, 1, T, S]`` (true: seen) allows.

    Args:
        q: ``[B, H, T, d]``, the last T positions.
        k: ``[B, Hkv, S, d]``; head h reads ``h // (H / Hkv)``.
        v: as ``k``; its heads may have another width.
        beside: queries ``[B, H, T, r]`` and keys ``[B, 1, S, r]``; their products are
            added to the scores.
        sinks: ``[H]``, one more score per head, without a value.
    """
    if isinstance(q, mx.array):
        if beside is not None:
            mask = _scores_beside(*beside, scale, mask)
        causal = "causal" if mask is None and q.shape[2] > 1 else mask
        return mx.fast.scaled_dot_product_attention(
            q, k, v, scale=scale, mask=causal, sinks=sinks
        )
    out = np.empty((*q.shape[:3], v.shape[3]), np.float32)
    n_kv, s = k.shape[1], k.shape[2]
    each = q.shape[1] // n_kv
    together = max(1, device.HOST_SCORES // (min(q.shape[2], QUERY_BLOCK) * s))
    for seq, kv in np.ndindex(len(q), n_kv):
        seen = None if mask is None else mask[seq % len(mask), 0]
        for first in range(kv * each, (kv + 1) * each, together):
            heads = slice(first, min(first + together, (kv + 1) * each))
            pairs = [(q[seq, heads] * scale, k[seq, kv])]
            if beside is not None:
                pairs.append((beside[0][seq, heads] * scale, beside[1][seq, 0]))
            own = None if sinks is None else sinks[heads, None, None]
            out[seq, heads] = _attend(pairs, v[seq, kv], seen, own)
    return out


def _scores_beside(
    q: mx.array, k: mx.array, scale: float, mask: mx.array | None
) -> mx.array:
    """Return products ``[B, H, T, S]`` to add, the lowest number for hidden rows."""
    scores = (q * scale) @ k.swapaxes(-1, -2)
    t, s = scores.shape[-2:]
    if mask is None and t > 1:
        mask = mx.arange(s) <= mx.arange(s - t, s)[:, None]
    if mask is None:
        return scores
    return mx.where(mask, scores, mx.array(mx.finfo(q.dtype).min, q.dtype))


def _attend(
    pairs: list[tuple[np.ndarray, np.ndarray]],
    v: np.ndarray,
    mask: np.ndarray | None,
    sinks: np.ndarray | None,
) -> np.ndarray:
    """Attend with heads that read the same rows.

    Args:
        pairs: queries ``[H, T, d]`` and keys ``[S, d]``; their products add up.
        sinks: ``[H, 1, 1]``.
    """
    n_heads, t, _ = pairs[0][0].shape
    s, lowest = len(v), np.finfo(np.float32).min
    out = np.empty((n_heads, t, v.shape[1]), np.float32)
    for start in range(0, t, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, t)
        seen = s if mask is not None else s - t + stop
        scores, *more = (np.matmul(q[:, start:stop], k[:seen].T) for q, k in pairs)
        for other in more:
            scores += other
        if mask is not None:
            np.copyto(scores, lowest, where=~mask[start:stop, :seen])
        elif stop - start > 1:
            ahead = np.tri(stop - start, k=-1, dtype=bool).T
            np.copyto(scores[..., seen - len(ahead) :], lowest, where=ahead)
        most = scores.max(axis=-1, keepdims=True)
        if sinks is not None:
            most = np.maximum(most, sinks)
        scores -= most
        np.exp(scores, out=scores)
        total = scores.sum(axis=-1, keepdims=True)
        scores /= total if sinks is None else total + np.exp(sinks - most)
        np.matmul(scores, v[:seen], out=out[:, start:stop])
    return out


def linear(x: Array, weight: Weight) -> Array:
    """Return ``x`` ``[..., I]`` times the transpose of ``weight`` ``[O, I]``, and bias.

    Rows and weight may be arrays of MLX or of NumPy; the result is of the rows' type.
    """
    on_host = isinstance(x, np.ndarray)
    weight = weight.on_host if on_host else weight.on_device
    out = host_linear(x, weight) if on_host else _device_linear(x, weight)
    return out if weight.bias is None else out + _bias_like(out, weight.bias)


def _bias_like(out: Array, bias: Array) -> Array:
    return bias.astype(out.dtype) if isinstance(out, mx.array) else widen(bias)


def _device_linear(x: mx.array, weight: Weight) -> mx.array:
    q = weight.quantization
    if q is None:
        return x @ weight.w.swapaxes(-1, -2)
    scales, biases = _scales_like(x, weight)
    return quantized_matmul(
        x,
        weight.w,
        scales,
        biases,
        transpose=True,
        group_size=q.group_size,
        bits=q.bits,
        mode=q.mode,
    )


def heads_linear(x: Array, weight: Weight) -> Array:
    """Return rows ``[N, H, I]`` times the transpose of each head's own matrix.

    Args:
        weight: ``[H, O, I]``.

    Returns:
        ``[N, H, O]``.
    """
    if isinstance(x, np.ndarray):
        weight = weight.on_host
        heads = range(x.shape[1])
        return np.stack([linear(x[:, h], weight[h]) for h in heads], axis=1)
    return linear(x.swapaxes(0, 1), weight).swapaxes(0, 1)


def embed(token_ids: Array, weight: Weight) -> Array:
    """Return rows ``token_ids`` ``[N]`` of ``weight`` ``[V, D]``, unpacked.

    With NumPy ids the weight may have MLX arrays; the result is of NumPy.
    """
    on_host = isinstance(token_ids, np.ndarray)
    weight = weight.on_host if on_host else weight
    parts = (weight.w, weight.scales, weight.biases)
    w, scales, biases = (None if x is None else x[token_ids] for x in parts)
    if weight.quantization is None:
        return widen(w) if on_host else w
    return dequantize(Weight(w, scales, biases, weight.quantization))


def inside_rows(token_ids: Array, weight: Weight) -> Array:
    """Return rows as ``embed`` does; those of ids outside of ``weight`` are NaN."""
    at = namespace(token_ids)
    ids = at.clip(token_ids, 0, weight.w.shape[0] - 1)
    rows = embed(ids, weight)
    nan = at.array(math.nan, dtype=rows.dtype)
    # In the shape of rows: MLX then compiles the mask and its use as one launch.
    inside = token_ids.reshape(-1, 1) == ids.reshape(-1, 1)
    return at.where(inside, rows, nan)


def _scales_like(x: mx.array, weight: Weight) -> tuple[mx.array, mx.array | None]:
    scales, biases = weight.scales, weight.biases
    assert scales is not None
    if scales.dtype not in (x.dtype, mx.uint8):
        scales = scales.astype(x.dtype)
        biases = None if biases is None else biases.astype(x.dtype)
    return scales, biases


def swiglu(gate: Array, up: Array) -> Array:
    """Return ``silu(gate) * up``."""
    return silu(gate) * up


Activation = Callable[[Array, Array], Array]


def clipped_swiglu(gate: Array, up: Array, alpha: float, limit: float) -> Array:
    """Return ``gate * sigmoid(alpha * gate) * (up + 1)`` of clipped values.

    ``gate`` is clipped to at most ``limit``, ``up`` to ``-limit`` to ``limit``.
    """
    xp = namespace(gate)
    gate, up = xp.minimum(gate, limit), xp.clip(up, -limit, limit)
    return (up + 1) * (gate * sigmoid(alpha * gate))


def expert_mlp(
    x: Array, experts: ExpertWeights, slot: int, activation: Activation = swiglu
) -> Array:
    """Apply one expert, ``down(silu(gate x) * (up x))``, to rows ``[M, D]``."""
    experts = experts.on_host if isinstance(x, np.ndarray) else experts
    act = activation(linear(x, experts.gate[slot]), linear(x, experts.up[slot]))
    return linear(act, experts.down[slot])


def experts_by_slot(
    x: Array,
    slots: Array,
    experts: ExpertWeights,
    *,
    activation: Activation = swiglu,
    in_order: bool = False,
) -> Array:
    """Run rows ``[N, D]`` through the experts in their slots ``[N, K]``.

    Args:
        in_order: slots never decrease from row to row, which lets MLX batch rows.

    Returns:
        ``[N, K, D]``.
    """
    if isinstance(x, np.ndarray):
        return _experts_on_host(x, slots, experts, activation)
    x = x[:, None, None]
    experts, slots = _gatherable(experts, slots, x.dtype)
    gate = _gather_linear(x, experts.gate, slots, in_order)
    up = _gather_linear(x, experts.up, slots, in_order)
    act = activation(gate, up)
    return _gather_linear(act, experts.down, slots, in_order).squeeze(-2)


def _experts_on_host(
    x: np.ndarray, slots: Array, experts: ExpertWeights, activation: Activation
) -> Array:
    experts, chosen = experts.on_host, slots.reshape(-1).tolist()
    rows = np.repeat(x, slots.shape[1], axis=0)
    if experts.gate.quantization == experts.up.quantization:
        gate, up = _with_biases(rows, [experts.gate, experts.up], chosen)
    else:
        (gate,) = _with_biases(rows, [experts.gate], chosen)
        (up,) = _with_biases(rows, [experts.up], chosen)
    (down,) = _with_biases(activation(gate, up), [experts.down], chosen)
    return down.reshape(*slots.shape, -1)


def _with_biases(
    x: np.ndarray, stacks: Sequence[Weight], slots: list[int]
) -> list[np.ndarray]:
    products = row_products(x, stacks, slots)
    return [
        out if stack.bias is None else out + widen(stack.bias[slots])
        for out, stack in zip(products, stacks, strict=True)
    ]


def _gatherable(
    experts: ExpertWeights, slots: mx.array, dtype: mx.Dtype
) -> tuple[ExpertWeights, mx.array]:
    """Return experts that MLX gathers rightly, without converting all, and their ids.

    If it cannot where they are, they are contiguous copies of those in ``slots``.
    """
    if all(_gathers_in_place(w, dtype) for w in experts.by_name.values()):
        return experts, slots
    return experts.end_to_end(slots)


def _gathers_in_place(weight: Weight, dtype: mx.Dtype) -> bool:
    own = weight.w if weight.quantization is None else weight.scales
    is_alike = not weight.strided or own.dtype in (dtype, mx.uint8)
    return is_alike and lies_well(weight)


def _gather_linear(
    x: mx.array, weight: Weight, slots: mx.array, in_order: bool
) -> mx.array:
    """Multiply rows ``[N, 1 or K, 1, I]`` by the matrices ``[n_slots, O, I]``."""
    weight = weight.on_device
    bits = None if weight.quantization is None else weight.quantization.bits

    def product(part: slice | None, ids: mx.array) -> mx.array:
        stack = weight if part is None else weight[part]
        return _gather_product(x, stack, ids, in_order)

    out = in_parts(product, weight.w, bits, slots)
    if weight.bias is None:
        return out
    return out + _bias_like(out, weight.bias_of(slots)[..., None, :])


def _gather_product(
    x: mx.array, weight: Weight, slots: mx.array, in_order: bool
) -> mx.array:
    q = weight.quantization
    if q is None:
        # ``sorted_indices`` is left out: with it, MLX's CUDA product is wrong.
        return mx.gather_mm(x, weight.w.swapaxes(-1, -2), rhs_indices=slots)
    scales, biases = _scales_like(x, weight)
    shape = slots.shape
    if in_order:
        # For sorted indices of two dimensions MLX has no gradients of the scales.
        x, slots = x.flatten(0, -3), slots.flatten()
    out = mx.gather_qmm(
        x,
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
    return mx.unflatten(out, 0, shape) if in_order else out


def dequantize(weight: Weight) -> Array:
    """Unpack ``weight`` to ``[..., O, I]``; NumPy arrays become float32."""
    q = weight.quantization
    assert q is not None
    if isinstance(weight.w, mx.array):
        return mx.dequantize(
            weight.w,
            weight.scales,
            weight.biases,
            group_size=q.group_size,
            bits=q.bits,
            mode=q.mode,
        )
    return unpack(weight)
