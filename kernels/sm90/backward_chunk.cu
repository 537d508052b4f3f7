// The gradients of portable/backward_chunk.cu on compute capability 9.0, for chunks of 64 tokens. Per chunk and value
// head, with S the state entering it, D' the gradient of the state leaving it, G from the reverse walk, N^ from the
// forward one, b = beta:
//
//   N = b N^      dV = dR = b G      dbeta = rowsum(G . N^)
//   dP = tril(dO N^T)      E = -tril(dR N^T, -1)
//   dQ = scale (dO S^T + dP K)      dK = scale dP^T Q + b (N^ D'^T - G S^T) + (E + E^T) K
//
// Memory bounds this, so loads never pause: each block goes through every gridDim-th pair of chunk and key head, and
// its loading warp runs ahead through a ring of stages of 64 value channels (dO, N^, G, S, D'), from one head or pair
// to the next. b multiplies rows and columns of sums, never a tile: operands are used as
// they land.
//
// Warpgroup 0: a warp loads with TMA, the other three make dV and dbeta. Warpgroup 1: dP, E and dQ. Warpgroup 2: dK.
// mbarriers hand tiles over; every warp says for itself that it is done with one.
//
// Numbers: operands of products in DTYPE, sums in float, results rounded once; dbeta in float. dQ and dK are summed
// over the value heads of a key head in registers, in their order: the same bits every time.
//
// Macros: DTYPE (bf16 or f16), HEAD_K (up to 128) and HEAD_V, multiples of 8; CHUNK (64), HAS_GATE (0), VARLEN,
// SLICE_STAGES.
// Grid: blocks of 384 threads, any number up to `pairs`.
// Shared memory: the ring; Q and K; scale dP and E + E^T; beta; see cupy_delta/cuda/sm90/backward.py and, for the
// first warpgroup, sm90/backward_chunk/load.cuh.
#include "sm90/backward_chunk/load.cuh"
#include "tiles/store.cuh"

// This warp's 16 rows of a box, or (TRANSPOSED) 16 columns, as left operand.
template <bool TRANSPOSED>
PRIM void load_rows(uint32_t (&a)[STEPS][4], const DTYPE* box, int warp, int lane) {
#pragma unroll
  for (int step = 0; step < STEPS; step++)
    if constexpr (TRANSPOSED)
      ldmatrix_x4_trans(a[step], box + swizzled(step * 16 + lane % 8 + lane / 16 * 8, warp * 16 + lane / 8 % 2 * 8));
    else
      ldmatrix_x4(a[step], box + swizzled(warp * 16 + lane % 16, step * 16 + lane / 16 * 8));
}

// box = E + E^T, from the 16 x 16 block of E at (warp's rows, column); on the diagonal it is zero from there up.
PRIM void write_symmetric(DTYPE* box, const float (&e0)[4], const float (&e1)[4], int row, int column, int lane) {
  if (column > row) return;
  if (column < row) {
    write_box(box, e0, e1, row, column, lane);
    write_box_transposed(box, e0, e1, column, row, lane);
    return;
  }
  uint32_t r[4] = {pack2<DTYPE>(e0[0], e0[1]), pack2<DTYPE>(e0[2], e0[3]), 0, pack2<DTYPE>(e1[2], e1[3])};
  r[2] = movmatrix_trans(r[1]);
  r[0] |= movmatrix_trans(r[0]);  // one of the two is zero
  r[3] |= movmatrix_trans(r[3]);
  stmatrix_x4(box + swizzled(row + lane % 16, column + lane / 16 * 8), r);
}

// `factor` times the warp's 16 rows of a sum, to rows of (token, key head).
PRIM void write_gradient(DTYPE* out, const float (&d)[K_TILES][4], float factor, const Chunk& chunk, int H, int h,
                         int warp, int lane) {
  const int64_t row = (chunk.first + warp * 16) * H + h;
  store_wide(out + row * HEAD_K, (int64_t)H * HEAD_K, d, factor, chunk.tokens - warp * 16, HEAD_K, lane);
}

PRIM void make_queries(const Shared& s, const Work& work, const float* beta, DTYPE* dq, float scale, int thread) {
  const int warp = thread / 32, lane = thread % 32;
  Ring<SLICE_STAGES> ring;
  Ring<1> keys, pairs;
  for_each_pair(work, [&](const Chunk& chunk, int, int h) {
    const int groups = work.HV / work.H;
    float dQ[K_TILES][4];
    clear(dQ);
    for (int group = 0; group < groups; group++) {
      const int64_t first = chunk.first * work.HV + h * groups + group;
      const float own = thread < chunk.tokens ? beta[first + (int64_t)thread * work.HV] : 0.0f;
      float dP[8][4], E[8][4];
      uint32_t a[STEPS][4], g[STEPS][4];
      clear(dP);
      clear(E);
      for (int slice = 0; slice < SLICES; slice++) {
        const DTYPE* stage = s.stages + ring.stage * STAGE;
        mbarrier_wait(s.full + ring.stage, ring.parity);
        load_rows<false>(a, stage, warp, lane);
        load_rows<false>(g, stage + G_AT, warp, lane);
        pin(a), pin(g), pin(dP), pin(E), pin(dQ);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
          wgmma<DTYPE, false>(dP, a[step], step_along_rows(stage + N_AT, step), true);
          wgmma<DTYPE, false>(E, g[step], step_along_rows(stage + N_AT, step), true);
        }
#pragma unroll
        for (int step = 0; step < STEPS; step++)
          wgmma<DTYPE, true>(dQ, a[step], step_of_rows(stage + S_AT, step), true);
        wgmma_commit();
        wgmma_wait<0>();
        pin(dP), pin(E), pin(dQ);
        __syncwarp();
        if (lane == 0) mbarrier_arrive(s.free + ring.stage);
        ring.advance();
      }

      float* b = s.b + pairs.parity * CHUNK;
      if (thread < CHUNK) b[thread] = own;
      named_barrier(BETA_BARRIER, 128);
      mbarrier_wait(s.pairs_free, pairs.parity ^ 1);
      const float b_rows[2] = {b[warp * 16 + lane / 4], b[warp * 16 + lane / 4 + 8]};
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float2 columns = *(const float2*)&b[sum_column(lane, j, 0)];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int below = warp * 16 + sum_row(lane, i) - sum_column(lane, j, i);
          const float b_column = i % 2 ? columns.y : columns.x;
          dP[j][i] = below >= 0 ? b_column * dP[j][i] : 0.0f;
          E[j][i] = below > 0 ? -b_rows[i / 2] * b_column * E[j][i] : 0.0f;
        }
        a[j / 2][j % 2 * 2] = pack2<DTYPE>(dP[j][0], dP[j][1]);
        a[j / 2][j % 2 * 2 + 1] = pack2<DTYPE>(dP[j][2], dP[j][3]);
#pragma unroll
        for (int i = 0; i < 4; i++) dP[j][i] *= scale;
      }
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        write_box(s.pairs, dP[j], dP[j + 1], warp * 16, j * 8, lane);
        write_symmetric(s.symmetric, E[j], E[j + 1], warp * 16, j * 8, lane);
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(s.pairs_full);
      pairs.advance();

      mbarrier_wait(s.keys_full, keys.parity);
      pin(a), pin(dQ);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < STEPS; step++) wgmma<DTYPE, true>(dQ, a[step], step_of_rows(s.k, step), true);
      wgmma_commit();
      wgmma_wait<0>();
      pin(dQ);
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(s.keys_free);
    keys.advance();
    write_gradient(dq, dQ, scale, chunk, work.H, h, warp, lane);
  });
}

PRIM void make_keys(const Shared& s, const Work& work, const float* beta, DTYPE* dk, int thread) {
  const int warp = thread / 32, lane = thread % 32;
  Ring<SLICE_STAGES> ring;
  Ring<1> keys, pairs;
  for_each_pair(work, [&](const Chunk& chunk, int, int h) {
    const int groups = work.HV / work.H;
    float dK[K_TILES][4];
    clear(dK);
    for (int group = 0; group < groups; group++) {
      const int64_t first = chunk.first * work.HV + h * groups + group;
      float b[2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int t = warp * 16 + half * 8 + lane / 4;
        b[half] = t < chunk.tokens ? beta[first + (int64_t)t * work.HV] : 0.0f;
      }
      float sum[K_TILES][4];  // N^ D'^T - G S^T
      uint32_t n[STEPS][4], g[STEPS][4];
      clear(sum);
      for (int slice = 0; slice < SLICES; slice++) {
        const DTYPE* stage = s.stages + ring.stage * STAGE;
        mbarrier_wait(s.full + ring.stage, ring.parity);
        load_rows<false>(n, stage + N_AT, warp, lane);
        load_rows<false>(g, stage + G_AT, warp, lane);
        pin(n), pin(g), pin(sum);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < STEPS; step++)
          wgmma<DTYPE, true>(sum, n[step], step_of_rows(stage + D_AT, step), true);
#pragma unroll
        for (int step = 0; step < STEPS; step++)
          wgmma<DTYPE, true, true>(sum, g[step], step_of_rows(stage + S_AT, step), true);
        wgmma_commit();
        wgmma_wait<0>();
        pin(sum);
        __syncwarp();
        if (lane == 0) mbarrier_arrive(s.free + ring.stage);
        ring.advance();
      }
#pragma unroll
      for (int j = 0; j < K_TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) dK[j][i] += b[i / 2] * sum[j][i];

      mbarrier_wait(s.pairs_full, pairs.parity);
      load_rows<true>(n, s.pairs, warp, lane);
      load_rows<false>(g, s.symmetric, warp, lane);
      __syncwarp();
      if (lane == 0) mbarrier_arrive(s.pairs_free);
      pairs.advance();
      mbarrier_wait(s.keys_full, keys.parity);
      pin(n), pin(g), pin(dK);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < STEPS; step++) wgmma<DTYPE, true>(dK, n[step], step_of_rows(s.q, step), true);
#pragma unroll
      for (int step = 0; step < STEPS; step++) wgmma<DTYPE, true>(dK, g[step], step_of_rows(s.k, step), true);
      wgmma_commit();
      wgmma_wait<0>();
      pin(dK);
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(s.keys_free);
    keys.advance();
    write_gradient(dk, dK, 1.0f, chunk, work.H, h, warp, lane);
  });
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    backward_chunk_hopper(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                          const __grid_constant__ TensorMap n_map, const __grid_constant__ TensorMap g_map,
                          const __grid_constant__ TensorMap do_map, const __grid_constant__ TensorMap states_map,
                          const __grid_constant__ TensorMap dstates_map, const float* beta, const int64_t* cu_seqlens,
                          DTYPE* dq, DTYPE* dk, DTYPE* dv, float* dbeta, float scale, int pairs, int N, int T, int H,
                          int HV) {
  const int warpgroup = uniform(threadIdx.x / 128), thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const Work work = {cu_seqlens, pairs, N, T, H, HV};
  DynSmem smem;
  const Shared s = take_shared(smem);
  smem.all_taken(SHARED_BYTES);
  if (threadIdx.x == 0) {
    for (int i = 0; i < SLICE_STAGES; i++) mbarrier_init(s.full + i, 1), mbarrier_init(s.free + i, 8 + VALUE_WARPS);
    mbarrier_init(s.keys_full, 1), mbarrier_init(s.keys_free, 8);
    mbarrier_init(s.pairs_full, 4), mbarrier_init(s.pairs_free, 4);
    mbarrier_init(s.landed, 1), mbarrier_init(s.landed + 1, 1);
    mbarrier_init_fence();
  }
  __syncthreads();

  if (warpgroup == 0) {
    fewer_registers<VALUE_REGISTERS>();
    if (warp == 0)
      load(s, {&q_map, &k_map, &n_map, &g_map, &do_map, &states_map, &dstates_map}, work, lane);
    else
      make_values(s, work, beta, dv, dbeta, warp - 1, lane);
  } else {
    more_registers<MATH_REGISTERS>();
    if (warpgroup == 1)
      make_queries(s, work, beta, dq, scale, thread);
    else
      make_keys(s, work, beta, dk, thread);
  }
}
