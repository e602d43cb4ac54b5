// Token embedding.
#include "moeflux.h"

// A NaN from its bits.
inline float not_a_number() {
  return as_type<float>(0x7fc00000u);
}

// Unpack rows token_ids[t] of a quantised embedding.
//
// token_ids: [T]; w: [V, D * BITS / 32] words; scales, biases: [V, D / G]; out: [T,D], NaN for ids
// outside the V rows, because ids are data that a caller may not have seen. Launch: one thread per
// word, grid (D * BITS / 32, T). A word is one load and up to 16 adjacent stores.
template <typename T, typename S, int BITS, int G>
[[kernel]] void embed_gather_4bit(
    device const int* token_ids,
    device const uint* w,
    device const S* scales,
    device const S* biases,
    constant uint& n_rows,
    constant uint& dim,
    device T* out,
    uint2 position [[thread_position_in_grid]]) {
  constexpr int PER_WORD = 32 / BITS;
  constexpr uint MASK = (1u << BITS) - 1u;
  uint first = position.x * PER_WORD;
  if (first >= dim) {
    return;
  }
  uint id = uint(token_ids[position.y]);
  bool inside = id < n_rows;
  ulong at = ulong(inside ? id : 0u) * dim + first;
  uint packed = w[at / PER_WORD];
  float scale = float(scales[at / G]);
  float bias = inside ? float(biases[at / G]) : not_a_number();
  device T* to = out + ulong(position.y) * dim + first;
#pragma unroll
  for (int j = 0; j < PER_WORD; ++j) {
    to[j] = T(fma(scale, float((packed >> (BITS * j)) & MASK), bias));
  }
}

// Rows token_ids[t] of a dense embedding.
//
// token_ids: [T]; w: [V,D]; out: [T,D], NaN for ids outside the V rows. Launch: four columns per
// thread, grid (D / 4, T). MLX needs several operations to keep ids inside and to mark the others.
template <typename T, typename W>
[[kernel]] void embed_gather_dense(
    device const int* token_ids,
    device const W* w,
    constant uint& n_rows,
    constant uint& dim,
    device T* out,
    uint2 position [[thread_position_in_grid]]) {
  uint first = 4 * position.x;
  if (first >= dim) {
    return;
  }
  uint id = uint(token_ids[position.y]);
  bool inside = id < n_rows;
  float4 values = read_columns(w + ulong(inside ? id : 0u) * dim, first, dim);
  values = inside ? values : float4(not_a_number());
  write_columns(out + ulong(position.y) * dim, first, dim, values);
}
