// The second warpgroup of backward_chunk.cu: dPqk and dQ, and of dg what queries have part in.
#pragma once
#include "sm90/backward_chunk/gates.cuh"
#include "sm90/backward_chunk/pairs.cuh"

PRIM void make_queries(const Shared& s, const Work& work, const float* beta, const float* decays, DTYPE* dq,
                       float scale, int thread) {
  const int warp = thread / 32, lane = thread % 32;
  Ring<SLICE_STAGES> ring;
  Ring<KEY_STAGES> keys;
  Ring<1> pairs;
  for_each_pair(work, [&](const Chunk& chunk, int slot, int h) {
    const int groups = work.HV / work.H;
    const DTYPE *q = s.q + keys.stage * K_BOXES * TILE, *k = s.k + keys.stage * K_BOXES * TILE;
    float dQ[K_TILES][4];
    clear(dQ);
    for (int group = 0; group < groups; group++) {
      const int hv = h * groups + group;
      const float* decay_rows = HAS_GATE ? decays_of(decays, slot, hv, work.HV) : nullptr;
      const Column own = load_column(beta + chunk.first * work.HV + hv, decay_rows, chunk.tokens, work.HV, thread);
#if HAS_GATE
      float reads[2], read_sums[2] = {};
      load_rows_of(reads, decay_rows + READS * CHUNK, warp, lane);
#endif
      float dPqk[8][4];
      uint32_t a[STEPS][4];
      clear(dPqk);
      for (int slice = 0; slice < SLICES; slice++) {
        const DTYPE* stage = s.stages + ring.stage * STAGE;
        mbarrier_wait(s.full + ring.stage, ring.parity);
#if HAS_GATE
        pin(dPqk);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < STEPS; step++)
          wgmma<DTYPE, false, false>(dPqk, step_along_rows(stage, step), step_along_rows(stage + N_AT, step), true);
        wgmma_commit();
        mbarrier_wait(s.keys_full + keys.stage, keys.parity);
        add_decayed(dQ, read_sums, stage, stage + S_AT, reads, q, warp, lane);
#else
        load_rows<false>(a, stage, warp, lane);
        pin(a), pin(dPqk), pin(dQ);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < STEPS; step++)
          wgmma<DTYPE, false>(dPqk, a[step], step_along_rows(stage + N_AT, step), true);
#pragma unroll
        for (int step = 0; step < STEPS; step++)
          wgmma<DTYPE, true>(dQ, a[step], step_of_rows(stage + S_AT, step), true);
        wgmma_commit();
        wgmma_wait<0>();
#endif
        pin(dPqk), pin(dQ);
        __syncwarp();
        if (lane == 0) mbarrier_arrive(s.free + ring.stage);
        ring.advance();
      }

      float* columns = s.columns + pairs.parity * COLUMNS;
      share_columns(columns, own, QUERY_BARRIER, thread);
      const float ones[2] = {1.0f, 1.0f};
      weigh_pairs<false>(dPqk, ones, columns, warp, lane);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        a[j / 2][j % 2 * 2] = pack2<DTYPE>(dPqk[j][0], dPqk[j][1]);
        a[j / 2][j % 2 * 2 + 1] = pack2<DTYPE>(dPqk[j][2], dPqk[j][3]);
#pragma unroll
        for (int i = 0; i < 4; i++) dPqk[j][i] *= scale;
      }
      mbarrier_wait(s.pairs_free, pairs.parity ^ 1);
#pragma unroll
      for (int j = 0; j < 8; j += 2) write_box(s.pairs, dPqk[j], dPqk[j + 1], warp * 16, j * 8, lane);
      __syncwarp();
      if (lane == 0) mbarrier_arrive(s.pairs_full);
      pairs.advance();

      mbarrier_wait(s.keys_full + keys.stage, keys.parity);
      pin(a), pin(dQ);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < STEPS; step++) wgmma<DTYPE, true>(dQ, a[step], step_of_rows(k, step), true);
      wgmma_commit();
      wgmma_wait<0>();
      pin(dQ);
#if HAS_GATE
      multiply_pairs(dPqk, q, k);
      sum_rectangles(s.sums.pairs + warp * CHUNK, dPqk, warp, lane);
      read_sums[0] *= scale * reads[0], read_sums[1] *= scale * reads[1];
      write_rows_of(s.sums.query_reads, read_sums, warp, lane);
      __syncwarp();
      if (lane == 0) mbarrier_arrive(s.sums.full);
#endif
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(s.keys_free + keys.stage);
    keys.advance();
    write_gradient(dq, dQ, scale, chunk, work.H, h, warp, lane);
  });
}
