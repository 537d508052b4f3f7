// The third warpgroup of backward_chunk.cu: E and dK, of dg what keys have part in, and all of it in the end.
#pragma once
#include "sm90/backward_chunk/gates.cuh"
#include "sm90/backward_chunk/pairs.cuh"

PRIM void make_keys(const Shared& s, const Work& work, const float* beta, const float* decays, DTYPE* dk, float* dg,
                    int thread) {
  const int warp = thread / 32, lane = thread % 32;
  Ring<SLICE_STAGES> ring;
  Ring<KEY_STAGES> keys;
  Ring<1> pairs;
  for_each_pair(work, [&](const Chunk& chunk, int slot, int h) {
    const int groups = work.HV / work.H;
    const DTYPE *q = s.q + keys.stage * K_BOXES * TILE, *k = s.k + keys.stage * K_BOXES * TILE;
    float dK[K_TILES][4];
    clear(dK);
    for (int group = 0; group < groups; group++) {
      const int hv = h * groups + group;
      const int64_t first = chunk.first * work.HV + hv;
      float b[2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int t = warp * 16 + half * 8 + lane / 4;
        b[half] = t < chunk.tokens ? beta[first + (int64_t)t * work.HV] : 0.0f;
      }
#if HAS_GATE
      const float* decay_rows = decays_of(decays, slot, hv, work.HV);
      float reads[2], writes[2], read_sums[2] = {}, write_sums[2] = {};
      load_rows_of(reads, decay_rows + READS * CHUNK, warp, lane);
      load_rows_of(writes, decay_rows + WRITES * CHUNK, warp, lane);
      reads[0] *= -b[0], reads[1] *= -b[1];
      writes[0] *= b[0], writes[1] *= b[1];
#else
      float sum[K_TILES][4];  // N^ dS'^T - dY S^T
      clear(sum);
#endif
      float E[8][4];
      uint32_t n[STEPS][4], dy[STEPS][4];
      clear(E);
      for (int slice = 0; slice < SLICES; slice++) {
        const DTYPE* stage = s.stages + ring.stage * STAGE;
        mbarrier_wait(s.full + ring.stage, ring.parity);
#if HAS_GATE
        pin(E);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < STEPS; step++)
          wgmma<DTYPE, false, false>(E, step_along_rows(stage + DY_AT, step), step_along_rows(stage + N_AT, step),
                                     true);
        wgmma_commit();
        mbarrier_wait(s.keys_full + keys.stage, keys.parity);
        add_decayed(dK, write_sums, stage + N_AT, stage + DS_AT, writes, k, warp, lane);
        add_decayed(dK, read_sums, stage + DY_AT, stage + S_AT, reads, k, warp, lane);
#else
        load_rows<false>(n, stage + N_AT, warp, lane);
        load_rows<false>(dy, stage + DY_AT, warp, lane);
        pin(n), pin(dy), pin(E), pin(sum);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < STEPS; step++)
          wgmma<DTYPE, false>(E, dy[step], step_along_rows(stage + N_AT, step), true);
#pragma unroll
        for (int step = 0; step < STEPS; step++)
          wgmma<DTYPE, true>(sum, n[step], step_of_rows(stage + DS_AT, step), true);
#pragma unroll
        for (int step = 0; step < STEPS; step++)
          wgmma<DTYPE, true, true>(sum, dy[step], step_of_rows(stage + S_AT, step), true);
        wgmma_commit();
        wgmma_wait<0>();
        pin(sum);
#endif
        pin(E);
        __syncwarp();
        if (lane == 0) mbarrier_arrive(s.free + ring.stage);
        ring.advance();
      }
#if !HAS_GATE
#pragma unroll
      for (int j = 0; j < K_TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) dK[j][i] += b[i / 2] * sum[j][i];
#endif

      mbarrier_wait(s.pairs_full, pairs.parity);
      load_rows<true>(n, s.pairs, warp, lane);
      const float* columns = s.columns + pairs.parity * COLUMNS;
      float minus_b[2];
      load_rows_of(minus_b, columns, warp, lane);
      minus_b[0] *= -1.0f, minus_b[1] *= -1.0f;
      weigh_pairs<true>(E, minus_b, columns, warp, lane);
#pragma unroll
      for (int j = 0; j < 8; j += 2) write_symmetric(s.symmetric, E[j], E[j + 1], warp * 16, j * 8, lane);
      named_barrier(KEY_BARRIER, 128);
      load_rows<false>(dy, s.symmetric, warp, lane);
      __syncwarp();
      // The first warp says so when it has read the sums, too.
      if (lane == 0 && !(HAS_GATE && warp == 0)) mbarrier_arrive(s.pairs_free);
      mbarrier_wait(s.keys_full + keys.stage, keys.parity);
      pin(n), pin(dy), pin(dK);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < STEPS; step++) wgmma<DTYPE, true>(dK, n[step], step_of_rows(q, step), true);
#pragma unroll
      for (int step = 0; step < STEPS; step++) wgmma<DTYPE, true>(dK, dy[step], step_of_rows(k, step), true);
      wgmma_commit();
      wgmma_wait<0>();
      pin(dK);
#if HAS_GATE
      multiply_pairs(E, k, k);
      sum_rectangles(s.sums.pairs + (4 + warp) * CHUNK, E, warp, lane);
      read_sums[0] *= reads[0], read_sums[1] *= reads[1];
      write_sums[0] *= writes[0], write_sums[1] *= writes[1];
      write_rows_of(s.sums.key_reads, read_sums, warp, lane);
      write_rows_of(s.sums.writes, write_sums, warp, lane);
      __syncwarp();
      if (lane == 0) mbarrier_arrive(s.sums.full);
      if (warp == 0) {
        mbarrier_wait(s.sums.full, pairs.parity);
        write_gate_gradient(dg + first, s.sums, chunk.tokens, work.HV, lane);
        __syncwarp();
        if (lane == 0) mbarrier_arrive(s.pairs_free);
      }
      __syncwarp();
#endif
      pairs.advance();
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(s.keys_free + keys.stage);
    keys.advance();
    write_gradient(dk, dK, 1.0f, chunk, work.H, h, warp, lane);
  });
}
