// `attend` for 16-bit rows on tensor cores, in CUDA C++. Arguments and results are the same.
//
// In a block of 32 columns, lane (n = lane / 4, c = lane % 4) reads columns 8 c to 8 c + 7 of head
// n's queries, and of rows n and n + 8 as keys. As values it reads columns 4 n to 4 n + 3 of rows
// 2 c, 2 c + 1, 2 c + 8 and 2 c + 9. A product may take its columns in any order that both factors
// share, so nothing is transposed in shared memory. The next keys are under way while a step's
// weights are computed. Weights are rounded to the rows' type.

// Load N neighbouring columns as N / 2 words; ALIGNED: in one access.
template <int N, bool ALIGNED, typename T>
inline void read_neighbours(const T* from, uint* to) {
  if (ALIGNED) {
    read_words<N / 2>((const uint*)__builtin_assume_aligned(from, 2 * N), to);
  } else {
    read_values<N / 2>(from, to);
  }
}

// Load eight columns of a row of n as four words, with zeros past its end.
template <bool ALIGNED, typename T>
inline void read_eight_columns(const T* row, uint column, uint n, uint* to) {
  if (column + 8 <= n) {
    read_neighbours<8, ALIGNED>(row + column, to);
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float pair[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      uint at = column + 2 * j + k;
      pair[k] = at < n ? float(row[at]) : 0.0f;
    }
    to[j] = packed_pair<T>(pair[0], pair[1]);
  }
}

template <int BLOCKS, int ROPE_BLOCKS, bool ALIGNED, typename T>
inline void attend_on_tensor_cores(
    const T* q,
    const T* q_pe,
    const T* latent,
    const T* rope,
    uint head,
    uint n_heads,
    uint latent_dim,
    uint rope_dim,
    float scale,
    uint begin,
    uint end,
    float* scratch,
    uint lane,
    uint simdgroup,
    uint n_simdgroups,
    Attended<BLOCKS>& result) {
  uint n = lane / 4;
  uint c = lane % 4;
  uint queries[BLOCKS][4];
  uint rope_queries[ROPE_BLOCKS][4];
  uint keys[2][BLOCKS][4];
  uint rope_keys[2][ROPE_BLOCKS][4];
  float sums[BLOCKS][4][4];
  auto block_at = [&](int b) {
    return 32 * (simdgroup + b * n_simdgroups);
  };
  // The rows of a step whose values and weights a lane holds.
  auto value_row = [&](int i) {
    return uint(i / 2 * 8 + i % 2) + 2 * c;
  };
  auto read_keys = [&](uint first) {
#pragma unroll
    for (int half_step = 0; half_step < 2; ++half_step) {
      uint at = first + 8 * half_step + n;
      ulong from = at < end ? at : first;
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
        const T* row = latent + from * latent_dim;
        read_eight_columns<ALIGNED>(row, block_at(b) + 8 * c, latent_dim, keys[half_step][b]);
      }
#pragma unroll
      for (int b = 0; b < ROPE_BLOCKS; ++b) {
        const T* row = rope + from * rope_dim;
        read_eight_columns<ALIGNED>(row, block_at(b) + 8 * c, rope_dim, rope_keys[half_step][b]);
      }
    }
  };
  if (begin < end) {
    read_keys(begin);
  }
  // Heads past the last one have queries of zeros.
  bool is_there = head + n < n_heads;
#pragma unroll
  for (int b = 0; b < BLOCKS; ++b) {
    uint width = is_there ? latent_dim : 0u;
    const T* row = q + ulong(head + n) * latent_dim;
    read_eight_columns<ALIGNED>(row, block_at(b) + 8 * c, width, queries[b]);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      sums[b][i / 4][i % 4] = 0.0f;
    }
  }
#pragma unroll
  for (int b = 0; b < ROPE_BLOCKS; ++b) {
    uint width = is_there ? rope_dim : 0u;
    const T* row = q_pe + ulong(head + n) * rope_dim;
    read_eight_columns<ALIGNED>(row, block_at(b) + 8 * c, width, rope_queries[b]);
  }
  float largest = -INFINITY;
  float denominator = 0.0f;
  uint turn = 0;
  for (uint first = begin; first < end; first += STEP) {
    float* scores = scratch + turn * MAX_SIMDGROUPS * SCORES;
    turn = 1 - turn;
    float score[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        uint left[4] = {
            keys[0][b][j], keys[1][b][j], keys[0][b][j + 1], keys[1][b][j + 1]};
        multiply_fragments(score, left, queries[b] + j, T());
      }
    }
#pragma unroll
    for (int b = 0; b < ROPE_BLOCKS; ++b) {
      // Most warps have no rope columns and skip the products.
      if (block_at(b) < rope_dim) {
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          uint left[4] = {
              rope_keys[0][b][j], rope_keys[1][b][j], rope_keys[0][b][j + 1],
              rope_keys[1][b][j + 1]};
          multiply_fragments(score, left, rope_queries[b] + j, T());
        }
      }
    }
    float* own = scores + simdgroup * SCORES + 8 * n + 2 * c;
    own[0] = score[0];
    own[1] = score[1];
    own[8 * 8] = score[2];
    own[8 * 8 + 1] = score[3];
    uint values[4][BLOCKS][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint at = first + value_row(i);
      ulong from = at < end ? at : first;
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
        values[i][b][0] = values[i][b][1] = 0u;
        if (block_at(b) < latent_dim) {
          const T* row = latent + from * latent_dim;
          read_neighbours<4, ALIGNED>(row + block_at(b) + 4 * n, values[i][b]);
        }
      }
    }
    if (first + STEP < end) {
      read_keys(first + STEP);
    }
    __syncthreads();
    float weights[4];
    float step_largest = largest;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint at = value_row(i);
      float total = 0.0f;
      for (uint s = 0; s < n_simdgroups; ++s) {
        total += scores[s * SCORES + 8 * at + n];
      }
      weights[i] = first + at < end ? scale * total : -INFINITY;
      step_largest = max(step_largest, weights[i]);
    }
    step_largest = matrix_row_max(step_largest);
    float shrink = exp(largest - step_largest);
    largest = step_largest;
    denominator *= shrink;
    if (!simd_all(shrink == 1.0f)) {
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sums[b][e][0] *= shrink;
          sums[b][e][1] *= shrink;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weights[i] = float(T(exp(weights[i] - largest)));
      denominator += weights[i];
    }
    // The fragment has 16 rows, but there are 8 heads.
    uint left[4] = {
        packed_pair<T>(weights[0], weights[1]), 0u, packed_pair<T>(weights[2], weights[3]), 0u};
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        // Column 4 n + e of two rows each.
        uint order = e % 2 ? 0x7632 : 0x5410;
        uint right[2] = {
            __byte_perm(values[0][b][e / 2], values[1][b][e / 2], order),
            __byte_perm(values[2][b][e / 2], values[3][b][e / 2], order)};
        multiply_fragments(sums[b][e], left, right, T());
      }
    }
  }
#pragma unroll
  for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      int e = 2 * (j % 2);
      result.sums[b][j] = float2(sums[b][e][j / 2], sums[b][e + 1][j / 2]);
    }
  }
  result.largest = largest;
  result.denominator = matrix_row_sum(denominator);
}

template <int BLOCKS, int ROPE_BLOCKS, typename T>
inline typename SixteenBits<T>::result attend(
    const T* q,
    const T* q_pe,
    const T* latent,
    const T* rope,
    uint head,
    uint n_heads,
    uint latent_dim,
    uint rope_dim,
    float scale,
    uint begin,
    uint end,
    float* scratch,
    uint lane,
    uint simdgroup,
    uint n_simdgroups,
    Attended<BLOCKS>& result) {
  ulong places = ulong(q) | ulong(q_pe) | ulong(latent) | ulong(rope);
  if ((places | 2 * rope_dim) % 16 == 0) {
    attend_on_tensor_cores<BLOCKS, ROPE_BLOCKS, true>(
        q, q_pe, latent, rope, head, n_heads, latent_dim, rope_dim, scale, begin, end, scratch,
        lane, simdgroup, n_simdgroups, result);
  } else {
    attend_on_tensor_cores<BLOCKS, ROPE_BLOCKS, false>(
        q, q_pe, latent, rope, head, n_heads, latent_dim, rope_dim, scale, begin, end, scratch,
        lane, simdgroup, n_simdgroups, result);
  }
}
