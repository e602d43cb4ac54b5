"""Ways of the gated delta rule and of the Ops that precede it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ...experts.weights import Weight
from ..launch import linear_attention as kernels
from ..ops import linear_attention as ops
from .registry import Run, way


@way(ops.PartKeyHeadsNTokens, "part_key_heads")
def part_key_heads(
    op: Any, run: Run, qkvz: mx.array, ba: mx.array
) -> tuple[mx.array, ...]:
    return run(kernels.part_key_heads(qkvz, ba, op.num_k_heads, op.key_dim))


@way(
    ops.Conv1dStepNTokens,
    "conv1d_step",
    lambda op: 2 <= op.kernel_size <= kernels.MAX_WIDTH,
    ("conv1d_step", "conv1d_state_update"),
)
def conv1d_step(
    op: Any,
    run: Run,
    x: mx.array,
    state: mx.array,
    mask: mx.array | None,
    lengths: mx.array | None,
    weight: Weight,
) -> tuple[mx.array, mx.array]:
    """Convolve, then update the history: two launches that read the same inputs."""
    state = state.astype(x.dtype)
    taps = weight.w.reshape(op.conv_dim, op.kernel_size)
    (out,) = run(kernels.conv1d_step(x, state, taps, mask))
    (new_state,) = run(kernels.conv1d_state_update(x, state, mask, lengths))
    return new_state, out


@way(ops.ComputeDecayBetaNTokens, "compute_decay_beta")
def decay_beta(
    _op: Any,
    run: Run,
    alpha: mx.array,
    beta: mx.array,
    mask: mx.array | None,
    a_log: Weight,
    dt_bias: Weight,
) -> tuple[mx.array, ...]:
    flat = None if mask is None else mask.reshape(-1)
    bias = dt_bias.w.astype(a_log.w.dtype)
    return run(kernels.compute_decay_beta(alpha, beta, a_log.w, bias, flat))


def _key_dim_fits(limit: int) -> Any:
    return lambda op: op.key_dim % kernels.SIMD == 0 and op.key_dim <= limit


def _one_token(op: Any) -> bool:
    return op.n_tokens == op.n_seqs and _key_dim_fits(kernels.MAX_KEY_DIM)(op)


def _delta(op_type: Any, kernel: Any, fits: Any) -> None:
    """Add a way of the delta rule; all its kernels take the same arguments."""

    @way(op_type, kernel.name, fits)
    def run_rule(
        op: Any,
        run: Run,
        state: mx.array,
        qkv: mx.array,
        decay: mx.array,
        beta: mx.array,
    ) -> tuple[mx.array, ...]:
        return run(kernel(qkv, state, decay, beta, op.num_k_heads))


_fits = _key_dim_fits(kernels.MAX_KEY_DIM)
_fits_chunks = _key_dim_fits(kernels.MAX_CHUNKED_KEY_DIM)
# The sequential form was the fastest on Apple's GPUs in an earlier engine.
_delta(ops.GatedDeltaNetStepNTokens, kernels.gated_delta_net_step, _one_token)
_delta(ops.GatedDeltaNetStepNTokens, kernels.gated_delta_net_sequential, _fits)
_delta(ops.GatedDeltaNetChunkwise, kernels.gated_delta_net_sequential, _fits)
_delta(ops.GatedDeltaNetChunkwise, kernels.gated_delta_net_chunkwise, _fits_chunks)
