// One token through its experts, whose matrices lie in slots of a pool.
#include "moeflux.h"

// 16 rows of one expert's opened gate, from `row` on: silu(Wg x) * (Wu x), in thread i < 16 that of
// row i. By 8 simdgroups, of which the first four take gate and the others the same rows of up;
// `sums` holds 32. Contains barriers: all threads must come.
template <
    int BITS, int G, int WORDS, typename X, typename W, typename S, typename B, typename W1,
    typename S1, typename B1>
inline float opened_rows(
    X x,
    W gate_w,
    S gate_scales,
    B gate_biases,
    W1 up_w,
    S1 up_scales,
    B1 up_biases,
    uint row,
    uint n_in,
    uint n_out,
    threadgroup float* sums,
    uint thread_index,
    uint simdgroup,
    uint lane) {
  rows_of_matrices<BITS, G, WORDS, 16, 2, false>(
      x, x, 0.0f, gate_w, gate_scales, gate_biases, up_w, up_scales, up_biases, row, n_in, n_out,
      sums, simdgroup, lane);
  uint own = thread_index % 16;
  return silu(sums[own]) * sums[16 + own];
}

// One token through the gate and up projections of its K experts:
// act[k] = silu(Wg x) * (Wu x), the matrices lying in slots of a pool.
//
// x: a row with the token's [I] from x_at on; slots: [K]; *_w: [n_slots, w_row] words, *_scales
// and *_biases: [n_slots, s_row], [n_slots, b_row], a matrix [N,I] in each row from its base
// on; act: [K,N]. I is a multiple of G, G of 32. Launch: threadgroups of 256 on (N / 16, K).
template <typename T, typename S, int BITS, int G, int WORDS>
[[kernel]] void experts_gate_up_swiglu(
    device const T* x,
    device const uint* slots,
    device const uint* gate_w,
    device const S* gate_scales,
    device const S* gate_biases,
    device const uint* up_w,
    device const S* up_scales,
    device const S* up_biases,
    constant uint& x_at,
    constant uint& gate_w_base,
    constant uint& gate_s_base,
    constant uint& gate_b_base,
    constant uint& up_w_base,
    constant uint& up_s_base,
    constant uint& up_b_base,
    constant uint& w_row,
    constant uint& s_row,
    constant uint& b_row,
    constant uint& n_in,
    constant uint& n_out,
    device T* act,
    uint2 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float sums[32];
  uint row = group.x * 16;
  ulong slot = slots[group.y];
  float opened = opened_rows<BITS, G, WORDS>(
      x + x_at, gate_w + slot * w_row + gate_w_base, gate_scales + slot * s_row + gate_s_base,
      gate_biases + slot * b_row + gate_b_base, up_w + slot * w_row + up_w_base,
      up_scales + slot * s_row + up_s_base, up_biases + slot * b_row + up_b_base, row, n_in, n_out,
      sums, thread_index, simdgroup, lane);
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
template <typename T, typename S, int BITS, int G, int WORDS, int PER_LANE>
[[kernel]] void experts_route_gate_up(
    device const T* x,
    device const uint* gate_w,
    device const S* gate_scales,
    device const S* gate_biases,
    device const uint* up_w,
    device const S* up_scales,
    device const S* up_biases,
    constant uint& x_at,
    constant uint& gate_w_base,
    constant uint& gate_s_base,
    constant uint& gate_b_base,
    constant uint& up_w_base,
    constant uint& up_s_base,
    constant uint& up_b_base,
    constant uint& w_row,
    constant uint& s_row,
    constant uint& b_row,
    constant uint& n_experts,
    constant uint& k,
    constant uint& n_in,
    constant uint& n_out,
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
  float opened = opened_rows<BITS, G, WORDS>(
      x + x_at, gate_w + slot * w_row + gate_w_base, gate_scales + slot * s_row + gate_s_base,
      gate_biases + slot * b_row + gate_b_base, up_w + slot * w_row + up_w_base,
      up_scales + slot * s_row + up_s_base, up_biases + slot * b_row + up_b_base, row, n_in, n_out,
      sums, thread_index, simdgroup, lane);
  if (thread_index < 16 && row + thread_index < n_out) {
    act[group.y * n_out + row + thread_index] = T(opened);
  }
}

// Rows of K experts' down projections and of a shared expert's, from `row` on, left in
// sums[0] to sums[15]: sum over k of weights[k] * (Wd_k act[k]) + opened * Ws (silu(gate) * up).
// By 8 simdgroups, of which two part the long row of K * N inputs between them for every four
// rows, and F likewise, so that all loads are under way at once. `w`, `scales` and `biases` point
// at the matrix of slot 0. Contains barriers: all threads must come.
template <
    int BITS, int SHARED_BITS, int G, int WORDS, typename X, typename I, typename E, typename W,
    typename S, typename B, typename Z, typename U, typename V, typename Y>
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
    auto b_at = biases + slot * b_row + in_group;
    float partners[VALUES];
    float sum =
        load_partners<BITS, WORDS>(act + expert * n_in + chunk * VALUES, weights[expert], partners);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float dot = dot_words<BITS, WORDS>(words[r], partners);
      float scale = float(s_at[rows[r] * row_groups]);
      own[r] += scale * dot + float(b_at[rows[r] * row_groups]) * sum;
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
      sum += set_partners<SHARED_BITS>(partners, i, values);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      ulong at = ulong(rows[r]) * n_shared + start;
      uint packed = shared_w[at / SHARED_VALUES];
      float dot = dot_words<SHARED_BITS, 1>(&packed, partners);
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
// out = sum over k of weights[k] * (Wd_k act[k]), the matrices lying in slots of a pool.
//
// act: [K,N]; slots, weights: [K]; w: [n_slots, w_row] words, scales and biases:
// [n_slots, s_row], [n_slots, b_row], a matrix [D,N] in each row from its base on; out:
// float32 [D], rounded only when the residual is added. N is a multiple of G, G of 32. Launch:
// threadgroups of 256 for 16 rows of D. The K rows of an output are walked as one long row:
// rows of experts are short (N), so lanes would idle if every expert began anew, and one
// simd_sum serves all K. A lane meets the experts in rising k, so the result is always the same.
template <typename T, typename S, int BITS, int G, int WORDS>
[[kernel]] void experts_down_sum(
    device const T* act,
    device const uint* slots,
    device const float* weights,
    device const uint* w,
    device const S* scales,
    device const S* biases,
    constant uint& w_base,
    constant uint& s_base,
    constant uint& b_base,
    constant uint& w_row,
    constant uint& s_row,
    constant uint& b_row,
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
  combined_rows<BITS, BITS, G, WORDS>(
      act, slots, weights, w + w_base, scales + s_base, biases + b_base, w_row, s_row, b_row, act,
      act, w, scales, biases, 0.0f, row, k, n_in, 0u, n_out, sums, thread_index, simdgroup, lane);
  if (thread_index < 16 && row + thread_index < n_out) {
    out[row + thread_index] = sums[thread_index];
  }
}

// `experts_down_sum`, the shared expert's down projection and the residual stream together:
// out = residual + sum over k of weights[k] * (Wd_k act[k])
//       + sigmoid(shared_gate) * Ws (silu(gate) * up).
//
// Arguments as there; shared: a row with gate [F] from gate_at on, up [F] from up_at and, if
// GATED, shared_gate [1] at opens_at, else the shared expert counts whole; shared_*: a matrix
// [D,F] in SHARED_BITS bits and groups of G; residual, out: [D]. Launch: threadgroups of 256
// for 16 rows of D.
template <
    typename T,
    typename S,
    typename H,
    int BITS,
    int SHARED_BITS,
    int G,
    int WORDS,
    bool GATED>
[[kernel]] void experts_down_combine(
    device const T* act,
    device const uint* slots,
    device const float* weights,
    device const uint* w,
    device const S* scales,
    device const S* biases,
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
    constant uint& w_row,
    constant uint& s_row,
    constant uint& b_row,
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
  combined_rows<BITS, SHARED_BITS, G, WORDS>(
      act, slots, weights, w + w_base, scales + s_base, biases + b_base, w_row, s_row, b_row,
      shared + gate_at, shared + up_at, shared_w, shared_scales, shared_biases,
      GATED ? sigmoid(float(shared[opens_at])) : 1.0f, row, k, n_in, n_shared, n_out, sums,
      thread_index, simdgroup, lane);
  if (thread_index < 16 && row + thread_index < n_out) {
    out[row + thread_index] = T(float(residual[row + thread_index]) + sums[thread_index]);
  }
}
