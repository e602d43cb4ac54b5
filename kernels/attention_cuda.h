// `attend_part` for 16-bit rows on tensor cores, in CUDA C++. Arguments and results are the same.
//
// It processes 32 rows at a time while it loads the next 32. A warp takes eight rows and half of
// the channels of the keys, and all rows and an eighth of the channels of the values. A product may
// sum its channels or rows in any order that both factors share. So each lane (n = lane / 4, c =
// lane % 4) reads neighbouring channels, nothing is transposed in shared memory, and only scores
// pass through it. Weights are rounded to the rows' type.

template <int D, typename T>
struct TensorAttention {};
template <typename T>
struct TensorAttention<128, T> : SixteenBits<T> {};
template <typename T>
struct TensorAttention<256, T> : SixteenBits<T> {};

// Load 2 N neighbouring values as N words, or zeros unless is_there.
template <int N, bool ALIGNED, typename T>
inline void read_channels(const T* from, bool is_there, uint* to) {
  if (!is_there) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      to[i] = 0u;
    }
  } else if (!ALIGNED) {
    read_values<N>(from, to);
  } else {
    read_words<N>((const uint*)__builtin_assume_aligned(from, 4 * N), to);
  }
}

template <int D, int FOLD, bool ALIGNED, typename T>
inline void attend_on_tensor_cores(
    const T* q,
    const T* k,
    const T* v,
    float scale,
    uint n_rows,
    uint n_parts,
    float* sums,
    float* stats,
    float* own,
    uint simdgroup,
    uint lane) {
  constexpr uint ROWS = 32;
  // Pitch of the scores in shared memory. It spreads the rows of four queries over all banks.
  constexpr uint PITCH = 40;
  constexpr int STEPS = D / 64;
  constexpr int EACH = D / 64;
  uint n = lane / 4;
  uint c = lane % 4;
  uint tile = simdgroup % 4 * 8;
  uint half_row = simdgroup / 4;
  uint key_at = half_row * (D / 2) + 8 * c;
  uint value_at = simdgroup * (D / 8) + n * EACH;
  uint query[STEPS][4];
  uint key[STEPS][4];
  uint value[8][EACH / 2];
  auto value_row = [&](int i) {
    return uint(i / 2 * 8 + i % 2) + 2 * c;
  };
  auto read = [&](uint row) {
    uint from = row + tile + n;
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      read_channels<4, ALIGNED>(k + ulong(from) * D + key_at + 32 * i, from < n_rows, key[i]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      from = row + value_row(i);
      read_channels<EACH / 2, ALIGNED>(v + ulong(from) * D + value_at, from < n_rows, value[i]);
    }
  };
  read(0);
#pragma unroll
  for (int i = 0; i < STEPS; ++i) {
    read_channels<4, ALIGNED>(q + n * D + key_at + 32 * i, n < FOLD, query[i]);
  }
  // total is the sum of weights of query n over this lane's rows; sum belongs to queries 2 c and
  // 2 c + 1.
  float top = -INFINITY;
  float total = 0.0f;
  float sum[EACH / 2][4];
#pragma unroll
  for (int i = 0; i < EACH / 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sum[i][j] = 0.0f;
    }
  }
  for (uint row = 0; row < n_rows; row += ROWS) {
    float products[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        // The fragment has 16 rows, but there are at most 8 queries.
        uint left[4] = {query[i][j], 0u, query[i][j + 1], 0u};
        multiply_fragments(products, left, key[i] + j, T());
      }
    }
    float* scores = own + (half_row * 8 + n) * PITCH + tile + 2 * c;
    scores[0] = products[0];
    scores[1] = products[1];
    __syncthreads();
    float weights[8];
    float higher = top;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      uint at = n * PITCH + value_row(i);
      float score = scale * (own[at] + own[8 * PITCH + at]);
      weights[i] = row + value_row(i) < n_rows ? score : -INFINITY;
      higher = fmax(higher, weights[i]);
    }
    higher = fmax(higher, simd_shuffle_xor(higher, 1));
    higher = fmax(higher, simd_shuffle_xor(higher, 2));
    float shrink = fast::exp(top - higher);
    top = higher;
    total *= shrink;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      weights[i] = fast::exp(weights[i] - higher);
      total += weights[i];
    }
    float first = simd_shuffle(shrink, 8 * c);
    float second = simd_shuffle(shrink, 8 * c + 4);
#pragma unroll
    for (int e = 0; e < EACH / 2; ++e) {
      sum[e][0] *= first;
      sum[e][1] *= second;
      sum[e][2] *= first;
      sum[e][3] *= second;
    }
    uint now[8][EACH / 2];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int e = 0; e < EACH / 2; ++e) {
        now[i][e] = value[i][e];
      }
    }
    if (row + ROWS < n_rows) {
      read(row + ROWS);
    }
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      uint weight[2] = {
          packed_pair<T>(weights[i], weights[i + 1]),
          packed_pair<T>(weights[i + 2], weights[i + 3])};
#pragma unroll
      for (int e = 0; e < EACH / 2; ++e) {
        // Gather channel 2 e of four rows, then channel 2 e + 1.
        uint left[4] = {
            __byte_perm(now[i][e], now[i + 1][e], 0x5410),
            __byte_perm(now[i][e], now[i + 1][e], 0x7632),
            __byte_perm(now[i + 2][e], now[i + 3][e], 0x5410),
            __byte_perm(now[i + 2][e], now[i + 3][e], 0x7632)};
        multiply_fragments(sum[e], left, weight, T());
      }
    }
    __syncthreads();
  }
  total += simd_shuffle_xor(total, 1);
  total += simd_shuffle_xor(total, 2);
  if (simdgroup == 0 && c == 0 && n < FOLD) {
    float* stat = stats + 2 * ulong(n) * n_parts;
    stat[0] = n_rows > 0 ? top : 0.0f;
    stat[1] = total;
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    uint f = 2 * c + j;
    float each[EACH];
#pragma unroll
    for (int e = 0; e < EACH / 2; ++e) {
      each[2 * e] = sum[e][j];
      each[2 * e + 1] = sum[e][j + 2];
    }
    if (f < FOLD) {
      store_words(
          (uint*)(sums + ulong(f) * n_parts * D + value_at), (const uint*)each, Words<EACH>());
    }
  }
}

template <int D, int FOLD, typename T>
inline typename TensorAttention<D, T>::result attend_part(
    const T* q,
    const T* k,
    const T* v,
    float scale,
    uint n_rows,
    uint n_parts,
    float* sums,
    float* stats,
    float* own,
    float*,
    float*,
    uint,
    uint simdgroup,
    uint lane) {
  if ((ulong(q) | ulong(k) | ulong(v)) % 16 == 0) {
    attend_on_tensor_cores<D, FOLD, true>(
        q, k, v, scale, n_rows, n_parts, sums, stats, own, simdgroup, lane);
  } else {
    attend_on_tensor_cores<D, FOLD, false>(
        q, k, v, scale, n_rows, n_parts, sums, stats, own, simdgroup, lane);
  }
}
