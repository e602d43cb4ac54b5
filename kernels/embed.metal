// Token embedding.
#include "moeflux.h"

// Unpack rows token_ids[t] of a quantised embedding.
//
// token_ids: [T], each below V (the caller checks); w: [V, D * BITS / 32] words; scales, biases:
// [V, D / G]; out: [T,D]. Launch: one thread per word, grid (D * BITS / 32, T). A word is one load
// and up to 16 adjacent stores.
template <typename T, typename S, int BITS, int G>
[[kernel]] void embed_gather_4bit(
    device const int* token_ids,
    device const uint* w,
    device const S* scales,
    device const S* biases,
    constant uint& dim,
    device T* out,
    uint2 position [[thread_position_in_grid]]) {
  constexpr int PER_WORD = 32 / BITS;
  constexpr uint MASK = (1u << BITS) - 1u;
  uint first = position.x * PER_WORD;
  if (first >= dim) {
    return;
  }
  ulong at = ulong(token_ids[position.y]) * dim + first;
  uint packed = w[at / PER_WORD];
  float scale = float(scales[at / G]);
  float bias = float(biases[at / G]);
  device T* to = out + ulong(position.y) * dim + first;
#pragma unroll
  for (int j = 0; j < PER_WORD; ++j) {
    to[j] = T(fma(scale, float((packed >> (BITS * j)) & MASK), bias));
  }
}
