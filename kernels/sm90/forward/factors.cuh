// The solvers of sm90/forward.cu: X11, M21, X22 and P of each chunk, or P alone where X is given.
//
// A tile of X holds X11 and X22 less their diagonals of ones, M21 below them and what rounding has left out of M21
// above.
#pragma once
#include "sm90/forward/tokens.cuh"

// Two column tiles, 16 x 16 from (row, column) on, times the decays 2^(F_i - F_j) of a paired chunk. Above the diagonal
// (TRANSPOSED: below it) they may overflow, which is cut away after.
template <bool TRANSPOSED>
PRIM void decay_pairs(float (&d0)[4], float (&d1)[4], const float* F, int row, int column, int lane) {
  const float rows[2] = {F[row + sum_row(lane, 0)], F[row + sum_row(lane, 2)]};
  const float2 c0 = *(const float2*)&F[column + sum_column(lane, 0, 0)];
  const float2 c1 = *(const float2*)&F[column + sum_column(lane, 1, 0)];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float r = rows[i / 2], x0 = i % 2 == 0 ? c0.x : c0.y, x1 = i % 2 == 0 ? c1.x : c1.y;
    d0[i] *= exp2f(TRANSPOSED ? x0 - r : r - x0);
    d1[i] *= exp2f(TRANSPOSED ? x1 - r : r - x1);
  }
}
// A block on the diagonal: zero on and above it; below it.
PRIM void cut_above_diagonal(float (&d0)[4], float (&d1)[4], int lane) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int below = sum_row(lane, i) - sum_column(lane, 0, i);
    if (below <= 0) d0[i] = 0.0f;
    if (below <= 8) d1[i] = 0.0f;
  }
}
PRIM void cut_below_diagonal(float (&d0)[4], float (&d1)[4], int lane) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int below = sum_row(lane, i) - sum_column(lane, 0, i);
    if (below > 0) d0[i] = 0.0f;
    if (below > 8) d1[i] = 0.0f;
  }
}

// What rounding has left out.
PRIM void keep_rest(float (&d)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const float2 rounded = unpack2<DTYPE>(pack2<DTYPE>(d[i], d[i + 1]));
    d[i] -= rounded.x, d[i + 1] -= rounded.y;
  }
}

// X - I for 32 tokens from `row` on, from A at `a`, by one warp.
PRIM void make_x(DTYPE* tile, float* a, int row, int lane) {
  invert_diagonal_blocks<DTYPE>(a, a, Ones(), lane);
  float x[3][2][4];
  merge_diagonal_blocks<DTYPE>(x[1], a, a, Ones(), lane);
  load_block(x[0], a, lane);
  load_block(x[2], a + 16 * (INVERSE_PITCH + 1), lane);
#pragma unroll
  for (int i = 0; i < 3; i++) write_box(tile, x[i][0], x[i][1], row + (i + 1) / 2 * 16, row + i / 2 * 16, lane);
}

// X of this block's chunks to the others of the cluster, by one thread, and to `kept`: (chunk slots, HV, 64, 64) in
// DTYPE, as it lies here.
PRIM void send(const Shared& s, const TensorMap* kept, const Work& work) {
  for (int c = work.rank; c < work.chunks; c += CLUSTER) {
    const int stage = c % FACTOR_STAGES;
    uint64_t* full = s.factors_full + stage;
    mbarrier_wait(full, c / FACTOR_STAGES % 2);
    for (int i = 1; i < CLUSTER; i++) {
      const int rank = (work.rank + i) % CLUSTER;
      DTYPE* x = s.x + stage * TILE;
      mbarrier_arrive_expect_remote(full, TILE * 2, rank);
      cluster_send(x, x, TILE * 2, full, rank);
    }
    if (KEPT && work.keeps) {
      tma_store(kept, s.x + stage * TILE, 0, 0, work.hv, (int)work.sequence.slot + c);
      tma_store_commit();
      tma_store_wait_read<0>();
      mbarrier_arrive(s.factors_free + stage);
    }
  }
}

// X11 and X22 of the chunks that this block solves, by INVERTERS warps in turn.
PRIM void invert(const Shared& s, const Work& work, int inverter, int lane_in_warp) {
  for (int job = inverter;; job += INVERTERS) {
    const int solved = job / 2, c = work.rank + CLUSTER * solved, half = job % 2, lane = opaque(lane_in_warp);
    if (c >= work.chunks) break;
    const int a_stage = solved % A_STAGES, stage = c % FACTOR_STAGES;
    mbarrier_wait(s.factors_free + stage, c / FACTOR_STAGES % 2 ^ 1);
    mbarrier_wait(s.a_full + a_stage, solved / A_STAGES % 2);
    make_x(s.x + stage * TILE, s.a + (a_stage * CHUNK + half * 32) * INVERSE_PITCH, half * 32, lane);
    async_proxy_fence();
    __syncwarp();
    if (lane == 0) {
      mbarrier_arrive(s.factors_full + stage);
      mbarrier_arrive(s.a_free + a_stage);
    }
  }
}

// X as a transfer kept it, by one thread.
PRIM void load_kept(const Shared& s, const TensorMap* kept, const Work& work) {
  Ring<FACTOR_STAGES> factors;
  for (int c = 0; c < work.chunks; c++) {
    uint64_t* full = s.factors_full + factors.stage;
    mbarrier_wait(s.factors_free + factors.stage, factors.parity ^ 1);
    mbarrier_arrive_expect(full, TILE * 2);
    tma_load(s.x + factors.stage * TILE, kept, full, 0, 0, work.hv, (int)work.sequence.slot + c);
    factors.advance();
  }
}

// What a solving warp makes of its 16 rows of K K^T, and of its 16 columns of Q K^T, of a chunk.
struct Solver {
  bool pairs;      // the chunk may be paired
  const float* F;  // references of tokens, then
  float b_low, b_high;
  int warp, lane;

  // b A's blocks of 32 x 32 on the diagonal, which are to be inverted.
  template <int TILES>
  PRIM void write_a(float* a, float (&M)[TILES][4]) const {
    const int row = warp * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      if (j / 2 > warp || j / 4 < warp / 2) continue;
      if (pairs) decay_pairs<false>(M[j], M[j + 1], F, warp * 16, j * 8, lane);
      if (j / 2 == warp) cut_above_diagonal(M[j], M[j + 1], lane);
      float* at = a + row * INVERSE_PITCH + j % 4 * 8 + lane % 4 * 2;
      *(float2*)at = make_float2(b_low * M[j][0], b_low * M[j][1]);
      *(float2*)(at + 8) = make_float2(b_low * M[j + 1][0], b_low * M[j + 1][1]);
      at += 8 * INVERSE_PITCH;
      *(float2*)at = make_float2(b_high * M[j][2], b_high * M[j][3]);
      *(float2*)(at + 8) = make_float2(b_high * M[j + 1][2], b_high * M[j + 1][3]);
    }
  }
  // M21, by the warps that have it, and what rounding has left out of it.
  template <int TILES>
  PRIM void write_m21(DTYPE* tile, float (&M)[TILES][4]) const {
    if (warp < 2) return;
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      if (pairs) decay_pairs<false>(M[j], M[j + 1], F, warp * 16, j * 8, lane);
      write_box(tile, M[j], M[j + 1], warp * 16, j * 8, lane);
      keep_rest(M[j]);
      keep_rest(M[j + 1]);
      write_box(tile, M[j], M[j + 1], warp * 16 - 32, j * 8 + 32, lane);
    }
  }
  // P from its transposed, tiles FIRST and next of the products.
  template <int FIRST, int TILES>
  PRIM void write_p(DTYPE* p, float (&products)[TILES][4]) const {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      if (j / 2 < warp) continue;
      float (&p0)[4] = products[FIRST + j], (&p1)[4] = products[FIRST + j + 1];
      if (pairs) decay_pairs<true>(p0, p1, F, warp * 16, j * 8, lane);
      if (j / 2 == warp) cut_below_diagonal(p0, p1, lane);
      write_box_transposed(p, p0, p1, j * 8, warp * 16, lane);
    }
  }
};

// GIVEN: P alone. `pairs`: with decays of pairs.
template <bool GIVEN>
PRIM void solve(const Shared& s, const Work& work, bool pairs, int solver, int thread_in_warpgroup) {
  const int id = SOLVER_BARRIER + solver;
  constexpr bool INVERTS = !WITH_INVERTERS && !GIVEN;
  Ring<KEY_STAGES> keys;
  Ring<FACTOR_STAGES> factors;
  Ring<A_STAGES> stages;
  auto advance = [&](int chunks, int solved) {
    for (int i = 0; i < chunks; i++) keys.advance(), factors.advance();
    for (int i = 0; i < solved; i++) stages.advance();
  };
  const int first_chunk = work.rank + CLUSTER * solver;
  advance(first_chunk, solver);
  for (int c = first_chunk; c < work.chunks; c += CLUSTER * SOLVERS) {
    const int thread = opaque(thread_in_warpgroup), warp = thread / 32, lane = thread % 32;
    const DTYPE* k = s.k + keys.stage * KEYS;
    // K K^T, and K Q^T beside it: products of 64 x 64 with both operands in shared memory would need all of its
    // bandwidth, one of 64 x 128 does not, and leaves the registers to its sums.
    constexpr int M_TILES = GIVEN ? 0 : 8, TILES = M_TILES + 8 * WITH_OUTPUT;
    float products[TILES][4];
    mbarrier_wait(s.keys_full + keys.stage, keys.parity);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < K_STEPS; step++)
      wgmma<DTYPE, false, false>(products, step_along_rows<KEY_PITCH>(k, step),
                                 step_along_rows<KEY_PITCH>(GIVEN ? k + TILE : k, step), step > 0);
    wgmma_commit();
    mbarrier_wait(s.factors_free + factors.stage, factors.parity ^ 1);
    if constexpr (WITH_INVERTERS && !GIVEN) mbarrier_wait(s.a_free + stages.stage, stages.parity ^ 1);
    if constexpr (INVERTS) named_barrier(id, 128);  // everyone is done with the A of the chunk before
    const float* tokens = tokens_of(s, keys.stage);
    const int row = warp * 16 + lane / 4;
    const Solver mine = {pairs,
                         tokens + REFERENCE_AT,
                         tokens[BETA_AT + factor_place(row)],
                         tokens[BETA_AT + factor_place(row + 8)],
                         warp,
                         lane};
    DTYPE* x = s.x + factors.stage * TILE;
    float* a = s.a + stages.stage * CHUNK * INVERSE_PITCH;
    wgmma_wait<0>();
    pin(products);
    if (lane == 0 && !pairs) mbarrier_arrive(s.keys_free + keys.stage);
    // The blocks of A to be inverted, which takes longest, then M21, then P.
    if constexpr (!GIVEN) {
      mine.write_a(a, products);
      if constexpr (WITH_INVERTERS) {
        __syncwarp();
        if (lane == 0) mbarrier_arrive(s.a_full + stages.stage);
      }
      mine.write_m21(x, products);
    }
    if constexpr (WITH_OUTPUT) mine.template write_p<M_TILES>(s.p + factors.stage * TILE, products);
    if constexpr (INVERTS) {
      named_barrier(id, 128);  // A is there
      if (warp < 2) make_x(x, a + warp * 32 * INVERSE_PITCH, warp * 32, lane);
    }
    async_proxy_fence();
    __syncwarp();
    if (lane == 0) {
      if (pairs) mbarrier_arrive(s.keys_free + keys.stage);
      mbarrier_arrive(s.factors_full + factors.stage);
    }
    advance(CLUSTER * SOLVERS, SOLVERS);
  }
}
PRIM void solve_chunks(const Shared& s, const Work& work, bool pairs, int solver, int thread_in_warpgroup) {
  if constexpr (WITH_GIVEN) {
    if (work.given) return solve<true>(s, work, pairs, solver, thread_in_warpgroup);
  }
  solve<false>(s, work, pairs, solver, thread_in_warpgroup);
}
