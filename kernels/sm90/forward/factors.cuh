// The solvers of sm90/forward.cu: T11, M21, T22 and P of each chunk, or P alone where T is given.
//
// A tile of T holds T11 and T22 less diag(b) on its diagonal, M21 below it and what rounding has left out of M21 above.
#pragma once
#include "sm90/forward/shared.cuh"

PRIM float no_less_than_lowest(float g) { return g < -1000.0f ? -1000.0f : g; }  // NaN stays

// A sum of gates as two floats, so that differences of large ones are as good as those of doubles.
PRIM float2 split(double x) { return make_float2((float)x, (float)(x - (float)x)); }
PRIM float difference(float2 x, float2 y) { return (x.x - y.x) + (x.y - y.y); }

// Running sums G of the gates of a chunk, and what is made of them, by one warp: a lane has two tokens.
PRIM void sum_gates(const Shared& s, const Gates& gates, int stage, float2 g, int lane) {
  const double first = no_less_than_lowest(g.x), pair = first + no_less_than_lowest(g.y);
  double sum = pair;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const double below = __shfl_sync(~0u, sum, max(lane - distance, 0));
    if (lane >= distance) sum += below;
  }
  // Nothing of the later of two tokens is in the sum of the earlier one.
  const double end = __shfl_sync(~0u, sum, 31), below = __shfl_sync(~0u, sum, max(lane - 1, 0));
  const double before = (lane > 0 ? below : 0.0) + first;
  const int token = 2 * lane, at = stage * CHUNK + token;
  gates.G[token] = split(before), gates.G[token + 1] = split(sum);
  *(float2*)&s.decay[at] = make_float2(expf((float)before), expf((float)sum));
  *(float2*)&s.rest[at] = make_float2(expf((float)(end - before)), expf((float)(end - sum)));
  // Of the 16 tokens of a block, those of eight lanes.
  const double last = __shfl_sync(~0u, sum, lane / 8 * 8 + 7), other = __shfl_sync(~0u, sum, max(lane / 8 * 8 - 1, 0));
  const double start = lane < 8 ? 0.0 : other;
  *(float2*)&gates.since[token] = make_float2(expf((float)(before - start)), expf((float)(sum - start)));
  *(float2*)&gates.until[token] = make_float2(expf((float)(last - before)), expf((float)(last - sum)));
}

// Two column tiles, 16 x 16, times those of D (TRANSPOSED: of D^T), from `row` and `column` on.
//
// A block on the diagonal. On the other side of it e^x may overflow, which is cut away after.
template <bool TRANSPOSED>
PRIM void weigh_diagonal(float (&d0)[4], float (&d1)[4], const Gates& gates, int row, int lane) {
#if HAS_GATE
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 r = gates.G[row + sum_row(lane, i)];
    const float2 c0 = gates.G[row + sum_column(lane, 0, i)], c1 = gates.G[row + sum_column(lane, 1, i)];
    d0[i] *= expf(TRANSPOSED ? difference(c0, r) : difference(r, c0));
    d1[i] *= expf(TRANSPOSED ? difference(c1, r) : difference(r, c1));
  }
#endif
}
// What later tokens read of an earlier block: D is a product of three decays, none of which can overflow, of the later
// token since the end of the block before its own, from the end of the earlier block to that, and of the earlier token
// until the end of its block.
template <bool TRANSPOSED>
PRIM void weigh(float (&d0)[4], float (&d1)[4], const Gates& gates, int row, int column, int lane) {
#if HAS_GATE
  const int later = TRANSPOSED ? column : row, earlier = TRANSPOSED ? row : column;
  const float between = expf(difference(gates.G[later - 1], gates.G[earlier + 15]));
  const float *rows = TRANSPOSED ? gates.until : gates.since, *columns = TRANSPOSED ? gates.since : gates.until;
  const float low = between * rows[row + sum_row(lane, 0)], high = between * rows[row + sum_row(lane, 2)];
  const float2 f0 = *(const float2*)&columns[column + sum_column(lane, 0, 0)];
  const float2 f1 = *(const float2*)&columns[column + sum_column(lane, 1, 0)];
  d0[0] *= low * f0.x, d0[1] *= low * f0.y, d0[2] *= high * f0.x, d0[3] *= high * f0.y;
  d1[0] *= low * f1.x, d1[1] *= low * f1.y, d1[2] *= high * f1.x, d1[3] *= high * f1.y;
#endif
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
  for (int i = 0; i < 4; i++) d[i] -= widen(narrow<DTYPE>(d[i]));
}

// T - diag(b) = L diag(b) for a 16 x 16 block of L at (row, column).
PRIM void write_t(DTYPE* t, float (&x)[2][4], const float* b, int row, int column, int lane) {
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const float2 f = *(const float2*)&b[column + sum_column(lane, j, 0)];
    x[j][0] *= f.x, x[j][1] *= f.y, x[j][2] *= f.x, x[j][3] *= f.y;
  }
  write_box(t, x[0], x[1], row, column, lane);
}

// T - diag(b) for 32 tokens from `row` on, from A at `a`, by one warp.
PRIM void make_t(DTYPE* t, float* a, const float* b, int row, int lane) {
  invert_diagonal_blocks(a, a, Ones(), lane);
  float x[2][4];
  merge_diagonal_blocks<DTYPE>(x, a, a, Ones(), lane);
  write_t(t, x, b, row + 16, row, lane);
#pragma unroll
  for (int block = 0; block < 32; block += 16) {
    load_block(x, a + block * (INVERSE_PITCH + 1), lane);
    write_t(t, x, b, row + block, row + block, lane);
  }
}

#if CLUSTER > 1
// T of this block's chunks, and columns, to the others of the cluster, by one thread; T to `kept`, too: (chunk slots,
// HV, 64, 64) in DTYPE, as it lies here.
PRIM void send(const Shared& s, const TensorMap* kept, const Work& work) {
  constexpr int COLUMN = CHUNK * 4, BYTES = TILE * 2 + (1 + 2 * HAS_GATE) * COLUMN;
  for (int c = work.rank; c < work.chunks; c += CLUSTER) {
    const int stage = c % FACTOR_STAGES;
    uint64_t* full = s.factors_full + stage;
    mbarrier_wait(full, c / FACTOR_STAGES % 2);
    for (int i = 1; i < CLUSTER; i++) {
      const int rank = (work.rank + i) % CLUSTER;
      auto send_to_rank = [&](void* x, int bytes) { cluster_send(x, x, bytes, full, rank); };
      mbarrier_arrive_expect_remote(full, BYTES, rank);
      send_to_rank(s.t + stage * TILE, TILE * 2);
      send_to_rank(s.beta + stage * CHUNK, COLUMN);
#if HAS_GATE
      send_to_rank(s.decay + stage * CHUNK, COLUMN);
      send_to_rank(s.rest + stage * CHUNK, COLUMN);
#endif
    }
    if (KEPT && work.keeps) {
      tma_store(kept, s.t + stage * TILE, 0, 0, work.hv, (int)work.sequence.slot + c);
      tma_store_commit();
      tma_store_wait_read<0>();
      mbarrier_arrive(s.factors_free + stage);
    }
  }
}
#endif

#if WITH_INVERTERS
// T11 and T22 of the chunks that this block solves, by INVERTERS warps in turn.
PRIM void invert(const Shared& s, const Work& work, int inverter, int lane_in_warp) {
  for (int job = inverter;; job += INVERTERS) {
    const int solved = job / 2, c = work.rank + CLUSTER * solved, half = job % 2, lane = opaque(lane_in_warp);
    if (c >= work.chunks) break;
    const int a_stage = solved % A_STAGES, stage = c % FACTOR_STAGES;
    mbarrier_wait(s.factors_free + stage, c / FACTOR_STAGES % 2 ^ 1);
    mbarrier_wait(s.a_full + a_stage, solved / A_STAGES % 2);
    make_t(s.t + stage * TILE, s.a + (a_stage * CHUNK + half * 32) * INVERSE_PITCH, s.beta + stage * CHUNK, half * 32,
           lane);
    async_proxy_fence();
    __syncwarp();
    if (lane == 0) {
      mbarrier_arrive(s.factors_full + stage);
      mbarrier_arrive(s.a_free + a_stage);
    }
  }
}
#endif

#if WITH_GIVEN
// T as a transfer kept it, by one thread.
PRIM void load_kept(const Shared& s, const TensorMap* kept, const Work& work) {
  Ring<FACTOR_STAGES> factors;
  for (int c = 0; c < work.chunks; c++) {
    uint64_t* full = s.factors_full + factors.stage;
    mbarrier_wait(s.factors_free + factors.stage, factors.parity ^ 1);
    mbarrier_arrive_expect(full, TILE * 2);
    tma_load(s.t + factors.stage * TILE, kept, full, 0, 0, work.hv, (int)work.sequence.slot + c);
    factors.advance();
  }
}
#endif

// GIVEN: P alone.
template <bool GIVEN>
PRIM void solve(const Shared& s, const Work& work, int solver, const float* beta, const float* g, int HV,
                int thread_in_warpgroup) {
  const int id = SOLVER_BARRIER + solver;
  const Gates gates = s.gates(solver);
  const int64_t first = work.sequence.first * HV + work.hv;  // row of (token, value head)
  // b of the 16 rows of A that a warp has.
  auto beta_of = [&](int c) {
    const int t = c * CHUNK + thread_in_warpgroup / 32 * 16 + thread_in_warpgroup % 16;
    return t < work.sequence.tokens ? beta[first + (int64_t)t * HV] : 0.0f;
  };
#if HAS_GATE
  auto gates_of = [&](int c) {
    const int t = c * CHUNK + 2 * (thread_in_warpgroup % 32);
    float2 x = make_float2(0.0f, 0.0f);
    if (t < work.sequence.tokens) x.x = g[first + (int64_t)t * HV];
    if (t + 1 < work.sequence.tokens) x.y = g[first + (int64_t)(t + 1) * HV];
    return x;
  };
  float2 next_gates = gates_of(work.rank + CLUSTER * solver);
#endif
  Ring<KEY_STAGES> keys;
  Ring<FACTOR_STAGES> factors;
  Ring<A_STAGES> stages;
  auto advance = [&](int chunks, int solved) {
    for (int i = 0; i < chunks; i++) keys.advance(), factors.advance();
    for (int i = 0; i < solved; i++) stages.advance();
  };
  const int first_chunk = work.rank + CLUSTER * solver;
  advance(first_chunk, solver);
  float next_beta = beta_of(first_chunk);
  for (int c = first_chunk; c < work.chunks; c += CLUSTER * SOLVERS) {
    const int thread = opaque(thread_in_warpgroup), warp = thread / 32, lane = thread % 32;
    DTYPE* t = s.t + factors.stage * TILE;
    const DTYPE* k = s.k + keys.stage * KEYS;
    // K K^T, and K Q^T beside it: products of 64 x 64 with both operands in shared memory would need all of its
    // bandwidth, one of 64 x 128 does not, and leaves the registers to its sums.
    constexpr int P = GIVEN ? 0 : 8;  // tile of K Q^T
    float products[P + 8 * WITH_OUTPUT][4];
    mbarrier_wait(s.keys_full + keys.stage, keys.parity);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < K_STEPS; step++) {
      const DTYPE* columns = GIVEN ? k + TILE : k;
      wgmma<DTYPE, false, false>(products, step_along_rows<KEY_PITCH>(k, step),
                                 step_along_rows<KEY_PITCH>(columns, step), step > 0);
    }
    wgmma_commit();
    mbarrier_wait(s.factors_free + factors.stage, factors.parity ^ 1);
#if WITH_INVERTERS
    if (!GIVEN) mbarrier_wait(s.a_free + stages.stage, stages.parity ^ 1);
#endif
    // Everyone is done with the A and the gates of the chunk before.
    if (HAS_GATE || !(WITH_INVERTERS || GIVEN)) named_barrier(id, 128);
    float *a = s.a + stages.stage * CHUNK * INVERSE_PITCH, *b = s.beta + factors.stage * CHUNK;
    if (lane < 16) b[warp * 16 + lane] = next_beta;
    const float b_low = __shfl_sync(~0u, next_beta, lane / 4), b_high = __shfl_sync(~0u, next_beta, lane / 4 + 8);
#if HAS_GATE
    if (warp == 0) sum_gates(s, gates, factors.stage, next_gates, lane);
    named_barrier(id, 128);
#endif
    wgmma_wait<0>();
    pin(products);
    if (lane == 0) mbarrier_arrive(s.keys_free + keys.stage);
    // The blocks of A to be inverted, which takes longest, then M21, then P.
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      if (GIVEN || j / 2 > warp || j / 4 < warp / 2) continue;
      if (j / 2 == warp) {
        weigh_diagonal<false>(products[j], products[j + 1], gates, warp * 16, lane);
        cut_above_diagonal(products[j], products[j + 1], lane);
      } else {
        weigh<false>(products[j], products[j + 1], gates, warp * 16, j * 8, lane);
      }
      float* at = a + (warp * 16 + lane / 4) * INVERSE_PITCH + j % 4 * 8 + lane % 4 * 2;
      *(float2*)at = make_float2(b_low * products[j][0], b_low * products[j][1]);
      *(float2*)(at + 8) = make_float2(b_low * products[j + 1][0], b_low * products[j + 1][1]);
      at += 8 * INVERSE_PITCH;
      *(float2*)at = make_float2(b_high * products[j][2], b_high * products[j][3]);
      *(float2*)(at + 8) = make_float2(b_high * products[j + 1][2], b_high * products[j + 1][3]);
    }
#if WITH_INVERTERS
    __syncwarp();
    if (lane == 0 && !GIVEN) mbarrier_arrive(s.a_full + stages.stage);
#endif
    if (warp >= 2 && !GIVEN) {
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        weigh<false>(products[j], products[j + 1], gates, warp * 16, j * 8, lane);
        write_box(t, products[j], products[j + 1], warp * 16, j * 8, lane);
        keep_rest(products[j]);
        keep_rest(products[j + 1]);
        write_box(t, products[j], products[j + 1], warp * 16 - 32, j * 8 + 32, lane);
      }
    }
#if WITH_OUTPUT
    DTYPE* p = s.p + factors.stage * TILE;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      if (j / 2 < warp) continue;
      float (&p0)[4] = products[P + j], (&p1)[4] = products[P + j + 1];  // of P transposed
      if (j / 2 == warp) {
        weigh_diagonal<true>(p0, p1, gates, warp * 16, lane);
        cut_below_diagonal(p0, p1, lane);
      } else {
        weigh<true>(p0, p1, gates, warp * 16, j * 8, lane);
      }
      write_box_transposed(p, p0, p1, j * 8, warp * 16, lane);
    }
#endif
    if (!WITH_INVERTERS && !GIVEN) {
      named_barrier(id, 128);  // A is there
      if (warp < 2) make_t(t, a + warp * 32 * INVERSE_PITCH, b, warp * 32, lane);
    }
    async_proxy_fence();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(s.factors_full + factors.stage);
    next_beta = beta_of(c + CLUSTER * SOLVERS);
#if HAS_GATE
    next_gates = gates_of(c + CLUSTER * SOLVERS);
#endif
    advance(CLUSTER * SOLVERS, SOLVERS);
  }
}
