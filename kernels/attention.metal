// Full attention: rotary positions, the KV cache, and causal attention over it.
//
// B sequences of T tokens, N = B T rows; H query heads, Hkv key heads, D head width, S cache rows.
// Query head h reads key head h / (H / Hkv).
#include "moeflux.h"

// Rotate the first 2 n_pairs channels of each head, pairing their first half with their second
// (NeoX), and multiply them by scale. Copy the other channels.
//
// x, out: [N, H d]; inv_freq: float32 [n_pairs], angle per position; start: [B], position of each
// sequence's first token. Launch: one thread per pair or copied channel, grid (d - n_pairs, H, N).
// Angles reach thousands of turns, and only the precise functions reduce such angles accurately.
template <typename T>
[[kernel]] void rope_n_tokens(
    device const T* x,
    device const float* inv_freq,
    device const int* start,
    constant uint& n_tokens,
    constant uint& n_heads,
    constant uint& head_dim,
    constant uint& n_pairs,
    constant float& scale,
    device T* out,
    uint3 position [[thread_position_in_grid]]) {
  uint channel = position.x;
  if (channel >= head_dim - n_pairs) {
    return;
  }
  ulong at = (ulong(position.z) * n_heads + position.y) * head_dim + channel;
  if (channel >= n_pairs) {
    out[at + n_pairs] = x[at + n_pairs];
    return;
  }
  int where = start[position.z / n_tokens] + int(position.z % n_tokens);
  float angle = float(where) * inv_freq[channel];
  float c = scale * precise::cos(angle);
  float s = scale * precise::sin(angle);
  float first = float(x[at]);
  float second = float(x[at + n_pairs]);
  out[at] = T(first * c - second * s);
  out[at + n_pairs] = T(first * s + second * c);
}

// Copy both caches, replacing T rows from `row` on by new ones. New rows outside the cache are
// dropped.
//
// keys, values: [N, Hkv d]; k_cache, v_cache and outputs: [B,Hkv,S,d]; row: [1]. Launch: four
// channels per thread, grid (d / 4, S, B Hkv). An MLX array is a value, so the whole cache is
// written. A model's cache object appends in place instead.
template <typename T, typename C>
[[kernel]] void kv_cache_append_n_tokens(
    device const T* keys,
    device const T* values,
    device const C* k_cache,
    device const C* v_cache,
    device const int* row,
    constant uint& n_tokens,
    constant uint& n_kv_heads,
    constant uint& n_rows,
    constant uint& head_dim,
    device C* k_out,
    device C* v_out,
    uint3 position [[thread_position_in_grid]]) {
  uint channel = 4 * position.x;
  if (channel >= head_dim) {
    return;
  }
  ulong sequence = position.z / n_kv_heads;
  uint head = position.z % n_kv_heads;
  ulong to = (ulong(position.z) * n_rows + position.y) * head_dim;
  int token = int(position.y) - row[0];
  if (token >= 0 && token < int(n_tokens)) {
    ulong from = ((sequence * n_tokens + token) * n_kv_heads + head) * head_dim;
    write_columns(k_out + to, channel, head_dim, read_columns(keys + from, channel, head_dim));
    write_columns(v_out + to, channel, head_dim, read_columns(values + from, channel, head_dim));
  } else {
    write_columns(k_out + to, channel, head_dim, read_columns(k_cache + to, channel, head_dim));
    write_columns(v_out + to, channel, head_dim, read_columns(v_cache + to, channel, head_dim));
  }
}

// First of three passes: scores of one query per sequence with all rows of the cache.
//
// q: [B, H D]; k: [B,Hkv,S,D]; scores: float32 [B,H,S]. Launch: one simdgroup per cache row, 8 per
// threadgroup, grid (32, S, B Hkv). A row is read once for all query heads that share it.
template <typename T, typename C, int D>
[[kernel]] void attn_scores_batched(
    device const T* q,
    device const C* k,
    constant float& scale,
    constant uint& n_heads,
    constant uint& heads_per_kv,
    constant uint& n_rows,
    device float* scores,
    uint3 position [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  constexpr int PER = D / SIMD;
  if (position.y >= n_rows) {
    return;
  }
  uint n_kv_heads = n_heads / heads_per_kv;
  ulong sequence = position.z / n_kv_heads;
  uint first = position.z % n_kv_heads * heads_per_kv;
  float key[PER];
  read_share<PER>(key, k + (ulong(position.z) * n_rows + position.y) * D, lane);
  for (uint head = first; head < first + heads_per_kv; ++head) {
    float query[PER];
    read_share<PER>(query, q + (sequence * n_heads + head) * D, lane);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < PER; ++j) {
      sum = fma(query[j], key[j], sum);
    }
    sum = simd_sum(sum);
    if (lane == 0) {
      scores[(sequence * n_heads + head) * n_rows + position.y] = scale * sum;
    }
  }
}

// Second pass: the softmax of each row.
//
// scores, out: float32 [R,S]. Launch: one threadgroup of 256 per row. It reads the row three times
// instead of keeping values in registers, because S has no bound.
[[kernel]] void attn_softmax_batched(
    device const float* scores,
    constant uint& n_rows,
    device float* out,
    uint row [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float scratch[8];
  threadgroup float tops[8];
  auto from = scores + ulong(row) * n_rows;
  device float* to = out + ulong(row) * n_rows;
  float top = -INFINITY;
  for (uint i = thread_index; i < n_rows; i += 256) {
    top = fmax(top, from[i]);
  }
  top = simd_max(top);
  if (lane == 0) {
    tops[simdgroup] = top;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  top = simd_max(tops[lane % 8]);
  float sum = 0.0f;
  for (uint i = thread_index; i < n_rows; i += 256) {
    sum += exp(from[i] - top);
  }
  sum = threadgroup_sum(sum, scratch, lane, simdgroup, 8);
  for (uint i = thread_index; i < n_rows; i += 256) {
    to[i] = exp(from[i] - top) / sum;
  }
}

// Third pass: values weighted by probabilities.
//
// p: float32 [B,H,S]; v: [B,Hkv,S,D]; out: [B, H D]. Launch: one threadgroup of 8 simdgroups per
// head. A simdgroup takes every eighth row, a lane D / 32 channels. The eight sums are added at the
// end.
template <typename C, typename T, int D>
[[kernel]] void attn_values_batched(
    device const float* p,
    device const C* v,
    constant uint& n_heads,
    constant uint& heads_per_kv,
    constant uint& n_rows,
    device T* out,
    uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  constexpr int PER = D / SIMD;
  threadgroup float sums[8 * D];
  ulong sequence = group / n_heads;
  ulong kv_head = sequence * (n_heads / heads_per_kv) + group % n_heads / heads_per_kv;
  auto weights = p + ulong(group) * n_rows;
  float sum[PER];
#pragma unroll
  for (int j = 0; j < PER; ++j) {
    sum[j] = 0.0f;
  }
  for (uint row = simdgroup; row < n_rows; row += 8) {
    float value[PER];
    read_share<PER>(value, v + (kv_head * n_rows + row) * D, lane);
    float weight = weights[row];
#pragma unroll
    for (int j = 0; j < PER; ++j) {
      sum[j] = fma(weight, value[j], sum[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < PER; ++j) {
    sums[simdgroup * D + lane * PER + j] = sum[j];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = thread_index; i < D; i += 256) {
    float total = 0.0f;
    for (uint s = 0; s < 8; ++s) {
      total += sums[s * D + i];
    }
    out[ulong(group) * D + i] = T(total);
  }
}

// Add ROWS rows of keys and values to the running softmax of FOLD queries that share them. `top` is
// the largest score so far, `total` the sum of exponentials, `sum` the values weighted by them. A
// lane holds PER channels of each query and sum. Queries are already scaled.
template <int PER, int FOLD, int ROWS, typename K, typename V>
inline void attend_rows(
    thread const float* query,
    thread float* sum,
    thread float* top,
    thread float* total,
    K keys,
    V values,
    uint lane) {
  float key[ROWS * PER];
  float value[ROWS * PER];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    read_share<PER>(key + r * PER, keys + r * PER * SIMD, lane);
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    read_share<PER>(value + r * PER, values + r * PER * SIMD, lane);
  }
#pragma unroll
  for (int f = 0; f < FOLD; ++f) {
    float scores[ROWS];
    float higher = top[f];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float score = 0.0f;
#pragma unroll
      for (int j = 0; j < PER; ++j) {
        score = fma(query[f * PER + j], key[r * PER + j], score);
      }
      scores[r] = simd_sum(score);
      higher = fmax(higher, scores[r]);
    }
    float shrink = fast::exp(top[f] - higher);
    top[f] = higher;
#pragma unroll
    for (int j = 0; j < PER; ++j) {
      sum[f * PER + j] *= shrink;
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float weight = fast::exp(scores[r] - higher);
      // An explicit fma rounds once in every instantiation; compilers contract only some.
      total[f] = r == 0 ? fma(total[f], shrink, weight) : total[f] + weight;
#pragma unroll
      for (int j = 0; j < PER; ++j) {
        sum[f * PER + j] = fma(weight, value[r * PER + j], sum[f * PER + j]);
      }
    }
  }
}

// Load and scale FOLD queries of neighbouring heads, and start an empty running softmax for each.
template <int PER, int FOLD, typename Q>
inline void begin_attention(
    thread float* query,
    thread float* sum,
    thread float* top,
    thread float* total,
    Q q,
    float scale,
    uint lane) {
#pragma unroll
  for (int f = 0; f < FOLD; ++f) {
    read_share<PER>(query + f * PER, q + f * PER * SIMD, lane);
    top[f] = -INFINITY;
    total[f] = 0.0f;
#pragma unroll
    for (int j = 0; j < PER; ++j) {
      query[f * PER + j] *= scale;
      sum[f * PER + j] = 0.0f;
    }
  }
}

// Attention of one token's FOLD heads over all rows that they see, by one simdgroup.
template <
    int D, int FOLD, bool HAS_MASK, typename T, typename Q, typename K, typename V, typename M>
inline void attend_direct(
    Q q,
    K k,
    V v,
    M mask,
    float scale,
    uint n_tokens,
    uint n_heads,
    uint heads_per_kv,
    uint n_rows,
    uint n_masks,
    device T* out,
    uint3 position,
    uint lane) {
  constexpr int PER = D / SIMD;
  uint token = position.y;
  if (token >= n_tokens) {
    return;
  }
  uint n_folds = n_heads / FOLD;
  ulong sequence = position.z / n_folds;
  uint head = position.z % n_folds * FOLD;
  ulong at = ((sequence * n_tokens + token) * n_heads + head) * D;
  ulong kv_at = (sequence * (n_heads / heads_per_kv) + head / heads_per_kv) * n_rows * D;
  auto kept = mask + (HAS_MASK ? ((n_masks > 1 ? sequence : 0) * n_tokens + token) * n_rows : 0);
  uint n_seen = HAS_MASK ? n_rows : n_rows - n_tokens + token + 1;
  float query[FOLD * PER];
  float sum[FOLD * PER];
  float top[FOLD];
  float total[FOLD];
  begin_attention<PER, FOLD>(query, sum, top, total, q + at, scale, lane);
  for (uint row = 0; row < n_seen; ++row) {
    bool seen = true;
    if (HAS_MASK) {
      seen = kept[row];
    }
    if (seen) {
      ulong from = kv_at + ulong(row) * D;
      attend_rows<PER, FOLD, 1>(query, sum, top, total, k + from, v + from, lane);
    }
  }
#pragma unroll
  for (int f = 0; f < FOLD; ++f) {
    // A query that sees no row gets zeros.
    float share = total[f] > 0.0f ? 1.0f / total[f] : 0.0f;
#pragma unroll
    for (int j = 0; j < PER; ++j) {
      out[at + f * D + lane * PER + j] = T(sum[f * PER + j] * share);
    }
  }
}

// Causal attention that reads cache rows straight from device memory.
//
// q, out: [N, H D]; k, v: [B,Hkv,S,D], whose last T rows belong to the queries: query t sees rows 0
// to S - T + t, or if HAS_MASK the rows that mask [1 or B, 1, T, S] allows. Launch: one simdgroup
// per token and head, four tokens per threadgroup, grid (32, T, B H). Neighbouring tokens read the
// same rows at the same time. The GPU's caches serve that better than copies in threadgroup memory,
// and no thread waits at a barrier.
template <typename T, typename C, int D, bool HAS_MASK>
[[kernel]] void sdpa_causal_direct(
    device const T* q,
    device const C* k,
    device const C* v,
    device const bool* mask,
    constant float& scale,
    constant uint& n_tokens,
    constant uint& n_heads,
    constant uint& heads_per_kv,
    constant uint& n_rows,
    constant uint& n_masks,
    device T* out,
    uint3 position [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  attend_direct<D, 1, HAS_MASK>(
      q, k, v, mask, scale, n_tokens, n_heads, heads_per_kv, n_rows, n_masks, out, position,
      lane);
}

// `sdpa_causal_direct` with two heads of one key head per simdgroup, which read each row once. Grid
// (32, T, B H / 2).
template <typename T, typename C, int D, bool HAS_MASK>
[[kernel]] void sdpa_causal_direct_fold2(
    device const T* q,
    device const C* k,
    device const C* v,
    device const bool* mask,
    constant float& scale,
    constant uint& n_tokens,
    constant uint& n_heads,
    constant uint& heads_per_kv,
    constant uint& n_rows,
    constant uint& n_masks,
    device T* out,
    uint3 position [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  attend_direct<D, 2, HAS_MASK>(
      q, k, v, mask, scale, n_tokens, n_heads, heads_per_kv, n_rows, n_masks, out, position,
      lane);
}

// `sdpa_causal_direct` with four heads per simdgroup. Grid (32, T, B H / 4).
template <typename T, typename C, int D, bool HAS_MASK>
[[kernel]] void sdpa_causal_direct_fold4(
    device const T* q,
    device const C* k,
    device const C* v,
    device const bool* mask,
    constant float& scale,
    constant uint& n_tokens,
    constant uint& n_heads,
    constant uint& heads_per_kv,
    constant uint& n_rows,
    constant uint& n_masks,
    device T* out,
    uint3 position [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  attend_direct<D, 4, HAS_MASK>(
      q, k, v, mask, scale, n_tokens, n_heads, heads_per_kv, n_rows, n_masks, out, position,
      lane);
}

// `sdpa_causal_direct` with eight heads per simdgroup: a lane needs 16 registers per channel. Grid
// (32, T, B H / 8).
template <typename T, typename C, int D, bool HAS_MASK>
[[kernel]] void sdpa_causal_direct_fold8(
    device const T* q,
    device const C* k,
    device const C* v,
    device const bool* mask,
    constant float& scale,
    constant uint& n_tokens,
    constant uint& n_heads,
    constant uint& heads_per_kv,
    constant uint& n_rows,
    constant uint& n_masks,
    device T* out,
    uint3 position [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  attend_direct<D, 8, HAS_MASK>(
      q, k, v, mask, scale, n_tokens, n_heads, heads_per_kv, n_rows, n_masks, out, position,
      lane);
}

// Causal attention that stages cache rows in threadgroup memory, 8 at a time.
//
// Arguments: see `sdpa_causal_direct`. Launch: threadgroups of 8 simdgroups, one token each, of one
// head, grid (32, T, B H). Each row is read once for eight tokens whatever the GPU caches, at the
// cost of two barriers per tile.
template <typename T, typename C, int D, bool HAS_MASK>
[[kernel]] void sdpa_causal_staged(
    device const T* q,
    device const C* k,
    device const C* v,
    device const bool* mask,
    constant float& scale,
    constant uint& n_tokens,
    constant uint& n_heads,
    constant uint& heads_per_kv,
    constant uint& n_rows,
    constant uint& n_masks,
    device T* out,
    uint3 position [[thread_position_in_grid]],
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  constexpr int PER = D / SIMD;
  constexpr int BLOCK = 8;
  threadgroup C keys[BLOCK * D];
  threadgroup C values[BLOCK * D];
  ulong sequence = position.z / n_heads;
  uint head = position.z % n_heads;
  // A simdgroup past the last token takes part in the barriers and writes nothing.
  bool there = position.y < n_tokens;
  uint token = there ? position.y : n_tokens - 1;
  uint last_token = min(group.y * 8 + 7, n_tokens - 1);
  ulong at = ((sequence * n_tokens + token) * n_heads + head) * D;
  ulong kv_at = (sequence * (n_heads / heads_per_kv) + head / heads_per_kv) * n_rows * D;
  auto kept = mask + (HAS_MASK ? ((n_masks > 1 ? sequence : 0) * n_tokens + token) * n_rows : 0);
  uint n_staged = HAS_MASK ? n_rows : n_rows - n_tokens + last_token + 1;
  uint n_seen = HAS_MASK ? n_rows : n_rows - n_tokens + token + 1;
  float query[PER];
  float sum[PER];
  float top[1];
  float total[1];
  begin_attention<PER, 1>(query, sum, top, total, q + at, scale, lane);
  for (uint start = 0; start < n_staged; start += BLOCK) {
    uint n_here = min(uint(BLOCK), n_staged - start);
    // All simdgroups must have read the previous rows.
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = thread_index; i < n_here * D; i += 256) {
      keys[i] = k[kv_at + ulong(start) * D + i];
      values[i] = v[kv_at + ulong(start) * D + i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint row = 0; row < n_here; ++row) {
      bool seen = start + row < n_seen;
      if (HAS_MASK) {
        seen = kept[start + row];
      }
      if (seen) {
        threadgroup const C* key = keys + row * D;
        threadgroup const C* value = values + row * D;
        attend_rows<PER, 1, 1>(query, sum, top, total, key, value, lane);
      }
    }
  }
  if (there) {
    float share = total[0] > 0.0f ? 1.0f / total[0] : 0.0f;
#pragma unroll
    for (int j = 0; j < PER; ++j) {
      out[at + lane * PER + j] = T(sum[j] * share);
    }
  }
}

// Attention of one token per sequence, with the cache's rows divided among simdgroups.
//
// Arguments: see `sdpa_causal_direct`, T = 1. Launch: one threadgroup of 8 simdgroups per FOLD
// heads of one key head, grid (256, B H / FOLD). Each simdgroup keeps its own softmax over every
// eighth row; at the end the eight are rescaled to one largest score and added. With a single token
// the rows are the only work that can fill the GPU.
template <typename T, typename C, int D, int FOLD, bool HAS_MASK>
[[kernel]] void sdpa_decode(
    device const T* q,
    device const C* k,
    device const C* v,
    device const bool* mask,
    constant float& scale,
    constant uint& n_heads,
    constant uint& heads_per_kv,
    constant uint& n_rows,
    constant uint& n_masks,
    device T* out,
    uint2 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  constexpr int PER = D / SIMD;
  threadgroup float sums[8 * D];
  threadgroup float tops[8 * FOLD];
  threadgroup float totals[8 * FOLD];
  uint n_folds = n_heads / FOLD;
  ulong sequence = group.y / n_folds;
  uint head = group.y % n_folds * FOLD;
  ulong at = (sequence * n_heads + head) * D;
  ulong kv_at = (sequence * (n_heads / heads_per_kv) + head / heads_per_kv) * n_rows * D;
  auto kept = mask + (HAS_MASK ? (n_masks > 1 ? sequence : 0) * n_rows : 0);
  float query[FOLD * PER];
  float sum[FOLD * PER];
  float top[FOLD];
  float total[FOLD];
  begin_attention<PER, FOLD>(query, sum, top, total, q + at, scale, lane);
  for (uint row = simdgroup; row < n_rows; row += 8) {
    bool seen = true;
    if (HAS_MASK) {
      seen = kept[row];
    }
    if (seen) {
      ulong from = kv_at + ulong(row) * D;
      attend_rows<PER, FOLD, 1>(query, sum, top, total, k + from, v + from, lane);
    }
  }
  if (lane == 0) {
#pragma unroll
    for (int f = 0; f < FOLD; ++f) {
      tops[simdgroup * FOLD + f] = top[f];
      totals[simdgroup * FOLD + f] = total[f];
    }
  }
#pragma unroll
  for (int f = 0; f < FOLD; ++f) {
    // One query at a time: threadgroup memory would not hold the sums of all of them.
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (int j = 0; j < PER; ++j) {
      sums[simdgroup * D + lane * PER + j] = sum[f * PER + j];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float highest = -INFINITY;
    for (int s = 0; s < 8; ++s) {
      highest = fmax(highest, tops[s * FOLD + f]);
    }
    for (uint i = thread_index; i < D; i += 256) {
      float value = 0.0f;
      float weight = 0.0f;
      for (int s = 0; s < 8; ++s) {
        // A simdgroup that saw no row has neither a largest score nor a share.
        float had = totals[s * FOLD + f];
        float part = had > 0.0f ? exp(tops[s * FOLD + f] - highest) : 0.0f;
        value = fma(part, sums[s * D + i], value);
        weight = fma(part, had, weight);
      }
      out[at + f * D + i] = T(weight > 0.0f ? value / weight : 0.0f);
    }
  }
}

// Values of threadgroup memory for `place_heads`: a slice of 256 for each simdgroup, and the sums of
// four simdgroups over queries and over keys.
constexpr constant int PLACING = 4 * 256 + 8;

// The sum of squares of a row of n by a threadgroup of four simdgroups. All threads must call it.
template <typename P>
inline float row_squares(P row, uint n, threadgroup float* scratch, uint simdgroup, uint lane) {
  float sum = 0.0f;
#pragma unroll 4
  for (uint i = 4 * (simdgroup * SIMD + lane); i < n; i += 16 * SIMD) {
    float4 values = read_columns(row, i, n);
    sum += dot(values, values);
  }
  return threadgroup_sum(sum, scratch, lane, simdgroup, 4);
}

// Normalise (if NORMED) and rotate the heads of a token's queries and keys, and multiply the
// rotated channels by turned_scale. A norm covers a head, or with ROW_NORMS the row of all heads.
// One simdgroup handles one head, query heads first, four per threadgroup. A query is the first
// head_dim of q_width values; key heads are k_step apart in k, and not written unless has_keys.
// `slices` holds PLACING values. Contains a barrier: all threads must call it.
template <
    typename T, bool NORMED, bool ROW_NORMS, typename Q, typename K, typename N, typename M,
    typename F, typename P>
inline void place_heads(
    Q q_proj,
    K k_proj,
    N q_norm,
    M k_norm,
    F inv_freq,
    P start,
    float eps,
    float turned_scale,
    uint n_heads,
    uint n_kv_heads,
    uint head_dim,
    uint q_width,
    uint n_pairs,
    device T* q,
    device T* k,
    ulong k_step,
    bool has_keys,
    threadgroup float* slices,
    uint3 group,
    uint simdgroup,
    uint lane) {
  threadgroup float* slice = slices + simdgroup * 256;
  ulong sequence = group.z;
  uint head = 4 * group.y + simdgroup;
  bool is_query = head < n_heads;
  bool there = is_query || (has_keys && head < n_heads + n_kv_heads);
  // Simdgroups without a head repeat the last head, to reach the barrier, and write nothing.
  uint own = is_query ? head : min(head - n_heads, n_kv_heads - 1);
  ulong from = is_query ? (sequence * n_heads + own) * q_width
                        : (sequence * n_kv_heads + own) * head_dim;
  ulong to = is_query ? (sequence * n_heads + own) * head_dim
                      : (sequence * n_kv_heads + own) * k_step;
  float squares = 0.0f;
  for (uint i = lane; i < head_dim; i += SIMD) {
    float value = float(is_query ? q_proj[from + i] : k_proj[from + i]);
    squares = fma(value, value, squares);
    slice[i] = value;
  }
  if (NORMED) {
    float mean;
    uint weights = 0;
    if (ROW_NORMS) {
      // Every threadgroup repeats these sums: they cost less than a launch that leaves them in memory.
      uint n_q = n_heads * head_dim;
      uint n_k = n_kv_heads * head_dim;
      float of_q = 0.0f;
      float of_k = 0.0f;
      if (4 * group.y < n_heads) {
        of_q = row_squares(q_proj + sequence * n_q, n_q, slices + 1024, simdgroup, lane);
      }
      if (4 * group.y + 4 > n_heads) {
        of_k = row_squares(k_proj + sequence * n_k, n_k, slices + 1028, simdgroup, lane);
      }
      mean = is_query ? of_q / float(n_q) : of_k / float(n_k);
      weights = own * head_dim;
    } else {
      mean = simd_sum(squares) / float(head_dim);
    }
    float scale = rsqrt(mean + eps);
    for (uint i = lane; i < head_dim; i += SIMD) {
      slice[i] *= scale * float(is_query ? q_norm[weights + i] : k_norm[weights + i]);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (!there) {
    return;
  }
  device T* out = is_query ? q : k;
  float where = float(start[sequence]);
  for (uint i = lane; i < head_dim; i += SIMD) {
    float value = slice[i];
    if (i < 2 * n_pairs) {
      uint pair = i % n_pairs;
      float angle = where * inv_freq[pair];
      float other = i < n_pairs ? -slice[i + n_pairs] : slice[pair];
      value = turned_scale * (value * precise::cos(angle) + other * precise::sin(angle));
    }
    out[to + i] = T(value);
  }
}

// Prepare a token's attention inputs: separate the heads of q_proj into query and gate, and
// normalise and rotate queries and keys.
//
// q_proj: [B, H 2 d], query then gate in each head; k_proj, k: [B, Hkv d]; q_norm, k_norm: [d];
// inv_freq: float32 [n_pairs]; start: [B], each token's position; q, gate: [B, H d]. d <= 256.
// Launch: one simdgroup per head, query heads first, four per threadgroup, grid (32, H + Hkv, B).
// One launch replaces several Ops that each touch a few hundred bytes.
template <typename T, typename N>
[[kernel]] void attention_inputs(
    device const T* q_proj,
    device const T* k_proj,
    device const N* q_norm,
    device const N* k_norm,
    device const float* inv_freq,
    device const int* start,
    constant float& eps,
    constant uint& n_heads,
    constant uint& n_kv_heads,
    constant uint& head_dim,
    constant uint& n_pairs,
    device T* q,
    device T* gate,
    device T* k,
    uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float slices[PLACING];
  place_heads<T, true, false>(
      q_proj, k_proj, q_norm, k_norm, inv_freq, start, eps, 1.0f, n_heads, n_kv_heads, head_dim,
      2 * head_dim, n_pairs, q, k, head_dim, true, slices, group, simdgroup, lane);
  uint head = 4 * group.y + simdgroup;
  if (head < n_heads) {
    ulong at = (group.z * ulong(n_heads) + head) * head_dim;
    for (uint i = lane; i < head_dim; i += SIMD) {
      gate[at + i] = q_proj[2 * at + head_dim + i];
    }
  }
}

// `attention_inputs` without a gate; both norms may be absent.
//
// q_proj, q: [B, H d]; q_norm: [d], or [H d] with ROW_NORMS; k_norm: [d] or [Hkv d]; turned_scale
// multiplies the rotated channels. Other arguments and launch: see `attention_inputs`.
template <typename T, typename N, bool HAS_Q_NORM, bool HAS_K_NORM, bool ROW_NORMS>
[[kernel]] void attention_inputs_ungated(
    device const T* q_proj,
    device const T* k_proj,
    device const N* q_norm,
    device const N* k_norm,
    device const float* inv_freq,
    device const int* start,
    constant float& eps,
    constant float& turned_scale,
    constant uint& n_heads,
    constant uint& n_kv_heads,
    constant uint& head_dim,
    constant uint& n_pairs,
    device T* q,
    device T* k,
    uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float slices[PLACING];
  place_heads<T, HAS_Q_NORM, ROW_NORMS>(
      q_proj, k_proj, q_norm, k_norm, inv_freq, start, eps, turned_scale, n_heads, n_kv_heads,
      head_dim, head_dim, n_pairs, q, k, head_dim, true, slices, group, simdgroup, lane);
}

// `attention_inputs_ungated` of one token, then `kv_cache_append_n_tokens` with its key and value.
//
// row: holds the token's queries [H d], keys and values [Hkv d] from q_at, k_at and v_at on; k_cache,
// v_cache and outputs: [Hkv,S,d]; place: [1], the row of the cache, which is dropped outside of it.
// Other arguments: see `attention_inputs_ungated`. Launch: threadgroups of 128: one per four heads,
// query heads first, then one per 32 rows of all key heads, which copy the caches.
template <typename T, typename N, bool HAS_Q_NORM, bool HAS_K_NORM, bool ROW_NORMS>
[[kernel]] void attention_inputs_append(
    device const T* row,
    device const N* q_norm,
    device const N* k_norm,
    device const float* inv_freq,
    device const int* start,
    device const T* k_cache,
    device const T* v_cache,
    device const int* place,
    constant float& eps,
    constant float& turned_scale,
    constant uint& q_at,
    constant uint& k_at,
    constant uint& v_at,
    constant uint& n_heads,
    constant uint& n_kv_heads,
    constant uint& head_dim,
    constant uint& n_pairs,
    constant uint& n_rows,
    device T* q,
    device T* k_out,
    device T* v_out,
    uint group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float slices[PLACING];
  uint n_placing = (n_heads + n_kv_heads + 3) / 4;
  bool inside = place[0] >= 0 && place[0] < int(n_rows);
  uint at = inside ? uint(place[0]) : 0u;
  if (group < n_placing) {
    place_heads<T, HAS_Q_NORM, ROW_NORMS>(
        row + q_at, row + k_at, q_norm, k_norm, inv_freq, start, eps, turned_scale, n_heads,
        n_kv_heads, head_dim, head_dim, n_pairs, q, k_out + ulong(at) * head_dim,
        ulong(n_rows) * head_dim, inside, slices, uint3(0, group, 0), simdgroup, lane);
    uint head = 4 * group + simdgroup;
    if (inside && head >= n_heads && head < n_heads + n_kv_heads) {
      uint own = head - n_heads;
      auto from = row + v_at + own * head_dim;
      device T* to = v_out + (ulong(own) * n_rows + at) * head_dim;
      for (uint i = 4 * lane; i < head_dim; i += 4 * SIMD) {
        write_columns(to, i, head_dim, read_columns(from, i, head_dim));
      }
    }
    return;
  }
  uint first = 32 * (group - n_placing) + 8 * simdgroup;
  for (uint own = first; own < first + 8 && own < n_kv_heads * n_rows; ++own) {
    if (inside && own % n_rows == at) {
      continue;
    }
    ulong to = ulong(own) * head_dim;
    for (uint i = 4 * lane; i < head_dim; i += 4 * SIMD) {
      write_columns(k_out + to, i, head_dim, read_columns(k_cache + to, i, head_dim));
      write_columns(v_out + to, i, head_dim, read_columns(v_cache + to, i, head_dim));
    }
  }
}

// Attention of FOLD queries of neighbouring heads over n_rows rows, by 8 simdgroups. For each query
// it writes the sum of values weighted by exp(score - top), then top and the sum of the weights;
// all are 0 without a row. q: [FOLD,D]; k, v: [n_rows,D]; query f's results lie n_parts places
// after those of query f - 1. The simdgroups take two rows in turn, each with its own softmax, and
// at the end are rescaled to one largest score.
template <int D, int FOLD, typename Q, typename K, typename V>
inline void attend_part(
    Q q,
    K k,
    V v,
    float scale,
    uint n_rows,
    uint n_parts,
    device float* sums,
    device float* stats,
    threadgroup float* own,
    threadgroup float* tops,
    threadgroup float* totals,
    uint thread_index,
    uint simdgroup,
    uint lane) {
  constexpr int PER = D / SIMD;
  float query[FOLD * PER];
  float sum[FOLD * PER];
  float top[FOLD];
  float total[FOLD];
  begin_attention<PER, FOLD>(query, sum, top, total, q, scale, lane);
  for (uint row = 2 * simdgroup; row < n_rows; row += 16) {
    ulong from = ulong(row) * D;
    if (row + 1 < n_rows) {
      attend_rows<PER, FOLD, 2>(query, sum, top, total, k + from, v + from, lane);
    } else {
      attend_rows<PER, FOLD, 1>(query, sum, top, total, k + from, v + from, lane);
    }
  }
  if (lane == 0) {
#pragma unroll
    for (int f = 0; f < FOLD; ++f) {
      tops[simdgroup * FOLD + f] = top[f];
      totals[simdgroup * FOLD + f] = total[f];
    }
  }
#pragma unroll
  for (int f = 0; f < FOLD; ++f) {
    // One query at a time: threadgroup memory would not hold the sums of all of them.
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (int j = 0; j < PER; ++j) {
      own[simdgroup * D + lane * PER + j] = sum[f * PER + j];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    ulong part = ulong(f) * n_parts;
    float highest = -INFINITY;
    float all = 0.0f;
    for (int s = 0; s < 8; ++s) {
      highest = fmax(highest, tops[s * FOLD + f]);
    }
    for (uint i = thread_index; i < D; i += 256) {
      float value = 0.0f;
      all = 0.0f;
      for (int s = 0; s < 8; ++s) {
        // A simdgroup that saw no row has neither a largest score nor a share.
        float had = totals[s * FOLD + f];
        float share = had > 0.0f ? exp(tops[s * FOLD + f] - highest) : 0.0f;
        value = fma(share, own[s * D + i], value);
        all = fma(share, had, all);
      }
      sums[part * D + i] = value;
    }
    if (thread_index == 0) {
      stats[2 * part] = all > 0.0f ? highest : 0.0f;
      stats[2 * part + 1] = all;
    }
  }
}

// First pass of split attention: one token per sequence over P splits of the cache, which may end
// in unused rows.
//
// q: [B, H D]; k, v: [B,Hkv,S,D]; start: [B], the last row that each sequence sees. For each split
// of part_rows rows, sums: float32 [B,H,P,D] receives the values weighted by exp(score - top), and
// stats: float32 [B,H,P,2] receives top and the sum of the weights; all are 0 for an unseen split.
// `sdpa_decode_join` combines them. Launch: one threadgroup of 8 simdgroups per split and FOLD
// heads of one key head, grid (256, P, B H / FOLD). With a single token the rows are the only work
// that can fill the GPU. The number of seen rows is read from memory, so neither shapes nor
// launches change from token to token.
template <typename T, typename C, int D, int FOLD>
[[kernel]] void sdpa_decode_parts(
    device const T* q,
    device const C* k,
    device const C* v,
    device const int* start,
    constant float& scale,
    constant uint& n_heads,
    constant uint& heads_per_kv,
    constant uint& n_rows,
    constant uint& part_rows,
    constant uint& n_parts,
    device float* sums,
    device float* stats,
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float own[8 * D];
  threadgroup float tops[8 * FOLD];
  threadgroup float totals[8 * FOLD];
  uint n_folds = n_heads / FOLD;
  ulong sequence = group.z / n_folds;
  uint head = group.z % n_folds * FOLD;
  ulong kv_head = sequence * (n_heads / heads_per_kv) + head / heads_per_kv;
  uint first = group.y * part_rows;
  uint n_seen = min(uint(max(start[sequence] + 1, 0)), n_rows);
  ulong q_at = (sequence * n_heads + head) * D;
  ulong kv_at = (kv_head * n_rows + first) * D;
  ulong part = (sequence * n_heads + head) * n_parts + group.y;
  attend_part<D, FOLD>(
      q + q_at, k + kv_at, v + kv_at, scale, min(part_rows, max(n_seen, first) - first), n_parts,
      sums + part * D, stats + 2 * part, own, tops, totals, thread_index, simdgroup, lane);
}

// Second pass of split attention: combine the splits of `sdpa_decode_parts` and apply the gate.
//
// sums: float32 [B,H,P,D]; stats: float32 [B,H,P,2]; gate, out: [B, H D]; if HAS_GATE, out =
// attention * sigmoid(gate); sinks: [H], if HAS_SINKS one more score per head, with a value of
// zeros. P <= 256. Launch: one threadgroup of 8 simdgroups per 32 values of a head, grid (D, 8 B
// H); each simdgroup takes every eighth split.
template <typename T, bool HAS_GATE, bool HAS_SINKS>
[[kernel]] void sdpa_decode_join(
    device const float* sums,
    device const float* stats,
    device const T* gate,
    device const T* sinks,
    constant uint& n_heads,
    constant uint& n_parts,
    constant uint& head_dim,
    device T* out,
    uint2 group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  constexpr uint MAX_PARTS = 256;
  threadgroup float values[8 * SIMD];
  threadgroup float shares[MAX_PARTS];
  auto own_stats = stats + ulong(group.y) * n_parts * 2;
  auto own_sums = sums + ulong(group.y) * n_parts * head_dim;
  uint i = group.x * SIMD + lane;
  // Start loading the first 64 splits before anything waits; `sdpa_decode_parts` makes no more.
  float firsts[8];
#pragma unroll
  for (uint j = 0; j < 8; ++j) {
    uint part = simdgroup + 8 * j;
    firsts[j] = part < n_parts ? own_sums[part * head_dim + i] : 0.0f;
  }
  float highest = -INFINITY;
  for (uint part = lane; part < n_parts; part += SIMD) {
    // A split that saw no row has neither a largest score nor a share.
    highest = fmax(highest, own_stats[2 * part + 1] > 0.0f ? own_stats[2 * part] : -INFINITY);
  }
  highest = simd_max(highest);
  float sink = 0.0f;
  if (HAS_SINKS) {
    sink = float(sinks[group.y % n_heads]);
    highest = fmax(highest, sink);
  }
  float total = 0.0f;
  for (uint part = lane; part < n_parts; part += SIMD) {
    float had = own_stats[2 * part + 1];
    float share = had > 0.0f ? exp(own_stats[2 * part] - highest) : 0.0f;
    total = fma(share, had, total);
    if (simdgroup == 0) {
      shares[part] = share;
    }
  }
  total = simd_sum(total);
  if (HAS_SINKS) {
    total += exp(sink - highest);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float value = 0.0f;
#pragma unroll
  for (uint j = 0; j < 8; ++j) {
    uint part = simdgroup + 8 * j;
    value = fma(part < n_parts ? shares[part] : 0.0f, firsts[j], value);
  }
  for (uint part = 64 + simdgroup; part < n_parts; part += 8) {
    value = fma(shares[part], own_sums[part * head_dim + i], value);
  }
  values[simdgroup * SIMD + lane] = value;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup > 0) {
    return;
  }
#pragma unroll
  for (uint s = 1; s < 8; ++s) {
    value += values[s * SIMD + lane];
  }
  ulong at = ulong(group.y) * head_dim + i;
  float opened = 1.0f;
  if (HAS_GATE) {
    opened = sigmoid(float(gate[at]));
  }
  out[at] = T(total > 0.0f ? opened * value / total : 0.0f);
}
