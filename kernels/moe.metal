// Mixture of experts: routing, prompts grouped by expert, and combination.
#include "moeflux.h"

// Softmax over the experts in float32 and its K largest values in falling order; ties go to the
// lower index.
//
// logits: [T,E]; indices, weights: [T,K]. E <= 512, K <= 16. PER_LANE = ceil(E / 32). Launch: one
// simdgroup per token, four per threadgroup. A row stays in registers. It is ranked by logits,
// because exp can map different logits to one value. Only the K chosen weights are computed, one
// per lane. If NORMALIZE, they are divided by their sum, and the sum over all experts cancels.
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
// weights, out: [T,K]. K <= 16. Launch: one thread per weight. Every thread adds its token's
// weights alone: they share a cache line, and no lane waits for another.
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

// DeepSeek-V3 routing. Scores are sigmoids of the logits. For the choice alone a correction bias is
// added: choose the topk_group of n_group expert groups whose two best scores have the largest sum,
// then the K best experts in them; ties go to the lower index. Experts of other groups are never
// chosen. Weights are the scores without bias, divided by (their sum + 1e-20) if NORMALIZE, times
// `scale`.
//
// logits: [T,E]; bias: [E]; indices, weights: [T,K]. E <= 512; K <= 16 and at most the number of
// experts in topk_group groups; n_group divides 32 and E. Launch: one simdgroup per token, four per
// threadgroup; see `noaux_keys`.
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
  uint keys[PER_LANE];
  uint first;
  uint step;
  noaux_keys<PER_LANE>(row, bias, n_experts, n_group, topk_group, lane, keys, first, step);
  uint chosen = 0;
  for (uint n = 0; n < k; ++n) {
    uint expert;
    take_largest<PER_LANE>(keys, first, step, expert);
    chosen = lane == n ? expert : chosen;
  }
  float weight = noaux_weight<NORMALIZE>(row, chosen, k, scale, lane);
  if (lane < k) {
    ulong at = ulong(token) * k + lane;
    indices[at] = int(chosen);
    weights[at] = weight;
  }
}

// The weighted value of the J-th of K experts in column i; 0 if J >= K.
template <int K, int J, typename W, typename P>
inline float expert_share(W weights, P expert, uint i) {
  return K > J ? weights[J] * float(expert[i]) : 0.0f;
}

// One token's h + sum of w_k * e_k + sigmoid(gate) * shared, with each expert in its own buffer.
//
// h, shared, e0 to e15, out: [D]; weights: [K]; gate: [1]. Inputs eK and above are not read.
// Launch: one thread per column. K is a template number, so unread inputs cost nothing. With 16
// experts the kernel stays below Metal's limit of 31 buffers.
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

// One token's h + sum of w_k * e_k + sigmoid(gate) * shared, with all experts in one buffer.
//
// h, shared, out: [D]; experts: [K,D]; weights: [K]; gate: [1]. Launch: one thread per column. The
// K loads of a thread are independent and all in flight at once, which hides their latency although
// there are few threads.
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

// h + moe_sum + sigmoid(gate) * shared for T tokens.
//
// h, shared, out: T [T,D]; moe_sum: S [T,D], float32 or T; gate: [T,1]. Launch: four columns per
// thread, one row of the grid per token. The experts' sum may be float32, and is then rounded only
// here.
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

// acc plus weights[m] * bucket[m] in row tokens[m]. A bucket holds one expert's rows, or any rows
// of distinct tokens.
//
// acc, out: float32 [T,D]; bucket: [M,D]; tokens, weights: [M], M <= T. Launch: four columns per
// thread, one row of the grid per token, 128 threads per threadgroup. Each simdgroup searches the M
// rows for its token. Rows are gathered, not scattered, so there are no atomics and successive
// buckets add in their order.
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

// For each expert, count the tokens that chose it and list their assignments token * K + k in
// rising order; the rest of a list is 0xffffffff.
//
// indices: [T,K], distinct within a token; counts: [E]; lists: [E,T]. Launch: one simdgroup per
// expert, four per threadgroup. A lane examines the K choices of one token, so one ballot orders 32
// tokens and no counter is shared.
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

// One quantised projection of all experts over the assignments of `moe_id_map`:
// out[token, k] = W_expert * x + bias.
//
// x: [T,I], or [T*K,I] if PER_ASSIGNMENT. w: [n_slots, w_row] words; scales, biases: [n_slots,
// s_row], [n_slots, b_row]: each row holds a matrix [O,I] from its base on, of packed floats where
// there are no biases. bias: [n_slots, bias_row], each row holds [O] from its base on. counts: [E];
// lists: [E,T]; slot_of_expert: [E]; out: [T,K,O]. I is a multiple of G and 32. Launch:
// threadgroups of 128 on (O / 64, T / 32, E): 32 assignments by 64 outputs, 32 inputs at a time. A
// tile past its expert's count returns at once. Most tiles are partly filled: see `multiply_tile`.
template <
    typename T,
    typename S,
    typename A,
    int BITS,
    int G,
    bool HAS_BIASES,
    bool HAS_BIAS,
    bool PER_ASSIGNMENT>
[[kernel]] void moe_mm_id(
    device const T* x,
    device const uint* w,
    device const S* scales,
    device const S* biases,
    device const A* bias,
    device const uint* counts,
    device const uint* lists,
    device const uint* slot_of_expert,
    constant uint& w_base,
    constant uint& s_base,
    constant uint& b_base,
    constant uint& bias_base,
    constant uint& w_row,
    constant uint& s_row,
    constant uint& b_row,
    constant uint& bias_row,
    constant uint& n_tokens,
    constant uint& k,
    constant uint& n_in,
    constant uint& n_out,
    device T* out,
    uint3 tile [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  constexpr bool FLOATS = !HAS_BIASES;
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

  // Each thread stays with one row: four threads load a row of x, two a row of W.
  uint x_row = thread_index / 4;
  bool has_row = x_row < n_rows;
  uint assignment = has_row ? list[x_row] : 0u;
  auto x_at = x + ulong(PER_ASSIGNMENT ? assignment : assignment / k) * n_in;
  ulong o = min(tile.x * COLUMNS + thread_index / 2, n_out - 1);
  auto w_at = w + slot * w_row + w_base + o * (n_in * BITS / 32);
  auto s_at = scales + slot * s_row + s_base + o * (n_in / G);
  auto b_at = biases + (FLOATS ? 0 : slot * b_row + b_base + o * (n_in / G));
  multiply_tile<BITS, FLOATS, G>(
      x_at, has_row, w_at, s_at, b_at, n_in, n_rows, x_tile, w_tile, thread_index, simdgroup);
  uint column = thread_index % COLUMNS;
  if (tile.x * COLUMNS + column < n_out) {
    ulong bias_at = slot * bias_row + bias_base + tile.x * COLUMNS + column;
    float added = row_bias<HAS_BIAS>(bias, bias_at);
    for (uint r = thread_index / COLUMNS; r < n_rows; r += 2) {
      ulong at = ulong(list[r]) * n_out + tile.x * COLUMNS + column;
      out[at] = T(ws[r * TILE_OUT_PITCH + column] + added);
    }
  }
}

// out = sum over k of weights[k] * mid[k] for each token, in rising k.
//
// mid: [T,K,D]; weights: [T,K]; out: float32 [T,D]. Launch: four columns per thread, one row of the
// grid per token. It gathers, because adding into a token's row would need atomics or a fixed order
// of experts.
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
