// Gated DeltaNet: causal convolution, decay, and three forms of the delta rule.
//
// B sequences of T tokens, N = B T rows; Hk key heads of width dk, Hv value heads of width dv; a
// convolution of width W over C channels.
#include "moeflux.h"

// log(1 + y) for y in [0, 1], as the series of 2 atanh(y / (2 + y)). Fast mathematics may simplify
// (1 + y) - 1 to y; it cannot damage this series.
inline float log1p_of_unit(float y) {
  float z = y / (2.0f + y);
  float s = z * z;
  float sum = 1.0f / 13.0f;
  sum = fma(sum, s, 1.0f / 11.0f);
  sum = fma(sum, s, 1.0f / 9.0f);
  sum = fma(sum, s, 1.0f / 7.0f);
  sum = fma(sum, s, 1.0f / 5.0f);
  sum = fma(sum, s, 1.0f / 3.0f);
  return 2.0f * fma(sum * s, z, z);
}

// log(1 + exp(x)). The argument of exp is never positive, so it cannot overflow.
inline float softplus(float x) {
  return fmax(x, 0.0f) + log1p_of_unit(exp(-fabs(x)));
}

// Decay g = exp(-exp(a_log) softplus(alpha + dt_bias)) and beta = sigmoid(b) for every token and
// value head. A masked token gets decay 1 and beta 0, which leaves the state unchanged.
//
// alpha, b: [N,Hv]; a_log, dt_bias: [Hv]; mask: [N], read if HAS_MASK; g, beta: float32 [N,Hv].
// Launch: one thread per value. Each output is too small for a launch of its own.
template <typename T, typename W, bool HAS_MASK>
[[kernel]] void compute_decay_beta(
    device const T* alpha,
    device const T* b,
    device const W* a_log,
    device const W* dt_bias,
    device const bool* mask,
    constant uint& n,
    constant uint& n_heads,
    device float* g,
    device float* beta,
    uint i [[thread_position_in_grid]]) {
  if (i >= n) {
    return;
  }
  uint head = i % n_heads;
  float step = softplus(float(alpha[i]) + float(dt_bias[head]));
  float decay = exp(-exp(float(a_log[head])) * step);
  float gate = sigmoid(float(b[i]));
  bool kept = true;
  if (HAS_MASK) {
    kept = mask[i / n_heads];
  }
  g[i] = kept ? decay : 1.0f;
  beta[i] = kept ? gate : 0.0f;
}

// Reorder rows that are grouped by key head. In qkvz each key head has q, k, the v of its value
// heads and their z; in ba it has their b and a.
//
// qkvz: [N, Hk (2 DK + 2 (Hv / Hk) dv)]; ba: [N, 2 Hv]; qkv: [N, 2 Hk DK + Hv dv], all q, all k,
// all v; z: [N, Hv dv]; b, a: [N, Hv]. Launch: one thread per input value, grid (both widths, N).
// One division of an input's index yields its destination.
template <typename T>
[[kernel]] void part_key_heads(
    device const T* qkvz,
    device const T* ba,
    constant uint& n_key_heads,
    constant uint& per_key,
    constant uint& dk,
    constant uint& dv,
    device T* qkv,
    device T* z,
    device T* b,
    device T* a,
    uint2 position [[thread_position_in_grid]]) {
  uint i = position.x;
  ulong token = position.y;
  uint values = per_key * dv;
  uint step = 2 * dk + 2 * values;
  uint width = n_key_heads * step;
  uint heads = n_key_heads * per_key;
  if (i < width) {
    uint key_head = i / step;
    uint at = i % step;
    T value = qkvz[token * width + i];
    if (at < 2 * dk + values) {
      uint keys = n_key_heads * dk;
      uint to = 2 * keys + key_head * values + at - 2 * dk;
      if (at < 2 * dk) {
        to = (at < dk ? 0 : keys - dk) + key_head * dk + at;
      }
      qkv[token * (2 * keys + heads * dv) + to] = value;
    } else {
      z[token * heads * dv + key_head * values + at - 2 * dk - values] = value;
    }
  } else if (i < width + 2 * heads) {
    uint j = i - width;
    uint at = j % (2 * per_key);
    T value = ba[token * 2 * heads + j];
    ulong first = token * heads + j / (2 * per_key) * per_key;
    if (at < per_key) {
      b[first + at] = value;
    } else {
      a[first + at - per_key] = value;
    }
  }
}

// Causal convolution of each channel over its history and the chunk, then SiLU.
//
// x, out: [B,T,C]; state: [B,W-1,C], the inputs before the chunk; weight: [C,W], the oldest input's
// tap first; mask: [B,T], read if HAS_MASK; a masked token counts as zeros. Launch: one thread per
// channel and RUN tokens, grid (C, T / RUN, B). A thread keeps the last W inputs in registers, so
// each input is read once and not W times.
template <typename T, typename S, typename P, int W, bool HAS_MASK>
[[kernel]] void conv1d_step(
    device const T* x,
    device const S* state,
    device const P* weight,
    device const bool* mask,
    constant uint& n_tokens,
    constant uint& n_channels,
    device T* out,
    uint3 position [[thread_position_in_grid]]) {
  constexpr int RUN = 8;
  uint channel = position.x;
  if (channel >= n_channels) {
    return;
  }
  uint first = position.y * RUN;
  ulong sequence = position.z;
  auto inputs = x + sequence * n_tokens * n_channels + channel;
  auto history = state + sequence * (W - 1) * n_channels + channel;
  auto kept = mask + (HAS_MASK ? sequence * n_tokens : 0);
  device T* row = out + sequence * n_tokens * n_channels + channel;
  float taps[W];
  float window[W];
#pragma unroll
  for (int j = 0; j < W; ++j) {
    taps[j] = float(weight[ulong(channel) * W + j]);
  }
  // window[j] is the input W - 1 - j tokens before the current one; the loop below shifts it.
#pragma unroll
  for (int j = 1; j < W; ++j) {
    int token = int(first) + j - W;
    if (token < 0) {
      window[j] = float(history[ulong(token + W - 1) * n_channels]);
    } else {
      bool counts = true;
      if (HAS_MASK) {
        counts = kept[token];
      }
      window[j] = counts ? float(inputs[ulong(token) * n_channels]) : 0.0f;
    }
  }
  uint last = min(first + uint(RUN), n_tokens);
  for (uint token = first; token < last; ++token) {
    bool counts = true;
    if (HAS_MASK) {
      counts = kept[token];
    }
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < W - 1; ++j) {
      window[j] = window[j + 1];
      sum = fma(window[j], taps[j], sum);
    }
    window[W - 1] = counts ? float(inputs[ulong(token) * n_channels]) : 0.0f;
    sum = fma(window[W - 1], taps[W - 1], sum);
    row[ulong(token) * n_channels] = T(silu(sum));
  }
}

// The last W - 1 inputs, which are the history of the next chunk.
//
// x: [B,T,C]; state, out: [B,W-1,C]; mask: [B,T], read if HAS_MASK; lengths: [B], read if
// HAS_LENGTHS, the number of tokens of this chunk that a sequence has, at most T. Launch: one
// thread per value, grid (C, W - 1, B). It is separate from the convolution, whose threads still
// read the old state.
template <typename T, typename S, bool HAS_MASK, bool HAS_LENGTHS>
[[kernel]] void conv1d_state_update(
    device const T* x,
    device const S* state,
    device const bool* mask,
    device const int* lengths,
    constant uint& n_tokens,
    constant uint& n_channels,
    constant uint& n_history,
    device S* out,
    uint3 position [[thread_position_in_grid]]) {
  if (position.x >= n_channels) {
    return;
  }
  ulong sequence = position.z;
  uint end = n_tokens;
  if (HAS_LENGTHS) {
    end = uint(clamp(lengths[sequence], 0, int(n_tokens)));
  }
  uint at = end + position.y;
  ulong to = (sequence * n_history + position.y) * n_channels + position.x;
  if (at < n_history) {
    out[to] = state[(sequence * n_history + at) * n_channels + position.x];
    return;
  }
  ulong token = sequence * n_tokens + (at - n_history);
  bool counts = true;
  if (HAS_MASK) {
    counts = mask[token];
  }
  out[to] = S(counts ? float(x[token * n_channels + position.x]) : 0.0f);
}

// Load a lane's share of rows `row` to row + ROWS - 1 of a head's state [dv, 32 PER]. Rows past the
// end read the last row.
template <int ROWS, int PER, typename S>
inline void read_rows(thread float* s, S state, uint row, uint dv, uint lane) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    read_share<PER>(s + r * PER, state + ulong(min(row + r, dv - 1)) * (PER * SIMD), lane);
  }
}

// Store such rows, except those past the end.
template <int ROWS, int PER>
inline void write_rows(device float* state, thread const float* s, uint row, uint dv, uint lane) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    if (row + r < dv) {
      write_share<PER>(state + ulong(row + r) * (PER * SIMD), s + r * PER, lane);
    }
  }
}

// One token's update of ROWS rows of the state: s = g s; s = s + beta (v - s k) k^T; v = s q.
template <int ROWS, int PER>
inline void delta_step(
    thread float* s,
    thread float* v,
    thread const float* q,
    thread const float* k,
    float decay,
    float rate) {
  float sums[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    sums[r] = 0.0f;
#pragma unroll
    for (int j = 0; j < PER; ++j) {
      s[r * PER + j] *= decay;
      sums[r] = fma(s[r * PER + j], k[j], sums[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    float change = rate * (v[r] - simd_sum(sums[r]));
    sums[r] = 0.0f;
#pragma unroll
    for (int j = 0; j < PER; ++j) {
      s[r * PER + j] = fma(change, k[j], s[r * PER + j]);
      sums[r] = fma(s[r * PER + j], q[j], sums[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    v[r] = simd_sum(sums[r]);
  }
}

// The delta rule over n_tokens tokens for ROWS rows of one head's state, by one simdgroup:
// S = g S; S = S + beta (v - S k) k^T; y = S q.
// A lane holds DK / 32 columns of each row in registers from the first token to the last.
template <typename T, int DK, int ROWS, typename Q, typename S, typename G, typename B>
inline void delta_rows(
    Q qkv,
    S state,
    G g,
    B beta,
    device float* state_out,
    device T* out,
    uint n_tokens,
    uint n_key_heads,
    uint n_heads,
    uint dv,
    uint3 where,
    uint lane) {
  constexpr int PER = DK / SIMD;
  uint row = where.y * ROWS;
  if (row >= dv) {
    return;
  }
  uint head = where.z % n_heads;
  ulong sequence = where.z / n_heads;
  uint key_head = head / (n_heads / n_key_heads);
  uint width = 2 * n_key_heads * DK + n_heads * dv;
  ulong first = ulong(where.z) * dv * DK;
  float s[ROWS * PER];
  read_rows<ROWS, PER>(s, state + first, row, dv, lane);
  for (uint t = 0; t < n_tokens; ++t) {
    ulong token = sequence * n_tokens + t;
    auto from = qkv + token * width;
    float q[PER];
    float k[PER];
    float v[ROWS];
    read_share<PER>(q, from + key_head * DK, lane);
    read_share<PER>(k, from + (n_key_heads + key_head) * DK, lane);
    auto values = from + 2 * n_key_heads * DK + head * dv;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      v[r] = float(values[min(row + r, dv - 1)]);
    }
    float decay = g[token * n_heads + head];
    float rate = beta[token * n_heads + head];
    delta_step<ROWS, PER>(s, v, q, k, decay, rate);
    device T* y = out + (token * n_heads + head) * dv + row;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (lane == uint(r) && row + r < dv) {
        y[r] = T(v[r]);
      }
    }
  }
  write_rows<ROWS, PER>(state_out + first, s, row, dv, lane);
}

// Convolve one channel's history and the new input x, and apply SiLU.
template <int W, typename S, typename P>
inline float convolved(float x, S history, P taps, uint channel, uint n_channels) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < W - 1; ++j) {
    sum = fma(float(history[ulong(j) * n_channels + channel]), float(taps[j]), sum);
  }
  return silu(fma(x, float(taps[W - 1]), sum));
}

// A whole gated DeltaNet between its projections, for one token of each sequence: convolution and
// history, unit-length q and k, decay and beta, the delta rule, and the gated norm.
//
// rows: [B, row_width]. A row holds, for key head i, q and k [DK] at q_at and k_at + i key_step;
// for its value heads v and z [dv each] at v_at and z_at + i value_step; and their b and alpha [1
// each] at b_at and a_at + i gate_step. history, history_out: [B,W-1,C], all q, all k, all v, where
// C = 2 Hk DK + Hv dv; taps: [C,W]; a_log, dt_bias: [Hv]; state, state_out: float32 [B,Hv,dv,DK];
// norm: [dv]; out: [B, Hv dv]. dv <= 256. Launch: one threadgroup of SIMDGROUPS (8 or more) per
// value head, grid (32 SIMDGROUPS, Hv, B); a simdgroup takes ROWS rows of the state at a time, as
// many as registers allow. One launch replaces five Ops, because a head depends on no other head.
// Only q and k are shared, and the value heads of one key head each compute them again.
template <
    typename T,
    typename S,
    typename P,
    typename V,
    typename N,
    int DK,
    int W,
    int ROWS,
    int SIMDGROUPS>
[[kernel]] void gated_delta_decode(
    device const T* rows,
    device const S* history,
    device const P* taps,
    device const V* a_log,
    device const V* dt_bias,
    device const float* state,
    device const N* norm,
    constant uint& row_width,
    constant uint& q_at,
    constant uint& k_at,
    constant uint& v_at,
    constant uint& z_at,
    constant uint& b_at,
    constant uint& a_at,
    constant uint& key_step,
    constant uint& value_step,
    constant uint& gate_step,
    constant float& eps,
    constant float& qk_eps,
    constant uint& n_key_heads,
    constant uint& n_heads,
    constant uint& dv,
    device S* history_out,
    device float* state_out,
    device T* out,
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  constexpr int PER = DK / SIMD;
  constexpr uint MAX_DV = 256;
  threadgroup float channels[2 * DK + MAX_DV];
  threadgroup float read[MAX_DV];
  uint head = group.y;
  ulong sequence = group.z;
  uint per_key = n_heads / n_key_heads;
  uint key_head = head / per_key;
  uint n_channels = 2 * n_key_heads * DK + n_heads * dv;
  uint values_at = key_head * value_step + head % per_key * dv;
  uint gate_at = key_head * gate_step + head % per_key;
  auto projected = rows + sequence * row_width;
  auto before = history + sequence * (W - 1) * n_channels;
  device S* after = history_out + sequence * (W - 1) * n_channels;
  ulong first = (sequence * n_heads + head) * dv * DK;
  uint row = simdgroup * ROWS;
  // The state is most of the input, so its loads start before anything waits.
  float s[ROWS * PER];
  read_rows<ROWS, PER>(s, state + first, row, dv, lane);
  for (uint i = thread_index; i < 2 * DK + dv; i += SIMDGROUPS * SIMD) {
    bool is_key = i < 2 * DK;
    uint at = is_key ? (i / DK * n_key_heads + key_head) * DK + i % DK
                     : 2 * n_key_heads * DK + head * dv + i - 2 * DK;
    uint from = is_key ? (i < DK ? q_at : k_at) + key_head * key_step + i % DK
                       : v_at + values_at + i - 2 * DK;
    float x = float(projected[from]);
    channels[i] = convolved<W>(x, before, taps + ulong(at) * W, at, n_channels);
    // Value heads of one key head share its channels; the first of them updates their history.
    if (!is_key || head % per_key == 0) {
#pragma unroll
      for (int j = 0; j < W - 2; ++j) {
        after[ulong(j) * n_channels + at] = before[ulong(j + 1) * n_channels + at];
      }
      after[ulong(W - 2) * n_channels + at] = S(x);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float q[PER];
  float k[PER];
  float q_squares = 0.0f;
  float k_squares = 0.0f;
#pragma unroll
  for (int j = 0; j < PER; ++j) {
    q[j] = channels[lane * PER + j];
    k[j] = channels[DK + lane * PER + j];
    q_squares = fma(q[j], q[j], q_squares);
    k_squares = fma(k[j], k[j], k_squares);
  }
  float q_scale = rsqrt(simd_sum(q_squares) + qk_eps) * rsqrt(float(DK));
  float k_scale = rsqrt(simd_sum(k_squares) + qk_eps);
#pragma unroll
  for (int j = 0; j < PER; ++j) {
    q[j] *= q_scale;
    k[j] *= k_scale;
  }
  float step = softplus(float(projected[a_at + gate_at]) + float(dt_bias[head]));
  float decay = exp(-exp(float(a_log[head])) * step);
  float rate = sigmoid(float(projected[b_at + gate_at]));
  while (row < dv) {
    float v[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      v[r] = channels[2 * DK + min(row + r, dv - 1)];
    }
    delta_step<ROWS, PER>(s, v, q, k, decay, rate);
    write_rows<ROWS, PER>(state_out + first, s, row, dv, lane);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (lane == uint(r) && row + r < dv) {
        read[row + r] = v[r];
      }
    }
    row += SIMDGROUPS * ROWS;
    if (row < dv) {
      read_rows<ROWS, PER>(s, state + first, row, dv, lane);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float squares = 0.0f;
  for (uint i = lane; i < dv; i += SIMD) {
    squares = fma(read[i], read[i], squares);
  }
  float scale = rsqrt(simd_sum(squares) / float(dv) + eps);
  if (thread_index < dv) {
    uint at = head * dv + thread_index;
    float normed = scale * read[thread_index] * float(norm[thread_index]);
    float gate = silu(float(projected[z_at + values_at + thread_index]));
    out[sequence * n_heads * dv + at] = T(normed * gate);
  }
}

// The delta rule for one token of each sequence.
//
// qkv: [B, 2 Hk dk + Hv dv], q, k, v in each row; state, state_out: float32 [B,Hv,dv,dk]; g, beta:
// float32 [B,Hv]; out: [B, Hv dv]. Key head = value head / (Hv / Hk). Launch: one simdgroup per
// four rows of the state, four simdgroups per threadgroup, grid (32, dv / 4, B Hv). The state
// dominates the memory traffic: each value is read and written once, 16 bytes at a time, and loaded
// q and k serve four rows.
template <typename T, int DK>
[[kernel]] void gated_delta_net_step(
    device const T* qkv,
    device const float* state,
    device const float* g,
    device const float* beta,
    constant uint& n_key_heads,
    constant uint& n_heads,
    constant uint& dv,
    device float* state_out,
    device T* out,
    uint3 where [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  delta_rows<T, DK, 4>(
      qkv, state, g, beta, state_out, out, 1u, n_key_heads, n_heads, dv, where, lane);
}

// The delta rule for T tokens of each sequence, token by token.
//
// Arguments and launch: see `gated_delta_net_step`, with N = B T rows of qkv, g, beta and out. The
// state stays in registers between tokens, and there are no barriers.
template <typename T, int DK>
[[kernel]] void gated_delta_net_sequential(
    device const T* qkv,
    device const float* state,
    device const float* g,
    device const float* beta,
    constant uint& n_tokens,
    constant uint& n_key_heads,
    constant uint& n_heads,
    constant uint& dv,
    device float* state_out,
    device T* out,
    uint3 where [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  delta_rows<T, DK, 4>(
      qkv, state, g, beta, state_out, out, n_tokens, n_key_heads, n_heads, dv, where, lane);
}

// The delta rule for T tokens of each sequence in chunks of 16, by matrix products.
//
// Arguments: see `gated_delta_net_sequential`. For tokens i and j of a chunk, let gap(i, j) be the
// sum of log g over tokens j + 1 to i, and total(i) the sum over tokens up to i. The corrections D
// solve (I + tril(beta_i exp(gap) K K^T, -1)) D = beta (V - exp(total) K S^T). Then
// Y = exp(total) Q S^T + tril(exp(gap) Q K^T) D and S = exp(total(15)) S + (exp(gap(15, j)) D)^T K.
// Launch: 4 simdgroups of 8 value columns each, grid (128, dv / 32, B Hv). A simdgroup keeps its
// columns of S^T in matrix registers through all chunks. Gaps are summed directly: with strong
// decay the difference of two totals would lose all digits. DK <= 192, which takes 31 KiB of
// threadgroup memory.
template <typename T, int DK>
[[kernel]] void gated_delta_net_chunkwise(
    device const T* qkv,
    device const float* state,
    device const float* g,
    device const float* beta,
    constant uint& n_tokens,
    constant uint& n_key_heads,
    constant uint& n_heads,
    constant uint& dv,
    device float* state_out,
    device T* out,
    uint3 where [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  constexpr int CHUNK = 16;
  constexpr int BLOCKS = DK / 8;
  constexpr int THREADS = 128;
  constexpr int TILE = 32;
  // Four extra columns put eight adjacent rows into different banks.
  constexpr int PITCH = DK + 4;
  // Rows of k, then of q. Before the first and after the last chunk, rows of the state.
  threadgroup float keys[TILE * PITCH];
  threadgroup float coupling[CHUNK * CHUNK];
  threadgroup float mixing[CHUNK * CHUNK];
  threadgroup float fixes[4 * CHUNK * 8];
  threadgroup float reads[4 * CHUNK * 8];
  threadgroup float log_g[CHUNK];
  threadgroup float rates[CHUNK];
  threadgroup float totals[CHUNK];
  threadgroup float tails[CHUNK];
  threadgroup float* queries = keys + CHUNK * PITCH;
  threadgroup float* fix = fixes + simdgroup * CHUNK * 8;
  threadgroup float* read = reads + simdgroup * CHUNK * 8;

  uint head = where.z % n_heads;
  ulong sequence = where.z / n_heads;
  uint key_head = head / (n_heads / n_key_heads);
  uint width = 2 * n_key_heads * DK + n_heads * dv;
  uint first_row = where.y * TILE;
  ulong state_at = (ulong(where.z) * dv + first_row) * DK;
  uint n_rows = min(uint(TILE), dv - first_row);
  uint column = first_row + simdgroup * 8 + lane % 8;

  for (uint i = thread_index; i < TILE * DK; i += THREADS) {
    keys[i / DK * PITCH + i % DK] = i < n_rows * DK ? state[state_at + i] : 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_float8x8 s[BLOCKS];
#pragma unroll
  for (int j = 0; j < BLOCKS; ++j) {
    simdgroup_load(s[j], keys + simdgroup * 8 * PITCH + 8 * j, PITCH, 0, true);
  }

  for (uint start = 0; start < n_tokens; start += CHUNK) {
    // All simdgroups must have read the state, or the previous chunk, from `keys`.
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint n_here = min(uint(CHUNK), n_tokens - start);
    // Missing tokens are zeros with decay 1 and beta 0, which change neither state nor sums.
    ulong token = sequence * n_tokens + start;
#pragma unroll
    for (uint n = 0; n < CHUNK * DK; n += THREADS) {
      uint i = n + thread_index;
      uint to = i / DK * PITCH + i % DK;
      bool there = i / DK < n_here;
      auto row = qkv + (token + (there ? i / DK : 0)) * width + key_head * DK + i % DK;
      queries[to] = there ? float(row[0]) : 0.0f;
      keys[to] = there ? float(row[n_key_heads * DK]) : 0.0f;
    }
    float values[CHUNK / 4];
#pragma unroll
    for (uint r = 0; r < CHUNK / 4; ++r) {
      uint i = 4 * r + lane / 8;
      bool there = i < n_here && column < dv;
      ulong from = (token + (there ? i : 0)) * width + 2 * n_key_heads * DK;
      values[r] = there ? float(qkv[from + head * dv + column]) : 0.0f;
    }
    if (thread_index < CHUNK) {
      bool there = thread_index < n_here;
      ulong at = (token + (there ? thread_index : 0)) * n_heads + head;
      // Fast mathematics assumes finite numbers: a decay that underflowed must not give -inf.
      log_g[thread_index] = there ? log(fmax(g[at], FLT_MIN)) : 0.0f;
      rates[thread_index] = there ? beta[at] : 0.0f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // A simdgroup computes one 8x8 block each of K K^T and Q K^T, and its columns of K S^T and Q
    // S^T.
    {
      uint block_row = simdgroup / 2;
      uint block_column = simdgroup % 2;
      simdgroup_float8x8 kk = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      simdgroup_float8x8 qk = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      simdgroup_float8x8 ks[2];
      simdgroup_float8x8 qs[2];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        ks[m] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        qs[m] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      }
#pragma unroll
      for (int j = 0; j < BLOCKS; ++j) {
        simdgroup_float8x8 left;
        simdgroup_float8x8 right;
        simdgroup_load(right, keys + block_column * 8 * PITCH + 8 * j, PITCH, 0, true);
        simdgroup_load(left, keys + block_row * 8 * PITCH + 8 * j, PITCH);
        simdgroup_multiply_accumulate(kk, left, right, kk);
        simdgroup_load(left, queries + block_row * 8 * PITCH + 8 * j, PITCH);
        simdgroup_multiply_accumulate(qk, left, right, qk);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          simdgroup_load(left, keys + m * 8 * PITCH + 8 * j, PITCH);
          simdgroup_multiply_accumulate(ks[m], left, s[j], ks[m]);
          simdgroup_load(left, queries + m * 8 * PITCH + 8 * j, PITCH);
          simdgroup_multiply_accumulate(qs[m], left, s[j], qs[m]);
        }
      }
      simdgroup_store(kk, coupling + block_row * 8 * CHUNK + block_column * 8, CHUNK);
      simdgroup_store(qk, mixing + block_row * 8 * CHUNK + block_column * 8, CHUNK);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        simdgroup_store(ks[m], fix + 64 * m, 8);
        simdgroup_store(qs[m], read + 64 * m, 8);
      }
    }
    if (thread_index < CHUNK) {
      float total = 0.0f;
      float tail = 0.0f;
      for (uint m = 0; m < CHUNK; ++m) {
        total += m <= thread_index ? log_g[m] : 0.0f;
        tail += m > thread_index ? log_g[m] : 0.0f;
      }
      totals[thread_index] = exp(total);
      tails[thread_index] = exp(tail);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    for (uint pair = thread_index; pair < CHUNK * CHUNK; pair += THREADS) {
      uint i = pair / CHUNK;
      uint j = pair % CHUNK;
      float gap = 0.0f;
#pragma unroll
      for (uint m = 1; m < CHUNK; ++m) {
        gap += m > j && m <= i ? log_g[m] : 0.0f;
      }
      float decay = j <= i ? exp(gap) : 0.0f;
      coupling[pair] = j < i ? rates[i] * decay * coupling[pair] : 0.0f;
      mixing[pair] = decay * mixing[pair];
    }
    // A lane holds every fourth token of one value column.
    float corrected[CHUNK / 4];
#pragma unroll
    for (uint r = 0; r < CHUNK / 4; ++r) {
      uint i = 4 * r + lane / 8;
      corrected[r] = rates[i] * (values[r] - totals[i] * fix[SIMD * r + lane]);
      read[SIMD * r + lane] *= totals[i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // Forward substitution: subtract each finished token from the tokens after it.
#pragma unroll
    for (uint j = 0; j < CHUNK; ++j) {
      float done = simd_shuffle(corrected[j / 4], j % 4 * 8 + lane % 8);
#pragma unroll
      for (uint r = j / 4; r < CHUNK / 4; ++r) {
        corrected[r] = fma(-coupling[CHUNK * (4 * r + lane / 8) + j], done, corrected[r]);
      }
    }
#pragma unroll
    for (uint r = 0; r < CHUNK / 4; ++r) {
      fix[SIMD * r + lane] = corrected[r];
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      simdgroup_float8x8 y;
      simdgroup_load(y, read + 64 * m, 8);
#pragma unroll
      for (int j = 0; j <= m; ++j) {
        simdgroup_float8x8 left;
        simdgroup_float8x8 right;
        simdgroup_load(left, mixing + m * 8 * CHUNK + 8 * j, CHUNK);
        simdgroup_load(right, fix + 64 * j, 8);
        simdgroup_multiply_accumulate(y, left, right, y);
      }
      simdgroup_store(y, read + 64 * m, 8);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (uint r = 0; r < CHUNK / 4; ++r) {
      uint i = 4 * r + lane / 8;
      if (i < n_here && column < dv) {
        out[((token + i) * n_heads + head) * dv + column] = T(read[SIMD * r + lane]);
      }
      fix[SIMD * r + lane] = tails[i] * corrected[r];
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_float8x8 corrections[2];
    simdgroup_load(corrections[0], fix, 8);
    simdgroup_load(corrections[1], fix + 64, 8);
    float end = totals[CHUNK - 1];
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
      s[j].thread_elements()[0] *= end;
      s[j].thread_elements()[1] *= end;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        simdgroup_float8x8 left;
        simdgroup_load(left, keys + m * 8 * PITCH + 8 * j, PITCH, 0, true);
        simdgroup_multiply_accumulate(s[j], left, corrections[m], s[j]);
      }
    }
  }

  threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
  for (int j = 0; j < BLOCKS; ++j) {
    simdgroup_store(s[j], keys + simdgroup * 8 * PITCH + 8 * j, PITCH, 0, true);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = thread_index; i < n_rows * DK; i += THREADS) {
    state_out[state_at + i] = keys[i / DK * PITCH + i % DK];
  }
}
