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
