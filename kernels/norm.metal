// RMS norms: of rows in one or two passes, of heads, of q and k, and with a gate.
#include "moeflux.h"

// Load blocks `first`, first + step, ... of four columns of a row of n into registers, and return
// the sum of their squares.
template <int BLOCKS, typename P>
inline float take_row(P row, uint n, uint first, uint step, thread float4* values) {
  float sum = 0.0f;
#pragma unroll
  for (int b = 0; b < BLOCKS; ++b) {
    values[b] = read_columns(row, 4 * (first + uint(b) * step), n);
    sum += dot(values[b], values[b]);
  }
  return sum;
}

// First pass of the two-pass norm: the sum of squares of each row.
//
// x: [T,D]; sum_sq: [T] float32. Launch: one threadgroup per row, four columns per thread at a
// time. Threads stride over the row, so that adjacent threads read adjacent columns for any D.
template <typename T>
[[kernel]] void rms_norm_sum_sq(
    device const T* x,
    constant uint& dim,
    device float* sum_sq,
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint3 n_threads [[threads_per_threadgroup]],
    uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint n_simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float scratch[32];
  auto row = x + ulong(group.y) * dim;
  float sum = 0.0f;
  for (uint i = 4 * thread_index; i < dim; i += 4 * n_threads.x) {
    float4 values = read_columns(row, i, dim);
    sum += dot(values, values);
  }
  sum = threadgroup_sum(sum, scratch, lane, simdgroup, n_simdgroups);
  if (thread_index == 0) {
    sum_sq[group.y] = sum;
  }
}

// Second pass: out = x * rsqrt(sum_sq / D + eps) * weight.
//
// x, out: [T,D]; sum_sq: [T]; weight: [D]. Launch: one thread per value, one row of the grid per
// row of x. This is the plain form; the other norms of this file compute the same function.
template <typename T, typename W>
[[kernel]] void rms_norm_apply(
    device const T* x,
    device const float* sum_sq,
    device const W* weight,
    constant uint& dim,
    constant float& eps,
    device T* out,
    uint2 at [[thread_position_in_grid]]) {
  if (at.x >= dim) {
    return;
  }
  ulong i = ulong(at.y) * dim + at.x;
  float scale = rsqrt(sum_sq[at.y] / float(dim) + eps);
  out[i] = T(float(x[i]) * scale * float(weight[at.x]));
}

// Second pass, four columns per thread.
//
// x, out: [T,D]; sum_sq: [T]; weight: [D], usually bfloat. Launch: one thread per four columns, one
// row of the grid per row of x. A quarter of the threads with 64-bit loads is faster for many rows
// of 16-bit values.
template <typename T, typename W>
[[kernel]] void rms_norm_apply_bf16(
    device const T* x,
    device const float* sum_sq,
    device const W* weight,
    constant uint& dim,
    constant float& eps,
    device T* out,
    uint2 at [[thread_position_in_grid]]) {
  uint i = 4 * at.x;
  ulong row = ulong(at.y) * dim;
  float scale = rsqrt(sum_sq[at.y] / float(dim) + eps);
  float4 values = scale * read_columns(x + row, i, dim);
  write_columns(out + row, i, dim, values * read_columns(weight, i, dim));
}

// The norm in one launch: x * rsqrt(mean(x^2) + eps) * weight of each row.
//
// x, out: [T,D]; weight: [D], usually bfloat. BLOCKS = ceil(D / (4 * threads)). Launch: one
// threadgroup per row, one thread per four columns, at most 1024 threads. The row stays in
// registers between its sum and its use, so memory is read once.
template <typename T, typename W, int BLOCKS>
[[kernel]] void rms_norm_bf16_fused_n_tokens(
    device const T* x,
    device const W* weight,
    constant uint& dim,
    constant float& eps,
    device T* out,
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint3 n_threads [[threads_per_threadgroup]],
    uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint n_simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float scratch[32];
  ulong row = ulong(group.y) * dim;
  float4 values[BLOCKS];
  float sum = take_row<BLOCKS>(x + row, dim, thread_index, n_threads.x, values);
  sum = threadgroup_sum(sum, scratch, lane, simdgroup, n_simdgroups);
  float scale = rsqrt(sum / float(dim) + eps);
#pragma unroll
  for (int b = 0; b < BLOCKS; ++b) {
    uint i = 4 * (thread_index + uint(b) * n_threads.x);
    write_columns(out + row, i, dim, scale * values[b] * read_columns(weight, i, dim));
  }
}

// The norm of every head's slice of d columns, with one weight for all heads.
//
// x, out: [T,H*d], n_slices = T * H; weight: [d]. d <= 1024, BLOCKS = ceil(d / 128). Launch: one
// simdgroup per slice, four per threadgroup. A slice fits in a simdgroup's registers, so it needs
// neither a barrier nor threadgroup memory.
template <typename T, typename W, int BLOCKS>
[[kernel]] void rms_norm_per_head_n_tokens(
    device const T* x,
    device const W* weight,
    constant uint& n_slices,
    constant uint& dim,
    constant float& eps,
    device T* out,
    uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  uint slice = 4 * group.y + simdgroup;
  if (slice >= n_slices) {
    return;
  }
  ulong begin = ulong(slice) * dim;
  float4 values[BLOCKS];
  float sum = simd_sum(take_row<BLOCKS>(x + begin, dim, lane, SIMD, values));
  float scale = rsqrt(sum / float(dim) + eps);
#pragma unroll
  for (int b = 0; b < BLOCKS; ++b) {
    uint i = 4 * (lane + uint(b) * SIMD);
    write_columns(out + begin, i, dim, scale * values[b] * read_columns(weight, i, dim));
  }
}

// Scale the heads of q and k in rows q|gap|k|v to unit length, multiply q by d^-1/2, and copy gap
// and v.
//
// x, out: [T,total]; q: columns 0 to Hk*d; k: Hk*d columns from key_offset. q becomes
// q * rsqrt(sum(q^2) + eps) * d^-1/2, k becomes k * rsqrt(sum(k^2) + eps). d <= 1024,
// BLOCKS = ceil(d / 128). Launch: one plane of the grid per row; one simdgroup per piece, four per
// threadgroup. A piece is one head, or as many copied columns as the registers for a head hold, so
// that all simdgroups do equal work.
template <typename T, int BLOCKS>
[[kernel]] void rms_norm_qk(
    device const T* x,
    constant uint& n_heads,
    constant uint& dim,
    constant uint& key_offset,
    constant uint& total,
    constant float& eps,
    device T* out,
    uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  constexpr uint CHUNK = 4 * SIMD * BLOCKS;
  uint piece = 4 * group.y + simdgroup;
  uint width = n_heads * dim;
  uint begin;
  uint end;
  if (piece < 2 * n_heads) {
    begin = piece < n_heads ? piece * dim : key_offset + (piece - n_heads) * dim;
    end = begin + dim;
  } else {
    uint chunk = piece - 2 * n_heads;
    uint gap_chunks = (key_offset - width + CHUNK - 1) / CHUNK;
    bool in_gap = chunk < gap_chunks;
    begin = in_gap ? width + chunk * CHUNK : key_offset + width + (chunk - gap_chunks) * CHUNK;
    end = min(begin + CHUNK, in_gap ? key_offset : total);
  }
  if (begin >= end) {
    return;
  }
  ulong at = ulong(group.z) * total + begin;
  float4 values[BLOCKS];
  float sum = simd_sum(take_row<BLOCKS>(x + at, end - begin, lane, SIMD, values));
  float scale = 1.0f;
  if (piece < 2 * n_heads) {
    scale = rsqrt(sum + eps) * (piece < n_heads ? rsqrt(float(dim)) : 1.0f);
  }
#pragma unroll
  for (int b = 0; b < BLOCKS; ++b) {
    write_columns(out + at, 4 * (lane + uint(b) * SIMD), end - begin, scale * values[b]);
  }
}

// rms_norm(values) * weight * silu(z) for each value head's slice of d columns.
//
// values, z, out: [T,H*d], n_slices = T * H; weight: [d]. d <= 1024, BLOCKS = ceil(d / 128).
// Launch: one simdgroup per slice, four per threadgroup. z is loaded after the sum, so it occupies
// no registers during it.
template <typename T, typename W, int BLOCKS>
[[kernel]] void gated_rms_norm(
    device const T* values,
    device const T* z,
    device const W* weight,
    constant uint& n_slices,
    constant uint& dim,
    constant float& eps,
    device T* out,
    uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  uint slice = 4 * group.y + simdgroup;
  if (slice >= n_slices) {
    return;
  }
  ulong begin = ulong(slice) * dim;
  float4 held[BLOCKS];
  float sum = simd_sum(take_row<BLOCKS>(values + begin, dim, lane, SIMD, held));
  float scale = rsqrt(sum / float(dim) + eps);
#pragma unroll
  for (int b = 0; b < BLOCKS; ++b) {
    uint i = 4 * (lane + uint(b) * SIMD);
    float4 gate = read_columns(z + begin, i, dim);
    float4 normed = scale * held[b] * read_columns(weight, i, dim);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      normed[j] *= silu(gate[j]);
    }
    write_columns(out + begin, i, dim, normed);
  }
}
