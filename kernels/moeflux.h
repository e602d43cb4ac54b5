// What the kernel families share. Valid Metal 3.1 by itself.
#pragma once
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

// Threads of a simdgroup on every Apple GPU; also CUDA's warp.
constexpr constant int SIMD = 32;

inline float sigmoid(float x) {
  return 1.0f / (1.0f + exp(-x));
}

inline float silu(float x) {
  return x / (1.0f + exp(-x));
}

// Sum over a threadgroup; every thread gets it. `scratch` holds one value a simdgroup.
// All threads of the group must call it: it contains barriers, also one before the
// scratch is written, so that it can be called again with the same scratch.
inline float threadgroup_sum(
    float value, threadgroup float* scratch, uint lane, uint simdgroup, uint n_simdgroups) {
  value = simd_sum(value);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (lane == 0) {
    scratch[simdgroup] = value;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float total = lane < n_simdgroups ? scratch[lane] : 0.0f;
  return simd_sum(total);
}

// Four values in a row as float32, and back. Packed vectors need no more alignment than one
// element, which is all that a view into an array or a file has. The few values that come
// in `constant` memory are read one by one.
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

// Columns i to i + 3 of a row of n as float32, and back; those past the end are 0 and are
// not written.
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

// Lane l's share of a row of 32 * PER values.
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
