// Element by element: residual, gates, SwiGLU and de-interleaving.
#include "moeflux.h"

// out = a + b over n values.
//
// a, b, out: [n]. Launch: one thread a value. One addition in float32 and one rounding,
// as MLX's own a + b.
template <typename T>
[[kernel]] void residual_add(
    device const T* a,
    device const T* b,
    constant uint& n,
    device T* out,
    uint i [[thread_position_in_grid]]) {
  if (i < n) {
    out[i] = T(float(a[i]) + float(b[i]));
  }
}
