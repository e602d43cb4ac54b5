// `rows_of_matrices` for 16-bit rows and matrices of 4 or 8 bits on tensor cores, in CUDA C++.
// Arguments and results are the same. A single token would fill one of a tensor core's eight
// columns. The gain is that a packed weight costs one instruction instead of four, so the loads of
// the matrix dominate.
//
// A warp takes 16 rows and a quarter of the inputs. Lane (n = lane / 4, c = lane % 4) reads four
// words of rows n and n + 8 in every chunk of inputs: the c-th quarter of the chunk. Two packed
// values are converted by placing them in the mantissas of two 16-bit OFFSETs; in the end OFFSET
// times the sum of x is subtracted. x lies in shared memory in the order in which words yield their
// values. A unit is the inputs of a chunk that share a scale. Column n of the product takes only
// the x of unit n, so the eight columns are the sums of eight units, and lane (n, c) holds those of
// units 2 c and 2 c + 1.

template <typename T, int BITS>
struct TensorRows {};
template <typename T>
struct TensorRows<T, 4> : SixteenBits<T> {};
template <typename T>
struct TensorRows<T, 8> : SixteenBits<T> {};

// The number whose mantissa receives packed values: its bits, twice in a word, and its value.
template <typename T>
struct Offset;
template <>
struct Offset<bfloat> {
  static constexpr uint BITS = 0x43004300u;
  static constexpr float VALUE = 128.0f;
};
template <>
struct Offset<half> {
  static constexpr uint BITS = 0x64006400u;
  static constexpr float VALUE = 1024.0f;
};

// Load four words, WORDS at a time, without keeping them in the L1 cache.
template <int WORDS>
inline void stream_words(const uint* from, uint* to) {
  if (WORDS == 4) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "l"(from));
  } else {
#pragma unroll
    for (int i = 0; i < 4; i += WORDS) {
      load_words<WORDS>(from + i, to + i);
    }
  }
}

// The low four bits of both halves of word >> SHIFT, in the mantissa of T's offset. It is volatile
// so that the compiler does not compute it for all words before the barrier that x waits for.
template <typename T, int SHIFT>
inline uint into_mantissa(uint word) {
  uint pair;
  asm volatile(
      "{ .reg .b32 s; shr.b32 s, %1, %2; lop3.b32 %0, s, %3, %4, 0xea; }"
      : "=r"(pair)
      : "r"(word), "n"(SHIFT), "n"(0x000f000f), "n"(Offset<T>::BITS));
  return pair;
}

// The chunks of the rows of one matrix.
template <typename F>
struct OneMatrix {
  const uint* w;
  const F* scales;
  const F* biases;
  uint n_in;
  uint n_chunks;

  inline uint place(uint chunk) const {
    return chunk;
  }
  inline const uint* w_at(uint) const {
    return w;
  }
  inline const F* scales_at(uint) const {
    return scales;
  }
  inline const F* biases_at(uint) const {
    return biases;
  }
  inline float factor(uint) const {
    return 1.0f;
  }
};

// The chunks of the rows of several experts' matrices, one expert after the other.
template <typename I, typename E, typename F>
struct ExpertMatrices {
  I slots;
  E weights;
  const uint* w;
  const F* scales;
  const F* biases;
  uint w_row;
  uint s_row;
  uint b_row;
  uint n_in;
  uint n_chunks;
  uint each;

  inline uint place(uint chunk) const {
    return chunk % each;
  }
  inline const uint* w_at(uint chunk) const {
    return w + ulong(slots[chunk / each]) * w_row;
  }
  inline const F* scales_at(uint chunk) const {
    return scales + ulong(slots[chunk / each]) * s_row;
  }
  inline const F* biases_at(uint chunk) const {
    return biases + ulong(slots[chunk / each]) * b_row;
  }
  inline float factor(uint chunk) const {
    return weights[chunk / each];
  }
};

// A set of chunks of two rows: their words, and the scales and biases of this lane's two units.
template <int BITS, int G, int WORDS>
struct RowSet {
  using S = Shape<BITS, G>;
  uint words[S::SET][2][4];
  float scales[2][2];
  float biases[2][2];

  // Load chunks first, first + step, ... of `from`.
  template <typename From>
  inline void load(const From& from, const uint* rows, uint first, uint step, uint lane) {
    uint c = lane % 4;
#pragma unroll
    for (int i = 0; i < S::SET; ++i) {
      uint chunk = first + i * step;
      uint input = from.place(chunk) * S::CHUNK + c * S::LANE;
      if (chunk < from.n_chunks && input < from.n_in) {
        const uint* w = from.w_at(chunk) + input / (32 / BITS);
        stream_words<WORDS>(w + ulong(rows[0]) * (from.n_in * BITS / 32), words[i][0]);
        stream_words<WORDS>(w + ulong(rows[1]) * (from.n_in * BITS / 32), words[i][1]);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          words[i][0][j] = 0u;
          words[i][1][j] = 0u;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint column = 2 * c + j;
      uint chunk = first + column / S::COLUMNS * step;
      uint input = from.place(chunk) * S::CHUNK + column % S::COLUMNS * S::UNIT;
      bool there = column % S::COLUMNS < S::UNITS && chunk < from.n_chunks && input < from.n_in;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        ulong at = ulong(rows[r]) * (from.n_in / G) + input / G;
        scales[r][j] = there ? float(from.scales_at(chunk)[at]) : 0.0f;
        biases[r][j] = there ? float(from.biases_at(chunk)[at]) : 0.0f;
      }
    }
  }

  // Add to y the products with n chunks of values that are staged from `at` on; they belong to
  // chunk `start` of `from` and those after it. Chunks alternate between CHAINS sums, because a
  // multiplication waits for the previous one that adds to the same sums.
  template <int CHAINS, typename T, typename From>
  inline void add(
      float* y, const From& from, uint at, uint start, uint first, uint step, uint n, uint lane,
      T) const {
    constexpr float OFFSET = Offset<T>::VALUE * (BITS == 4 ? 1.0f : 17.0f);
    Staged& memory = staged();
    uint c = lane % 4;
    float low[CHAINS][4];
    float high[CHAINS][4];
#pragma unroll
    for (int q = 0; q < 4 * CHAINS; ++q) {
      low[q / 4][q % 4] = 0.0f;
      high[q / 4][q % 4] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < S::SET; ++i) {
      uint chunk = first + i * step;
      bool mine = chunk < n && lane / 4 == i * S::COLUMNS + c * S::LANE / S::UNIT;
      uint u = (at + chunk * S::CHUNK + c * S::LANE) / 8;
      const uint4* x = memory.x + (mine ? u / 4 * 5 + u % 4 : STAGED_WORDS / 4);
#pragma unroll
      for (int j = 0; j < S::LANE / 8; ++j) {
        uint4 v = x[j];
        uint right[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          // A fragment's registers: rows n and n + 8 of one pair of inputs, then of the next pair.
          uint left[2][4];
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            const uint* row = words[i][q % 2];
            uint pair = 2 * p + q / 2;
            if (BITS == 4) {
              left[0][q] = pair == 0   ? into_mantissa<T, 0>(row[j])
                           : pair == 1 ? into_mantissa<T, 4>(row[j])
                           : pair == 2 ? into_mantissa<T, 8>(row[j])
                                       : into_mantissa<T, 12>(row[j]);
            } else {
              // Take the same byte of two words.
              uint bytes = __byte_perm(row[2 * j % 4], row[2 * j % 4 + 1], pair * 0x1111 + 0x4400);
              left[0][q] = into_mantissa<T, 0>(bytes);
              left[1][q] = into_mantissa<T, 4>(bytes);
            }
          }
          multiply_fragments(low[i % CHAINS], left[0], right + 2 * p, T());
          if (BITS == 8) {
            multiply_fragments(high[i % CHAINS], left[1], right + 2 * p, T());
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint column = 2 * c + j;
      uint chunk = first + column / S::COLUMNS * step;
      bool there = column % S::COLUMNS < S::UNITS && chunk < n;
      uint unit = at + chunk * S::CHUNK + column % S::COLUMNS * S::UNIT;
      float sum = there ? memory.sums[unit / 16] : 0.0f;
      float factor = there ? from.factor(start + chunk) : 0.0f;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        int at = 2 * r + j;
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < CHAINS; ++i) {
          dot += low[i][at] + (BITS == 4 ? 0.0f : 16.0f * high[i][at]);
        }
        y[r] += factor * (scales[r][j] * (dot - OFFSET * sum) + biases[r][j] * sum);
      }
    }
  }
};

// Write the sums of a warp's rows n and n + 8 to shared memory from `at` on.
inline void leave_rows(float* y, uint at, uint lane) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    y[r] += __shfl_xor_sync(0xffffffffu, y[r], 1);
    y[r] += __shfl_xor_sync(0xffffffffu, y[r], 2);
    if (lane % 4 == 0) {
      staged().parts[at + lane / 4 + 8 * r] = y[r];
    }
  }
}

// A row's sum of squares, computed by 32 * N threads. Contains a barrier.
template <int N, typename T>
inline float sum_squares(const T* x, uint n, uint simdgroup, uint lane) {
  float squares = 0.0f;
  bool aligned = is_aligned(x);
  for (uint i = 8 * (32 * simdgroup + lane); i < n; i += 8 * 32 * N) {
    float values[8];
    read_eight(x + i, aligned, values);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      squares = fmaf(values[j], values[j], squares);
    }
  }
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    squares += __shfl_xor_sync(0xffffffffu, squares, lanes);
  }
  float* all = staged().squares;
  if (lane == 0) {
    all[simdgroup] = squares;
  }
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    sum += all[i];
  }
  return sum;
}

template <
    int BITS, bool FLOATS, int G, int WORDS, int ROWS, int PARTS, bool NORM, typename T, typename N,
    typename F>
inline typename TensorRows<T, FLOATS ? 0 : BITS>::result rows_of_matrices(
    const T* x,
    const N* norm,
    float eps,
    const uint* w,
    const F* scales,
    const F* biases,
    const uint* w1,
    const F* scales1,
    const F* biases1,
    uint row,
    uint n_in,
    uint n_out,
    float* sums,
    uint simdgroup,
    uint lane) {
  using S = Shape<BITS, G>;
  constexpr int TILES = ROWS / 16;
  constexpr uint AT_ONCE = STAGED;
  uint warp = simdgroup % 4;
  bool aligned = is_aligned(x);
  uint thread_index = simdgroup * 32 + lane;
  uint n_chunks = S::chunks(n_in);
  bool second = PARTS == 2 && simdgroup >= 4;
  OneMatrix<F> matrix = {
      second ? w1 : w, second ? scales1 : scales, second ? biases1 : biases, n_in, n_chunks};
  float y[TILES][2];
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    y[tile][0] = 0.0f;
    y[tile][1] = 0.0f;
  }
  RowSet<BITS, G, WORDS> next;
  auto load = [&](uint tile, uint first) {
    uint n = row + 16 * tile + lane / 4;
    uint rows[2] = {min(n, n_out - 1), min(n + 8, n_out - 1)};
    next.load(matrix, rows, first, 4u, lane);
  };
  load(0, warp);
  float scale = 1.0f;
  if (NORM) {
    scale = rsqrt(sum_squares<4 * PARTS>(x, n_in, simdgroup, lane) / float(n_in) + eps);
  }
  stage_zeros(thread_index);
  for (uint start = 0; start < n_in; start += AT_ONCE) {
    uint first_chunk = start / S::CHUNK;
    uint n_here = min(n_in - start, AT_ONCE);
    uint n = S::chunks(n_here);
    if (start > 0) {
      __syncthreads();
      load(0, first_chunk + warp);
    }
    auto read = [&](uint i, float* values) {
      read_eight(x + start + i, aligned, values);
      if (NORM) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          values[j] *= scale * float(norm[start + i + j]);
        }
      }
    };
    stage<T, BITS, G>(read, n_here, 0u, thread_index, 128 * PARTS);
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      for (uint first = warp; first < n; first += 4 * S::SET) {
        RowSet<BITS, G, WORDS> set = next;
        if (first + 4 * S::SET < n) {
          load(tile, first_chunk + first + 4 * S::SET);
        } else if (tile + 1 < TILES) {
          load(tile + 1, first_chunk + warp);
        }
        set.template add<TILES == 1 ? 2 : 1>(
            y[tile], matrix, 0u, first_chunk, first, 4u, n, lane, T());
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    leave_rows(y[tile], simdgroup * ROWS + 16 * tile, lane);
  }
  __syncthreads();
  if (thread_index < PARTS * ROWS) {
    const float* parts =
        staged().parts + thread_index / ROWS * 4 * ROWS + thread_index % ROWS;
    sums[thread_index] = (parts[0] + parts[ROWS]) + (parts[2 * ROWS] + parts[3 * ROWS]);
  }
  __syncthreads();
}
