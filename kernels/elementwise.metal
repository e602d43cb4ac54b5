// Elementwise kernels: residuals, gates, SwiGLU, zeroing, de-interleaving and weighted sums.
#include "moeflux.h"

// out = a + b over n values.
//
// a, b, out: [n]. Launch: one thread per value. It adds in float32 and rounds once, as MLX's
// a + b does.
template <typename T>
[[kernel]] void residual_add(
    device const T* a,
    device const T* b,
    constant uint& n,
    device T* out,
    uint i [[thread_position_in_grid]]) {
  if (i < n) {
    out[i] = T(float(a[i]) + float(b[i]));
  }
}

// out = a + b over rows.
//
// a, b, out: [T,D], n = T * D. Launch: one thread per four values. Rows are contiguous, so they
// count as one long row: only the last thread meets a remainder, whatever D is.
template <typename T>
[[kernel]] void residual_add_n_tokens(
    device const T* a,
    device const T* b,
    constant uint& n,
    device T* out,
    uint thread_index [[thread_position_in_grid]]) {
  uint i = 4 * thread_index;
  write_columns(out, i, n, read_columns(a, i, n) + read_columns(b, i, n));
}

inline float4 swiglu4(float4 gate, float4 up) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    up[j] *= silu(gate[j]);
  }
  return up;
}

// out = silu(gate) * up over n values.
//
// gate, up, out: [n]. Launch: one thread per value. This plain form spreads one token's few values
// over the most cores.
template <typename T>
[[kernel]] void swiglu_fused(
    device const T* gate,
    device const T* up,
    constant uint& n,
    device T* out,
    uint i [[thread_position_in_grid]]) {
  if (i < n) {
    out[i] = T(silu(float(gate[i])) * float(up[i]));
  }
}

// out = silu(gate) * up over n values, a multiple of four.
//
// gate, up, out: [n]. Launch: one thread per four values. There is no remainder, so no thread
// handles single values.
template <typename T>
[[kernel]] void swiglu_fused_vec4(
    device const T* gate,
    device const T* up,
    constant uint& n,
    device T* out,
    uint thread_index [[thread_position_in_grid]]) {
  uint i = 4 * thread_index;
  if (i < n) {
    write4(out + i, swiglu4(read4(gate + i), read4(up + i)));
  }
}

// out = swiglu(gate, up) over rows of tokens or of experts.
//
// gate, up, out: [T,F], n = T * F; alpha, limit: see `swiglu`. Launch: one thread per four values
// of the rows taken as one.
template <typename T>
[[kernel]] void swiglu_fused_batched(
    device const T* gate,
    device const T* up,
    constant uint& n,
    constant float& alpha,
    constant float& limit,
    device T* out,
    uint thread_index [[thread_position_in_grid]]) {
  uint i = 4 * thread_index;
  float4 gates = read_columns(gate, i, n);
  float4 values = read_columns(up, i, n);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    values[j] = swiglu(gates[j], values[j], alpha, limit);
  }
  write_columns(out, i, n, values);
}

// out = x * sigmoid(gate).
//
// x, gate, out: [T,D], n = T * D. Launch: one thread per four values of the rows taken as one.
template <typename T>
[[kernel]] void sigmoid_gate(
    device const T* x,
    device const T* gate,
    constant uint& n,
    device T* out,
    uint thread_index [[thread_position_in_grid]]) {
  uint i = 4 * thread_index;
  float4 values = read_columns(x, i, n);
  float4 gates = read_columns(gate, i, n);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    values[j] *= sigmoid(gates[j]);
  }
  write_columns(out, i, n, values);
}

// Separate q from gate, which alternate head by head.
//
// q_proj: [T,H*2d], q then gate in each head; q, gate: [T,H*d], n_slices = T * H. Launch: one row
// of the grid per head's slice, one thread per four columns. The grid has two dimensions because
// the compiler does not know d, and dividing by it would cost more than the copy.
template <typename T>
[[kernel]] void split_q_gate(
    device const T* q_proj,
    constant uint& n_slices,
    constant uint& dim,
    device T* q,
    device T* gate,
    uint2 at [[thread_position_in_grid]]) {
  if (at.y >= n_slices) {
    return;
  }
  uint i = 4 * at.x;
  ulong to = ulong(at.y) * dim;
  auto pair = q_proj + 2 * to;
  write_columns(q + to, i, dim, read_columns(pair, i, dim));
  write_columns(gate + to, i, dim, read_columns(pair + dim, i, dim));
}

// out = sum over k of weights[k] * values[k], for one token's K experts.
//
// values: [K,D]; weights: [K] float32; out: [D]. Launch: one thread per column. One token has few
// columns, and more threads hide more latency than wider loads would save. The sum always runs in
// rising k, so its bits do not depend on the schedule.
template <typename T>
[[kernel]] void weighted_sum(
    device const T* values,
    device const float* weights,
    constant uint& k,
    constant uint& dim,
    device T* out,
    uint i [[thread_position_in_grid]]) {
  if (i >= dim) {
    return;
  }
  float sum = 0.0f;
  for (uint j = 0; j < k; ++j) {
    sum = fma(weights[j], float(values[ulong(j) * dim + i]), sum);
  }
  out[i] = T(sum);
}

// Fill n values with zeros.
//
// out: [n] float32, an accumulator. Launch: one thread per four values.
[[kernel]] void zero_buffer(
    constant uint& n,
    device float* out,
    uint thread_index [[thread_position_in_grid]]) {
  write_columns(out, 4 * thread_index, n, float4(0.0f));
}
