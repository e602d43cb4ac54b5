// One token through its experts, whose matrices lie in slots of a pool.
#include "moeflux.h"

// 16 rows of one expert's opened gate, from `row` on: `swiglu` of Wg x + gate_bias and
// Wu x + up_bias, in thread i < 16 that of row i, whose biases it brings. By 8 simdgroups, of which
// the first four take gate and the others the same rows of up; `sums` holds 32. Contains barriers:
// all threads must come.
template <
    int BITS, bool FLOATS, int G, int WORDS, typename X, typename W, typename S, typename B,
    typename W1, typename S1, typename B1>
inline float opened_rows(
    X x,
    W gate_w,
    S gate_scales,
    B gate_biases,
    W1 up_w,
    S1 up_scales,
    B1 up_biases,
    float gate_bias,
    float up_bias,
    float alpha,
    float limit,
    uint row,
    uint n_in,
    uint n_out,
    threadgroup float* sums,
    uint thread_index,
    uint simdgroup,
    uint lane) {
  rows_of_matrices<BITS, FLOATS, G, WORDS, 16, 2, false>(
      x, x, 0.0f, gate_w, gate_scales, gate_biases, up_w, up_scales, up_biases, row, n_in, n_out,
      sums, simdgroup, lane);
  uint own = thread_index % 16;
  return swiglu(sums[own] + gate_bias, sums[16 + own] + up_bias, alpha, limit);
}

// One token through the gate and up projections of its K experts:
// act[k] = swiglu(Wg x + gate_bias, Wu x + up_bias), the matrices lying in slots of a pool.
//
// x: a row with the token's [I] from x_at on; slots: [K]; *_w: [n_slots, w_row] words, *_scales
// and *_biases: [n_slots, s_row], [n_slots, b_row], a matrix [N,I] in each row from its base
// on, of floats where there are no biases; *_bias: [n_slots, bias_row], [N] likewise; alpha, limit:
// as `swiglu` has them; act: [K,N]. I is a multiple of G and 32. Launch: threadgroups of 256 on
// (N / 16, K).
template <
    typename T,
    typename S,
    typename A,
    int BITS,
    int G,
    int WORDS,
    bool HAS_GATE_BIASES,
    bool HAS_UP_BIASES,
    bool HAS_GATE_BIAS,
    bool HAS_UP_BIAS>
[[kernel]] void experts_gate_up_swiglu(
    device const T* x,
    device const uint* slots,
    device const uint* gate_w,
    device const S* gate_scales,
    device const S* gate_biases,
    device const uint* up_w,
    device const S* up_scales,
    device const S* up_biases,
    device const A* gate_bias,
    device const A* up_bias,
    constant uint& x_at,
    constant uint& gate_w_base,
    constant uint& gate_s_base,
    constant uint& gate_b_base,
    constant uint& up_w_base,
    constant uint& up_s_base,
    constant uint& up_b_base,
    constant uint& gate_bias_base,
    constant uint& up_bias_base,
    constant uint& w_row,
    constant uint& s_row,
    constant uint& b_row,
    constant uint& bias_row,
    constant uint& n_in,
    constant uint& n_out,
    constant float& alpha,
    constant float& limit,
    device T* act,
    uint2 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float sums[32];
  uint row = group.x * 16;
  ulong slot = slots[group.y];
  uint own = min(row + thread_index % 16, n_out - 1);
  ulong bias_at = slot * bias_row + own;
  float opened = opened_rows<BITS, !HAS_GATE_BIASES, G, WORDS>(
      x + x_at, gate_w + slot * w_row + gate_w_base, gate_scales + slot * s_row + gate_s_base,
      gate_biases + slot * b_row + gate_b_base, up_w + slot * w_row + up_w_base,
      up_scales + slot * s_row + up_s_base, up_biases + slot * b_row + up_b_base,
      row_bias<HAS_GATE_BIAS>(gate_bias, bias_at + gate_bias_base),
      row_bias<HAS_UP_BIAS>(up_bias, bias_at + up_bias_base), alpha, limit, row, n_in, n_out, sums,
      thread_index, simdgroup, lane);
  if (thread_index < 16 && row + thread_index < n_out) {
    act[group.y * n_out + row + thread_index] = T(opened);
  }
}

// `moe_softmax_topk` for one token, its weights divided by their sum, and
// `experts_gate_up_swiglu` of the experts chosen, each in the slot of its number.
//
// x: a row with the logits [E] from 0 on and the token's [I] from x_at on; others as there;
// chosen, weights: [K]. E <= 512, PER_LANE = ceil(E / 32). Launch as there. Every simdgroup finds
// its threadgroup's expert itself, which takes less than a launch.
template <
    typename T,
    typename S,
    typename A,
    int BITS,
    int G,
    int WORDS,
    int PER_LANE,
    bool HAS_GATE_BIASES,
    bool HAS_UP_BIASES,
    bool HAS_GATE_BIAS,
    bool HAS_UP_BIAS>
[[kernel]] void experts_route_gate_up(
    device const T* x,
    device const uint* gate_w,
    device const S* gate_scales,
    device const S* gate_biases,
    device const uint* up_w,
    device const S* up_scales,
    device const S* up_biases,
    device const A* gate_bias,
    device const A* up_bias,
    constant uint& x_at,
    constant uint& gate_w_base,
    constant uint& gate_s_base,
    constant uint& gate_b_base,
    constant uint& up_w_base,
    constant uint& up_s_base,
    constant uint& up_b_base,
    constant uint& gate_bias_base,
    constant uint& up_bias_base,
    constant uint& w_row,
    constant uint& s_row,
    constant uint& b_row,
    constant uint& bias_row,
    constant uint& n_experts,
    constant uint& k,
    constant uint& n_in,
    constant uint& n_out,
    constant float& alpha,
    constant float& limit,
    device T* act,
    device uint* chosen,
    device float* weights,
    uint2 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float sums[32];
  uint keys[PER_LANE];
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    uint e = lane + uint(j) * SIMD;
    keys[j] = e < n_experts ? ordered(float(x[e])) : 0u;
  }
  // The threadgroups of the last expert know them all, and the first of these says which.
  uint expert = 0;
  uint own_expert = 0;
  uint own_key = 0;
  uint largest = 0;
  for (uint n = 0; n <= group.y; ++n) {
    uint key = take_largest<PER_LANE>(keys, lane, SIMD, expert);
    largest = n == 0 ? key : largest;
    own_expert = lane == n ? expert : own_expert;
    own_key = lane == n ? key : own_key;
  }
  if (group.x == 0 && group.y == k - 1 && simdgroup == 0) {
    float weight = lane < k ? exp(unordered(own_key) - unordered(largest)) : 0.0f;
    float sum = simd_sum(weight);
    if (lane < k) {
      chosen[lane] = own_expert;
      weights[lane] = weight / sum;
    }
  }
  uint row = group.x * 16;
  ulong slot = expert;
  uint own = min(row + thread_index % 16, n_out - 1);
  ulong bias_at = slot * bias_row + own;
  float opened = opened_rows<BITS, !HAS_GATE_BIASES, G, WORDS>(
      x + x_at, gate_w + slot * w_row + gate_w_base, gate_scales + slot * s_row + gate_s_base,
      gate_biases + slot * b_row + gate_b_base, up_w + slot * w_row + up_w_base,
      up_scales + slot * s_row + up_s_base, up_biases + slot * b_row + up_b_base,
      row_bias<HAS_GATE_BIAS>(gate_bias, bias_at + gate_bias_base),
      row_bias<HAS_UP_BIAS>(up_bias, bias_at + up_bias_base), alpha, limit, row, n_in, n_out, sums,
      thread_index, simdgroup, lane);
  if (thread_index < 16 && row + thread_index < n_out) {
    act[group.y * n_out + row + thread_index] = T(opened);
  }
}

// Row `row` of sum over k of weights[k] * bias_k, if there are biases.
template <bool HAS, typename I, typename E, typename P>
inline float weighted_bias(I slots, E weights, P bias, uint bias_row, uint k, uint row) {
  float sum = 0.0f;
  if (HAS) {
    for (uint j = 0; j < k; ++j) {
      sum += weights[j] * float(bias[ulong(slots[j]) * bias_row + row]);
    }
  }
  return sum;
}

// Rows of K experts' down projections and of a shared expert's, from `row` on, left in
// sums[0] to sums[15]: sum over k of weights[k] * (Wd_k act[k]) + opened * Ws (silu(gate) * up).
// By 8 simdgroups, of which two part the long row of K * N inputs between them for every four
// rows, and F likewise, so that all loads are under way at once. `w`, `scales` and `biases` point
// at the matrix of slot 0. Contains barriers: all threads must come.
template <
    int BITS, bool FLOATS, int SHARED_BITS, int G, int WORDS, typename X, typename I, typename E,
    typename W, typename S, typename B, typename Z, typename U, typename V, typename Y>
inline void combined_rows(
    X act,
    I slots,
    E weights,
    W w,
    S scales,
    B biases,
    uint w_row,
    uint s_row,
    uint b_row,
    Z gate,
    Z up,
    U shared_w,
    V shared_scales,
    Y shared_biases,
    float opened,
    uint row,
    uint k,
    uint n_in,
    uint n_shared,
    uint n_out,
    threadgroup float* sums,
    uint thread_index,
    uint simdgroup,
    uint lane) {
  constexpr int VALUES = WORDS * (32 / BITS);
  constexpr int ROWS = 4;
  uint row_words = n_in / (32 / BITS);
  uint row_groups = n_in / G;
  uint n_chunks = n_in / VALUES;
  // A row past the end is read as the last one and not written.
  uint rows[ROWS];
  float own[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    rows[r] = min(row + simdgroup % 4 * ROWS + r, n_out - 1);
    own[r] = 0.0f;
  }
  uint first = simdgroup / 4 * SIMD + lane;
  for (uint at = first; at < k * n_chunks; at += 2 * SIMD) {
    uint expert = at / n_chunks;
    uint chunk = at % n_chunks;
    ulong slot = slots[expert];
    auto w_at = w + slot * w_row + chunk * WORDS;
    uint words[ROWS][WORDS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      load_words<WORDS>(w_at + rows[r] * row_words, words[r]);
    }
    uint in_group = chunk * VALUES / G;
    auto s_at = scales + slot * s_row + in_group;
    auto b_at = biases + (FLOATS ? 0 : slot * b_row + in_group);
    float partners[VALUES];
    float sum = load_partners<BITS, FLOATS, WORDS>(
        act + expert * n_in + chunk * VALUES, weights[expert], partners);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float dot = dot_words<BITS, FLOATS, WORDS>(words[r], partners);
      float scale = scale_of<G>(s_at[rows[r] * row_groups]);
      float bias = FLOATS ? 0.0f : float(b_at[rows[r] * row_groups]);
      own[r] += group_product<FLOATS>(scale, dot, bias, sum);
    }
  }
  for (uint word = first; word < n_shared / (32 / SHARED_BITS); word += 2 * SIMD) {
    constexpr int SHARED_VALUES = 32 / SHARED_BITS;
    uint start = word * SHARED_VALUES;
    float partners[SHARED_VALUES];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < SHARED_VALUES; i += 4) {
      float4 values = read4(gate + start + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        values[j] = silu(values[j]);
      }
      values *= opened * read4(up + start + i);
      sum += set_partners<SHARED_BITS, false>(partners, i, values);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      ulong at = ulong(rows[r]) * n_shared + start;
      uint packed = shared_w[at / SHARED_VALUES];
      float dot = dot_words<SHARED_BITS, false, 1>(&packed, partners);
      own[r] += float(shared_scales[at / G]) * dot + float(shared_biases[at / G]) * sum;
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    float total = simd_sum(own[r]);
    if (lane == 0) {
      sums[simdgroup * ROWS + r] = total;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (thread_index < 16) {
    sums[thread_index] += sums[16 + thread_index];
  }
}

// The K experts' down projections of one token and their weighted sum:
// out = sum over k of weights[k] * (Wd_k act[k] + bias_k), the matrices lying in slots of a pool.
//
// act: [K,N]; slots, weights: [K]; w: [n_slots, w_row] words, scales and biases:
// [n_slots, s_row], [n_slots, b_row], a matrix [D,N] in each row from its base on, of floats where
// there are no biases; bias: [n_slots, bias_row], [D] likewise; out: float32 [D], rounded only when
// the residual is added. N is a multiple of G and 32. Launch:
// threadgroups of 256 for 16 rows of D. The K rows of an output are walked as one long row:
// rows of experts are short (N), so lanes would idle if every expert began anew, and one
// simd_sum serves all K. A lane meets the experts in rising k, so the result is always the same.
template <
    typename T, typename S, typename A, int BITS, int G, int WORDS, bool HAS_BIASES, bool HAS_BIAS>
[[kernel]] void experts_down_sum(
    device const T* act,
    device const uint* slots,
    device const float* weights,
    device const uint* w,
    device const S* scales,
    device const S* biases,
    device const A* bias,
    constant uint& w_base,
    constant uint& s_base,
    constant uint& b_base,
    constant uint& bias_base,
    constant uint& w_row,
    constant uint& s_row,
    constant uint& b_row,
    constant uint& bias_row,
    constant uint& k,
    constant uint& n_in,
    constant uint& n_out,
    device float* out,
    uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float sums[32];
  uint row = group * 16;
  combined_rows<BITS, !HAS_BIASES, BITS, G, WORDS>(
      act, slots, weights, w + w_base, scales + s_base, biases + b_base, w_row, s_row, b_row, act,
      act, w, scales, biases, 0.0f, row, k, n_in, 0u, n_out, sums, thread_index, simdgroup, lane);
  if (thread_index < 16 && row + thread_index < n_out) {
    float added =
        weighted_bias<HAS_BIAS>(slots, weights, bias + bias_base, bias_row, k, row + thread_index);
    out[row + thread_index] = sums[thread_index] + added;
  }
}

// `experts_down_sum`, the shared expert's down projection and the residual stream together:
// out = residual + sum over k of weights[k] * (Wd_k act[k] + bias_k)
//       + sigmoid(shared_gate) * Ws (silu(gate) * up).
//
// Arguments as there; shared: a row with gate [F] from gate_at on, up [F] from up_at and, if
// GATED, shared_gate [1] at opens_at, else the shared expert counts whole; shared_*: a matrix
// [D,F] in SHARED_BITS bits and groups of G; residual, out: [D]. Launch: threadgroups of 256
// for 16 rows of D.
template <
    typename T,
    typename S,
    typename A,
    typename H,
    int BITS,
    int SHARED_BITS,
    int G,
    int WORDS,
    bool HAS_BIASES,
    bool HAS_BIAS,
    bool GATED>
[[kernel]] void experts_down_combine(
    device const T* act,
    device const uint* slots,
    device const float* weights,
    device const uint* w,
    device const S* scales,
    device const S* biases,
    device const A* bias,
    device const T* shared,
    device const uint* shared_w,
    device const H* shared_scales,
    device const H* shared_biases,
    device const T* residual,
    constant uint& gate_at,
    constant uint& up_at,
    constant uint& opens_at,
    constant uint& w_base,
    constant uint& s_base,
    constant uint& b_base,
    constant uint& bias_base,
    constant uint& w_row,
    constant uint& s_row,
    constant uint& b_row,
    constant uint& bias_row,
    constant uint& k,
    constant uint& n_in,
    constant uint& n_shared,
    constant uint& n_out,
    device T* out,
    uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float sums[32];
  uint row = group * 16;
  combined_rows<BITS, !HAS_BIASES, SHARED_BITS, G, WORDS>(
      act, slots, weights, w + w_base, scales + s_base, biases + b_base, w_row, s_row, b_row,
      shared + gate_at, shared + up_at, shared_w, shared_scales, shared_biases,
      GATED ? sigmoid(float(shared[opens_at])) : 1.0f, row, k, n_in, n_shared, n_out, sums,
      thread_index, simdgroup, lane);
  if (thread_index < 16 && row + thread_index < n_out) {
    float added =
        weighted_bias<HAS_BIAS>(slots, weights, bias + bias_base, bias_row, k, row + thread_index);
    out[row + thread_index] =
        T(float(residual[row + thread_index]) + (sums[thread_index] + added));
  }
}
