"""Array functions that references are written in, for MLX and for NumPy arrays.

References run on MLX arrays everywhere. On a Linux CPU they may also be given NumPy
arrays: MLX's CPU library there links the reference BLAS and hands every small
operation to another thread, which costs 50 times NumPy's time for a product and 10
times for the rest. The mathematics is written once either way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from .. import device
from ..weights import ExpertWeights, Weight

Array = Any


def namespace(x: Array) -> Any:
    """Return the module, ``numpy`` or ``mlx.core``, whose functions take ``x``."""
    return np if isinstance(x, np.ndarray) else mx


def to_host(x: Array) -> Array:
    """Return an MLX array's memory as a NumPy array; bfloat16 becomes float32."""
    if not isinstance(x, mx.array):
        return x
    return np.asarray(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)


def to_device(x: Array) -> Array:
    """Return a NumPy array's values as an MLX array."""
    return mx.array(x) if isinstance(x, np.ndarray) else x


def detached(x: Array) -> Array:
    """Return a part of an array with memory of its own, so that the rest can go."""
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
    """Return from each row of ``[N, E]`` its entries ``indices`` ``[N, K]``."""
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


def rope(x: Array, dims: int, inv_freq: Array, start: Array) -> Array:
    """Rotate the first ``dims`` channels of ``[B, H, T, d]``, halves paired.

    ``start`` ``[B]`` is the position of each sequence's first token.
    """
    if isinstance(x, mx.array):
        freqs = mx.reciprocal(inv_freq)
        return mx.fast.rope(
            x, dims, traditional=False, base=None, scale=1.0, offset=start, freqs=freqs
        )
    positions = (start[:, None] + np.arange(x.shape[2])).astype(np.float32)
    angles = positions[:, None, :, None] * to_host(inv_freq)
    cos, sin = np.cos(angles), np.sin(angles)
    half = dims // 2
    first, second = x[..., :half], x[..., half:dims]
    rotated = [first * cos - second * sin, first * sin + second * cos, x[..., dims:]]
    return np.concatenate(rotated, axis=-1)


# Queries taken together on the host: bounds the score matrix, skips what is hidden.
QUERY_BLOCK = 256


def attention(q: Array, k: Array, v: Array, scale: float, mask: Array | None) -> Array:
    """Attend causally, or as ``mask`` ``[B or 1, 1, T, S]`` (true: seen) allows.

    Args:
        q: ``[B, H, T, d]``, the last T positions.
        k: ``[B, Hkv, S, d]``; head h reads ``h // (H / Hkv)``.
        v: as ``k``.
    """
    if isinstance(q, mx.array):
        causal = "causal" if mask is None and q.shape[2] > 1 else mask
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=causal)
    n_seqs, heads, t, d = q.shape
    n_kv, s = k.shape[1], k.shape[2]
    grouped = (q * scale).reshape(n_seqs, n_kv, heads // n_kv, t, d)
    blocks = []
    for start in range(0, t, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, t)
        seen = s if mask is not None else s - t + stop
        keys = k[:, :, None, :seen].swapaxes(-1, -2)
        scores = np.matmul(grouped[:, :, :, start:stop], keys)
        if mask is not None:
            np.putmask(
                scores,
                ~np.broadcast_to(mask[:, :, None, start:stop, :seen], scores.shape),
                np.finfo(np.float32).min,
            )
        elif stop - start > 1:
            rows = np.arange(seen - (stop - start), seen)[:, None]
            scores[..., rows < np.arange(seen)] = np.finfo(np.float32).min
        blocks.append(np.matmul(softmax(scores), v[:, :, None, :seen]))
    out = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=-2)
    return out.reshape(q.shape)


def linear(x: Array, weight: Weight) -> Array:
    """Return ``x`` ``[..., I]`` times the transpose of ``weight`` ``[O, I]``.

    A weight of MLX arrays serves NumPy rows too.
    """
    if isinstance(x, np.ndarray):
        return _host_linear(x, weight.on_host)
    q = weight.quantization
    if q is None:
        return x @ weight.w.T
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


def embed(token_ids: Array, weight: Weight) -> Array:
    """Return rows ``token_ids`` ``[N]`` of ``weight`` ``[V, D]``, unpacked.

    A weight of MLX arrays serves NumPy ids too.
    """
    on_host = isinstance(token_ids, np.ndarray)
    weight = weight.on_host if on_host else weight
    parts = (weight.w, weight.scales, weight.biases)
    w, scales, biases = (None if x is None else x[token_ids] for x in parts)
    if weight.quantization is None:
        return widen(w) if on_host else w
    return dequantize(Weight(w, scales, biases, weight.quantization))


def _host_linear(x: np.ndarray, weight: Weight) -> np.ndarray:
    if weight.quantization is None:
        return x @ widen(weight.w).T
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) >= device.UNPACK_MIN_ROWS or not _has_table(weight):
        return _unpacked_product(x, weight)
    (out,) = row_products(rows, [weight[None]], [0] * len(rows))
    return out.reshape(*x.shape[:-1], -1)


def _unpacked_product(x: np.ndarray, weight: Weight) -> np.ndarray:
    step = max(1, device.UNPACKED_BLOCK_BYTES // (4 * x.shape[-1]))
    n_out = weight.w.shape[-2]
    if n_out <= step:
        return x @ dequantize(weight).T
    out = np.empty((*x.shape[:-1], n_out), np.float32)
    for start in range(0, n_out, step):
        block = slice(start, start + step)
        np.matmul(x, dequantize(weight[block]).T, out=out[..., block])
    return out


def row_products(
    x: np.ndarray, stacks: Sequence[Weight], slots: Sequence[int] | np.ndarray
) -> list[np.ndarray]:
    """Multiply row i of ``[K, I]`` by ``stack[slots[i]]`` ``[O, I]`` of each stack.

    Packed values are looked up a block at a time, small enough for the cache, and
    scaled after the products with each group: ``s (q . x) + b sum(x)``.

    Returns:
        ``[K, O]`` for each stack; all have the same shape and quantisation.
    """
    first = stacks[0]
    if not _has_table(first):
        return [
            np.stack([_host_linear(r, stack[s]) for r, s in zip(x, slots, strict=True)])
            for stack in stacks
        ]
    q, (n_out, n_groups) = first.quantization, first.scales.shape[1:]
    assert q is not None
    slots = np.asarray(slots)
    grouped = x.reshape(len(x), n_groups, q.group_size, 1)
    parts = [s.scales[slots] for s in stacks] + [s.biases[slots] for s in stacks]
    shape = (2, len(stacks), *parts[0].shape)
    scales, biases = widen(np.concatenate(parts)).reshape(shape)
    out = (biases @ grouped.sum(2))[..., 0]
    step = max(8, device.HOST_BLOCK_VALUES // (x.size * len(stacks)))
    for start in range(0, n_out, step):
        rows = slice(start, min(start + step, n_out))
        packed = [s.w[slots] if step >= n_out else s.w[slots, rows] for s in stacks]
        values = _unpacked(np.concatenate(packed), q.bits)
        shape = (len(stacks), len(x), -1, n_groups, q.group_size)
        values = values.reshape(shape)
        dots = (values.swapaxes(2, 3) @ grouped)[..., 0]
        out[:, :, rows] += np.einsum("skgo,skog->sko", dots, scales[:, :, rows])
    return list(out)


def _has_table(weight: Weight) -> bool:
    q = weight.quantization
    return q is not None and q.mode == "affine" and q.bits in (2, 4, 8)


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


def expert_mlp(x: Array, experts: ExpertWeights, slot: int) -> Array:
    """Apply one expert, ``down(silu(gate x) * (up x))``, to rows ``[M, D]``."""
    experts = experts.on_host if isinstance(x, np.ndarray) else experts
    act = swiglu(linear(x, experts.gate[slot]), linear(x, experts.up[slot]))
    return linear(act, experts.down[slot])


def experts_by_slot(
    x: Array, slots: Array, experts: ExpertWeights, *, in_order: bool = False
) -> Array:
    """Run rows ``[N, D]`` through the experts in their slots ``[N, K]``.

    Args:
        in_order: slots never fall from row to row, which lets MLX group rows.

    Returns:
        ``[N, K, D]``.
    """
    if isinstance(x, np.ndarray):
        return _experts_on_host(x, slots, experts)
    x = x[:, None, None]
    gate = _gather_linear(x, experts.gate, slots, in_order)
    up = _gather_linear(x, experts.up, slots, in_order)
    return _gather_linear(swiglu(gate, up), experts.down, slots, in_order).squeeze(-2)


def _experts_on_host(x: np.ndarray, slots: Array, experts: ExpertWeights) -> Array:
    experts, chosen = experts.on_host, slots.reshape(-1).tolist()
    rows = np.repeat(x, slots.shape[1], axis=0)
    if experts.gate.quantization == experts.up.quantization:
        gate, up = row_products(rows, [experts.gate, experts.up], chosen)
    else:
        (gate,) = row_products(rows, [experts.gate], chosen)
        (up,) = row_products(rows, [experts.up], chosen)
    (down,) = row_products(swiglu(gate, up), [experts.down], chosen)
    return down.reshape(*slots.shape, -1)


def _gather_linear(
    x: mx.array, weight: Weight, slots: mx.array, in_order: bool
) -> mx.array:
    """Multiply rows ``[N, 1 or K, 1, I]`` by the matrices ``[n_slots, O, I]``."""
    if weight.strided and not device.gathers_strided():
        weight, slots = _end_to_end(weight, slots)
    q = weight.quantization
    if q is None:
        # Not told that slots are in order: MLX's CUDA product is wrong then.
        return mx.gather_mm(x, weight.w.swapaxes(-1, -2), rhs_indices=slots)
    scales, biases = _scales_like(x, weight)
    return mx.gather_qmm(
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


def dequantize(weight: Weight) -> Array:
    """Unpack ``weight`` to ``[..., O, I]``; float32 when its arrays are NumPy's."""
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
    if not _has_table(weight):
        return _unpack_with_mlx(weight)
    scales, biases = widen(weight.scales), widen(weight.biases)
    values = _unpacked(weight.w, q.bits).reshape(*scales.shape, q.group_size)
    values *= scales[..., None]
    values += biases[..., None]
    return values.reshape(*scales.shape[:-1], math.prod(values.shape[-2:]))


def _end_to_end(weight: Weight, slots: mx.array) -> tuple[Weight, mx.array]:
    """Return copies of the matrices in ``slots``, and where each is among them."""
    parts = (weight.w, weight.scales, weight.biases)
    w, scales, biases = (None if x is None else x[slots.flatten()] for x in parts)
    places = mx.arange(slots.size, dtype=mx.uint32).reshape(slots.shape)
    return Weight(w, scales, biases, weight.quantization), places


def _unpack_with_mlx(weight: Weight) -> np.ndarray:
    q = weight.quantization
    assert q is not None and weight.scales is not None
    is_float = q.mode == "affine"
    scales = mx.array(widen(weight.scales) if is_float else weight.scales)
    biases = None if weight.biases is None else mx.array(widen(weight.biases))
    same = Weight(mx.array(weight.w), scales, biases, q)
    return to_host(dequantize(same).astype(mx.float32))


def widen(x: Any) -> np.ndarray:
    """Return float32 of float32 or float16 values, or of bfloat16 ones as bits."""
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32, copy=False)


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Return packed values as float32, in order along a new last axis."""
    words = np.ascontiguousarray(packed).view(np.uint8)
    return np.take(_table(bits), words, axis=0, mode="clip")


@functools.cache
def _table(bits: int) -> np.ndarray:
    """Map a byte to its values as float32; small enough to stay in the cache."""
    words = np.arange(256, dtype=np.uint32)
    columns = [(words >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.stack(columns, axis=-1).astype(np.float32)
