// Helpers shared by the kernel families. This file alone is valid Metal 3.1.
#pragma once
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

// Threads in a simdgroup on every Apple GPU, and in a warp on CUDA.
constexpr constant int SIMD = 32;

inline float sigmoid(float x) {
  return 1.0f / (1.0f + exp(-x));
}

inline float silu(float x) {
  return x / (1.0f + exp(-x));
}

// silu(gate) * up. A limit other than 0 selects gpt-oss's clipped form: clip gate from above and up
// on both sides at `limit`, then return gate * sigmoid(alpha * gate) * (up + 1).
inline float swiglu(float gate, float up, float alpha, float limit) {
  if (limit == 0.0f) {
    return silu(gate) * up;
  }
  gate = min(gate, limit);
  up = clamp(up, -limit, limit);
  return gate * sigmoid(alpha * gate) * (up + 1.0f);
}

// Sum over a threadgroup, returned to every thread. `scratch` holds one value per simdgroup and
// needs no initial contents. It contains a barrier, so all threads must call it.
inline float threadgroup_sum(
    float value, threadgroup float* scratch, uint lane, uint simdgroup, uint n_simdgroups) {
  value = simd_sum(value);
  if (lane == 0) {
    scratch[simdgroup] = value;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float total = lane < n_simdgroups ? scratch[lane] : 0.0f;
  return simd_sum(total);
}

// Load four consecutive values as float32, or store them. Packed vectors need only the alignment
// of one element, and a view into an array or a file has no more. Small inputs arrive in `constant`
// memory and are read one by one.
template <typename P>
inline float4 read4(P p) {
  return float4(float(p[0]), float(p[1]), float(p[2]), float(p[3]));
}
inline float4 read4(device const float* p) {
  return float4(*(device const packed_float4*)p);
}
inline float4 read4(device const half* p) {
  return float4(half4(*(device const packed_half4*)p));
}
inline float4 read4(device const bfloat* p) {
  return float4(bfloat4(*(device const packed_bfloat4*)p));
}

inline void write4(device float* p, float4 values) {
  *(device packed_float4*)p = values;
}
inline void write4(device half* p, float4 values) {
  *(device packed_half4*)p = half4(values);
}
inline void write4(device bfloat* p, float4 values) {
  *(device packed_bfloat4*)p = bfloat4(values);
}

// Load columns i to i + 3 of a row of n values as float32, or store them. Columns past the end
// read as 0 and are not written.
template <typename P>
inline float4 read_columns(P row, uint i, uint n) {
  if (i + 4 <= n) {
    return read4(row + i);
  }
  float4 values = float4(0.0f);
#pragma unroll
  for (uint j = 0; j < 3; ++j) {
    if (i + j < n) {
      values[j] = float(row[i + j]);
    }
  }
  return values;
}

template <typename T>
inline void write_columns(device T* row, uint i, uint n, float4 values) {
  if (i + 4 <= n) {
    write4(row + i, values);
    return;
  }
#pragma unroll
  for (uint j = 0; j < 3; ++j) {
    if (i + j < n) {
      row[i + j] = T(values[j]);
    }
  }
}

// Load lane l's PER consecutive values of a row of 32 * PER.
template <int PER, typename P>
inline void read_share(thread float* share, P row, uint lane) {
  if (PER % 4 == 0) {
#pragma unroll
    for (int j = 0; j < PER; j += 4) {
      float4 values = read4(row + lane * PER + j);
#pragma unroll
      for (int i = 0; i < 4 && i < PER; ++i) {
        share[j + i] = values[i];
      }
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < PER; ++j) {
    share[j] = float(row[lane * PER + j]);
  }
}

// Store a lane's share back into its row.
template <int PER>
inline void write_share(device float* row, thread const float* share, uint lane) {
  if (PER % 4 == 0) {
#pragma unroll
    for (int j = 0; j + 3 < PER; j += 4) {
      write4(row + lane * PER + j, float4(share[j], share[j + 1], share[j + 2], share[j + 3]));
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < PER; ++j) {
    row[lane * PER + j] = share[j];
  }
}

// Load WORDS packed words. In `device` memory their address is a multiple of WORDS words, so one
// vector load is aligned.
template <int WORDS, typename P>
inline void load_words(P p, thread uint* words) {
#pragma unroll
  for (int i = 0; i < WORDS; ++i) {
    words[i] = p[i];
  }
}
template <int WORDS>
inline void load_words(device const uint* p, thread uint* words) {
  if (WORDS == 4) {
    uint4 v = *(device const uint4*)p;
    words[0] = v.x;
    words[1] = v.y;
    words[2] = v.z;
    words[3] = v.w;
  } else if (WORDS == 2) {
    uint2 v = *(device const uint2*)p;
    words[0] = v.x;
    words[1] = v.y;
  } else {
    words[0] = p[0];
  }
}

// Packed values have two forms. Integers of BITS bits: each group has a scale and a bias. If
// FLOATS, 4-bit floats (one sign bit, two exponent bits, one mantissa bit): each group has a scale
// of one byte, which is a power of two for groups of 32 (mxfp4) and an 8-bit float for groups of 16
// (nvfp4).

// A group's scale as float32. Both float forms are moved bit by bit into a wider float.
template <int G, typename S>
inline float scale_of(S scale) {
  return float(scale);
}
template <int G>
inline float scale_of(uchar scale) {
  if (G == 16) {
    return 256.0f * float(as_type<half>(ushort((scale & 127) << 7 | (scale & 128) << 8)));
  }
  return as_type<float>(scale == 0 ? 0x00400000u : uint(scale) << 23);
}

// A 4-bit float whose bits are moved into a half is too small by this factor, the difference of
// the two exponent biases (2^14).
constexpr constant float SMALL_FLOAT = 16384.0f;

// The i-th of four 4-bit floats in half a word, divided by SMALL_FLOAT.
inline float small_float(ushort half_word, int i) {
  ushort q = half_word >> (4 * i);
  return float(as_type<half>(ushort((q & 7) << 9 | (q & 8) << 12)));
}

// Unpack the lowest four values of a packed word, before scale and bias.
template <int BITS, bool FLOATS>
inline float4 unpack4(uint q) {
  constexpr uint MASK = (1u << BITS) - 1u;
  if (FLOATS) {
    ushort h = ushort(q);
    return SMALL_FLOAT *
        float4(small_float(h, 0), small_float(h, 1), small_float(h, 2), small_float(h, 3));
  }
  return float4(
      float(q & MASK),
      float((q >> BITS) & MASK),
      float((q >> (2 * BITS)) & MASK),
      float((q >> (3 * BITS)) & MASK));
}

// Store values i to i + 3 in `partners` for `dot_words` and return their sum. `dot_words` masks a
// packed value in place, which leaves it multiplied by a power of two. Dividing the partner by that
// power is exact and saves one shift per row. Packed floats need no division.
template <int BITS, bool FLOATS>
inline float set_partners(thread float* partners, int i, float4 values) {
  constexpr int HALF = 16 / BITS;
  constexpr int KEPT = FLOATS ? 0 : BITS;
  partners[i] = values.x * (1.0f / float(1 << (KEPT * (i % HALF))));
  partners[i + 1] = values.y * (1.0f / float(1 << (KEPT * ((i + 1) % HALF))));
  partners[i + 2] = values.z * (1.0f / float(1 << (KEPT * ((i + 2) % HALF))));
  partners[i + 3] = values.w * (1.0f / float(1 << (KEPT * ((i + 3) % HALF))));
  return (values.x + values.y) + (values.z + values.w);
}

// Load the values for WORDS packed words, times `factor`, into `partners`; return their sum.
template <int BITS, bool FLOATS, int WORDS, typename P>
inline float load_partners(P x, float factor, thread float* partners) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < WORDS * (32 / BITS); i += 4) {
    sum += set_partners<BITS, FLOATS>(partners, i, factor * read4(x + i));
  }
  return sum;
}

// The i-th packed value of half a word, masked in place to match its partner.
template <int BITS, bool FLOATS>
inline float packed_value(ushort half_word, int i) {
  constexpr int MASK = (1 << BITS) - 1;
  if (FLOATS) {
    return small_float(half_word, i);
  }
  return float(ushort(half_word & (MASK << (BITS * i))));
}

// Sum of packed values times their partners. It works on half words because 16-bit registers are
// cheaper and every masked value is still exact in float32.
template <int BITS, bool FLOATS, int WORDS>
inline float dot_words(thread const uint* words, thread const float* partners) {
  constexpr int HALF = 16 / BITS;
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < WORDS; ++w) {
    ushort2 halves = as_type<ushort2>(words[w]);
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
      float low = packed_value<BITS, FLOATS>(halves.x, i);
      sum = fma(low, partners[2 * HALF * w + i], sum);
    }
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
      float high = packed_value<BITS, FLOATS>(halves.y, i);
      sum = fma(high, partners[2 * HALF * w + HALF + i], sum);
    }
  }
  return FLOATS ? SMALL_FLOAT * sum : sum;
}

// A group's contribution to a product, from the `dot` of packed values and the `sum` of partners.
template <bool FLOATS>
inline float group_product(float scale, float dot, float bias, float sum) {
  return FLOATS ? scale * dot : scale * dot + bias * sum;
}

// Multiply ROWS rows of a matrix by x with one simdgroup. `sums` receives each lane's partial sums.
// A lane loads WORDS words of all rows before it computes, which keeps enough loads in flight to
// use the memory bandwidth, and reads x once for all rows. WORDS words hold at most 32 values of
// one group, so they share one scale. If NORM, x is multiplied by `norm` first.
template <
    int BITS, bool FLOATS, int G, int WORDS, int ROWS, bool NORM,
    typename X, typename N, typename W, typename S, typename B>
inline void dot_rows(
    X x,
    N norm,
    W w,
    S scales,
    B biases,
    uint row,
    uint n_in,
    uint n_out,
    uint lane,
    thread float* sums) {
  constexpr int VALUES = WORDS * (32 / BITS);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    sums[r] = 0.0f;
  }
  for (uint start = VALUES * lane; start < n_in; start += VALUES * SIMD) {
    uint words[ROWS][WORDS];
    float scale[ROWS];
    float bias[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      // Rows past the end read the last row; the caller drops their sums.
      ulong at = ulong(min(row + r, n_out - 1)) * n_in + start;
      load_words<WORDS>(w + at / (32 / BITS), words[r]);
      scale[r] = scale_of<G>(scales[at / G]);
      bias[r] = FLOATS ? 0.0f : float(biases[at / G]);
    }
    float partners[VALUES];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < VALUES; i += 4) {
      float4 values = read4(x + start + i);
      if (NORM) {
        values *= read4(norm + start + i);
      }
      sum += set_partners<BITS, FLOATS>(partners, i, values);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float dot = dot_words<BITS, FLOATS, WORDS>(words[r], partners);
      sums[r] += group_product<FLOATS>(scale[r], dot, bias[r], sum);
    }
  }
}

// The scale of a row's RMS norm. Every simdgroup computes it alone, without a barrier.
template <typename P>
inline float rms_scale(P x, uint n, float eps, uint lane) {
  float squares = 0.0f;
  for (uint i = 4 * lane; i < n; i += 4 * SIMD) {
    float4 values = read4(x + i);
    squares += dot(values, values);
  }
  return rsqrt(simd_sum(squares) / float(n) + eps);
}

// Multiply ROWS rows (a multiple of 16) of each of PARTS matrices, starting at `row`, by x. Four
// simdgroups handle a matrix. The first matrix's products go to sums[0] to sums[ROWS - 1], the
// second's follow. If NORM, x is replaced by its RMS norm with weight `norm`. Contains barriers:
// all threads of the 4 * PARTS simdgroups must call it.
template <
    int BITS, bool FLOATS, int G, int WORDS, int ROWS, int PARTS, bool NORM,
    typename X, typename N, typename W, typename S, typename B, typename W1, typename S1,
    typename B1>
inline void rows_of_matrices(
    X x,
    N norm,
    float eps,
    W w,
    S scales,
    B biases,
    W1 w1,
    S1 scales1,
    B1 biases1,
    uint row,
    uint n_in,
    uint n_out,
    threadgroup float* sums,
    uint simdgroup,
    uint lane) {
  // More than 32 values would span two groups, which have different scales.
  constexpr int AT_ONCE = BITS < WORDS ? BITS : WORDS;
  float scale = 1.0f;
  if (NORM) {
    scale = rms_scale(x, n_in, eps, lane);
  }
  uint at = simdgroup / 4 * ROWS + simdgroup % 4 * 4;
  for (uint own = simdgroup % 4 * 4; own < ROWS; own += 16) {
    float totals[4];
    if (PARTS == 1 || simdgroup < 4) {
      dot_rows<BITS, FLOATS, G, AT_ONCE, 4, NORM>(
          x, norm, w, scales, biases, row + own, n_in, n_out, lane, totals);
    } else {
      dot_rows<BITS, FLOATS, G, AT_ONCE, 4, NORM>(
          x, norm, w1, scales1, biases1, row + own, n_in, n_out, lane, totals);
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float total = scale * simd_sum(totals[r]);
      if (lane == 0) {
        sums[at + r] = total;
      }
    }
    at += 16;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// `rows_of_matrices` for one matrix of packed integers.
template <
    int BITS, int G, int WORDS, int ROWS, bool NORM,
    typename X, typename N, typename W, typename S, typename B>
inline void block_rows(
    X x,
    N norm,
    float eps,
    W w,
    S scales,
    B biases,
    uint row,
    uint n_in,
    uint n_out,
    threadgroup float* sums,
    uint simdgroup,
    uint lane) {
  rows_of_matrices<BITS, false, G, WORDS, ROWS, 1, NORM>(
      x, norm, eps, w, scales, biases, w, scales, biases, row, n_in, n_out, sums, simdgroup, lane);
}

// The bias of output row `row`, or 0 without a bias.
template <bool HAS, typename P>
inline float row_bias(P bias, ulong row) {
  return HAS ? float(bias[row]) : 0.0f;
}

// Sizes of a tile of a product: rows of x by columns of the result, which are rows of the matrix.
// Pitches of 36 and 68 values spread 8 rows of a tile over all banks of threadgroup memory.
constexpr constant int TILE_ROWS = 32;
constexpr constant int TILE_COLUMNS = 64;
constexpr constant int TILE_PITCH = 36;
constexpr constant int TILE_OUT_PITCH = 68;

// Multiply up to 32 rows of x by 64 rows of a quantised matrix with a threadgroup of 128. Four
// threads load a row of x, two a row of the matrix: thread t passes `x_row_at` and `has_row` of row
// t / 4, and `w_row_at`, `s_at` and `b_at` of matrix row t / 2. The result ends in w_tile, row r at
// r * TILE_OUT_PITCH. Every simdgroup computes all rows of 16 columns, so a partly filled tile
// shortens the work of all four equally, in units of 8 rows. Contains barriers: all threads must
// call it.
template <int BITS, bool FLOATS, int G, typename X, typename W, typename S, typename B>
inline void multiply_tile(
    X x_row_at,
    bool has_row,
    W w_row_at,
    S s_at,
    B b_at,
    uint n_in,
    uint n_rows,
    threadgroup float4* x_tile,
    threadgroup float4* w_tile,
    uint thread_index,
    uint simdgroup) {
  constexpr int STEP = 32;
  constexpr int WORDS = BITS / 2;
  constexpr int PER_WORD = 32 / BITS;
  threadgroup float* xs = (threadgroup float*)x_tile;
  threadgroup float* ws = (threadgroup float*)w_tile;
  uint x_row = thread_index / 4;
  uint x_column = thread_index % 4 * 8;
  uint w_line = thread_index / 2;
  uint w_half = thread_index % 2;
  auto x_at = x_row_at + x_column;
  auto w_at = w_row_at + w_half * WORDS;

  simdgroup_float8x8 sums[TILE_ROWS / 8][2];
#pragma unroll
  for (int m = 0; m < TILE_ROWS / 8; ++m) {
    sums[m][0] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    sums[m][1] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
  for (uint start = 0; start < n_in; start += STEP) {
    // All simdgroups must have read the previous inputs.
    threadgroup_barrier(mem_flags::mem_threadgroup);
    threadgroup float4* x_to = x_tile + (x_row * TILE_PITCH + x_column) / 4;
    x_to[0] = has_row ? read4(x_at + start) : float4(0.0f);
    x_to[1] = has_row ? read4(x_at + start + 4) : float4(0.0f);
    // With groups of 16 the two threads of a row use different groups.
    uint group = (start + w_half * (STEP / 2)) / G;
    float scale = scale_of<G>(s_at[group]);
    float bias = FLOATS ? 0.0f : float(b_at[group]);
    threadgroup float4* w_to = w_tile + (w_line * TILE_PITCH + w_half * (STEP / 2)) / 4;
#pragma unroll
    for (int word = 0; word < WORDS; ++word) {
      uint packed = w_at[start / PER_WORD + word];
#pragma unroll
      for (int j = 0; j < PER_WORD / 4; ++j) {
        float4 values = unpack4<BITS, FLOATS>(packed >> (4 * BITS * j));
        w_to[word * (PER_WORD / 4) + j] = FLOATS ? scale * values : scale * values + bias;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (int inner = 0; inner < STEP; inner += 8) {
      simdgroup_float8x8 left;
      simdgroup_float8x8 right[2];
      threadgroup float* columns = ws + simdgroup * 16 * TILE_PITCH + inner;
      simdgroup_load(right[0], columns, TILE_PITCH, 0, true);
      simdgroup_load(right[1], columns + 8 * TILE_PITCH, TILE_PITCH, 0, true);
#pragma unroll
      for (int m = 0; m < TILE_ROWS / 8; ++m) {
        if (uint(8 * m) < n_rows) {
          simdgroup_load(left, xs + 8 * m * TILE_PITCH + inner, TILE_PITCH);
          simdgroup_multiply_accumulate(sums[m][0], left, right[0], sums[m][0]);
          simdgroup_multiply_accumulate(sums[m][1], left, right[1], sums[m][1]);
        }
      }
    }
  }
  // The result replaces the weights in w_tile.
  threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
  for (int m = 0; m < TILE_ROWS / 8; ++m) {
    if (uint(8 * m) < n_rows) {
      threadgroup float* to = ws + 8 * m * TILE_OUT_PITCH + simdgroup * 16;
      simdgroup_store(sums[m][0], to, TILE_OUT_PITCH);
      simdgroup_store(sums[m][1], to + 8, TILE_OUT_PITCH);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// Map a float to an integer of the same order, so that ties and maxima are exact and simd_max is
// one operation. Both zeros map to one number. The result is never 0, which marks a removed key.
inline uint ordered(float x) {
  uint bits = as_type<uint>(x);
  bits = bits == 0x80000000u ? 0u : bits;
  return max(bits ^ ((bits >> 31) != 0u ? 0xffffffffu : 0x80000000u), 1u);
}

inline float unordered(uint key) {
  return as_type<float>(key ^ ((key >> 31) != 0u ? 0x80000000u : 0xffffffffu));
}

// Remove the largest key of a simdgroup, on ties that of the lowest expert. A lane's i-th key
// belongs to expert `first + i * step`. All lanes receive the key and the expert.
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

// Prepare the choice of one token's experts as `moe_noaux_topk` makes it: `keys` receives this
// lane's experts `first`, first + step, ..., with key 0 for those that may not be chosen.
// logits, bias: [E]. A group belongs to L = 32 / n_group neighbouring lanes with
// PER_LANE = ceil(E / n_group / L) experts each, so log2(L) exchanges find the two best scores of
// all groups at once.
template <int PER_LANE, typename L, typename B>
inline void noaux_keys(
    L logits,
    B bias,
    uint n_experts,
    uint n_group,
    uint topk_group,
    uint lane,
    thread uint* keys,
    thread uint& first,
    thread uint& step) {
  uint group_experts = n_experts / n_group;
  step = SIMD / n_group;
  uint group = lane / step;
  uint within = lane % step;
  first = group * group_experts + within;
  float best = -INFINITY;
  float second = -INFINITY;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    keys[j] = 0;
    uint at = uint(j) * step;
    if (within + at < group_experts) {
      float score = sigmoid(float(logits[first + at])) + float(bias[first + at]);
      keys[j] = ordered(score);
      second = max(second, min(best, score));
      best = max(best, score);
    }
  }
  for (ushort distance = ushort(step / 2); distance > 0; distance /= 2) {
    float other_best = simd_shuffle_xor(best, distance);
    float other_second = simd_shuffle_xor(second, distance);
    second = max(min(best, other_best), max(second, other_second));
    best = max(best, other_best);
  }
  float group_score = best + second;
  uint n_better = 0;
  for (uint g = 0; g < n_group; ++g) {
    float other = simd_shuffle(group_score, ushort(g * step));
    n_better += uint(other > group_score || (other == group_score && g < group));
  }
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    keys[j] = n_better < topk_group ? keys[j] : 0u;
  }
}

// The weight of lane n's expert, the n-th chosen one, as `moe_noaux_topk` gives it.
template <bool NORMALIZE, typename L>
inline float noaux_weight(L logits, uint chosen, uint k, float scale, uint lane) {
  float weight = lane < k ? sigmoid(float(logits[chosen])) : 0.0f;
  if (NORMALIZE) {
    weight /= simd_sum(weight) + 1e-20f;
  }
  return weight * scale;
}
