// One token's inputs in shared memory for tensor cores, in CUDA C++: in the order in which packed
// words yield their values, with the sum of every unit of inputs that share a scale. See
// `rows_cuda.h`.

constexpr int STAGED = 8192;
constexpr int STAGED_WORDS = STAGED / 32 * 20;

struct Staged {
  uint4 x[(STAGED_WORDS + 16) / 4];
  float sums[STAGED / 16];
  float parts[8 * 64];
  float squares[32];
};

inline Staged& staged() {
  __shared__ Staged memory;
  return memory;
}

template <int BITS, int G>
struct Shape {
  static constexpr int LANE = 128 / BITS;
  static constexpr int CHUNK = 4 * LANE;
  static constexpr int UNIT = G < CHUNK ? G : CHUNK;
  static constexpr int UNITS = CHUNK / UNIT;
  static constexpr int COLUMNS = UNITS < 2 ? 2 : UNITS;
  // Number of chunks whose sums fill the eight columns.
  static constexpr int SET = 8 / COLUMNS;

  static inline uint chunks(uint n) {
    return (n + CHUNK - 1) / CHUNK;
  }
};

inline bool is_aligned(const void* at) {
  return ((ulong)at) % 16 == 0;
}

// Load eight values, in one access if they are aligned.
template <typename T>
inline void read_eight(const T* from, bool aligned, float* to) {
  if (aligned) {
    uint words[4];
    uint4 v = *(const uint4*)from;
    words[0] = v.x;
    words[1] = v.y;
    words[2] = v.z;
    words[3] = v.w;
    const T* values = (const T*)words;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      to[i] = float(values[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      to[i] = float(from[i]);
    }
  }
}

// Store values 8 u to 8 u + 7 of x, if `there`. All lanes of a warp must call it with consecutive
// u, because they add their sums with shuffles.
template <typename T, int UNIT>
inline void stage_eight(const float* values, uint u, bool there) {
  Staged& memory = staged();
  uint4 pairs;
  pairs.x = packed_pair<T>(values[0], values[4]);
  pairs.y = packed_pair<T>(values[1], values[5]);
  pairs.z = packed_pair<T>(values[2], values[6]);
  pairs.w = packed_pair<T>(values[3], values[7]);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    sum += float(T(values[i]));
  }
#pragma unroll
  for (int lanes = 1; lanes < UNIT / 8; lanes *= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  }
  if (there) {
    memory.x[u / 4 * 5 + u % 4] = pairs;
    if (u % (UNIT / 8) == 0) {
      memory.sums[u / 2] = sum;
    }
  }
}

// Stage n_in values at place `to`, padded with zeros to a whole chunk. `read(i, values)` loads
// eight values from i on. `threads` threads share the work in whole warps.
template <typename T, int BITS, int G, typename Read>
inline void stage(const Read& read, uint n_in, uint to, uint thread_index, uint threads) {
  using S = Shape<BITS, G>;
  uint n = S::chunks(n_in) * S::CHUNK / 8;
  for (uint first = thread_index / 32 * 32; first < n; first += threads) {
    uint u = first + thread_index % 32;
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      values[i] = 0.0f;
    }
    if (8 * u < n_in) {
      read(8 * u, values);
    }
    stage_eight<T, S::UNIT>(values, to / 8 + u, u < n);
  }
}

inline void stage_zeros(uint thread_index) {
  if (thread_index < 4) {
    staged().x[STAGED_WORDS / 4 + thread_index] = uint4(0u, 0u, 0u, 0u);
  }
}
