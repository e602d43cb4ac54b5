// `combined_rows` on tensor cores, in CUDA C++. All eight warps share the rows of all experts, in
// as many chunks at once as fit into shared memory; the shared expert's inputs follow there.

constexpr uint EXPERTS_STAGED = 6144;
constexpr uint SHARED_STAGED = STAGED - EXPERTS_STAGED;

// This form takes neither 2-bit values, in either matrix, nor 4-bit floats.
template <
    int BITS, bool FLOATS, int SHARED_BITS, int G, int WORDS, typename T, typename I, typename E,
    typename F, typename H>
inline typename TensorRows<T, FLOATS || BITS == 2 ? 0 : SHARED_BITS>::result combined_rows(
    const T* act,
    I slots,
    E weights,
    const uint* w,
    const F* scales,
    const F* biases,
    uint w_row,
    uint s_row,
    uint b_row,
    const T* gate,
    const T* up,
    const uint* shared_w,
    const H* shared_scales,
    const H* shared_biases,
    float opened,
    uint row,
    uint k,
    uint n_in,
    uint n_shared,
    uint n_out,
    float* sums,
    uint thread_index,
    uint simdgroup,
    uint lane) {
  using S = Shape<BITS, G>;
  using Z = Shape<SHARED_BITS, G>;
  constexpr uint WARPS = 8;
  bool act_aligned = is_aligned(act);
  bool aligned = is_aligned(gate) && is_aligned(up);
  uint each = S::chunks(n_in);
  uint rows[2] = {min(row + lane / 4, n_out - 1), min(row + lane / 4 + 8, n_out - 1)};
  ExpertMatrices<I, E, F> experts = {
      slots, weights, w, scales, biases, w_row, s_row, b_row, n_in, k * each, each};
  OneMatrix<H> shared = {
      shared_w, shared_scales, shared_biases, n_shared, Z::chunks(n_shared)};
  float y[2] = {0.0f, 0.0f};
  RowSet<BITS, G, WORDS> next;
  RowSet<SHARED_BITS, G, 4> next_shared;
  next.load(experts, rows, simdgroup, WARPS, lane);
  next_shared.load(shared, rows, simdgroup, WARPS, lane);
  stage_zeros(thread_index);
  auto stage_shared = [&](uint start) {
    auto read = [&](uint i, float* values) {
      float ups[8];
      read_eight(gate + start + i, aligned, values);
      read_eight(up + start + i, aligned, ups);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        values[j] = silu(values[j]) * ups[j];
      }
    };
    uint n = min(n_shared - start, SHARED_STAGED);
    stage<T, SHARED_BITS, G>(read, n, EXPERTS_STAGED, thread_index, 32 * WARPS);
  };
  constexpr uint PIECE = EXPERTS_STAGED / S::CHUNK;
  for (uint start = 0; start < experts.n_chunks; start += PIECE) {
    uint n = min(experts.n_chunks - start, PIECE);
    if (start > 0) {
      __syncthreads();
      next.load(experts, rows, start + simdgroup, WARPS, lane);
    }
    auto read = [&](uint i, float* values) {
      uint chunk = start + i / S::CHUNK;
      uint input = chunk % each * S::CHUNK + i % S::CHUNK;
      if (input < n_in) {
        read_eight(act + chunk / each * n_in + input, act_aligned, values);
      }
    };
    stage<T, BITS, G>(read, n * S::CHUNK, 0u, thread_index, 32 * WARPS);
    if (start == 0) {
      stage_shared(0u);
    }
    __syncthreads();
    for (uint first = simdgroup; first < n; first += WARPS * S::SET) {
      RowSet<BITS, G, WORDS> set = next;
      if (first + WARPS * S::SET < n) {
        next.load(experts, rows, start + first + WARPS * S::SET, WARPS, lane);
      }
      set.template add<2>(y, experts, 0u, start, first, WARPS, n, lane, T());
    }
  }
  float own[2] = {0.0f, 0.0f};
  constexpr uint SHARED_PIECE = SHARED_STAGED / Z::CHUNK;
  for (uint start = 0; start < shared.n_chunks; start += SHARED_PIECE) {
    uint n = min(shared.n_chunks - start, SHARED_PIECE);
    if (start > 0) {
      __syncthreads();
      next_shared.load(shared, rows, start + simdgroup, WARPS, lane);
      stage_shared(start * Z::CHUNK);
      __syncthreads();
    }
    for (uint first = simdgroup; first < n; first += WARPS * Z::SET) {
      RowSet<SHARED_BITS, G, 4> set = next_shared;
      if (first + WARPS * Z::SET < n) {
        next_shared.load(shared, rows, start + first + WARPS * Z::SET, WARPS, lane);
      }
      set.template add<2>(own, shared, EXPERTS_STAGED, start, first, WARPS, n, lane, T());
    }
  }
  y[0] += opened * own[0];
  y[1] += opened * own[1];
  leave_rows(y, 16 * simdgroup, lane);
  __syncthreads();
  if (thread_index < 16) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) {
      sum += staged().parts[16 * i + thread_index];
    }
    sums[thread_index] = sum;
  }
}
