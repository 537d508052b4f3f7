// The third warpgroup of backward_chunk.cu: E and dK, of dg what keys have part in, and all of it in the end.
#pragma once
#include "sm90/backward_chunk/gates.cuh"
#include "sm90/backward_chunk/pairs.cuh"

struct Keys {
  const Shared& s;
  const Work& work;
  const float *beta, *decays;
  float *dbeta, *dg;
  const int warp, lane;
  Ring<SLICE_STAGES> ring;
  Ring<KEY_STAGES> keys;
  Ring<1> pairs;
  Ring<2> tokens_of_heads;

  // Adds what a value head has to dK, from row (first token, value head) on.
  PRIM void add_head(float (&dK)[K_TILES][4], int64_t first, int tokens, const float* decay_rows) {
    float b[2];
    DecayedRows reads, writes;
    const float* columns = s.columns + pairs.parity * COLUMNS;
    if constexpr (LEAVES_DV) {
      columns = wait_for_columns(s, tokens_of_heads);
      load_rows_of(b, columns, warp, lane);
      load_rows_of(reads.factor, columns + READS_AT, warp, lane);
      load_rows_of(writes.factor, columns + WRITES_AT, warp, lane);
    } else {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int t = warp * 16 + half * 8 + lane / 4;
        b[half] = t < tokens ? beta[first + (int64_t)t * work.HV] : 0.0f;
      }
      if constexpr (HAS_GATE) {
        load_rows_of(reads.factor, decay_rows + READS * CHUNK, warp, lane);
        load_rows_of(writes.factor, decay_rows + WRITES * CHUNK, warp, lane);
      }
    }
    float E[8][4];
    if constexpr (HAS_GATE) {
      reads.factor[0] *= LEAVES_DV ? -1.0f : -b[0], reads.factor[1] *= LEAVES_DV ? -1.0f : -b[1];
      writes.factor[0] *= b[0], writes.factor[1] *= b[1];
      clear(E);
      add_slices_decayed(E, dK, reads, writes);
    } else {
      add_slices(E, dK, b);
    }
    write_dbeta(E, b, first, tokens);
    add_pairs(E, dK, columns);
    if constexpr (HAS_GATE) sum_gates(E, reads, writes, first, tokens);
    pairs.advance();
  }

  PRIM const DTYPE* q() const { return s.q + keys.stage * K_BOXES * TILE; }
  PRIM const DTYPE* k() const { return s.k + keys.stage * K_BOXES * TILE; }

  // E = dY N^^T and dK += b (N^ dS'^T - dY S^T), slice after slice.
  PRIM void add_slices(float (&E)[8][4], float (&dK)[K_TILES][4], const float (&b)[2]) {
    float sum[K_TILES][4];
    clear(sum);
    uint32_t n[STEPS][4], dy[STEPS][4];
    clear(E);
    for (int slice = 0; slice < SLICES; slice++) {
      const DTYPE* stage = s.stages + ring.stage * STAGE;
      mbarrier_wait(s.full + ring.stage, ring.parity);
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
      pin(E);
      free_slice();
    }
#pragma unroll
    for (int j = 0; j < K_TILES; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) dK[j][i] += b[i / 2] * sum[j][i];
  }

  // The same with decays of reads and writes, of which dg has the sums.
  PRIM void add_slices_decayed(float (&E)[8][4], float (&dK)[K_TILES][4], DecayedRows& reads, DecayedRows& writes) {
    for (int slice = 0; slice < SLICES; slice++) {
      const DTYPE* stage = s.stages + ring.stage * STAGE;
      mbarrier_wait(s.full + ring.stage, ring.parity);
      pin(E);
      Product product;
      start_product(product, stage + N_AT, stage + DS_AT);
#pragma unroll
      for (int step = 0; step < STEPS; step++)
        wgmma<DTYPE, false, false>(E, step_along_rows(stage + DY_AT, step), step_along_rows(stage + N_AT, step), true);
      wgmma_commit();
      mbarrier_wait(s.keys_full + keys.stage, keys.parity);
      // Of the boxes of keys the writes, then the reads.
      wgmma_wait<1>();
      add_decayed(dK, writes, product, k(), 0, warp, lane);
#pragma unroll
      for (int i = 1; i < 2 * K_BOXES; i++) {
        const DTYPE* state = stage + (i < K_BOXES ? DS_AT : S_AT) + i % K_BOXES * TILE;
        start_product(product, stage + (i < K_BOXES ? N_AT : DY_AT), state);
        wgmma_wait<0>();
        add_decayed(dK, i < K_BOXES ? writes : reads, product, k(), i % K_BOXES, warp, lane);
      }
      pin(E);
      free_slice();
    }
  }

  // dbeta, which is on the diagonal of dY N^^T.
  PRIM void write_dbeta(const float (&E)[8][4], const float (&b)[2], int64_t first, int tokens) const {
    float diagonal[2];
    const bool has_it = take_diagonal(diagonal, E, warp, lane);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int t = warp * 16 + half * 8 + lane / 4;
      if (LEAVES_DV && is_small(b[half])) continue;
      if (has_it && t < tokens)
        dbeta[first + (int64_t)t * work.HV] = LEAVES_DV ? diagonal[half] / b[half] : diagonal[half];
    }
  }

  PRIM void free_slice() {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(s.free + ring.stage);
    ring.advance();
  }

  // E becomes that of the chunk, and dK += scale dPqk^T Q + (E + E^T) K.
  PRIM void add_pairs(float (&E)[8][4], float (&dK)[K_TILES][4], const float* columns) {
    uint32_t d_pqk[STEPS][4], symmetric[STEPS][4];
    mbarrier_wait(s.pairs_full, pairs.parity);
    load_rows<true>(d_pqk, s.pairs, warp, lane);
    float minus_b[2] = {1.0f, 1.0f};
    if constexpr (!LEAVES_DV) load_rows_of(minus_b, columns, warp, lane);
    minus_b[0] *= -1.0f, minus_b[1] *= -1.0f;
    weigh_pairs<true>(E, minus_b, columns, warp, lane);
    if constexpr (LEAVES_DV) free_columns(s, tokens_of_heads, lane);
#pragma unroll
    for (int j = 0; j < 8; j += 2) write_symmetric(s.symmetric, E[j], E[j + 1], warp * 16, j * 8, lane);
    named_barrier(KEY_BARRIER, 128);
    load_rows<false>(symmetric, s.symmetric, warp, lane);
    __syncwarp();
    // The first warp says so when it has read the sums, too, unless another one does.
    if (lane == 0 && !(HAS_GATE && !LEAVES_DV && warp == 0)) mbarrier_arrive(s.pairs_free);
    mbarrier_wait(s.keys_full + keys.stage, keys.parity);
    pin(d_pqk), pin(symmetric), pin(dK);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < STEPS; step++) wgmma<DTYPE, true>(dK, d_pqk[step], step_of_rows(q(), step), true);
#pragma unroll
    for (int step = 0; step < STEPS; step++) wgmma<DTYPE, true>(dK, symmetric[step], step_of_rows(k(), step), true);
    wgmma_commit();
    wgmma_wait<0>();
    pin(dK);
  }

  // What keys have part in, and by the first warp all of dg, if no other one sums it up.
  PRIM void sum_gates(float (&E)[8][4], DecayedRows& reads, DecayedRows& writes, int64_t first, int tokens) {
    multiply_pairs(E, k(), k());
    sum_rectangles(s.sums.pairs + (4 + warp) * CHUNK, E, warp, lane);
    reads.sums[0] *= reads.factor[0], reads.sums[1] *= reads.factor[1];
    writes.sums[0] *= writes.factor[0], writes.sums[1] *= writes.factor[1];
    write_rows_of(s.sums.key_reads, reads.sums, warp, lane);
    write_rows_of(s.sums.writes, writes.sums, warp, lane);
    __syncwarp();
    if (lane == 0) mbarrier_arrive(s.sums.full);
    if (!LEAVES_DV && warp == 0) {
      mbarrier_wait(s.sums.full, pairs.parity);
      write_gate_gradient(dg + first, s.sums, tokens, work.HV, lane);
      __syncwarp();
      if (lane == 0) mbarrier_arrive(s.pairs_free);
    }
    __syncwarp();
  }
};

struct Inputs {
  const float *beta, *decays;
};
struct KeyGradients {
  DTYPE* dk;
  float *dbeta, *dg;
};

PRIM void make_keys(const Shared& s, const Work& work, const Inputs& inputs, const KeyGradients& to, int thread) {
  const float* decays = inputs.decays;
  Keys role = {s, work, inputs.beta, decays, to.dbeta, to.dg, thread / 32, thread % 32};
  for_each_pair(work, [&](const Chunk& chunk, int slot, int h) {
    const int groups = work.HV / work.H;
    float dK[K_TILES][4];
    clear(dK);
    for (int group = 0; group < groups; group++) {
      const int hv = h * groups + group;
      role.add_head(dK, chunk.first * work.HV + hv, chunk.tokens,
                    HAS_GATE ? decays_of(decays, slot, hv, work.HV) : nullptr);
    }
    free_keys(s, role.keys, role.lane);
    write_gradient(to.dk, dK, 1.0f, chunk, work.H, h, thread);
  });
}
