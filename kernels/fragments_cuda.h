// Fragments of 16-bit rows for tensor cores, in CUDA C++. The tensor-core forms of the helpers
// share them.

// Enables an overload for the row types of tensor cores; other types use the Metal helper.
template <typename T>
struct SixteenBits {};
template <>
struct SixteenBits<bfloat> {
  using result = void;
};
template <>
struct SixteenBits<half> {
  using result = void;
};

template <typename T>
inline uint packed_pair(float a, float b);
template <>
inline uint packed_pair<bfloat>(float a, float b) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return *(uint*)&pair;
}
template <>
inline uint packed_pair<half>(float a, float b) {
  __half2 pair = __floats2half2_rn(a, b);
  return *(uint*)&pair;
}

// c += a b for a 16x16 and a 16x8 factor.
inline void multiply_fragments(float* c, const uint* a, const uint* b, bfloat) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
inline void multiply_fragments(float* c, const uint* a, const uint* b, half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Load N words in the widest accesses that their number and alignment allow.
template <int N>
inline void read_words(const uint* from, uint* to) {
  if (N % 4 == 0 && ((ulong)from) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      uint4 four = ((const uint4*)from)[i];
      to[4 * i] = four.x;
      to[4 * i + 1] = four.y;
      to[4 * i + 2] = four.z;
      to[4 * i + 3] = four.w;
    }
  } else if (N % 2 == 0 && ((ulong)from) % 8 == 0) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      uint2 two = ((const uint2*)from)[i];
      to[2 * i] = two.x;
      to[2 * i + 1] = two.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      to[i] = from[i];
    }
  }
}

// Load 2 N values as N words from any address that is aligned to one value.
template <int N, typename T>
inline void read_values(const T* from, uint* to) {
  if (((ulong)from) % 4 == 0) {
    read_words<N>((const uint*)from, to);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      to[i] = packed_pair<T>(float(from[2 * i]), float(from[2 * i + 1]));
    }
  }
}
