// The second warpgroup of backward_chunk.cu: dPqk and dQ, and of dg what queries have part in.
#pragma once
#include "sm90/backward_chunk/gates.cuh"
#include "sm90/backward_chunk/pairs.cuh"

struct Queries {
  const Shared& s;
  const float scale;
  const int thread, warp, lane;
  Ring<SLICE_STAGES> ring;
  Ring<KEY_STAGES> keys;
  Ring<1> pairs;
  Ring<2> tokens_of_heads;

  // Adds what a value head has to dQ.
  PRIM void add_head(float (&dQ)[K_TILES][4], const Column& own, const float* decay_rows) {
    DecayedRows reads;
    float states[8][4], over = 0.0f;  // S dS'^T, whose diagonal counts; the decay over the chunk
    float* columns = s.columns + pairs.parity * COLUMNS;
    if constexpr (LEAVES_DV) {
      const float* rows = wait_for_columns(s, tokens_of_heads) + READS_AT;
      load_rows_of(reads.factor, rows, warp, lane);
      over = rows[CHUNK - 1];
      columns = s.columns + tokens_of_heads.stage * COLUMNS;
    } else if constexpr (HAS_GATE) {
      load_rows_of(reads.factor, decay_rows + READS * CHUNK, warp, lane);
      over = decay_rows[READS * CHUNK + CHUNK - 1];
    }
    if constexpr (HAS_GATE) clear(states);
    float dPqk[8][4];
    clear(dPqk);
    for (int slice = 0; slice < SLICES; slice++) {
      const DTYPE* stage = s.stages + ring.stage * STAGE;
      mbarrier_wait(s.full + ring.stage, ring.parity);
      if constexpr (HAS_GATE)
        add_slice_decayed(dPqk, dQ, states, reads, stage);
      else
        add_slice(dPqk, dQ, stage);
      pin(dPqk), pin(dQ);
      __syncwarp();
      if (lane == 0) mbarrier_arrive(s.free + ring.stage);
      ring.advance();
    }
    add_pairs(dPqk, dQ, own, columns);
    if constexpr (HAS_GATE) sum_gates(dPqk, states, over, reads);
  }

  PRIM const DTYPE* q() const { return s.q + keys.stage * K_BOXES * TILE; }
  PRIM const DTYPE* k() const { return s.k + keys.stage * K_BOXES * TILE; }

  // dPqk += dO N^^T and dQ += dO S^T for a slice of value channels.
  PRIM void add_slice(float (&dPqk)[8][4], float (&dQ)[K_TILES][4], const DTYPE* stage) const {
    uint32_t a[STEPS][4];
    load_rows<false>(a, stage, warp, lane);
    pin(a), pin(dPqk), pin(dQ);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < STEPS; step++)
      wgmma<DTYPE, false>(dPqk, a[step], step_along_rows(stage + N_AT, step), true);
#pragma unroll
    for (int step = 0; step < STEPS; step++) wgmma<DTYPE, true>(dQ, a[step], step_of_rows(stage + S_AT, step), true);
    wgmma_commit();
    wgmma_wait<0>();
  }

  // The same with decays of reads, of which dg has the sums.
  PRIM void add_slice_decayed(float (&dPqk)[8][4], float (&dQ)[K_TILES][4], float (&states)[8][4], DecayedRows& reads,
                              const DTYPE* stage) const {
    pin(dPqk), pin(states);
    Product product;
    start_product(product, stage, stage + S_AT);
#pragma unroll
    for (int step = 0; step < STEPS; step++)
      wgmma<DTYPE, false, false>(dPqk, step_along_rows(stage, step), step_along_rows(stage + N_AT, step), true);
#pragma unroll
    for (int step = 0; step < KP / 16; step++)
      wgmma<DTYPE, false, false>(states, step_along_rows(stage + S_AT, step), step_along_rows(stage + DS_AT, step),
                                 true);
    wgmma_commit();
    mbarrier_wait(s.keys_full + keys.stage, keys.parity);
    wgmma_wait<1>();
    add_decayed(dQ, reads, product, q(), 0, warp, lane);
    if constexpr (K_BOXES > 1) {
      start_product(product, stage, stage + S_AT + TILE);
      wgmma_wait<0>();
      add_decayed(dQ, reads, product, q(), 1, warp, lane);
    }
    wgmma_wait<0>();
    pin(states);
  }

  // dPqk becomes scale times that of the chunk, which keys need too, and dQ += dPqk K.
  PRIM void add_pairs(float (&dPqk)[8][4], float (&dQ)[K_TILES][4], const Column& own, float* columns) {
    if constexpr (!LEAVES_DV) share_columns(columns, own, QUERY_BARRIER, thread);
    const float ones[2] = {1.0f, 1.0f};
    weigh_pairs<false>(dPqk, ones, columns, warp, lane);
    if constexpr (LEAVES_DV) free_columns(s, tokens_of_heads, lane);
    uint32_t a[STEPS][4];
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
    for (int step = 0; step < STEPS; step++) wgmma<DTYPE, true>(dQ, a[step], step_of_rows(k(), step), true);
    wgmma_commit();
    wgmma_wait<0>();
    pin(dQ);
  }

  // What queries have part in of dg.
  PRIM void sum_gates(float (&dPqk)[8][4], const float (&states)[8][4], float over, DecayedRows& reads) const {
    float diagonal[2];
    take_diagonal(diagonal, states, warp, lane);
    float sum = diagonal[0] + diagonal[1];
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(~0u, sum, bits);
    if (lane == 0) s.sums.states[warp] = over * sum;
    multiply_pairs(dPqk, q(), k());
    sum_rectangles(s.sums.pairs + warp * CHUNK, dPqk, warp, lane);
    reads.sums[0] *= scale * reads.factor[0], reads.sums[1] *= scale * reads.factor[1];
    write_rows_of(s.sums.query_reads, reads.sums, warp, lane);
    __syncwarp();
    if (lane == 0) mbarrier_arrive(s.sums.full);
  }
};

PRIM void make_queries(const Shared& s, const Work& work, const float* beta, const float* decays, DTYPE* dq,
                       float scale, int thread) {
  Queries role = {s, scale, thread, thread / 32, thread % 32};
  for_each_pair(work, [&](const Chunk& chunk, int slot, int h) {
    const int groups = work.HV / work.H;
    float dQ[K_TILES][4];
    clear(dQ);
    for (int group = 0; group < groups; group++) {
      const int hv = h * groups + group;
      const float* decay_rows = HAS_GATE ? decays_of(decays, slot, hv, work.HV) : nullptr;
      Column own = {};
      if constexpr (!LEAVES_DV)
        own = load_column(beta + chunk.first * work.HV + hv, decay_rows, chunk.tokens, work.HV, thread);
      role.add_head(dQ, own, decay_rows);
    }
    free_keys(s, role.keys, role.lane);
    write_gradient(dq, dQ, scale, chunk, work.H, h, thread);
  });
}
