// Products with quantised and with dense matrices.
//
// A matrix [O,I] in 2, 4 or 8 bits: a row has I * bits / 32 words, lowest bits first, and I / G
// scales and biases; value = scale * q + bias. I is a multiple of G, and G of 32.
#include "moeflux.h"

// Number of inputs that the v3 kernels hold in threadgroup memory: 16 KiB of its 32.
constexpr constant int CACHED = 4096;

// out = W x with one thread per row: the readable baseline.
//
// x: [I]; w, scales, biases: a matrix [O,I] in 4 bits; out: [O]. Launch: one thread per row.
template <typename T, typename S, int G>
[[kernel]] void dequant_matvec_4bit(
    device const T* x,
    device const uint* w,
    device const S* scales,
    device const S* biases,
    constant uint& n_in,
    constant uint& n_out,
    device T* out,
    uint row [[thread_position_in_grid]]) {
  if (row >= n_out) {
    return;
  }
  float sum = 0.0f;
  for (uint i = 0; i < n_in; ++i) {
    ulong at = ulong(row) * n_in + i;
    uint q = (w[at / 8] >> (4 * (i % 8))) & 15u;
    float value = fma(float(scales[at / G]), float(q), float(biases[at / G]));
    sum = fma(value, float(x[i]), sum);
  }
  out[row] = T(sum);
}

// A lane's share of the product of one row with values in threadgroup or device memory: the words
// `first`, first + step, .... A value adds fma(q, scale * x, bias * x).
template <int BITS, int G, typename X, typename W, typename S, typename B>
inline float dot_row(X x, W w, S scales, B biases, uint n_in, uint first, uint step) {
  constexpr int PER_WORD = 32 / BITS;
  constexpr uint MASK = (1u << BITS) - 1u;
  float sum = 0.0f;
  for (uint word = first; word < n_in / PER_WORD; word += step) {
    uint packed = w[word];
    float scale = float(scales[word * PER_WORD / G]);
    float bias = float(biases[word * PER_WORD / G]);
#pragma unroll
    for (int j = 0; j < PER_WORD; ++j) {
      float value = float(x[word * PER_WORD + j]);
      float q = float((packed >> (BITS * j)) & MASK);
      sum += fma(q, scale * value, bias * value);
    }
  }
  return sum;
}

// Copy x into threadgroup memory with 256 threads. Contains a barrier.
template <typename P>
inline void cache_row(P x, threadgroup float* cached, uint n_in, uint thread_index) {
  for (uint i = thread_index; i < n_in; i += 256) {
    cached[i] = float(x[i]);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// out = W x with one threadgroup of 64 per row, for rows of any length.
//
// Arguments: see `dequant_matvec_4bit`. Launch: 64 threads per row. Two simdgroups halve the time
// of a long row. All threadgroups read the same x from device memory, so the GPU's caches hold it.
template <typename T, typename S, int G>
[[kernel]] void dequant_matvec_4bit_fast(
    device const T* x,
    device const uint* w,
    device const S* scales,
    device const S* biases,
    constant uint& n_in,
    device T* out,
    uint row [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup float halves[2];
  ulong at = ulong(row) * n_in;
  float sum =
      dot_row<4, G>(x, w + at / 8, scales + at / G, biases + at / G, n_in, thread_index, 64);
  sum = simd_sum(sum);
  if (thread_index % SIMD == 0) {
    halves[simdgroup] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (thread_index == 0) {
    out[row] = T(halves[0] + halves[1]);
  }
}

// One row per simdgroup for 8 simdgroups, with x cached once for all of them.
template <typename T, int BITS, int G, typename X, typename W, typename S, typename B>
inline void cached_rows(
    X x,
    W w,
    S scales,
    B biases,
    device T* out,
    threadgroup float* cached,
    uint n_in,
    uint n_out,
    uint row,
    uint thread_index,
    uint lane) {
  cache_row(x, cached, n_in, thread_index);
  // Not before the barrier in cache_row: a thread that skips it would hang the others.
  if (row >= n_out) {
    return;
  }
  ulong at = ulong(row) * n_in;
  float sum = dot_row<BITS, G>(
      cached, w + at * BITS / 32, scales + at / G, biases + at / G, n_in, lane, SIMD);
  sum = simd_sum(sum);
  if (lane == 0) {
    out[row] = T(sum);
  }
}

// out = W x with one simdgroup per row, and x cached in threadgroup memory for 8 rows.
//
// Arguments: see `dequant_matvec_4bit`; I <= 4096. Launch: 256 threads per 8 rows. In bfloat16 x
// has more than three times the bytes of a row, so the 8 rows share its reads.
template <typename T, typename S, int G>
[[kernel]] void dequant_matvec_4bit_v3(
    device const T* x,
    device const uint* w,
    device const S* scales,
    device const S* biases,
    constant uint& n_in,
    constant uint& n_out,
    device T* out,
    uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float cached[CACHED];
  cached_rows<T, 4, G>(
      x, w, scales, biases, out, cached, n_in, n_out, 8 * group + simdgroup, thread_index, lane);
}

// `dequant_matvec_4bit_v3` in 8 bits, for routers and the gates of shared experts.
//
// Launch: see `dequant_matvec_4bit_v3`.
template <typename T, typename S, int G>
[[kernel]] void dequant_matvec_8bit_v3(
    device const T* x,
    device const uint* w,
    device const S* scales,
    device const S* biases,
    constant uint& n_in,
    constant uint& n_out,
    device T* out,
    uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float cached[CACHED];
  cached_rows<T, 8, G>(
      x, w, scales, biases, out, cached, n_in, n_out, 8 * group + simdgroup, thread_index, lane);
}

// `dequant_matvec_8bit_v3` for each of T tokens, with the same bits at T = 1.
//
// x: [T,I]; out: [T,O]. Launch: 256 threads per 8 rows and token, grid (256 O / 8, T).
template <typename T, typename S, int G>
[[kernel]] void dequant_matvec_8bit_v3_n_tokens(
    device const T* x,
    device const uint* w,
    device const S* scales,
    device const S* biases,
    constant uint& n_in,
    constant uint& n_out,
    device T* out,
    uint2 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float cached[CACHED];
  auto row = x + ulong(group.y) * n_in;
  device T* to = out + ulong(group.y) * n_out;
  cached_rows<T, 8, G>(
      row, w, scales, biases, to, cached, n_in, n_out, 8 * group.x + simdgroup, thread_index,
      lane);
}

// out = W x with ROWS rows per threadgroup, and 128-bit loads where rows are long enough.
//
// Arguments: see `dequant_matvec_4bit`. Launch: 128 threads per ROWS rows. A matrix of many rows
// gets a larger ROWS, so that x is read less often.
template <typename T, typename S, int G, int WORDS, int ROWS>
[[kernel]] void dequant_matvec_4bit_v4(
    device const T* x,
    device const uint* w,
    device const S* scales,
    device const S* biases,
    constant uint& n_in,
    constant uint& n_out,
    device T* out,
    uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float sums[ROWS];
  uint row = group * ROWS;
  block_rows<4, G, WORDS, ROWS, false>(
      x, x, 0.0f, w, scales, biases, row, n_in, n_out, sums, simdgroup, lane);
  if (thread_index < ROWS && row + thread_index < n_out) {
    out[row + thread_index] = T(sums[thread_index]);
  }
}

// out = residual + W x + bias.
//
// Arguments: see `dequant_matvec_4bit`, but BITS bits; residual, bias: [O]. Launch: see
// `dequant_matvec_4bit_v4`. It saves a separate launch for a tiny addition.
template <typename T, typename S, int BITS, int G, int WORDS, int ROWS, bool HAS_BIAS>
[[kernel]] void matvec_residual(
    device const T* x,
    device const uint* w,
    device const S* scales,
    device const S* biases,
    device const T* residual,
    device const T* bias,
    constant uint& n_in,
    constant uint& n_out,
    device T* out,
    uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float sums[ROWS];
  uint row = group * ROWS;
  block_rows<BITS, G, WORDS, ROWS, false>(
      x, x, 0.0f, w, scales, biases, row, n_in, n_out, sums, simdgroup, lane);
  if (thread_index < ROWS && row + thread_index < n_out) {
    uint own = row + thread_index;
    float product = sums[thread_index] + row_bias<HAS_BIAS>(bias, own);
    out[own] = T(float(residual[own]) + product);
  }
}

// The RMS norm of a row and the products of one or two matrices with it, written to one row.
//
// x: [I]; norm: [I], the norm's weight; w<i>, scales<i>, biases<i>: matrix i, [n<i>, I] in BITS<i>
// bits; bias<i>: [n<i>], added to its product; n1 is 0 for a single matrix; out: [at_normed + I]:
// the first product at 0, the second at at1, the norm at at_normed. Launch: threadgroups of 128,
// one per ROWS rows of the first matrix, then of the second, and a last one for the norm. Every
// threadgroup computes the norm's scale: it reads all of x anyway, and this saves a launch.
template <
    typename T,
    typename N,
    typename S,
    int G,
    int BITS0,
    int BITS1,
    int WORDS,
    int ROWS,
    bool HAS_BIAS0,
    bool HAS_BIAS1>
[[kernel]] void norm_matvecs(
    device const T* x,
    device const N* norm,
    device const uint* w0,
    device const S* scales0,
    device const S* biases0,
    device const uint* w1,
    device const S* scales1,
    device const S* biases1,
    device const T* bias0,
    device const T* bias1,
    constant float& eps,
    constant uint& n_in,
    constant uint& n0,
    constant uint& n1,
    constant uint& at1,
    constant uint& at_normed,
    device T* out,
    uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float sums[ROWS];
  uint first1 = (n0 + ROWS - 1) / ROWS;
  uint last = first1 + (n1 + ROWS - 1) / ROWS;
  if (group < first1) {
    uint row = group * ROWS;
    block_rows<BITS0, G, WORDS, ROWS, true>(
        x, norm, eps, w0, scales0, biases0, row, n_in, n0, sums, simdgroup, lane);
    if (thread_index < ROWS && row + thread_index < n0) {
      float added = row_bias<HAS_BIAS0>(bias0, row + thread_index);
      out[row + thread_index] = T(sums[thread_index] + added);
    }
  } else if (group < last) {
    uint row = (group - first1) * ROWS;
    block_rows<BITS1, G, WORDS, ROWS, true>(
        x, norm, eps, w1, scales1, biases1, row, n_in, n1, sums, simdgroup, lane);
    if (thread_index < ROWS && row + thread_index < n1) {
      float added = row_bias<HAS_BIAS1>(bias1, row + thread_index);
      out[at1 + row + thread_index] = T(sums[thread_index] + added);
    }
  } else {
    float scale = rms_scale(x, n_in, eps, lane);
    for (uint i = 4 * thread_index; i < n_in; i += 4 * 128) {
      write4(out + at_normed + i, scale * read4(x + i) * read4(norm + i));
    }
    // Clear the gaps between the three results, so that no output is left unwritten.
    if (thread_index < at1 - n0) {
      out[n0 + thread_index] = T(0.0f);
    }
    if (thread_index < at_normed - at1 - n1) {
      out[at1 + n1 + thread_index] = T(0.0f);
    }
  }
}

// The SwiGLU of two products with the RMS norm of a row: out = silu(Wg y) * (Wu y), y = norm(x).
//
// x: [I]; norm: [I], the norm's weight; w, scales, biases: a matrix [2 O,I] in BITS bits, the rows
// of Wg before those of Wu; out: [O]. Launch: threadgroups of 256, one per ROWS rows of both. The
// products are rounded to T first, so that the bits are those of `norm_matvecs` and a SwiGLU of its
// own. No threadgroup computes a value of another one again, which the down product would have to.
template <typename T, typename N, typename S, int BITS, int G, int WORDS, int ROWS>
[[kernel]] void norm_gate_up_swiglu(
    device const T* x,
    device const N* norm,
    device const uint* w,
    device const S* scales,
    device const S* biases,
    constant float& eps,
    constant uint& n_in,
    constant uint& n_out,
    device T* out,
    uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float sums[2 * ROWS];
  uint row = group * ROWS;
  ulong up = ulong(n_out) * n_in;
  rows_of_matrices<BITS, false, G, WORDS, ROWS, 2, true>(
      x, norm, eps, w, scales, biases, w + up / (32 / BITS), scales + up / G, biases + up / G, row,
      n_in, n_out, sums, simdgroup, lane);
  if (thread_index < ROWS && row + thread_index < n_out) {
    float gate = float(T(sums[thread_index]));
    out[row + thread_index] = T(silu(gate) * float(T(sums[ROWS + thread_index])));
  }
}

// A thread's share of the product of x with four rows of a dense matrix, from `row` on, by a
// threadgroup of 128. If NORM, x is multiplied by `norm` first, and sums[4] receives the share of
// its sum of squares. Every thread reads parts of all four rows, so that x is read once.
template <bool NORM, typename X, typename N, typename W>
inline void dense_sums(
    X x, N norm, W w, uint row, uint n_in, uint n_out, uint thread_index, thread float* sums) {
  for (uint at = 8 * thread_index; at < n_in; at += 8 * 128) {
    float4 low = read4(x + at);
    float4 high = read4(x + at + 4);
    if (NORM) {
      sums[4] += dot(low, low) + dot(high, high);
      low *= read4(norm + at);
      high *= read4(norm + at + 4);
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      // Rows past the end read the last row; the caller drops their products.
      auto from = w + ulong(min(row + uint(r), n_out - 1)) * n_in + at;
      sums[r] += dot(low, read4(from)) + dot(high, read4(from + 4));
    }
  }
}

// Four rows of a dense matrix, from `row` on, times x, by a threadgroup of 128: thread i < 4
// receives the product of row i. If NORM, x is replaced by its RMS norm with weight `norm`. `parts`
// holds 20 values. Contains a barrier: all threads must call it.
template <bool NORM, typename X, typename N, typename W>
inline float dense_rows(
    X x,
    N norm,
    float eps,
    W w,
    uint row,
    uint n_in,
    uint n_out,
    threadgroup float* parts,
    uint thread_index,
    uint simdgroup,
    uint lane) {
  float sums[5] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  dense_sums<NORM>(x, norm, w, row, n_in, n_out, thread_index, sums);
#pragma unroll
  for (int r = 0; r < 5; ++r) {
    float total = simd_sum(sums[r]);
    if (lane == 0) {
      parts[5 * simdgroup + r] = total;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint own = thread_index % 4;
  float product = (parts[own] + parts[5 + own]) + (parts[10 + own] + parts[15 + own]);
  float squares = (parts[4] + parts[9]) + (parts[14] + parts[19]);
  return NORM ? product * rsqrt(squares / float(n_in) + eps) : product;
}

// The RMS norm of a row and the products of a dense matrix with it, and of a quantised one if any,
// written to one row.
//
// x: [I]; norm: [I], the norm's weight; dense: [n_dense, I]; bias: [n_dense], added to its product;
// w, scales, biases: [n_rows, I] in BITS bits, n_rows being 0 without it; out: [at_normed + I]: the
// dense product at 0, the quantised one at at_rows, the norm at at_normed. I is a multiple of 8.
// Launch: threadgroups of 128, one per four rows of the dense matrix, then one per ROWS of the other,
// and a last one for the norm. So a router needs no launch of its own.
template <
    typename T,
    typename N,
    typename D,
    typename S,
    int BITS,
    int G,
    int WORDS,
    int ROWS,
    bool HAS_BIAS,
    bool HAS_W,
    bool HAS_SCALES,
    bool HAS_BIASES>
[[kernel]] void norm_dense_matvecs(
    device const T* x,
    device const N* norm,
    device const D* dense,
    device const T* bias,
    device const uint* w,
    device const S* scales,
    device const S* biases,
    constant float& eps,
    constant uint& n_in,
    constant uint& n_dense,
    constant uint& n_rows,
    constant uint& at_rows,
    constant uint& at_normed,
    device T* out,
    uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float sums[ROWS];
  threadgroup float parts[20];
  uint first = (n_dense + 3) / 4;
  uint last = first + (n_rows + ROWS - 1) / ROWS;
  if (group < first) {
    uint row = group * 4;
    float product = dense_rows<true>(
        x, norm, eps, dense, row, n_in, n_dense, parts, thread_index, simdgroup, lane);
    if (thread_index < 4 && row + thread_index < n_dense) {
      out[row + thread_index] = T(product + row_bias<HAS_BIAS>(bias, row + thread_index));
    }
  } else if (HAS_W && group < last) {
    uint row = (group - first) * ROWS;
    block_rows<BITS, G, WORDS, ROWS, true>(
        x, norm, eps, w, scales, biases, row, n_in, n_rows, sums, simdgroup, lane);
    if (thread_index < ROWS && row + thread_index < n_rows) {
      out[at_rows + row + thread_index] = T(sums[thread_index]);
    }
  } else {
    float scale = rms_scale(x, n_in, eps, lane);
    for (uint i = 4 * thread_index; i < n_in; i += 4 * 128) {
      write4(out + at_normed + i, scale * read4(x + i) * read4(norm + i));
    }
    // Clear the gaps between the three results, so that no output is left unwritten.
    if (thread_index < at_rows - n_dense) {
      out[n_dense + thread_index] = T(0.0f);
    }
    if (thread_index < at_normed - at_rows - n_rows) {
      out[at_rows + n_rows + thread_index] = T(0.0f);
    }
  }
}

// out = residual + W x + bias for a dense matrix.
//
// x: [I], I being a multiple of 8; w: [O,I]; residual, bias, out: [O]. Launch: threadgroups of 128,
// one per four rows. It saves the launches of two sums.
template <typename T, typename W, bool HAS_BIAS>
[[kernel]] void dense_residual(
    device const T* x,
    device const W* w,
    device const T* residual,
    device const T* bias,
    constant uint& n_in,
    constant uint& n_out,
    device T* out,
    uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float parts[20];
  uint row = group * 4;
  float product = dense_rows<false>(
      x, x, 0.0f, w, row, n_in, n_out, parts, thread_index, simdgroup, lane);
  if (thread_index < 4 && row + thread_index < n_out) {
    uint own = row + thread_index;
    out[own] = T(float(residual[own]) + product + row_bias<HAS_BIAS>(bias, own));
  }
}

// `dequant_matvec_4bit_v3` with a lookup table of a group's 16 values.
//
// Launch: see `dequant_matvec_4bit_v3`. A lane computes the 16 values that its 32 packed values can
// take, then looks them up. This is faster where indexed registers beat conversions to float.
template <typename T, typename S, int G>
[[kernel]] void dequant_matvec_4bit_v5(
    device const T* x,
    device const uint* w,
    device const S* scales,
    device const S* biases,
    constant uint& n_in,
    constant uint& n_out,
    device T* out,
    uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float cached[CACHED];
  cache_row(x, cached, n_in, thread_index);
  uint row = 8 * group + simdgroup;
  if (row >= n_out) {
    return;
  }
  ulong at = ulong(row) * n_in;
  float sum = 0.0f;
  for (uint start = 32 * lane; start < n_in; start += 32 * SIMD) {
    float scale = float(scales[(at + start) / G]);
    float bias = float(biases[(at + start) / G]);
    float table[16];
#pragma unroll
    for (int q = 0; q < 16; ++q) {
      table[q] = fma(scale, float(q), bias);
    }
    for (uint i = 0; i < 32; i += 8) {
      uint packed = w[(at + start + i) / 8];
#pragma unroll
      for (uint j = 0; j < 8; ++j) {
        sum = fma(table[(packed >> (4 * j)) & 15u], cached[start + i + j], sum);
      }
    }
  }
  sum = simd_sum(sum);
  if (lane == 0) {
    out[row] = T(sum);
  }
}

// K products with matrices at any offsets of one buffer.
//
// x: [K,I]; w, scales, biases: flat; offsets: [3 K], the first word, scale and bias of each
// product; out: [K,O]; I <= 4096. Offsets are clamped to w_last, s_last and b_last, the start of
// the last matrix that fits, so a wrong offset reads a wrong matrix but never other memory. Launch:
// 256 threads per 8 rows of a product, grid (256 O / 8, K).
template <typename T, typename S, int G>
[[kernel]] void dequant_matvec_4bit_batched(
    device const T* x,
    device const uint* w,
    device const S* scales,
    device const S* biases,
    device const uint* offsets,
    constant uint& n_in,
    constant uint& n_out,
    constant uint& w_last,
    constant uint& s_last,
    constant uint& b_last,
    device T* out,
    uint2 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float cached[CACHED];
  auto row = x + ulong(group.y) * n_in;
  device T* to = out + ulong(group.y) * n_out;
  auto at = offsets + 3 * group.y;
  cached_rows<T, 4, G>(
      row, w + min(at[0], w_last), scales + min(at[1], s_last),
      biases + min(at[2], b_last), to, cached, n_in, n_out, 8 * group.x + simdgroup,
      thread_index, lane);
}

// K products with matrices in the slots of a pool.
//
// x: [K,I] if PER_EXPERT, else [I] for all; slots: [K]; w: [n_slots, w_row] words; scales, biases:
// [n_slots, s_row], [n_slots, b_row]: each row holds a matrix [O,I] from its base on; out: [K,O];
// I <= 4096. Launch: 256 threads per 8 rows of a product, grid (256 O / 8, K).
template <typename T, typename S, int G, bool PER_EXPERT>
[[kernel]] void dequant_matvec_4bit_v3_experts(
    device const T* x,
    device const uint* slots,
    device const uint* w,
    device const S* scales,
    device const S* biases,
    constant uint& w_base,
    constant uint& s_base,
    constant uint& b_base,
    constant uint& w_row,
    constant uint& s_row,
    constant uint& b_row,
    constant uint& n_in,
    constant uint& n_out,
    device T* out,
    uint2 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float cached[CACHED];
  auto row = x + (PER_EXPERT ? ulong(group.y) * n_in : 0);
  device T* to = out + ulong(group.y) * n_out;
  ulong slot = slots[group.y];
  auto w_at = w + slot * w_row + w_base;
  auto s_at = scales + slot * s_row + s_base;
  auto b_at = biases + slot * b_row + b_base;
  cached_rows<T, 4, G>(
      row, w_at, s_at, b_at, to, cached, n_in, n_out, 8 * group.x + simdgroup, thread_index,
      lane);
}

// out = W x with one simdgroup per row of 2-bit values, 16 to a word.
//
// Arguments: see `dequant_matvec_4bit`. Launch: one simdgroup per row, four per threadgroup. x
// stays in device memory: a row has so few bytes that caching x would cost more than it saves.
template <typename T, typename S, int G>
[[kernel]] void dequant_matvec_2bit(
    device const T* x,
    device const uint* w,
    device const S* scales,
    device const S* biases,
    constant uint& n_in,
    constant uint& n_out,
    device T* out,
    uint i [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  uint row = i / SIMD;
  if (row >= n_out) {
    return;
  }
  ulong at = ulong(row) * n_in;
  float sum =
      dot_row<2, G>(x, w + at / 16, scales + at / G, biases + at / G, n_in, lane, SIMD);
  sum = simd_sum(sum);
  if (lane == 0) {
    out[row] = T(sum);
  }
}

// out = silu(Wg x) * (Wu x) in one pass over x.
//
// x: [I], I <= 4096; gate_*, up_*: matrices [O,I] in 4 bits; out: [O]. Launch: 256 threads per 8
// rows, which share a cached x. One simdgroup computes a row of both matrices.
template <typename T, typename S, int G>
[[kernel]] void fused_gate_up_swiglu(
    device const T* x,
    device const uint* gate_w,
    device const S* gate_scales,
    device const S* gate_biases,
    device const uint* up_w,
    device const S* up_scales,
    device const S* up_biases,
    constant uint& n_in,
    constant uint& n_out,
    device T* out,
    uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float cached[CACHED];
  cache_row(x, cached, n_in, thread_index);
  uint row = 8 * group + simdgroup;
  if (row >= n_out) {
    return;
  }
  ulong at = ulong(row) * n_in;
  float gate = dot_row<4, G>(
      cached, gate_w + at / 8, gate_scales + at / G, gate_biases + at / G, n_in, lane, SIMD);
  float up = dot_row<4, G>(
      cached, up_w + at / 8, up_scales + at / G, up_biases + at / G, n_in, lane, SIMD);
  gate = simd_sum(gate);
  up = simd_sum(up);
  if (lane == 0) {
    out[row] = T(silu(gate) * up);
  }
}

// out = W x for a dense matrix, with one simdgroup per row and four values per lane at a time.
//
// x: [I]; w: [O,I], usually bfloat16; out: [O]. Launch: one simdgroup per row, four per
// threadgroup.
template <typename T, typename W>
[[kernel]] void bf16_matvec(
    device const T* x,
    device const W* w,
    constant uint& n_in,
    constant uint& n_out,
    device T* out,
    uint i [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  uint row = i / SIMD;
  if (row >= n_out) {
    return;
  }
  auto from = w + ulong(row) * n_in;
  float4 sums = float4(0.0f);
  for (uint at = 4 * lane; at < n_in; at += 4 * SIMD) {
    sums = fma(read_columns(from, at, n_in), read_columns(x, at, n_in), sums);
  }
  float sum = simd_sum((sums.x + sums.y) + (sums.z + sums.w));
  if (lane == 0) {
    out[row] = T(sum);
  }
}

// A dense matrix times T tokens.
//
// x: [T,I]; w: [O,I]; out: [T,O]. Launch: one simdgroup per matrix row and four tokens, four per
// threadgroup, grid (32 O, T / 4). A row is read once for four tokens.
template <typename T, typename W>
[[kernel]] void bf16_matmul_n_tokens(
    device const T* x,
    device const W* w,
    constant uint& n_tokens,
    constant uint& n_in,
    constant uint& n_out,
    device T* out,
    uint2 position [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  constexpr int TOKENS = 4;
  uint row = position.x / SIMD;
  if (row >= n_out) {
    return;
  }
  uint first = position.y * TOKENS;
  auto from = w + ulong(row) * n_in;
  float sums[TOKENS] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (uint at = 4 * lane; at < n_in; at += 4 * SIMD) {
    float4 values = read_columns(from, at, n_in);
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      // Tokens past the end read the last token and are not written.
      uint token = min(first + t, n_tokens - 1);
      sums[t] += dot(values, read_columns(x + ulong(token) * n_in, at, n_in));
    }
  }
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    float sum = simd_sum(sums[t]);
    if (lane == 0 && first + t < n_tokens) {
      out[ulong(first + t) * n_out + row] = T(sum);
    }
  }
}

// A quantised matrix times T tokens, in tiles of matrix products.
//
// x: [T,I]; w, scales, biases: a matrix [O,I] in BITS bits, of packed floats where there are no
// biases; out: [T,O]. Launch: threadgroups of 128 on (O / 64, T / 32). Each unpacked value serves
// 32 tokens, which makes the cost of unpacking small.
template <typename T, typename S, int BITS, int G, bool HAS_BIASES>
[[kernel]] void qmm_t(
    device const T* x,
    device const uint* w,
    device const S* scales,
    device const S* biases,
    constant uint& n_tokens,
    constant uint& n_in,
    constant uint& n_out,
    device T* out,
    uint2 tile [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  constexpr bool FLOATS = !HAS_BIASES;
  threadgroup float4 x_tile[TILE_ROWS * TILE_PITCH / 4];
  threadgroup float4 w_tile[TILE_COLUMNS * TILE_PITCH / 4];
  threadgroup float* result = (threadgroup float*)w_tile;
  uint first = tile.y * TILE_ROWS;
  uint n_rows = min(n_tokens - first, uint(TILE_ROWS));
  uint x_row = thread_index / 4;
  bool has_row = x_row < n_rows;
  auto x_at = x + ulong(first + (has_row ? x_row : 0)) * n_in;
  ulong o = min(tile.x * TILE_COLUMNS + thread_index / 2, n_out - 1);
  multiply_tile<BITS, FLOATS, G>(
      x_at, has_row, w + o * (n_in * BITS / 32), scales + o * (n_in / G),
      biases + (FLOATS ? 0 : o * (n_in / G)), n_in, n_rows, x_tile, w_tile, thread_index,
      simdgroup);
  uint column = tile.x * TILE_COLUMNS + thread_index % TILE_COLUMNS;
  if (column < n_out) {
    for (uint r = thread_index / TILE_COLUMNS; r < n_rows; r += 2) {
      float value = result[r * TILE_OUT_PITCH + thread_index % TILE_COLUMNS];
      out[ulong(first + r) * n_out + column] = T(value);
    }
  }
}
