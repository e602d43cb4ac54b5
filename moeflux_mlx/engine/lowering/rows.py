"""Ways of products, norms, the embedding and elementwise Ops."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ...experts.weights import Quantization, Weight
from ..launch import Launch, elementwise, embed, norm, quant
from ..ops import elementwise as elementwise_ops
from ..ops import embed as embed_ops
from ..ops import norm as norm_ops
from ..ops.quant import MatvecNTokens
from .registry import Run, way

KERNEL_BITS = (2, 4, 8)
KERNEL_GROUPS = (32, 64, 128)
# Columns of the input that the v3 kernels keep in threadgroup memory.
V3_MAX_IN_DIM = 4096


def kernel_form(q: Quantization | None) -> bool:
    """Return whether our kernels know a matrix's quantisation."""
    return (
        q is not None
        and q.mode == "affine"
        and q.bits in KERNEL_BITS
        and q.group_size in KERNEL_GROUPS
    )


def parts(weight: Weight) -> tuple[mx.array, mx.array, mx.array]:
    """Return words, scales and biases of a quantised matrix."""
    return weight.w, weight.scales, weight.biases


def form(weight: Weight) -> tuple[int, int]:
    """Return bits and group size of a quantised matrix."""
    q = weight.quantization
    assert q is not None
    return q.bits, q.group_size


# Products with a matrix: by rows of the matrix for one token, in tiles for more.
def _bits(op: MatvecNTokens, bits: int) -> bool:
    q = op.weight.quantization
    return kernel_form(op.weight.quantization) and q is not None and q.bits == bits


def _one_token(op: MatvecNTokens, bits: int, max_in_dim: int | None = None) -> bool:
    fits = max_in_dim is None or op.in_dim <= max_in_dim
    return op.n_tokens == 1 and _bits(op, bits) and fits


def _with_bias(out: mx.array, x: mx.array, bias: Weight | None) -> mx.array:
    out = out.reshape(x.shape[0], -1)
    return out if bias is None else out + bias.w


def _matvec(name: str, fits: Any) -> None:
    """Add a way for one token: a kernel of a row ``[I]`` and a matrix."""

    @way(MatvecNTokens, name, fits)
    def run_one(
        _op: Any, run: Run, x: mx.array, weight: Weight, bias: Weight | None
    ) -> mx.array:
        kernel = getattr(quant, name)
        launch: Launch = kernel(x.reshape(-1), *parts(weight), form(weight)[1])
        return _with_bias(run(launch)[0], x, bias)


# Only ways that were the fastest somewhere, or that nobody has timed: those of 2 bits
# and of dense matrices. The library has more kernels for the same products.
_matvec("dequant_matvec_4bit_v3", lambda op: _one_token(op, 4, V3_MAX_IN_DIM))
_matvec("dequant_matvec_4bit_fast", lambda op: _one_token(op, 4))
_matvec("dequant_matvec_2bit", lambda op: _one_token(op, 2))


_matvec("dequant_matvec_4bit_v4", lambda op: _one_token(op, 4))


@way(
    MatvecNTokens,
    "dequant_matvec_8bit_v3_n_tokens",
    lambda op: _bits(op, 8) and op.in_dim <= V3_MAX_IN_DIM,
)
def by_rows(
    _op: Any, run: Run, x: mx.array, weight: Weight, bias: Weight | None
) -> mx.array:
    launch = quant.dequant_matvec_8bit_v3_n_tokens
    (out,) = run(launch(x, *parts(weight), form(weight)[1]))
    return _with_bias(out, x, bias)


@way(MatvecNTokens, "qmm_t", lambda op: kernel_form(op.weight.quantization))
def qmm_t(
    _op: Any, run: Run, x: mx.array, weight: Weight, bias: Weight | None
) -> mx.array:
    (out,) = run(quant.qmm_t(x, *parts(weight), *form(weight)))
    return _with_bias(out, x, bias)


# Unpacking a matrix first pays for at least so many tokens and at most so many values.
UNPACKED_TOKENS, UNPACKED_VALUES = 256, 1 << 26


def _worth_unpacking(op: MatvecNTokens) -> bool:
    small = op.in_dim * op.out_dim <= UNPACKED_VALUES
    return (
        kernel_form(op.weight.quantization) and op.n_tokens >= UNPACKED_TOKENS and small
    )


@way(MatvecNTokens, "mlx_dequantize", _worth_unpacking, kernels=())
def unpacked_product(
    _op: Any, _run: Run, x: mx.array, weight: Weight, bias: Weight | None
) -> mx.array:
    """Unpack the matrix to the rows' type, then use MLX's dense product."""
    bits, group_size = form(weight)
    dense = mx.dequantize(*parts(weight), group_size=group_size, bits=bits)
    return _with_bias(x @ dense.astype(x.dtype).T, x, bias)


def _dense(op: MatvecNTokens) -> bool:
    return op.weight.quantization is None


@way(MatvecNTokens, "bf16_matvec", lambda op: _dense(op) and op.n_tokens == 1)
def dense_matvec(
    _op: Any, run: Run, x: mx.array, weight: Weight, bias: Weight | None
) -> mx.array:
    (out,) = run(quant.bf16_matvec(x.reshape(-1), weight.w))
    return _with_bias(out, x, bias)


@way(MatvecNTokens, "bf16_matmul_n_tokens", _dense)
def dense_matmul(
    _op: Any, run: Run, x: mx.array, weight: Weight, bias: Weight | None
) -> mx.array:
    (out,) = run(quant.bf16_matmul_n_tokens(x, weight.w))
    return _with_bias(out, x, bias)


@way(
    embed_ops.EmbedGatherNTokens,
    "embed_gather_4bit",
    lambda op: kernel_form(op.weight.quantization),
)
def embed_gather(_op: Any, run: Run, token_ids: mx.array, weight: Weight) -> mx.array:
    dtype = weight.scales.dtype
    launch = embed.embed_gather_4bit(token_ids, *parts(weight), *form(weight), dtype)
    return run(launch)[0]


def _dense_rows(op: embed_ops.EmbedGatherNTokens) -> bool:
    return op.weight.quantization is None


@way(embed_ops.EmbedGatherNTokens, "embed_gather_dense", _dense_rows)
def dense_rows(_op: Any, run: Run, token_ids: mx.array, weight: Weight) -> mx.array:
    return run(embed.embed_gather_dense(token_ids, weight.w, weight.w.dtype))[0]


# Norms.
@way(
    norm_ops.RmsNormBf16NTokens,
    "rms_norm_bf16_fused_n_tokens",
    lambda op: op.dim <= norm.MAX_DIM,
)
def rms_norm(op: Any, run: Run, x: mx.array, weight: Weight) -> mx.array:
    return run(norm.rms_norm_bf16_fused_n_tokens(x, weight.w, op.eps))[0]


@way(
    norm_ops.RmsNormBf16NTokens,
    "rms_norm_sum_sq",
    kernels=("rms_norm_sum_sq", "rms_norm_apply", "rms_norm_apply_bf16"),
)
def rms_norm_two_pass(op: Any, run: Run, x: mx.array, weight: Weight) -> mx.array:
    (sum_sq,) = run(norm.rms_norm_sum_sq(x))
    same = weight.w.dtype == x.dtype
    apply = norm.rms_norm_apply if same else norm.rms_norm_apply_bf16
    return run(apply(x, sum_sq, weight.w, op.eps))[0]


@way(
    norm_ops.RmsNormPerHeadNTokens,
    "rms_norm_per_head_n_tokens",
    lambda op: op.head_dim <= norm.MAX_HEAD_DIM,
)
def rms_norm_per_head(op: Any, run: Run, x: mx.array, weight: Weight) -> mx.array:
    return run(norm.rms_norm_per_head_n_tokens(x, weight.w, op.eps))[0]


@way(
    norm_ops.RmsNormQkNTokens,
    "rms_norm_qk",
    lambda op: op.key_dim <= norm.MAX_HEAD_DIM,
)
def rms_norm_qk(op: Any, run: Run, x: mx.array) -> mx.array:
    sizes = (op.num_k_heads, op.key_dim, op.key_offset_per_token)
    return run(norm.rms_norm_qk(x, *sizes, op.eps))[0]


@way(
    norm_ops.GatedRmsNormNTokens,
    "gated_rms_norm",
    lambda op: op.value_dim <= norm.MAX_HEAD_DIM,
)
def gated_rms_norm(
    op: Any, run: Run, values: mx.array, z: mx.array, weight: Weight
) -> mx.array:
    return run(norm.gated_rms_norm(values, z, weight.w, op.eps))[0]


# Elementwise.
@way(elementwise_ops.ResidualAddNTokens, "residual_add_n_tokens")
def residual_add(_op: Any, run: Run, a: mx.array, b: mx.array) -> mx.array:
    return run(elementwise.residual_add_n_tokens(a, b))[0]


@way(elementwise_ops.ZeroBuffer, "zero_buffer")
def zero_buffer(op: Any, run: Run) -> mx.array:
    (out,) = run(elementwise.zero_buffer(op.n_tokens * op.dim))
    return out.reshape(op.n_tokens, op.dim)


@way(elementwise_ops.SwigluFusedBatched, "swiglu_fused_batched")
def swiglu(_op: Any, run: Run, gate: mx.array, up: mx.array) -> mx.array:
    return run(elementwise.swiglu_fused_batched(gate, up))[0]


@way(elementwise_ops.SigmoidGateNTokens, "sigmoid_gate")
def sigmoid_gate(_op: Any, run: Run, x: mx.array, gate: mx.array) -> mx.array:
    return run(elementwise.sigmoid_gate(x, gate))[0]


@way(elementwise_ops.SplitQGate, "split_q_gate")
def split_q_gate(op: Any, run: Run, q_proj: mx.array) -> tuple[mx.array, ...]:
    return run(elementwise.split_q_gate(q_proj, op.num_heads))
