// `multiply_tile` for 16-bit rows on tensor cores, in CUDA C++. Arguments and results are the same.
// CUDA emulates Metal's simdgroup matrices exactly but slowly. These sums are float32 too, but of
// weights rounded to the rows' type.
//
// It stages 64 inputs at a time in threadgroup memory as 16-bit values. A pitch of 72 values
// spreads eight rows over all banks. The next inputs are loaded while the tensor cores work.

// Load four 8x8 matrices of 16-bit values; lane l passes row l % 8 of matrix l / 8.
template <typename T>
inline void load_fragments(uint* to, const T* row) {
  uint at = uint(__cvta_generic_to_shared(row));
  asm volatile(
      "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
      : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
      : "r"(at));
}

template <int BITS, bool FLOATS, int G, typename T, typename S, typename B>
inline typename SixteenBits<T>::result multiply_tile(
    const T* x_row_at,
    bool has_row,
    const uint* w_row_at,
    S s_at,
    B b_at,
    uint n_in,
    uint n_rows,
    float4* x_tile,
    float4* w_tile,
    uint thread_index,
    uint simdgroup) {
  constexpr int STEP = 64;
  constexpr int PITCH = 72;
  constexpr int PER_WORD = 32 / BITS;
  T* xs = (T*)x_tile;
  T* ws = (T*)w_tile;
  uint lane = thread_index % 32;
  uint x_column = thread_index % 4 * 16;
  uint w_column = thread_index % 2 * 32;
  uint4* x_to = (uint4*)(xs + thread_index / 4 * PITCH + x_column);
  uint4* w_to = (uint4*)(ws + thread_index / 2 * PITCH + w_column);
  uint x_next[8];
  uint w_next[BITS];
  // A thread loads 32 weights of a row, which are two groups of 16.
  float scales[2] = {0.0f, 0.0f};
  float bias = 0.0f;
  // n_in is a multiple of 32, so half of the last 64 inputs may be missing: both factors are then
  // 0.
  auto read = [&](uint start) {
    if (has_row && start + x_column < n_in) {
      read_values<8>(x_row_at + start + x_column, x_next);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        x_next[i] = 0u;
      }
    }
    if (start + w_column < n_in) {
      read_words<BITS>(w_row_at + (start + w_column) / PER_WORD, w_next);
      scales[0] = scale_of<G>(s_at[(start + w_column) / G]);
      scales[1] = G == 16 ? scale_of<G>(s_at[(start + w_column) / G + 1]) : scales[0];
      bias = FLOATS ? 0.0f : float(b_at[(start + w_column) / G]);
    } else {
#pragma unroll
      for (int i = 0; i < BITS; ++i) {
        w_next[i] = 0u;
      }
      scales[0] = 0.0f;
      scales[1] = 0.0f;
      bias = 0.0f;
    }
  };
  float sums[2][2][4];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    sums[i / 8][i / 4 % 2][i % 4] = 0.0f;
  }
  const T* x_from = xs + lane % 16 * PITCH + lane / 16 * 8;
  const T* w_from =
      ws + (simdgroup * 16 + lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 8;
  read(0);
  for (uint start = 0; start < n_in; start += STEP) {
    __syncthreads();
    x_to[0] = uint4(x_next[0], x_next[1], x_next[2], x_next[3]);
    x_to[1] = uint4(x_next[4], x_next[5], x_next[6], x_next[7]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        int at = 8 * i + 2 * j;
        uint packed = w_next[at / PER_WORD] >> (BITS * (at % PER_WORD));
        float4 values = unpack4<BITS, FLOATS>(packed);
        float scale = scales[i / 2];
        pairs[j] =
            packed_pair<T>(fmaf(scale, values.x, bias), fmaf(scale, values.y, bias));
      }
      w_to[i] = uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
    __syncthreads();
    if (start + STEP < n_in) {
      read(start + STEP);
    }
#pragma unroll
    for (int k = 0; k < STEP; k += 16) {
      uint right[4];
      load_fragments(right, w_from + k);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        if (uint(16 * m) < n_rows) {
          uint left[4];
          load_fragments(left, x_from + m * 16 * PITCH + k);
          multiply_fragments(sums[m][0], left, right, T());
          multiply_fragments(sums[m][1], left, right + 2, T());
        }
      }
    }
  }
  __syncthreads();
  float* out = (float*)w_tile + lane / 4 * TILE_OUT_PITCH + simdgroup * 16 + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    int m = i / 4;
    int low = i / 2 % 2;
    int n = i % 2;
    float* to = out + (16 * m + 8 * low) * TILE_OUT_PITCH + 8 * n;
    to[0] = sums[m][n][2 * low];
    to[1] = sums[m][n][2 * low + 1];
  }
  __syncthreads();
}
