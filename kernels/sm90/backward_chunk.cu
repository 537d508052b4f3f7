// The gradients of portable/backward_chunk.cu on compute capability 9.0, for chunks of 64 tokens. Per chunk and value
// head, with S the state entering it, dS' the gradient of the state leaving it, dY from the reverse walk, N^ from the
// forward one, b = beta, and decays from sm90/factors.cu (D between tokens, r of reads, w of writes, c of the state:
// all 1 without a gate):
//
//   N = b N^      dV = dR = b dY      dbeta = rowsum(dY . N^)
//   dPqk = tril(dO N^T . D)      E = -tril(dR N^T . D, -1)
//   dQ = scale (r dO S^T + dPqk K)      dK = scale dPqk^T Q + w N dS'^T - r dR S^T + (E + E^T) K
//
// and the gradient of the gates as sums of what holds them, backward_chunk/gates.cuh. With LEAVES_DV dV is there
// already, in place of dY (sm90/value_gradient.cuh).
//
// Memory bounds this, so loads never pause: each block goes through every gridDim-th pair of chunk and key head, and
// its loading warp runs ahead through a ring of stages of 64 value channels (dO, N^, dY, S, dS'), from one head or pair
// to the next. b and decays multiply rows and columns of sums, never a tile: operands are used as they land.
//
// Warpgroup 0: a warp loads with TMA, the other three make dV. With LEAVES_DV one of them
// brings what is known of tokens, one sums up dg, and one has dbeta of a small b. Warpgroup 1: dPqk and dQ. Warpgroup
// 2: E, dbeta, dK and, from what both sum, dg. mbarriers hand tiles over; every warp says for itself that it is done
// with one.
//
// Numbers: operands of products in DTYPE, sums in float, results rounded once; dbeta and dg in float. dQ and dK are
// summed over the value heads of a key head in registers, in their order: the same bits every time.
//
// Macros: DTYPE (bf16 or f16), HEAD_K (up to 128) and HEAD_V, multiples of 8; CHUNK (64), HAS_GATE, VARLEN,
// LEAVES_DV, SLICE_STAGES, KEY_STAGES.
// Grid: blocks of 384 threads, any number up to `pairs`.
// Shared memory: the ring; one of Q and K; scale dPqk and E + E^T; beta; sums for dg; see
// cupy_delta/cuda/sm90/backward.py and, for the first warpgroup, sm90/backward_chunk/load.cuh.
#include "sm90/backward_chunk/keys.cuh"
#include "sm90/backward_chunk/load.cuh"
#include "sm90/backward_chunk/queries.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    backward_chunk_hopper(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                          const __grid_constant__ TensorMap n_map, const __grid_constant__ TensorMap dy_map,
                          const __grid_constant__ TensorMap do_map, const __grid_constant__ TensorMap states_map,
                          const __grid_constant__ TensorMap dstates_map, const float* beta, const float* decays,
                          const int64_t* cu_seqlens, DTYPE* dq, DTYPE* dk,
#if LEAVES_DV
                          const DTYPE* corrections, const DTYPE* small_dy,
#endif
#if !LEAVES_DV
                          DTYPE* dv,
#endif
                          float* dbeta, float* dg, float scale, int pairs, int N, int T, int H, int HV) {
  const int warpgroup = uniform(threadIdx.x / 128), thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const Work work = {cu_seqlens, pairs, N, T, H, HV};
  DynSmem smem;
  const Shared s = take_shared(smem);
  smem.all_taken(SHARED_BYTES);
  if (threadIdx.x == 0) {
    for (int i = 0; i < SLICE_STAGES; i++)
      mbarrier_init(s.full + i, 1), mbarrier_init(s.free + i, 8 + !LEAVES_DV * VALUE_WARPS);
    for (int i = 0; i < KEY_STAGES; i++) mbarrier_init(s.keys_full + i, 1), mbarrier_init(s.keys_free + i, 8);
    mbarrier_init(s.pairs_full, 4), mbarrier_init(s.pairs_free, 4 + LEAVES_DV);
#if LEAVES_DV
    for (int i = 0; i < 2; i++) mbarrier_init(s.columns_full + i, 1), mbarrier_init(s.columns_free + i, 9);
#endif
#if HAS_GATE
    mbarrier_init(s.sums.full, 8);
#endif
    mbarrier_init(s.landed, 1), mbarrier_init(s.landed + 1, 1);
    mbarrier_init_fence();
  }
  __syncthreads();

  if (warpgroup == 0) {
    fewer_registers<VALUE_REGISTERS>();
    if (warp == 0) load(s, {&q_map, &k_map, &n_map, &dy_map, &do_map, &states_map, &dstates_map}, work, lane);
#if LEAVES_DV
    else if (warp == 1)
      bring_columns(s, work, beta, decays, lane);
    else if (warp == 2)
      write_gate_gradients(s, work, dg, lane);
    else
      sum_small(s, work, corrections, small_dy, dbeta, lane);
#else
    else
      make_values(s, work, beta, dv, warp - 1, lane);
#endif
  } else if (warpgroup == 1) {
    more_registers<QUERY_REGISTERS>();
    make_queries(s, work, beta, decays, dq, scale, thread);
  } else {
    more_registers<KEY_REGISTERS>();
    make_keys(s, work, {beta, decays}, {dk, dbeta, dg}, thread);
  }
}
