// One token through its experts, whose matrices lie in the slots of a pool.
#include "moeflux.h"

// 16 rows of one expert's activation, from `row` on: swiglu(Wg x + gate_bias, Wu x + up_bias).
// Thread i < 16 passes the biases of row i and receives its value. The first four of 8 simdgroups
// compute gate rows, the others the same rows of up; `sums` holds 32 values. Contains barriers: all
// threads must call it.
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

// Gate and up projections of one token's K experts:
// act[k] = swiglu(Wg x + gate_bias, Wu x + up_bias).
//
// x: a row that holds the token's [I] from x_at on; slots: [K], each expert's slot of the pool.
// *_w: [n_slots, w_row] words; *_scales, *_biases: [n_slots, s_row], [n_slots, b_row]: each row
// holds a matrix [N,I] from its base on, of packed floats where there are no biases. *_bias:
// [n_slots, bias_row], each row holds [N] from its base on. alpha, limit: see `swiglu`; act: [K,N].
// I is a multiple of G and 32. Launch: threadgroups of 256 on (N / 16, K).
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

// `moe_softmax_topk` (normalised) for one token, then `experts_gate_up_swiglu` for the chosen
// experts, where expert e lies in slot e.
//
// x: a row that holds the logits [E] from 0 on and the token's [I] from x_at on; chosen, weights:
// [K]; other arguments and launch: see `experts_gate_up_swiglu`. E <= 512, PER_LANE = ceil(E / 32).
// Every simdgroup repeats the search for its expert, which takes less time than a launch.
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
  // The threadgroups of the last expert find all K experts; the first of them writes the result.
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

// `moe_noaux_topk` for one token, then `experts_gate_up_swiglu` for the chosen experts, where
// expert e lies in slot e.
//
// x: a row that holds the logits [E] from 0 on and the token's [I] from x_at on; correction: [E], the
// bias of the choice; chosen, weights: [K]; other arguments: see `moe_noaux_topk` and
// `experts_gate_up_swiglu`. The experts have no biases and a plain SwiGLU. Launch: see
// `experts_gate_up_swiglu`. Every simdgroup repeats the search for its expert, which takes less time
// than a launch.
template <
    typename T,
    typename S,
    typename C,
    int BITS,
    int G,
    int WORDS,
    int PER_LANE,
    bool NORMALIZE,
    bool HAS_GATE_BIASES,
    bool HAS_UP_BIASES>
[[kernel]] void experts_noaux_gate_up(
    device const T* x,
    device const C* correction,
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
    constant uint& n_group,
    constant uint& topk_group,
    constant uint& k,
    constant float& scale,
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
  uint first;
  uint step;
  noaux_keys<PER_LANE>(x, correction, n_experts, n_group, topk_group, lane, keys, first, step);
  // The threadgroups of the last expert find all K experts; the first of them writes the result.
  uint expert = 0;
  uint own_expert = 0;
  for (uint n = 0; n <= group.y; ++n) {
    take_largest<PER_LANE>(keys, first, step, expert);
    own_expert = lane == n ? expert : own_expert;
  }
  if (group.x == 0 && group.y == k - 1 && simdgroup == 0) {
    float weight = noaux_weight<NORMALIZE>(x, own_expert, k, scale, lane);
    if (lane < k) {
      chosen[lane] = own_expert;
      weights[lane] = weight;
    }
  }
  uint row = group.x * 16;
  ulong slot = expert;
  float opened = opened_rows<BITS, !HAS_GATE_BIASES, G, WORDS>(
      x + x_at, gate_w + slot * w_row + gate_w_base, gate_scales + slot * s_row + gate_s_base,
      gate_biases + slot * b_row + gate_b_base, up_w + slot * w_row + up_w_base,
      up_scales + slot * s_row + up_s_base, up_biases + slot * b_row + up_b_base, 0.0f, 0.0f, 1.0f,
      0.0f, row, n_in, n_out, sums, thread_index, simdgroup, lane);
  if (thread_index < 16 && row + thread_index < n_out) {
    act[group.y * n_out + row + thread_index] = T(opened);
  }
}

// Row `row` of sum over k of weights[k] * bias_k, or 0 without biases.
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

// 16 rows, from `row` on, of the K experts' down projections and a shared expert's:
// sums[r] = sum over k of weights[k] * (Wd_k act[k]) + opened * Ws (silu(gate) * up).
// Each pair of the 8 simdgroups handles four rows and halves their K * N inputs, and the F inputs of
// the shared expert, so that all loads are in flight at once. `w`, `scales` and `biases` point at
// the matrix of slot 0. Contains a barrier: all threads must call it.
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
  // Rows past the end read the last row; the caller does not write them.
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

// Weighted sum of one token's K down projections:
// out = sum over k of weights[k] * (Wd_k act[k] + bias_k).
//
// act: [K,N]; slots, weights: [K]. w: [n_slots, w_row] words; scales, biases: [n_slots, s_row],
// [n_slots, b_row]: each row holds a matrix [D,N] from its base on, of packed floats where there
// are no biases. bias: [n_slots, bias_row], each row holds [D] from its base on. out: float32 [D];
// the addition of the residual rounds it. N is a multiple of G and 32. Launch: threadgroups of 256,
// one per 16 rows of D. The K matrix rows of an output count as one long row: a single one (N) is
// too short to occupy all lanes, and one simd_sum serves all K. A lane adds the experts in rising
// k, so the bits never change.
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

// Down projections of one token's K experts, one by one: out[k] = Wd_k act[k] + bias_k.
//
// out: [K,D]; other arguments: see `experts_down_sum`. Launch: threadgroups of 256 on (D / 16, K).
// Machines that share the experts exchange these rows before they add them.
template <
    typename T, typename S, typename A, int BITS, int G, int WORDS, bool HAS_BIASES, bool HAS_BIAS>
[[kernel]] void experts_down_rows(
    device const T* act,
    device const uint* slots,
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
    constant uint& n_in,
    constant uint& n_out,
    device T* out,
    uint2 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float sums[32];
  uint row = group.x * 16;
  const float whole[1] = {1.0f};
  auto own = act + group.y * n_in;
  auto slot = slots + group.y;
  combined_rows<BITS, !HAS_BIASES, BITS, G, WORDS>(
      own, slot, whole, w + w_base, scales + s_base, biases + b_base, w_row, s_row, b_row, own, own,
      w, scales, biases, 0.0f, row, 1u, n_in, 0u, n_out, sums, thread_index, simdgroup, lane);
  if (thread_index < 16 && row + thread_index < n_out) {
    float added = row_bias<HAS_BIAS>(
        bias, ulong(slot[0]) * bias_row + bias_base + row + thread_index);
    out[group.y * n_out + row + thread_index] = T(sums[thread_index] + added);
  }
}

// `experts_down_sum`, the shared expert's down projection and the residual stream together:
// out = residual + sum over k of weights[k] * (Wd_k act[k] + bias_k)
//       + sigmoid(shared_gate) * Ws (silu(gate) * up).
//
// shared: a row that holds gate [F] from gate_at on, up [F] from up_at on and, if GATED,
// shared_gate [1] at opens_at; without it the factor of the shared expert is 1. shared_*: a matrix
// [D,F] in SHARED_BITS bits and groups of G; residual, out: [D]. Other arguments and launch: see
// `experts_down_sum`.
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
