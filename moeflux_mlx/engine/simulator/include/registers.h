// What the simulator's runtime does, as one instruction of a GPU each: for an estimate of
// the registers that a kernel takes. Nothing of this is ever run.
#pragma once

namespace __msl {

// A value that only the hardware knows how to make of another one.
template <typename T> inline T opaque(T x) {
  constexpr int N = (sizeof(T) + 3) / 4;
  uint words[N] = {};
  __builtin_memcpy(words, &x, sizeof(T));
  for (int i = 0; i < N; ++i) asm("; of %1" : "=v"(words[i]) : "v"(words[i]));
  __builtin_memcpy(&x, words, sizeof(T));
  return x;
}
template <typename T> inline T opaque(T x, uint lane) {
  constexpr int N = (sizeof(T) + 3) / 4;
  uint words[N] = {};
  __builtin_memcpy(words, &x, sizeof(T));
  for (int i = 0; i < N; ++i) asm("; of %1 %2" : "=v"(words[i]) : "v"(words[i]), "v"(lane));
  __builtin_memcpy(&x, words, sizeof(T));
  return x;
}

inline void multiply(float* sum, float a0, float a1, float b0, float b1) {
  asm("; %0 %1 += %2 %3 * %4 %5" : "+v"(sum[0]), "+v"(sum[1]) : "v"(a0), "v"(a1), "v"(b0), "v"(b1));
}

inline void __msl_barrier(unsigned, unsigned long) {
  __builtin_amdgcn_fence(__ATOMIC_SEQ_CST, "workgroup");
  __builtin_amdgcn_s_barrier();
}
inline void __msl_simd_barrier(unsigned, unsigned long) { __builtin_amdgcn_wave_barrier(); }
inline unsigned __msl_lane() { return __builtin_amdgcn_mbcnt_lo(~0u, 0u); }

inline float exp2f(float x) { return __builtin_amdgcn_exp2f(x); }
inline float expf(float x) { return exp2f(x * 1.44269502f); }
inline float exp10f(float x) { return exp2f(x * 3.32192809f); }
inline float log2f(float x) { return __builtin_amdgcn_logf(x); }
inline float logf(float x) { return log2f(x) * 0.693147182f; }
inline float log10f(float x) { return log2f(x) * 0.301029996f; }
inline float sinf(float x) { return __builtin_amdgcn_sinf(x * 0.159154943f); }
inline float cosf(float x) { return __builtin_amdgcn_cosf(x * 0.159154943f); }
inline float powf(float x, float y) { return exp2f(y * log2f(x)); }
inline float fmodf(float x, float y) { return opaque(x + y); }
inline float atan2f(float x, float y) { return opaque(x + y); }
inline float tanf(float x) { return opaque(x); }
inline float asinf(float x) { return opaque(x); }
inline float acosf(float x) { return opaque(x); }
inline float atanf(float x) { return opaque(x); }
inline float sinhf(float x) { return opaque(x); }
inline float coshf(float x) { return opaque(x); }
inline float tanhf(float x) { return opaque(x); }
inline float asinhf(float x) { return opaque(x); }
inline float acoshf(float x) { return opaque(x); }
inline float atanhf(float x) { return opaque(x); }
inline float ldexpf(float x, int n) { return opaque(x + (float)n); }
inline float frexpf(float x, int* n) { return *n = (int)opaque(x), opaque(x); }
inline float modff(float x, float* whole) { return *whole = opaque(x), opaque(x); }

}
