// Metal's types and functions in CUDA C++. This text precedes a kernel's source for NVIDIA's
// compiler. Everything is in namespace msl, so that no name resolves to CUDA's vector types or
// half, or to MLX's helpers, by mistake.
//
// Address spaces are removed from the source first, because CUDA uses some of the same words.
// `threadgroup T x[n];`, which declares storage, becomes `MSL_SHARED T x[n];`.
#define MSL_SHARED __shared__
#define inline __device__ __forceinline__
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#ifndef FLT_MIN
#define FLT_MIN 1.175494351e-38f
#endif

namespace msl {

using uint = unsigned int;
using ushort = unsigned short;
using uchar = unsigned char;
using ulong = unsigned long;
using half = __half;
using bfloat = __nv_bfloat16;

template <typename T>
struct Same {
  using type = T;
};

// Vectors with elementwise arithmetic and swizzles of two elements.
template <typename T, int N>
struct Vec;
template <typename T, int N, int A, int B>
struct Swizzle {
  T all[N];
  inline operator Vec<T, 2>() const {
    return Vec<T, 2>(all[A], all[B]);
  }
};
#define MSL_VECTOR_COMMON(N)                                  \
  Vec() = default;                                            \
  inline explicit Vec(T value) {                              \
    for (int i = 0; i < N; ++i) {                             \
      (*this)[i] = value;                                     \
    }                                                         \
  }                                                           \
  template <typename U>                                       \
  inline explicit Vec(const Vec<U, N>& other) {               \
    for (int i = 0; i < N; ++i) {                             \
      (*this)[i] = T(other[i]);                               \
    }                                                         \
  }                                                           \
  inline T& operator[](int i) {                               \
    return (&x)[i];                                           \
  }                                                           \
  inline const T& operator[](int i) const {                   \
    return (&x)[i];                                           \
  }

template <typename T>
struct alignas(2 * sizeof(T)) Vec<T, 2> {
  T x, y;
  MSL_VECTOR_COMMON(2)
  inline Vec(T x, T y) : x(x), y(y) {}
};
template <typename T>
struct alignas(4 * sizeof(T)) Vec<T, 3> {
  union {
    struct {
      T x, y, z;
    };
    Swizzle<T, 3, 0, 1> xy;
    Swizzle<T, 3, 1, 2> yz;
  };
  MSL_VECTOR_COMMON(3)
  inline Vec(T x, T y, T z) : x(x), y(y), z(z) {}
};
template <typename T>
struct alignas(4 * sizeof(T)) Vec<T, 4> {
  union {
    struct {
      T x, y, z, w;
    };
    Swizzle<T, 4, 0, 1> xy;
    Swizzle<T, 4, 2, 3> zw;
    Swizzle<T, 4, 0, 2> xz;
    Swizzle<T, 4, 1, 3> yw;
  };
  MSL_VECTOR_COMMON(4)
  inline Vec(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
  inline Vec(Vec<T, 2> a, Vec<T, 2> b) : x(a.x), y(a.y), z(b.x), w(b.y) {}
};
// half and bfloat have constructors, and an anonymous union cannot hold such types.
#define MSL_SMALL_VECTOR(T)                                            \
  template <>                                                          \
  struct alignas(4 * sizeof(T)) Vec<T, 4> {                            \
    T x, y, z, w;                                                      \
    Vec() = default;                                                   \
    template <typename U>                                              \
    inline explicit Vec(const Vec<U, 4>& v)                            \
        : x(T(v.x)), y(T(v.y)), z(T(v.z)), w(T(v.w)) {}                \
    inline T& operator[](int i) {                                      \
      return (&x)[i];                                                  \
    }                                                                  \
    inline const T& operator[](int i) const {                          \
      return (&x)[i];                                                  \
    }                                                                  \
  };
MSL_SMALL_VECTOR(half)
MSL_SMALL_VECTOR(bfloat)

#define MSL_OPERATOR(op)                                                     \
  template <typename T, int N>                                               \
  inline Vec<T, N> operator op(const Vec<T, N>& a, const Vec<T, N>& b) {     \
    Vec<T, N> out;                                                           \
    for (int i = 0; i < N; ++i) {                                            \
      out[i] = T(a[i] op b[i]);                                              \
    }                                                                        \
    return out;                                                              \
  }                                                                          \
  template <typename T, int N>                                               \
  inline Vec<T, N> operator op(const Vec<T, N>& a, typename Same<T>::type b) { \
    return a op Vec<T, N>(b);                                                \
  }                                                                          \
  template <typename T, int N>                                               \
  inline Vec<T, N> operator op(typename Same<T>::type a, const Vec<T, N>& b) { \
    return Vec<T, N>(a) op b;                                                \
  }                                                                          \
  template <typename T, int N, int A, int B>                                 \
  inline Vec<T, 2> operator op(const Swizzle<T, N, A, B>& a, const Vec<T, 2>& b) { \
    return Vec<T, 2>(a) op b;                                                \
  }                                                                          \
  template <typename T, int N, typename B>                                   \
  inline Vec<T, N>& operator op##=(Vec<T, N>& a, const B& b) {               \
    return a = a op b;                                                       \
  }
MSL_OPERATOR(+)
MSL_OPERATOR(-)
MSL_OPERATOR(*)
MSL_OPERATOR(/)
MSL_OPERATOR(&)
MSL_OPERATOR(|)
MSL_OPERATOR(^)
MSL_OPERATOR(>>)
MSL_OPERATOR(<<)
template <typename T, int N>
inline Vec<T, N> operator-(const Vec<T, N>& a) {
  return T(0) - a;
}

using float2 = Vec<float, 2>;
using float3 = Vec<float, 3>;
using float4 = Vec<float, 4>;
using half4 = Vec<half, 4>;
using bfloat4 = Vec<bfloat, 4>;
using int2 = Vec<int, 2>;
using uint2 = Vec<uint, 2>;
using uint3 = Vec<uint, 3>;
using uint4 = Vec<uint, 4>;
using ushort2 = Vec<ushort, 2>;
using ushort4 = Vec<ushort, 4>;

// Store words in one access. In C++ the compiler could split it, or merge it with neighbouring
// stores.
template <int N>
struct Words {};
inline void store_words(unsigned int* to, const unsigned int* from, Words<4>) {
  asm volatile("st.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(from[0]), "r"(from[1]),
               "r"(from[2]), "r"(from[3])
               : "memory");
}
inline void store_words(unsigned int* to, const unsigned int* from, Words<2>) {
  asm volatile("st.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(from[0]), "r"(from[1]) : "memory");
}

// Load or store four values without required alignment. Aligned ones take one access. Rows whose
// width is a multiple of four are aligned, so all threads of a warp take the same branch.
template <typename T>
struct Packed4 {
  T all[4];
  inline bool aligned() const {
    return ((unsigned long)this) % (4 * sizeof(T)) == 0;
  }
  inline operator Vec<T, 4>() const {
    if (aligned()) {
      return *(const Vec<T, 4>*)this;
    }
    Vec<T, 4> out;
    for (int i = 0; i < 4; ++i) {
      out[i] = all[i];
    }
    return out;
  }
  inline Packed4& operator=(const Vec<T, 4>& values) {
    if (aligned()) {
      store_words((unsigned int*)this, (const unsigned int*)&values, Words<sizeof(values) / 4>());
    } else {
      for (int i = 0; i < 4; ++i) {
        all[i] = values[i];
      }
    }
    return *this;
  }
};
using packed_float4 = Packed4<float>;
using packed_half4 = Packed4<half>;
using packed_bfloat4 = Packed4<bfloat>;

template <typename To, typename From>
inline To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type between sizes");
  To out;
  memcpy(&out, &x, sizeof(To));
  return out;
}

// Mathematics; vectors are handled elementwise.
#define MSL_FUNCTION1(name, call)                  \
  inline float name(float x) {                     \
    return call;                                   \
  }                                                \
  template <int N>                                 \
  inline Vec<float, N> name(Vec<float, N> values) { \
    for (int i = 0; i < N; ++i) {                  \
      values[i] = name(values[i]);                 \
    }                                              \
    return values;                                 \
  }
#define MSL_FUNCTIONS(fast)           \
  MSL_FUNCTION1(exp, fast##expf(x))   \
  MSL_FUNCTION1(log, fast##logf(x))   \
  MSL_FUNCTION1(sin, fast##sinf(x))   \
  MSL_FUNCTION1(cos, fast##cosf(x))   \
  MSL_FUNCTION1(exp2, ::exp2f(x))     \
  MSL_FUNCTION1(log2, ::log2f(x))     \
  MSL_FUNCTION1(tanh, ::tanhf(x))     \
  MSL_FUNCTION1(sqrt, ::sqrtf(x))     \
  MSL_FUNCTION1(rsqrt, ::rsqrtf(x))
// Neither function is CUDA's fast form, whose error exceeds the tolerances of these kernels.
MSL_FUNCTIONS()
namespace precise {
MSL_FUNCTIONS()
}
namespace fast {
MSL_FUNCTIONS(__)
}
MSL_FUNCTION1(fabs, ::fabsf(x))
MSL_FUNCTION1(floor, ::floorf(x))
MSL_FUNCTION1(ceil, ::ceilf(x))
MSL_FUNCTION1(rint, ::rintf(x))
inline float fmax(float a, float b) {
  return ::fmaxf(a, b);
}
inline float fmin(float a, float b) {
  return ::fminf(a, b);
}
inline float pow(float a, float b) {
  return ::powf(a, b);
}
inline float fma(float a, float b, float c) {
  return ::fmaf(a, b, c);
}
template <int N>
inline Vec<float, N> fma(Vec<float, N> a, Vec<float, N> b, Vec<float, N> c) {
  for (int i = 0; i < N; ++i) {
    a[i] = fma(a[i], b[i], c[i]);
  }
  return a;
}
template <typename T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
inline T max(T a, T b) {
  return a < b ? b : a;
}
template <typename T>
inline T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
template <typename T>
inline T select(T a, T b, bool c) {
  return c ? b : a;
}
inline uint popcount(uint x) {
  return __popc(x);
}
inline uint clz(uint x) {
  return __clz(x);
}
inline uint ctz(uint x) {
  return x == 0 ? 32 : __ffs(x) - 1;
}
template <typename T, int N>
inline T dot(const Vec<T, N>& a, const Vec<T, N>& b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; ++i) {
    sum += a[i] * b[i];
  }
  return sum;
}

// Positions of a thread. Launches have only complete threadgroups of complete warps.
inline uint3 thread_position_in_threadgroup() {
  return uint3(threadIdx.x, threadIdx.y, threadIdx.z);
}
inline uint3 threadgroup_position_in_grid() {
  return uint3(blockIdx.x, blockIdx.y, blockIdx.z);
}
inline uint3 threads_per_threadgroup() {
  return uint3(blockDim.x, blockDim.y, blockDim.z);
}
inline uint3 threadgroups_per_grid() {
  return uint3(gridDim.x, gridDim.y, gridDim.z);
}
inline uint3 threads_per_grid() {
  return threadgroups_per_grid() * threads_per_threadgroup();
}
inline uint3 thread_position_in_grid() {
  return threadgroup_position_in_grid() * threads_per_threadgroup() +
      thread_position_in_threadgroup();
}
inline uint thread_index_in_threadgroup() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
inline uint thread_index_in_simdgroup() {
  return thread_index_in_threadgroup() % 32;
}
inline uint simdgroup_index_in_threadgroup() {
  return thread_index_in_threadgroup() / 32;
}
inline uint threads_per_simdgroup() {
  return 32;
}
inline uint simdgroups_per_threadgroup() {
  return (blockDim.x * blockDim.y * blockDim.z + 31) / 32;
}

// Barriers.
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
inline void threadgroup_barrier(mem_flags) {
  __syncthreads();
}
inline void simdgroup_barrier(mem_flags) {
  __syncwarp();
}

// A simdgroup is a warp. All 32 lanes must take part, as they do in these kernels.
constexpr unsigned MSL_ALL = 0xffffffffu;
template <typename T>
inline T simd_shuffle(T x, ushort lane) {
  return __shfl_sync(MSL_ALL, x, lane);
}
template <typename T>
inline T simd_shuffle_xor(T x, ushort mask) {
  return __shfl_xor_sync(MSL_ALL, x, mask);
}
template <typename T>
inline T simd_shuffle_up(T x, ushort delta) {
  return __shfl_up_sync(MSL_ALL, x, delta);
}
template <typename T>
inline T simd_shuffle_down(T x, ushort delta) {
  return __shfl_down_sync(MSL_ALL, x, delta);
}
template <typename T>
inline T simd_broadcast(T x, ushort lane) {
  return __shfl_sync(MSL_ALL, x, lane);
}
template <typename T>
inline T simd_broadcast_first(T x) {
  return __shfl_sync(MSL_ALL, x, 0);
}
#define MSL_REDUCTION(name, width, combined)    \
  template <typename T>                         \
  inline T name(T x) {                          \
    for (int mask = width; mask > 0; mask /= 2) { \
      T other = simd_shuffle_xor(x, mask);      \
      x = combined;                             \
    }                                           \
    return x;                                   \
  }
MSL_REDUCTION(simd_sum, 16, x + other)
MSL_REDUCTION(simd_product, 16, x * other)
MSL_REDUCTION(simd_max, 16, max(x, other))
MSL_REDUCTION(simd_min, 16, min(x, other))
MSL_REDUCTION(quad_sum, 2, x + other)
MSL_REDUCTION(quad_max, 2, max(x, other))
MSL_REDUCTION(quad_min, 2, min(x, other))
template <typename T>
inline T quad_shuffle_xor(T x, ushort mask) {
  return __shfl_xor_sync(MSL_ALL, x, mask, 4);
}
template <typename T>
inline T quad_broadcast(T x, ushort lane) {
  return __shfl_sync(MSL_ALL, x, lane, 4);
}
template <typename T>
inline T simd_prefix_inclusive_sum(T x) {
  for (int delta = 1; delta < 32; delta *= 2) {
    T other = __shfl_up_sync(MSL_ALL, x, delta);
    x = thread_index_in_simdgroup() >= delta ? x + other : x;
  }
  return x;
}
template <typename T>
inline T simd_prefix_exclusive_sum(T x) {
  T up = __shfl_up_sync(MSL_ALL, simd_prefix_inclusive_sum(x), 1);
  return thread_index_in_simdgroup() == 0 ? T(0) : up;
}
struct simd_vote {
  uint votes;
  inline explicit operator ulong() const {
    return votes;
  }
};
inline simd_vote simd_ballot(bool x) {
  return {__ballot_sync(MSL_ALL, x)};
}
inline bool simd_all(bool x) {
  return __all_sync(MSL_ALL, x);
}
inline bool simd_any(bool x) {
  return __any_sync(MSL_ALL, x);
}
inline bool simd_is_first() {
  return thread_index_in_simdgroup() == 0;
}

// 8x8 matrices. A lane holds two neighbours of a row, in the order of a tensor core's left factor
// and sum. Metal promises no order, so a kernel that depends on it calls these functions for a
// lane's place. The kernel defines Apple's order as templates of the same names; these take
// precedence.
inline uint matrix_row(uint lane) {
  return lane / 4;
}
inline uint matrix_column(uint lane) {
  return lane % 4 * 2;
}
inline float matrix_row_sum(float x) {
  return quad_sum(x);
}
inline float matrix_row_max(float x) {
  return quad_max(x);
}
template <typename T, int R, int C>
struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "Metal has 8x8 matrices only");
  T elements[2];
  inline T* thread_elements() {
    return elements;
  }
  inline const T* thread_elements() const {
    return elements;
  }
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;
template <typename T, int R, int C>
inline simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, R, C> m;
  m.elements[0] = m.elements[1] = value;
  return m;
}
template <typename T, typename P>
inline void simdgroup_load(
    simdgroup_matrix<T, 8, 8>& m, P source, ulong stride = 8, int = 0, bool transposed = false) {
  __syncwarp();
  uint lane = thread_index_in_simdgroup();
  uint row = matrix_row(lane), column = matrix_column(lane);
  for (int i = 0; i < 2; ++i) {
    m.elements[i] = transposed ? source[(column + i) * stride + row]
                               : source[row * stride + column + i];
  }
}
template <typename T, typename P>
inline void simdgroup_store(
    const simdgroup_matrix<T, 8, 8>& m,
    P target,
    ulong stride = 8,
    int = 0,
    bool transposed = false) {
  __syncwarp();
  uint lane = thread_index_in_simdgroup();
  uint row = matrix_row(lane), column = matrix_column(lane);
  for (int i = 0; i < 2; ++i) {
    target[transposed ? (column + i) * stride + row : row * stride + column + i] = m.elements[i];
  }
}

// The top 11 mantissa bits of two float32, as tensor cores take them, and the next 11 bits.
struct Split {
  uint high[2], low[2];
  inline Split(float x, float y) {
    float values[2] = {x, y};
    for (int i = 0; i < 2; ++i) {
      high[i] = __float_as_uint(values[i]) & 0xffffe000u;
      low[i] = __float_as_uint(values[i] - __uint_as_float(high[i])) & 0xffffe000u;
    }
  }
};
// top += first * right and bottom += second * right, for 8x8 factors of 11 bits. A lane has columns
// 2t and 2t + 1 of a row of a left factor, and rows 2t and 2t + 1 of a column of the right factor.
inline void multiply_halves(
    float* top, float* bottom, const uint* first, const uint* second, const uint* right) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(top[0]), "+f"(top[1]), "+f"(bottom[0]), "+f"(bottom[1])
      : "r"(first[0]), "r"(second[0]), "r"(first[1]), "r"(second[1]), "r"(right[0]),
        "r"(right[1]));
}
// Split each value into a high and a low part, and omit the product of both low parts: the error is
// at most 2^-21 of the largest product. Values must be finite, as they are in these kernels.
template <typename D, typename A, typename B, typename S>
inline void simdgroup_multiply_accumulate(
    simdgroup_matrix<D, 8, 8>& d,
    simdgroup_matrix<A, 8, 8> a,
    simdgroup_matrix<B, 8, 8> b,
    simdgroup_matrix<S, 8, 8> c) {
  // Lanes of even rows send one element while lanes of odd rows send the other, so two shuffles
  // transpose b.
  uint lane = thread_index_in_simdgroup();
  bool odd = lane / 4 % 2;
  ushort from = lane % 4 * 8 + odd * 4 + lane / 8;
  float b0 = float(b.elements[0]), b1 = float(b.elements[1]);
  float same = simd_shuffle(odd ? b1 : b0, from);
  float other = simd_shuffle(odd ? b0 : b1, from ^ 4);
  Split left(float(a.elements[0]), float(a.elements[1]));
  Split right(odd ? other : same, odd ? same : other);
  uint none[2] = {0, 0};
  float sum[2] = {float(c.elements[0]), float(c.elements[1])};
  float rest[2] = {0.0f, 0.0f};
  multiply_halves(sum, rest, left.high, left.low, right.high);
  multiply_halves(sum, rest, left.high, none, right.low);
  d.elements[0] = D(sum[0] + rest[0]);
  d.elements[1] = D(sum[1] + rest[1]);
}
template <typename D, typename A, typename B>
inline void simdgroup_multiply(
    simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8, 8>(D(0)));
}

// Atomics, relaxed like all of Metal's.
enum memory_order { memory_order_relaxed };
struct atomic_uint {
  uint value;
};
struct atomic_int {
  int value;
};
struct atomic_float {
  float value;
};
template <typename A, typename T>
inline auto atomic_fetch_add_explicit(A* at, T x, memory_order) {
  return atomicAdd(&at->value, x);
}
template <typename A, typename T>
inline auto atomic_fetch_max_explicit(A* at, T x, memory_order) {
  return atomicMax(&at->value, x);
}
template <typename A>
inline auto atomic_load_explicit(const A* at, memory_order) {
  return *(const volatile decltype(at->value)*)&at->value;
}
template <typename A, typename T>
inline void atomic_store_explicit(A* at, T x, memory_order) {
  *(volatile decltype(at->value)*)&at->value = x;
}

} // namespace msl
