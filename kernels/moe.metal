// Mixture of experts: routing, decode over slots, prefill grouped by expert, combination.
#include "moeflux.h"

// Map floats to integers of the same order, so that ties and maxima are exact and a
// simd_max is one operation. Both zeros are one number; the result is never 0 (removed).
inline uint ordered(float x) {
  uint bits = as_type<uint>(x);
  bits = bits == 0x80000000u ? 0u : bits;
  return max(bits ^ ((bits >> 31) != 0u ? 0xffffffffu : 0x80000000u), 1u);
}

inline float unordered(uint key) {
  return as_type<float>(key ^ ((key >> 31) != 0u ? 0x80000000u : 0xffffffffu));
}

// Take the largest key out of those of a simdgroup, the lowest expert among equals. A
// lane's i-th key belongs to expert `first + i * step`; all lanes get key and expert.
template <int PER_LANE>
inline uint take_largest(thread uint* keys, uint first, uint step, thread uint& expert) {
  uint best = 0;
  uint owner = 0xffffffffu;
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    owner = keys[i] > best ? first + uint(i) * step : owner;
    best = max(best, keys[i]);
  }
  uint largest = simd_max(best);
  expert = simd_min(best == largest ? owner : 0xffffffffu);
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    keys[i] = first + uint(i) * step == expert ? 0u : keys[i];
  }
  return largest;
}

// Softmax over the experts in float32 and the K largest in falling order, ties to the
// lower index.
//
// logits: [T,E]; indices, weights: [T,K]. E <= 512, K <= 16. PER_LANE = ceil(E / 32).
// Launch: one simdgroup a token, four a threadgroup. A row lives in registers; it is
// ranked by its logits, because exp would make equal what is not, and only the K weights
// kept are ever computed, one by each lane. If NORMALIZE, they are divided by their sum,
// which makes that over all experts needless.
template <typename T, int PER_LANE, bool NORMALIZE>
[[kernel]] void moe_softmax_topk(
    device const T* logits,
    constant uint& n_tokens,
    constant uint& n_experts,
    constant uint& k,
    device int* indices,
    device float* weights,
    uint i [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  uint token = i / SIMD;
  if (token >= n_tokens) {
    return;
  }
  auto row = logits + ulong(token) * n_experts;
  uint keys[PER_LANE];
  float values[PER_LANE];
  float largest = -INFINITY;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    uint e = lane + uint(j) * SIMD;
    values[j] = e < n_experts ? float(row[e]) : -INFINITY;
    keys[j] = e < n_experts ? ordered(values[j]) : 0u;
    largest = max(largest, values[j]);
  }
  largest = simd_max(largest);
  float sum = 0.0f;
  if (!NORMALIZE) {
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
      sum += exp(values[j] - largest);
    }
  }
  uint chosen = 0;
  uint chosen_key = 0;
  for (uint n = 0; n < k; ++n) {
    uint expert;
    uint key = take_largest<PER_LANE>(keys, lane, SIMD, expert);
    chosen = lane == n ? expert : chosen;
    chosen_key = lane == n ? key : chosen_key;
  }
  float weight = lane < k ? exp(unordered(chosen_key) - largest) : 0.0f;
  sum = simd_sum(NORMALIZE ? weight : sum);
  if (lane < k) {
    ulong at = ulong(token) * k + lane;
    indices[at] = int(chosen);
    weights[at] = weight / sum;
  }
}

// Each token's K weights divided by their sum.
//
// weights, out: [T,K]. K <= 16. Launch: one thread a weight. Every thread adds up its
// token's weights itself: they share a cache line, and no lane waits for another.
[[kernel]] void moe_normalize_weights(
    device const float* weights,
    constant uint& n,
    constant uint& k,
    device float* out,
    uint i [[thread_position_in_grid]]) {
  if (i >= n) {
    return;
  }
  auto row = weights + i / k * k;
  float sum = 0.0f;
  for (uint j = 0; j < k; ++j) {
    sum += row[j];
  }
  out[i] = weights[i] / sum;
}

// DeepSeek-V3 routing: scores are sigmoids; with a correction bias added, only for
// choosing, the best topk_group of n_group groups by the sum of their two best, and the
// K best experts there, ties to the lower index. Weights are the scores, divided by
// their sum if NORMALIZE, times `scale`. Scores of groups left out count as 0.
//
// logits: [T,E]; bias: [E]; indices, weights: [T,K]. E <= 512, K <= 16, n_group divides
// 32 and E. Launch: one simdgroup a token, four a threadgroup. A group belongs to
// L = 32 / n_group neighbouring lanes, PER_LANE = ceil(E / n_group / L) experts each, so
// the two best of all groups are found together by log2(L) exchanges.
template <typename T, typename S, int PER_LANE, bool NORMALIZE>
[[kernel]] void moe_noaux_topk(
    device const T* logits,
    device const S* bias,
    constant uint& n_tokens,
    constant uint& n_experts,
    constant uint& n_group,
    constant uint& topk_group,
    constant uint& k,
    constant float& scale,
    device int* indices,
    device float* weights,
    uint i [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  uint token = i / SIMD;
  if (token >= n_tokens) {
    return;
  }
  auto row = logits + ulong(token) * n_experts;
  uint group_experts = n_experts / n_group;
  uint n_lanes = SIMD / n_group;
  uint group = lane / n_lanes;
  uint within = lane % n_lanes;
  uint first = group * group_experts + within;
  uint keys[PER_LANE];
  float best = -INFINITY;
  float second = -INFINITY;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    keys[j] = 0;
    uint at = uint(j) * n_lanes;
    if (within + at < group_experts) {
      float score = sigmoid(float(row[first + at])) + float(bias[first + at]);
      keys[j] = ordered(score);
      second = max(second, min(best, score));
      best = max(best, score);
    }
  }
  for (ushort distance = ushort(n_lanes / 2); distance > 0; distance /= 2) {
    float other_best = simd_shuffle_xor(best, distance);
    float other_second = simd_shuffle_xor(second, distance);
    second = max(min(best, other_best), max(second, other_second));
    best = max(best, other_best);
  }
  float group_score = best + second;
  uint n_better = 0;
  for (uint g = 0; g < n_group; ++g) {
    float other = simd_shuffle(group_score, ushort(g * n_lanes));
    n_better += uint(other > group_score || (other == group_score && g < group));
  }
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    bool dropped = n_better >= topk_group && keys[j] != 0;
    keys[j] = dropped ? ordered(0.0f) : keys[j];
  }
  uint chosen = 0;
  for (uint n = 0; n < k; ++n) {
    uint expert;
    take_largest<PER_LANE>(keys, first, n_lanes, expert);
    chosen = lane == n ? expert : chosen;
  }
  float weight = lane < k ? sigmoid(float(row[chosen])) : 0.0f;
  if (NORMALIZE) {
    weight /= simd_sum(weight);
  }
  if (lane < k) {
    ulong at = ulong(token) * k + lane;
    indices[at] = int(chosen);
    weights[at] = weight * scale;
  }
}

// What the J-th of K experts adds to column i.
template <int K, int J, typename W, typename P>
inline float expert_share(W weights, P expert, uint i) {
  return K > J ? weights[J] * float(expert[i]) : 0.0f;
}

// One token's h + sum of w_k * e_k + sigmoid(gate) * shared, experts in their own
// buffers.
//
// h, shared, e0 to e15, out: [D]; weights: [K]; gate: [1]. Inputs e of K and more are not
// read. Launch: one thread a column. K is a template number, so that what is not read
// costs nothing; 16 experts and the rest stay below Metal's 31 buffers.
template <typename T, int K>
[[kernel]] void moe_combine_residual(
    device const T* h,
    device const T* shared,
    device const T* gate,
    device const float* weights,
    device const T* e0,
    device const T* e1,
    device const T* e2,
    device const T* e3,
    device const T* e4,
    device const T* e5,
    device const T* e6,
    device const T* e7,
    device const T* e8,
    device const T* e9,
    device const T* e10,
    device const T* e11,
    device const T* e12,
    device const T* e13,
    device const T* e14,
    device const T* e15,
    constant uint& n,
    device T* out,
    uint i [[thread_position_in_grid]]) {
  if (i >= n) {
    return;
  }
  float sum = expert_share<K, 0>(weights, e0, i);
  sum += expert_share<K, 1>(weights, e1, i);
  sum += expert_share<K, 2>(weights, e2, i);
  sum += expert_share<K, 3>(weights, e3, i);
  sum += expert_share<K, 4>(weights, e4, i);
  sum += expert_share<K, 5>(weights, e5, i);
  sum += expert_share<K, 6>(weights, e6, i);
  sum += expert_share<K, 7>(weights, e7, i);
  sum += expert_share<K, 8>(weights, e8, i);
  sum += expert_share<K, 9>(weights, e9, i);
  sum += expert_share<K, 10>(weights, e10, i);
  sum += expert_share<K, 11>(weights, e11, i);
  sum += expert_share<K, 12>(weights, e12, i);
  sum += expert_share<K, 13>(weights, e13, i);
  sum += expert_share<K, 14>(weights, e14, i);
  sum += expert_share<K, 15>(weights, e15, i);
  out[i] = T(float(h[i]) + sum + sigmoid(float(gate[0])) * float(shared[i]));
}

// Sum over k of weights[k] * experts[k,i].
template <typename W, typename P>
inline float weighted_column(W weights, P experts, uint k, uint n, uint i) {
  float sum = 0.0f;
  for (uint j = 0; j < k; ++j) {
    sum += weights[j] * float(experts[j * n + i]);
  }
  return sum;
}

// One token's h + sum of w_k * e_k + sigmoid(gate) * shared, experts in one buffer.
//
// h, shared, out: [D]; experts: [K,D]; weights: [K]; gate: [1]. Launch: one thread a
// column. The K loads of a thread do not depend on each other, so they are all under way
// at once and hide the latency that so few threads otherwise would not.
template <typename T>
[[kernel]] void moe_combine_residual_flat(
    device const T* h,
    device const T* shared,
    device const T* gate,
    device const float* weights,
    device const T* experts,
    constant uint& k,
    constant uint& n,
    device T* out,
    uint i [[thread_position_in_grid]]) {
  if (i >= n) {
    return;
  }
  float sum = weighted_column(weights, experts, k, n, i);
  out[i] = T(float(h[i]) + sum + sigmoid(float(gate[0])) * float(shared[i]));
}

// One token's h + sum of w_k * e_k + shared, experts in one buffer (DeepSeek: the shared
// expert has no gate).
//
// h, shared, out: [D]; experts: [K,D]; weights: [K]. Launch: one thread a column, for
// the reason given above `moe_combine_residual_flat`.
template <typename T>
[[kernel]] void moe_combine_residual_unscaled(
    device const T* h,
    device const T* shared,
    device const float* weights,
    device const T* experts,
    constant uint& k,
    constant uint& n,
    device T* out,
    uint i [[thread_position_in_grid]]) {
  if (i >= n) {
    return;
  }
  float sum = weighted_column(weights, experts, k, n, i);
  out[i] = T(float(h[i]) + sum + float(shared[i]));
}

// h + moe_sum + sigmoid(gate) * shared for T tokens.
//
// h, shared, out: T [T,D]; moe_sum: S [T,D], float32 or T; gate: [T,1]. Launch: four
// columns a thread, one row of the grid a token. The experts' sum may still be float32:
// its only rounding is then the one here.
template <typename T, typename S>
[[kernel]] void moe_combine_residual_n_tokens(
    device const T* h,
    device const S* moe_sum,
    device const T* shared,
    device const T* gate,
    constant uint& n,
    device T* out,
    uint2 position [[thread_position_in_grid]]) {
  uint i = 4 * position.x;
  ulong row = ulong(position.y) * n;
  float4 sum = read_columns(h + row, i, n) + read_columns(moe_sum + row, i, n);
  float open = sigmoid(float(gate[position.y]));
  write_columns(out + row, i, n, sum + open * read_columns(shared + row, i, n));
}

// acc with weights[row] * bucket[row] added to row tokens[row]: one expert's rows, or
// any bucket in which no token comes twice.
//
// acc, out: float32 [T,D]; bucket: [M,D]; tokens, weights: [M], M <= T. Launch: four
// columns a thread, one row of the grid a token, 128 threads a threadgroup. Each
// simdgroup looks for its token among the M itself: rows are gathered, not scattered, so
// buckets given one after another add up in that order and nothing is atomic.
template <typename T>
[[kernel]] void moe_bucket_accumulate(
    device const float* acc,
    device const T* bucket,
    device const uint* tokens,
    device const float* weights,
    constant uint& m,
    constant uint& n,
    device float* out,
    uint2 position [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  uint found = 0;
  for (uint j = lane; j < m; j += SIMD) {
    found = tokens[j] == position.y ? j + 1 : found;
  }
  found = simd_max(found);
  uint i = 4 * position.x;
  ulong row = ulong(position.y) * n;
  float4 sum = read_columns(acc + row, i, n);
  if (found > 0) {
    auto added = bucket + ulong(found - 1) * n;
    sum += weights[found - 1] * read_columns(added, i, n);
  }
  write_columns(out + row, i, n, sum);
}

// Who chose which expert: per expert how many tokens, and their assignments
// token * K + slot in rising order, the rest of the list 0xffffffff.
//
// indices: [T,K], distinct within a token; counts: [E]; lists: [E,T]. Launch: one
// simdgroup an expert, four a threadgroup. A lane looks at the K choices of one token,
// so one vote orders 32 tokens and no counter is shared.
[[kernel]] void moe_id_map(
    device const int* indices,
    constant uint& n_tokens,
    constant uint& k,
    constant uint& n_experts,
    device uint* counts,
    device uint* lists,
    uint i [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  uint expert = i / SIMD;
  if (expert >= n_experts) {
    return;
  }
  device uint* list = lists + ulong(expert) * n_tokens;
  uint n_found = 0;
  for (uint start = 0; start < n_tokens; start += SIMD) {
    uint token = start + lane;
    uint assignment = 0xffffffffu;
    if (token < n_tokens) {
      for (uint slot = 0; slot < k; ++slot) {
        uint at = token * k + slot;
        assignment = uint(indices[at]) == expert ? at : assignment;
      }
    }
    bool chosen = assignment != 0xffffffffu;
    uint votes = uint(ulong(simd_ballot(chosen)));
    if (chosen) {
      list[n_found + popcount(votes & ((1u << lane) - 1u))] = assignment;
    }
    n_found += popcount(votes);
  }
  if (lane == 0) {
    counts[expert] = n_found;
  }
  for (uint j = n_found + lane; j < n_tokens; j += SIMD) {
    list[j] = 0xffffffffu;
  }
}

// One projection of all experts over the assignments of `moe_id_map`:
// out[token, slot] = W_expert * x, W quantised and in the expert's slot of the pool.
//
// x: [T,I], or [T*K,I] if PER_ASSIGNMENT; w: [n_slots, w_row] words and scales, biases:
// [n_slots, s_row], [n_slots, b_row], a matrix [O,I] lying in each row from its base on;
// counts: [E]; lists: [E,T]; slot_of_expert: [E]; out: [T,K,O]. I is a multiple of G, G
// of 32. Launch: threadgroups of 128 on (O / 64, T / 32, E): 32 assignments by 64
// outputs in steps of 32 inputs. A tile past its expert's count leaves at once. Every
// simdgroup takes all rows of 16 columns, so tiles that are not full (most are) leave
// the work of all four equally short, by 8 rows at a time.
template <typename T, typename S, int BITS, int G, bool PER_ASSIGNMENT>
[[kernel]] void moe_mm_id(
    device const T* x,
    device const uint* w,
    device const S* scales,
    device const S* biases,
    device const uint* counts,
    device const uint* lists,
    device const uint* slot_of_expert,
    constant uint& w_base,
    constant uint& s_base,
    constant uint& b_base,
    constant uint& w_row,
    constant uint& s_row,
    constant uint& b_row,
    constant uint& n_tokens,
    constant uint& k,
    constant uint& n_in,
    constant uint& n_out,
    device T* out,
    uint3 tile [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  constexpr int ROWS = TILE_ROWS;
  constexpr int COLUMNS = TILE_COLUMNS;
  threadgroup float4 x_tile[TILE_ROWS * TILE_PITCH / 4];
  threadgroup float4 w_tile[TILE_COLUMNS * TILE_PITCH / 4];
  threadgroup float* ws = (threadgroup float*)w_tile;

  uint expert = tile.z;
  uint count = counts[expert];
  if (tile.y * ROWS >= count) {
    return;
  }
  uint n_rows = min(count - tile.y * ROWS, uint(ROWS));
  auto list = lists + ulong(expert) * n_tokens + tile.y * ROWS;
  ulong slot = slot_of_expert[expert];

  // Four threads read a row of x, two a row of W: each thread stays with its row.
  uint x_row = thread_index / 4;
  bool has_row = x_row < n_rows;
  uint assignment = has_row ? list[x_row] : 0u;
  auto x_at = x + ulong(PER_ASSIGNMENT ? assignment : assignment / k) * n_in;
  ulong o = min(tile.x * COLUMNS + thread_index / 2, n_out - 1);
  auto w_at = w + slot * w_row + w_base + o * (n_in * BITS / 32);
  auto s_at = scales + slot * s_row + s_base + o * (n_in / G);
  auto b_at = biases + slot * b_row + b_base + o * (n_in / G);
  multiply_tile<BITS, G>(
      x_at, has_row, w_at, s_at, b_at, n_in, n_rows, x_tile, w_tile, thread_index, simdgroup);
  uint column = thread_index % COLUMNS;
  if (tile.x * COLUMNS + column < n_out) {
    for (uint r = thread_index / COLUMNS; r < n_rows; r += 2) {
      ulong at = ulong(list[r]) * n_out + tile.x * COLUMNS + column;
      out[at] = T(ws[r * TILE_OUT_PITCH + column]);
    }
  }
}

// Sum over a token's slots of weight * mid, in the order of the slots.
//
// mid: [T,K,D]; weights: [T,K]; out: float32 [T,D]. Launch: four columns a thread, one row of
// the grid a token. Gathers where an addition into the token's row would need atomics or
// a fixed order of experts.
template <typename T>
[[kernel]] void moe_combine_topk(
    device const T* mid,
    device const float* weights,
    constant uint& k,
    constant uint& n,
    device float* out,
    uint2 position [[thread_position_in_grid]]) {
  uint i = 4 * position.x;
  ulong token = position.y;
  float4 sum = float4(0.0f);
  for (uint slot = 0; slot < k; ++slot) {
    ulong at = token * k + slot;
    sum += weights[at] * read_columns(mid + at * n, i, n);
  }
  write_columns(out + token * n, i, n, sum);
}

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
// Arguments as there; shared: a row with gate [F] from gate_at on, up [F] from up_at and
// shared_gate [1] at opens_at; shared_*: a matrix [D,F] in SHARED_BITS bits and groups of G;
// residual, out: [D]. Launch: threadgroups of 256 for 16 rows of D.
template <typename T, typename S, typename H, int BITS, int SHARED_BITS, int G, int WORDS>
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
      sigmoid(float(shared[opens_at])), row, k, n_in, n_shared, n_out, sums, thread_index,
      simdgroup, lane);
  if (thread_index < 16 && row + thread_index < n_out) {
    out[row + thread_index] = T(float(residual[row + thread_index]) + sums[thread_index]);
  }
}
