// `dense_sums` for 16-bit matrices, in CUDA C++. Arguments and results are the same. A thread loads
// 16 bytes of all four rows before it computes, so that these loads are in flight together.

// Load eight values as four words, in one access if they are aligned.
template <typename W>
inline void load_eight(const W* from, bool aligned, uint* to) {
  if (aligned) {
    uint4 v = *(const uint4*)from;
    to[0] = v.x;
    to[1] = v.y;
    to[2] = v.z;
    to[3] = v.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[i] = packed_pair<W>(float(from[2 * i]), float(from[2 * i + 1]));
    }
  }
}

template <bool NORM, typename T, typename N, typename W>
inline typename SixteenBits<W>::result dense_sums(
    const T* x, const N* norm, const W* w, uint row, uint n_in, uint n_out, uint thread_index,
    float* sums) {
  // Rows are a multiple of 8 values long, so all are aligned if the first one is.
  bool aligned = ((ulong)w) % 16 == 0;
  const W* rows[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    rows[r] = w + ulong(min(row + uint(r), n_out - 1)) * n_in;
  }
  for (uint at = 8 * thread_index; at < n_in; at += 8 * 128) {
    uint words[4][4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      load_eight(rows[r] + at, aligned, words[r]);
    }
    float4 halves[2] = {read4(x + at), read4(x + at + 4)};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (NORM) {
        sums[4] += dot(halves[h], halves[h]);
        halves[h] *= read4(norm + at + 4 * h);
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const W* values = (const W*)words[r] + 4 * h;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[r] = fmaf(halves[h][i], float(values[i]), sums[r]);
        }
      }
    }
  }
}
