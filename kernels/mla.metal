// Multi-head latent attention: projections per head, rotary positions, cache, attention.
#include "moeflux.h"

// Copy a row with the lanes of a simdgroup, four columns per lane.
template <typename P, typename T>
inline void copy_row(P from, device T* to, uint n, uint lane) {
  for (uint i = 4 * lane; i < n; i += 4 * SIMD) {
    write_columns(to, i, n, read_columns(from, i, n));
  }
}

// Separate every head's query into nope and rope columns, and a token's key-value row into latent
// and rope key.
//
// q: [T,H*(N+R)], nope then rope in each head; kv: [T,L+R]; q_nope: [T,H*N]; q_pe: [T,H*R]; latent:
// [T,L]; k_pe: [T,R]. Launch: one simdgroup per head and one more for the key-value row of a token,
// four per threadgroup. The widths are no multiples of each other, so one simdgroup per row wastes
// fewer threads than a rectangular grid of columns.
template <typename T>
[[kernel]] void mla_split_q_kv(
    device const T* q,
    device const T* kv,
    constant uint& n_tokens,
    constant uint& n_heads,
    constant uint& nope_dim,
    constant uint& rope_dim,
    constant uint& latent_dim,
    device T* q_nope,
    device T* q_pe,
    device T* latent,
    device T* k_pe,
    uint2 at [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  uint slice = at.x / SIMD;
  ulong token = at.y;
  if (slice < n_heads) {
    ulong head = token * n_heads + slice;
    auto row = q + head * (nope_dim + rope_dim);
    copy_row(row, q_nope + head * nope_dim, nope_dim, lane);
    copy_row(row + nope_dim, q_pe + head * rope_dim, rope_dim, lane);
  } else if (slice == n_heads) {
    auto row = kv + token * (latent_dim + rope_dim);
    copy_row(row, latent + token * latent_dim, latent_dim, lane);
    copy_row(row + latent_dim, k_pe + token * rope_dim, rope_dim, lane);
  }
}

// Number of heads per thread; they share the sines and cosines of the angles.
constexpr constant uint HEADS_PER_THREAD = 4;

// Scale every head by mscale and rotate its neighbouring pairs.
//
// x, out: [B*T,H*R]; inv_freq: [R/2] float32, the angle of a pair per position, with YaRN's ramp
// and factor included; start: [B], token t of sequence b has position start[b] + t. R is even.
// Launch: one thread per two pairs of four heads, one plane of the grid per token. The angles of
// long contexts need the precise sine and cosine, which cost more than all else, so heads share
// them. Only four do, because one token must still occupy the GPU.
template <typename T>
[[kernel]] void yarn_rope_apply(
    device const T* x,
    device const float* inv_freq,
    device const int* start,
    constant uint& n_new,
    constant float& mscale,
    constant uint& n_heads,
    constant uint& rope_dim,
    device T* out,
    uint3 at [[thread_position_in_grid]]) {
  uint i = 4 * at.x;
  uint first = HEADS_PER_THREAD * at.y;
  if (i >= rope_dim || first >= n_heads) {
    return;
  }
  float position = float(start[at.z / n_new] + int(at.z % n_new));
  float2 angle = position * float2(inv_freq[i / 2], inv_freq[min(i / 2 + 1, rope_dim / 2 - 1)]);
  float2 c = mscale * precise::cos(angle);
  float2 s = mscale * precise::sin(angle);
  uint last = min(first + HEADS_PER_THREAD, n_heads);
  for (uint head = first; head < last; ++head) {
    ulong row = (ulong(at.z) * n_heads + head) * rope_dim;
    float4 v = read_columns(x + row, i, rope_dim);
    float2 even = v.xz * c - v.yw * s;
    float2 odd = v.xz * s + v.yw * c;
    write_columns(out + row, i, rope_dim, float4(even.x, odd.x, even.y, odd.y));
  }
}

// Scale n columns of a row by mscale and rotate their neighbouring pairs, with the lanes of a
// simdgroup.
template <typename P, typename F, typename T>
inline void rotate_row(
    P from,
    device T* to,
    F inv_freq,
    float position,
    float mscale,
    uint n,
    uint lane) {
  for (uint i = 4 * lane; i < n; i += 4 * SIMD) {
    float2 angle = position * float2(inv_freq[i / 2], inv_freq[min(i / 2 + 1, n / 2 - 1)]);
    float2 c = mscale * precise::cos(angle);
    float2 s = mscale * precise::sin(angle);
    float4 v = read_columns(from, i, n);
    float2 even = v.xz * c - v.yw * s;
    float2 odd = v.xz * s + v.yw * c;
    write_columns(to, i, n, float4(even.x, odd.x, even.y, odd.y));
  }
}

// Norm a token's latents, and rotate its rope key, with the lanes of a simdgroup.
template <typename T, typename P, typename N, typename F>
inline void place_latents(
    P row,
    N weight,
    F inv_freq,
    float position,
    float eps,
    float mscale,
    uint latent_dim,
    uint rope_dim,
    device T* latent,
    device T* k_pe,
    uint lane) {
  float squares = 0.0f;
  for (uint i = 4 * lane; i < latent_dim; i += 4 * SIMD) {
    float4 values = read_columns(row, i, latent_dim);
    squares += dot(values, values);
  }
  float scale = rsqrt(simd_sum(squares) / float(latent_dim) + eps);
  for (uint i = 4 * lane; i < latent_dim; i += 4 * SIMD) {
    float4 values = scale * read_columns(row, i, latent_dim);
    values *= read_columns(weight, i, latent_dim);
    write_columns(latent, i, latent_dim, values);
  }
  rotate_row(row + latent_dim, k_pe, inv_freq, position, mscale, rope_dim, lane);
}

// `mla_split_q_kv`, the norm of the latent row, and the rotation of all rope columns, for one token
// of each sequence.
//
// q: [B,H*(N+R)]; kv: [B,L+R], from kv_at on; weight: [L]; inv_freq: [R/2] float32; start: [B], the
// position of each token; q_nope: [B,H*N]; q_pe: [B,H*R]; latent: [B,L]; k_pe: [B,R]. For B = 1 both
// q and kv may be parts of a longer row. Launch: one simdgroup per
// head and one more for the key-value row of a token, four per threadgroup. Each head computes its
// own sines and cosines: for one token that takes less time than another launch.
template <typename T, typename W>
[[kernel]] void mla_inputs(
    device const T* q,
    device const T* kv,
    device const W* weight,
    device const float* inv_freq,
    device const int* start,
    constant float& eps,
    constant float& mscale,
    constant uint& kv_at,
    constant uint& n_heads,
    constant uint& nope_dim,
    constant uint& rope_dim,
    constant uint& latent_dim,
    device T* q_nope,
    device T* q_pe,
    device T* latent,
    device T* k_pe,
    uint2 at [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  uint slice = at.x / SIMD;
  ulong token = at.y;
  float position = float(start[token]);
  if (slice < n_heads) {
    ulong head = token * n_heads + slice;
    auto row = q + head * (nope_dim + rope_dim);
    copy_row(row, q_nope + head * nope_dim, nope_dim, lane);
    rotate_row(row + nope_dim, q_pe + head * rope_dim, inv_freq, position, mscale, rope_dim, lane);
  } else if (slice == n_heads) {
    place_latents<T>(
        kv + kv_at + token * (latent_dim + rope_dim), weight, inv_freq, position, eps, mscale,
        latent_dim, rope_dim, latent + token * latent_dim, k_pe + token * rope_dim, lane);
  }
}

// `mla_inputs` of one token, then `mla_kv_cache_append` with its latents and rope key.
//
// latent_cache, latent_out: [S,L]; rope_cache, rope_out: [S,R]; place: [1], the row of the caches,
// which is dropped outside of them. Other arguments: see `mla_inputs`. Launch: one simdgroup per
// head, one for the key-value row, and one per cache row, four per threadgroup.
template <typename T, typename W>
[[kernel]] void mla_inputs_append(
    device const T* q,
    device const T* kv,
    device const W* weight,
    device const float* inv_freq,
    device const int* start,
    device const T* latent_cache,
    device const T* rope_cache,
    device const int* place,
    constant float& eps,
    constant float& mscale,
    constant uint& kv_at,
    constant uint& n_heads,
    constant uint& nope_dim,
    constant uint& rope_dim,
    constant uint& latent_dim,
    constant uint& n_rows,
    device T* q_nope,
    device T* q_pe,
    device T* latent_out,
    device T* rope_out,
    uint i [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  uint slice = i / SIMD;
  bool inside = place[0] >= 0 && place[0] < int(n_rows);
  uint at = inside ? uint(place[0]) : 0u;
  // The simdgroup of the key-value row writes a row of the caches, and the others copy the rest.
  uint own = slice > n_heads ? slice - n_heads - 1 : at;
  auto to_latent = latent_out + ulong(own) * latent_dim;
  auto to_rope = rope_out + ulong(own) * rope_dim;
  if (slice < n_heads) {
    auto row = q + ulong(slice) * (nope_dim + rope_dim);
    copy_row(row, q_nope + ulong(slice) * nope_dim, nope_dim, lane);
    rotate_row(
        row + nope_dim, q_pe + ulong(slice) * rope_dim, inv_freq, float(start[0]), mscale, rope_dim,
        lane);
  } else if (slice == n_heads) {
    if (inside) {
      place_latents<T>(
          kv + kv_at, weight, inv_freq, float(start[0]), eps, mscale, latent_dim, rope_dim,
          to_latent, to_rope, lane);
    }
  } else if (own < n_rows && !(inside && own == at)) {
    copy_row(latent_cache + ulong(own) * latent_dim, to_latent, latent_dim, lane);
    copy_row(rope_cache + ulong(own) * rope_dim, to_rope, rope_dim, lane);
  }
}

// Copy both caches, replacing rows start to start + T - 1 by new ones.
//
// latent_cache, latent_out: [S,L]; rope_cache, rope_out: [S,R]; latent: [T,L]; k_pe: [T,R]. Launch:
// one simdgroup per cache row, four per threadgroup. An MLX array is a value, so every row is
// written. A model's cache object writes in place instead.
template <typename T>
[[kernel]] void mla_kv_cache_append(
    device const T* latent_cache,
    device const T* rope_cache,
    device const T* latent,
    device const T* k_pe,
    constant int& start,
    constant uint& n_rows,
    constant uint& n_new,
    constant uint& latent_dim,
    constant uint& rope_dim,
    device T* latent_out,
    device T* rope_out,
    uint i [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  uint row = i / SIMD;
  if (row >= n_rows) {
    return;
  }
  auto to_latent = latent_out + ulong(row) * latent_dim;
  auto to_rope = rope_out + ulong(row) * rope_dim;
  int token = int(row) - start;
  if (token >= 0 && token < int(n_new)) {
    copy_row(latent + ulong(token) * latent_dim, to_latent, latent_dim, lane);
    copy_row(k_pe + ulong(token) * rope_dim, to_rope, rope_dim, lane);
  } else {
    copy_row(latent_cache + ulong(row) * latent_dim, to_latent, latent_dim, lane);
    copy_row(rope_cache + ulong(row) * rope_dim, to_rope, rope_dim, lane);
  }
}

// Load four packed words. A row has a multiple of four, so in `device` memory they are aligned.
template <typename P>
inline uint4 read_words(P p) {
  return uint4(p[0], p[1], p[2], p[3]);
}
inline uint4 read_words(device const uint* p) {
  return *(device const uint4*)p;
}

// The four 4-bit values of half a word, each times the power of 16 of its place. Masking in place
// takes one operation, a shift and a mask take two, and both are exact in float32. The caller
// divides the other factors by that power once.
inline float4 packed_values(ushort half_word) {
  return float4(ushort4(half_word) & ushort4(0x000f, 0x00f0, 0x0f00, 0xf000));
}

// Number of weight rows that a lane holds at once, and so of loads in flight.
constexpr constant int ROWS = 4;

// Multiply one head's matrix by that head's slice of every token.
//
// x: [T,H*I]; w: [H,O,I/8]; scales, biases: [H,O,I/G]; out: [T,H*O]. I <= 1024, a multiple of 32. A
// lane takes 32 columns, so LANES (I / 32 rounded up to a power of two) take a row, and a simdgroup
// takes ROWS * 32 / LANES rows. A row of one head is so short that a whole simdgroup per row would
// leave most lanes idle. Weights stay in registers for all tokens.
template <int LANES, typename T, typename X, typename W, typename S, typename B>
inline void multiply_per_head(
    X x,
    W w,
    S scales,
    B biases,
    uint n_tokens,
    uint n_heads,
    uint n_out,
    uint n_in,
    uint n_groups,
    device T* out,
    uint simdgroup,
    uint head,
    uint lane) {
  constexpr uint TOGETHER = 32 / LANES;
  uint first = simdgroup * ROWS * TOGETHER;
  if (first >= n_out) {
    return;
  }
  first += lane / LANES;
  uint within = lane % LANES;
  uint n_chunks = n_in / 32;
  bool has_columns = within < n_chunks;
  uint chunk = has_columns ? within : 0;
  uint group = chunk / (n_chunks / n_groups);
  uint4 words[ROWS];
  float scale[ROWS];
  float bias[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    ulong row = ulong(head) * n_out + min(first + r * TOGETHER, n_out - 1);
    words[r] = read_words(w + row * (n_in / 8) + 4 * chunk);
    scale[r] = has_columns ? float(scales[row * n_groups + group]) : 0.0f;
    bias[r] = has_columns ? float(biases[row * n_groups + group]) : 0.0f;
  }
  const float4 divisors = float4(1.0f, 1.0f / 16.0f, 1.0f / 256.0f, 1.0f / 4096.0f);
  for (uint token = 0; token < n_tokens; ++token) {
    ulong slice = ulong(token) * n_heads + head;
    auto columns = x + slice * n_in + 32 * chunk;
    float4 partners[8];
    float4 totals = float4(0.0f);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float4 values = read4(columns + 4 * i);
      totals += values;
      partners[i] = values * divisors;
    }
    float total = (totals.x + totals.y) + (totals.z + totals.w);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float4 sums = float4(0.0f);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ushort2 halves = as_type<ushort2>(words[r][i]);
        sums = fma(packed_values(halves.x), partners[2 * i], sums);
        sums = fma(packed_values(halves.y), partners[2 * i + 1], sums);
      }
      float sum = (sums.x + sums.y) + (sums.z + sums.w);
      sum = fma(scale[r], sum, bias[r] * total);
#pragma unroll
      for (ushort distance = LANES / 2; distance > 0; distance /= 2) {
        sum += simd_shuffle_xor(sum, distance);
      }
      uint row = first + r * TOGETHER;
      if (within == uint(r % LANES) && row < n_out) {
        out[slice * n_out + row] = T(sum);
      }
    }
  }
}

// Queries in the latent space: q_prime = W_uk * q_nope for every head.
//
// q_nope: [T,H*N]; w: [H,L,N/8]; scales, biases: [H,L,N/G]; q_prime: [T,H*L]. N <= 1024, a multiple
// of 32 and of G. Launch: one row of the grid per head, four simdgroups per threadgroup; for LANES
// and rows see `multiply_per_head`. With such queries the cached latents serve as keys of all
// heads.
template <typename T, typename S, int LANES>
[[kernel]] void mla_q_prime_4bit(
    device const T* q_nope,
    device const uint* w,
    device const S* scales,
    device const S* biases,
    constant uint& n_tokens,
    constant uint& n_heads,
    constant uint& latent_dim,
    constant uint& nope_dim,
    constant uint& n_groups,
    device T* q_prime,
    uint2 at [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  multiply_per_head<LANES, T>(
      q_nope, w, scales, biases, n_tokens, n_heads, latent_dim, nope_dim, n_groups, q_prime,
      at.x / SIMD, at.y, lane);
}

// Each head's output from its latent context: out = W_uv * context for every head.
//
// context: [T,H*L]; w: [H,V,L/8]; scales, biases: [H,V,L/G]; out: [T,H*V]. L <= 1024, a multiple of
// 32 and of G. Launch: see `mla_q_prime_4bit`. Rows are longer and fewer here: at L = 512 half a
// simdgroup takes one.
template <typename T, typename S, int LANES>
[[kernel]] void mla_out_per_head_4bit(
    device const T* context,
    device const uint* w,
    device const S* scales,
    device const S* biases,
    constant uint& n_tokens,
    constant uint& n_heads,
    constant uint& value_dim,
    constant uint& latent_dim,
    constant uint& n_groups,
    device T* out,
    uint2 at [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  multiply_per_head<LANES, T>(
      context, w, scales, biases, n_tokens, n_heads, value_dim, latent_dim, n_groups, out,
      at.x / SIMD, at.y, lane);
}

// Attention of eight heads with 8x8 matrices.
//
// All heads read the same latents. Eight heads form the rows of a matrix, so a loaded cache value
// serves eight heads, as key and as value. Simdgroups divide the columns: block b of 32 belongs to
// simdgroup b % n_simdgroups, which holds its columns of queries and outputs in registers. Only the
// scores are shared: each simdgroup writes its share of them to threadgroup memory.
//
// A lane holds two neighbouring elements of a matrix. Queries and keys may permute their columns as
// long as both do it alike, so each of a block's four matrices takes two of the eight neighbouring
// columns that a lane loads at once.
constexpr constant int MAX_SIMDGROUPS = 8;
constexpr constant int STEP = 16;
constexpr constant int SCORES = STEP * 8;
constexpr constant int SCRATCH = 2 * MAX_SIMDGROUPS * SCORES;

inline float2 multiply_add(float2 a, float2 b, float2 c) {
  simdgroup_float8x8 left;
  simdgroup_float8x8 right;
  simdgroup_float8x8 sum;
  left.thread_elements()[0] = a.x;
  left.thread_elements()[1] = a.y;
  right.thread_elements()[0] = b.x;
  right.thread_elements()[1] = b.y;
  sum.thread_elements()[0] = c.x;
  sum.thread_elements()[1] = c.y;
  simdgroup_multiply_accumulate(sum, left, right, sum);
  return float2(sum.thread_elements()[0], sum.thread_elements()[1]);
}

// A lane's place in an 8x8 matrix on Apple's GPUs: its row, and the first of its two columns. On
// CUDA the order differs, and non-template functions of the same names in msl_cuda.h take
// precedence.
template <typename L>
inline uint matrix_row(L lane) {
  return (lane / 16) * 4 + (lane % 8) / 2;
}
template <typename L>
inline uint matrix_column(L lane) {
  return (lane % 16) / 8 * 4 + (lane % 2) * 2;
}
// Reductions over the four lanes that share a row, whose numbers differ in bits 0 and 3.
template <typename F>
inline F matrix_row_sum(F x) {
  x += simd_shuffle_xor(x, 1);
  return x + simd_shuffle_xor(x, 8);
}
template <typename F>
inline F matrix_row_max(F x) {
  x = max(x, simd_shuffle_xor(x, 1));
  return max(x, simd_shuffle_xor(x, 8));
}

// Load a lane's eight columns of a block, with zeros past the end of the row.
template <typename P>
inline void load_block(P row, uint column, uint n, thread float2* values) {
  float4 first = read_columns(row, column, n);
  float4 second = read_columns(row, column + 4, n);
  values[0] = first.xy;
  values[1] = first.zw;
  values[2] = second.xy;
  values[3] = second.zw;
}

// Load and scale a block of eight heads' queries as the right factor of keys * queries.
template <typename P>
inline void load_queries(
    P q, uint head, uint n_heads, uint block, uint n, float scale, uint lane, thread float2* to) {
  uint row = matrix_row(lane);
  uint first = head + matrix_column(lane);
#pragma unroll
  for (uint j = 0; j < 4; ++j) {
    uint column = 32 * block + row / 2 * 8 + 2 * j + row % 2;
    bool inside = column < n;
    to[j].x = inside && first < n_heads ? scale * float(q[first * n + column]) : 0.0f;
    to[j].y =
        inside && first + 1 < n_heads ? scale * float(q[(first + 1) * n + column]) : 0.0f;
  }
}

// A lane's result of `attend`: its head's largest score and denominator, and eight columns of each
// of its blocks.
template <int BLOCKS>
struct Attended {
  float largest;
  float denominator;
  float2 sums[BLOCKS][4];
};

// Attention of heads [head, head + 8) of one token over rows [begin, end) of the cache.
template <int BLOCKS, int ROPE_BLOCKS, typename Q, typename QR, typename K, typename KR>
inline void attend(
    Q q,
    QR q_pe,
    K latent,
    KR rope,
    uint head,
    uint n_heads,
    uint latent_dim,
    uint rope_dim,
    float scale,
    uint begin,
    uint end,
    threadgroup float* scratch,
    uint lane,
    uint simdgroup,
    uint n_simdgroups,
    thread Attended<BLOCKS>& result) {
  uint row = matrix_row(lane);
  uint column = matrix_column(lane);
  float2 queries[BLOCKS][4];
  float2 rope_queries[ROPE_BLOCKS][4];
#pragma unroll
  for (int b = 0; b < BLOCKS; ++b) {
    uint block = simdgroup + b * n_simdgroups;
    load_queries(q, head, n_heads, block, latent_dim, scale, lane, queries[b]);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      result.sums[b][j] = float2(0.0f);
    }
  }
#pragma unroll
  for (int b = 0; b < ROPE_BLOCKS; ++b) {
    uint block = simdgroup + b * n_simdgroups;
    load_queries(q_pe, head, n_heads, block, rope_dim, scale, lane, rope_queries[b]);
  }
  float largest = -INFINITY;
  float denominator = 0.0f;
  // Two halves of the scratch memory alternate, so one barrier per step suffices.
  uint turn = 0;
  for (uint first = begin; first < end; first += STEP) {
    threadgroup float* scores = scratch + turn * MAX_SIMDGROUPS * SCORES;
    turn = 1 - turn;
    float2 keys[2][BLOCKS][4];
#pragma unroll
    for (int half_step = 0; half_step < 2; ++half_step) {
      uint at = first + 8 * half_step + row;
      bool seen = at < end;
      ulong from = seen ? at : first;
      float2 score = float2(0.0f);
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
        uint i = 32 * (simdgroup + b * n_simdgroups) + 4 * column;
        load_block(latent + from * latent_dim, i, latent_dim, keys[half_step][b]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          score = multiply_add(keys[half_step][b][j], queries[b][j], score);
        }
      }
#pragma unroll
      for (int b = 0; b < ROPE_BLOCKS; ++b) {
        // Most simdgroups have no rope columns and skip the products.
        uint block = simdgroup + b * n_simdgroups;
        if (32 * block < rope_dim) {
          float2 rope_keys[4];
          load_block(rope + from * rope_dim, 32 * block + 4 * column, rope_dim, rope_keys);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            score = multiply_add(rope_keys[j], rope_queries[b][j], score);
          }
        }
      }
      uint to = simdgroup * SCORES + (8 * half_step + row) * 8 + column;
      scores[to] = score.x;
      scores[to + 1] = score.y;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float2 weights[2];
    float step_largest = largest;
#pragma unroll
    for (int half_step = 0; half_step < 2; ++half_step) {
      uint at = 8 * half_step + column;
      float2 score = float2(0.0f);
      for (uint s = 0; s < n_simdgroups; ++s) {
        score.x += scores[s * SCORES + at * 8 + row];
        score.y += scores[s * SCORES + (at + 1) * 8 + row];
      }
      score.x = first + at < end ? score.x : -INFINITY;
      score.y = first + at + 1 < end ? score.y : -INFINITY;
      weights[half_step] = score;
      step_largest = max(step_largest, max(score.x, score.y));
    }
    // A row of this matrix is a head.
    step_largest = matrix_row_max(step_largest);
    float shrink = exp(largest - step_largest);
    largest = step_largest;
    denominator *= shrink;
    // The maximum soon stops rising; then nothing needs rescaling.
    if (!simd_all(shrink == 1.0f)) {
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          result.sums[b][j] *= shrink;
        }
      }
    }
#pragma unroll
    for (int half_step = 0; half_step < 2; ++half_step) {
      float2 weight = exp(weights[half_step] - float2(largest));
      denominator += weight.x + weight.y;
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          result.sums[b][j] = multiply_add(weight, keys[half_step][b][j], result.sums[b][j]);
        }
      }
    }
  }
  result.largest = largest;
  result.denominator = matrix_row_sum(denominator);
}

// Write a lane's columns of all its blocks, times a factor, to its head's row.
template <int BLOCKS, typename T>
inline void write_blocks(
    device T* row,
    thread const Attended<BLOCKS>& result,
    float factor,
    uint latent_dim,
    uint lane,
    uint simdgroup,
    uint n_simdgroups) {
#pragma unroll
  for (int b = 0; b < BLOCKS; ++b) {
    uint i = 32 * (simdgroup + b * n_simdgroups) + 4 * matrix_column(lane);
    if (i < latent_dim) {
      write4(row + i, factor * float4(result.sums[b][0], result.sums[b][1]));
      write4(row + i + 4, factor * float4(result.sums[b][2], result.sums[b][3]));
    }
  }
}

// The number of a sequence's n_rows cache rows that are in use.
template <bool HAS, typename P>
inline uint seen_rows(P seen, uint sequence, uint n_rows) {
  return HAS ? uint(seen[sequence]) : n_rows;
}

// Causal attention in the latent space over short caches, in one launch.
//
// q_prime: [B*T,H*L]; q_pe: [B*T,H*R]; seen: [B], the rows in use of each sequence if HAS_SEEN,
// else all S; latent: [B,S,L], rope: [B,S,R], whose last T rows in use belong to the tokens;
// context: [B*T,H*L]. L is a multiple of 32. Launch: one threadgroup of up to 8 simdgroups per
// eight heads of a token; BLOCKS and ROPE_BLOCKS blocks of 32 columns per simdgroup. With eight
// heads per cache row the bytes of the cache, not the number of heads, determine the time.
template <typename T, int BLOCKS, int ROPE_BLOCKS, bool HAS_SEEN>
[[kernel]] void mla_sdpa_folded(
    device const T* q_prime,
    device const T* q_pe,
    device const T* latent,
    device const T* rope,
    device const uint* seen,
    constant float& scale,
    constant uint& n_new,
    constant uint& n_heads,
    constant uint& n_rows,
    constant uint& latent_dim,
    constant uint& rope_dim,
    device T* context,
    uint2 group [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint n_simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float scratch[SCRATCH];
  ulong token_heads = ulong(group.y) * n_heads;
  uint head = 8 * group.x;
  uint sequence = group.y / n_new;
  ulong first = ulong(sequence) * n_rows;
  uint end = seen_rows<HAS_SEEN>(seen, sequence, n_rows) - n_new + group.y % n_new + 1;
  Attended<BLOCKS> result;
  attend<BLOCKS, ROPE_BLOCKS>(
      q_prime + token_heads * latent_dim, q_pe + token_heads * rope_dim,
      latent + first * latent_dim, rope + first * rope_dim, head, n_heads, latent_dim, rope_dim,
      scale, 0, end, scratch, lane, simdgroup, n_simdgroups, result);
  head += matrix_row(lane);
  if (head < n_heads) {
    write_blocks(
        context + (token_heads + head) * latent_dim, result, 1.0f / result.denominator,
        latent_dim, lane, simdgroup, n_simdgroups);
  }
}

// First pass over a long cache: the maximum, denominator and sums of every tile of rows.
//
// Inputs: see `mla_sdpa_folded`; n = ceil(S / TILE) tiles; maxima, denominators: [n,T*H] float32;
// sums: [n,T*H,L] float32, of exp(score - maximum) * latent. A tile that a token does not see gets
// -inf, 0 and zeros. Launch: see `mla_sdpa_folded`, one threadgroup per tile and eight heads of a
// token. Tiles run in parallel, because with few tokens the heads alone would not occupy the GPU.
template <typename T, int BLOCKS, int ROPE_BLOCKS, int TILE, bool HAS_SEEN>
[[kernel]] void mla_sdpa_tile_accumulate(
    device const T* q_prime,
    device const T* q_pe,
    device const T* latent,
    device const T* rope,
    device const uint* seen,
    constant float& scale,
    constant uint& n_tokens,
    constant uint& n_new,
    constant uint& n_heads,
    constant uint& n_rows,
    constant uint& latent_dim,
    constant uint& rope_dim,
    device float* maxima,
    device float* denominators,
    device float* sums,
    uint3 group [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint n_simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float scratch[SCRATCH];
  ulong token_heads = ulong(group.y) * n_heads;
  uint head = 8 * group.x;
  uint sequence = group.y / n_new;
  ulong first = ulong(sequence) * n_rows;
  uint begin = group.z * TILE;
  uint own = seen_rows<HAS_SEEN>(seen, sequence, n_rows) - n_new + group.y % n_new + 1;
  Attended<BLOCKS> result;
  attend<BLOCKS, ROPE_BLOCKS>(
      q_prime + token_heads * latent_dim, q_pe + token_heads * rope_dim,
      latent + first * latent_dim, rope + first * rope_dim, head, n_heads, latent_dim, rope_dim,
      scale, begin, min(begin + TILE, own), scratch, lane, simdgroup, n_simdgroups, result);
  head += matrix_row(lane);
  if (head < n_heads) {
    ulong row = ulong(group.z) * n_tokens * n_heads + token_heads + head;
    write_blocks(
        sums + row * latent_dim, result, 1.0f, latent_dim, lane, simdgroup, n_simdgroups);
    if (simdgroup == 0 && matrix_column(lane) == 0) {
      maxima[row] = result.largest;
      denominators[row] = result.denominator;
    }
  }
}

// Second pass: rescale the tiles' sums to one maximum, add them, and divide by the denominator.
//
// maxima, denominators: [n,T*H] float32; sums: [n,T*H,L] float32; context: [T*H,L]. L is a multiple
// of 4. Launch: one row of the grid per head of a token, one thread per four columns. Every thread
// finds the maximum alone: there are few tiles, and no thread waits for another.
template <typename T>
[[kernel]] void mla_sdpa_tile_finalize(
    device const float* maxima,
    device const float* denominators,
    device const float* sums,
    constant uint& n_tiles,
    constant uint& n_slices,
    constant uint& latent_dim,
    device T* context,
    uint2 at [[thread_position_in_grid]]) {
  uint i = 4 * at.x;
  if (i >= latent_dim || at.y >= n_slices) {
    return;
  }
  float largest = -INFINITY;
  for (uint tile = 0; tile < n_tiles; ++tile) {
    largest = max(largest, maxima[tile * n_slices + at.y]);
  }
  float denominator = 0.0f;
  float4 sum = float4(0.0f);
  for (uint tile = 0; tile < n_tiles; ++tile) {
    uint slice = tile * n_slices + at.y;
    float factor = exp(maxima[slice] - largest);
    denominator = fma(factor, denominators[slice], denominator);
    sum += factor * read4(sums + ulong(slice) * latent_dim + i);
  }
  write4(context + ulong(at.y) * latent_dim + i, sum / denominator);
}
