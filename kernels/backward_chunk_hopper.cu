// The gradients of backward_chunk.cu on compute capability 9.0, for chunks of 64 tokens. Per chunk and value head, with
// S the state entering it, D' the gradient of the state leaving it, G from the reverse walk, N^ from the forward one,
// b = beta:
//
//   N = b N^      dV = dR = b G      dbeta = rowsum(G . N^)
//   dP = tril(dO N^T)      E = -tril(dR N^T, -1)
//   dQ = scale (dO S^T + dP K)      dK = scale dP^T Q + b (N^ D'^T - G S^T) + (E + E^T) K
//
// Memory bounds this, so loads never pause: as many blocks as multiprocessors each go through every gridDim-th pair of
// chunk and key head, and the loading warp runs ahead through a ring of stages of 64 value channels (dO, N^, G, S, D'),
// past the end of a head, a chunk or a pair. b multiplies rows and columns of sums, never a tile: operands are used as
// they land.
//
// Warpgroup 0: a warp loads with TMA, the other three make dV and dbeta. Warpgroup 1: dP, E and dQ. Warpgroup 2: dK.
// mbarriers hand tiles over; every warp says for itself that it is done with one.
//
// Numbers: operands of products in DTYPE, sums in float, results rounded once; dbeta in float. dQ and dK are summed
// over the value heads of a key head in registers, in their order: the same bits every time.
//
// Macros: DTYPE (bf16 or f16), HEAD_K (up to 128) and HEAD_V, multiples of 8; CHUNK (64), HAS_GATE (0), VARLEN,
// SLICE_STAGES. Grid: any number of blocks of 384 threads, up to `pairs`. Shared memory: the ring; Q and K; dP and E +
// E^T; beta; see cupy_delta/cuda/hopper_gradients.py.
#include "tiles/sequence.cuh"
#include "tiles/store.cuh"
#include "tiles/swizzled.cuh"

static_assert(CHUNK == 64, "the chunk is wgmma's 64 rows");
constexpr int VALUE_WARPS = 3, THREADS = 384;
// Per thread. A block starts with 168 for each, what 65536 are for 384 threads in steps of 8, and cannot have more later.
constexpr int VALUE_REGISTERS = 88, MATH_REGISTERS = 208;
static_assert(VALUE_REGISTERS + 2 * MATH_REGISTERS <= 3 * 168, "a warpgroup would wait for registers for ever");
constexpr int KP = HEAD_K <= 64 ? 64 : 128, K_BOXES = KP / BOX, K_TILES = KP / 8;
constexpr int SLICES = (HEAD_V + BOX - 1) / BOX;
constexpr int TILE = CHUNK * BOX, STEPS = CHUNK / 16;
constexpr int BETA_BARRIER = 1;
// A stage: boxes of dO, N^ and G, then 64 rows of S and of D'.
constexpr int N_AT = TILE, G_AT = 2 * TILE, S_AT = 3 * TILE, D_AT = (3 + K_BOXES) * TILE;
constexpr int STAGE = (3 + 2 * K_BOXES) * TILE;

struct Shared {
  DTYPE *stages, *q, *k, *pairs, *symmetric;  // pairs: scale dP; symmetric: E + E^T
  float* b;
  uint64_t *full, *free, *keys_full, *keys_free, *pairs_full, *pairs_free, *landed;
};

PRIM Shared take_shared(DynSmem& smem) {
  Shared s;
  s.stages = smem.take<DTYPE>(SLICE_STAGES * STAGE, "stages", 1024);
  s.q = smem.take<DTYPE>(K_BOXES * TILE, "q", 1024);
  s.k = smem.take<DTYPE>(K_BOXES * TILE, "k", 1024);
  s.pairs = smem.take<DTYPE>(TILE, "scaled dp", 1024);
  s.symmetric = smem.take<DTYPE>(TILE, "e + e^t", 1024);
  s.b = smem.take<float>(2 * CHUNK, "beta");
  s.full = smem.take<uint64_t>(SLICE_STAGES, "full");
  s.free = smem.take<uint64_t>(SLICE_STAGES, "free");
  s.keys_full = smem.take<uint64_t>(1, "keys full");
  s.keys_free = smem.take<uint64_t>(1, "keys free");
  s.pairs_full = smem.take<uint64_t>(1, "pairs full");
  s.pairs_free = smem.take<uint64_t>(1, "pairs free");
  s.landed = smem.take<uint64_t>(2, "ragged chunk landed");
  return s;
}

// The pairs of chunk and key head of one block.
struct Work {
  const int64_t* cu_seqlens;
  int pairs, N, T, H, HV;
};

// Calls body(chunk, slot, key head) for each pair; every role goes through the same ones.
template <class Body>
PRIM void for_each_pair(const Work& work, Body body) {
  for (int pair = blockIdx.x; pair < work.pairs; pair += gridDim.x) {
    const int slot = pair / work.H;
    const Chunk chunk = find_chunk<CHUNK>(work.cu_seqlens, slot, work.N, work.T);
    if (chunk.tokens > 0) body(chunk, slot, pair % work.H);
  }
}

struct Maps {
  const TensorMap *q, *k, *n, *g, *d_o, *states, *dstates;
};

PRIM void load(const Shared& s, const Maps& maps, const Work& work, int lane) {
  Ring<SLICE_STAGES> ring;
  Ring<1> keys;
  int landed[2] = {};  // parities
  for_each_pair(work, [&](const Chunk& chunk, int slot, int h) {
    const int batch = VARLEN ? 0 : (int)(chunk.first / work.T), token = (int)(chunk.first - (int64_t)batch * work.T);
    // Tokens past the end: in a batch they lie outside the array and come as zeros, else they are another sequence's.
    const bool clears = VARLEN && chunk.tokens < CHUNK;
    const int groups = work.HV / work.H;
    for (int group = 0; group < groups; group++) {
      const int hv = h * groups + group;
      for (int slice = 0; slice < SLICES; slice++) {
        DTYPE* stage = s.stages + ring.stage * STAGE;
        uint64_t* full = clears ? s.landed : s.full + ring.stage;
        if (lane == 0) {
          mbarrier_wait(s.free + ring.stage, ring.parity ^ 1);
          mbarrier_arrive_expect(full, STAGE * 2);
          tma_load(stage, maps.d_o, full, slice * BOX, hv, token, batch);
          tma_load(stage + N_AT, maps.n, full, slice * BOX, hv, token, batch);
          tma_load(stage + G_AT, maps.g, full, slice * BOX, hv, token, batch);
#pragma unroll
          for (int box = 0; box < K_BOXES; box++) {
            tma_load(stage + S_AT + box * TILE, maps.states, full, box * BOX, slice * BOX, hv, slot);
            tma_load(stage + D_AT + box * TILE, maps.dstates, full, box * BOX, slice * BOX, hv, slot);
          }
        }
        if (clears) {
          __syncwarp();
          mbarrier_wait(s.landed, landed[0]);
          landed[0] ^= 1;
          clear_rows(stage, 3, chunk.tokens, lane);
          async_proxy_fence();
          __syncwarp();
          if (lane == 0) mbarrier_arrive(s.full + ring.stage);
        }
        ring.advance();
      }
      if (group > 0) continue;
      // Q and K are needed at the end of a head, and are free at the end of the pair before.
      uint64_t* full = clears ? s.landed + 1 : s.keys_full;
      if (lane == 0) {
        mbarrier_wait(s.keys_free, keys.parity ^ 1);
        mbarrier_arrive_expect(full, 2 * K_BOXES * TILE * 2);
#pragma unroll
        for (int box = 0; box < K_BOXES; box++) {
          tma_load(s.q + box * TILE, maps.q, full, box * BOX, h, token, batch);
          tma_load(s.k + box * TILE, maps.k, full, box * BOX, h, token, batch);
        }
      }
      if (clears) {
        __syncwarp();
        mbarrier_wait(s.landed + 1, landed[1]);
        landed[1] ^= 1;
        clear_rows(s.q, K_BOXES, chunk.tokens, lane);
        clear_rows(s.k, K_BOXES, chunk.tokens, lane);
        async_proxy_fence();
        __syncwarp();
        if (lane == 0) mbarrier_arrive(s.keys_full);
      }
      keys.advance();
    }
  });
}

// dV = b G and dbeta = rowsum(G . N^): eight lanes per token, eight channels each.
PRIM void make_values(const Shared& s, const Work& work, const float* beta, DTYPE* dv, float* dbeta, int warp,
                      int lane) {
  constexpr int ROUNDS = (CHUNK / 4 + VALUE_WARPS - 1) / VALUE_WARPS;
  Ring<SLICE_STAGES> ring;
  for_each_pair(work, [&](const Chunk& chunk, int, int h) {
    const int groups = work.HV / work.H, piece = lane % 8;
    for (int group = 0; group < groups; group++) {
      const int64_t first = chunk.first * work.HV + h * groups + group;  // row of (token, value head)
      float b[ROUNDS], sums[ROUNDS] = {};
#pragma unroll
      for (int round = 0; round < ROUNDS; round++) {
        const int t = (round * VALUE_WARPS + warp) * 4 + lane / 8;
        b[round] = t < chunk.tokens ? beta[first + (int64_t)t * work.HV] : 0.0f;
      }
      for (int slice = 0; slice < SLICES; slice++) {
        const DTYPE* stage = s.stages + ring.stage * STAGE;
        mbarrier_wait(s.full + ring.stage, ring.parity);
#pragma unroll
        for (int round = 0; round < ROUNDS; round++) {
          const int t = (round * VALUE_WARPS + warp) * 4 + lane / 8, channel = slice * BOX + piece * 8;
          if (t >= chunk.tokens) continue;
          const uint4 n = *(const uint4*)&stage[N_AT + swizzled(t, piece * 8)];
          const uint4 g = *(const uint4*)&stage[G_AT + swizzled(t, piece * 8)];
          const uint32_t n_hat[4] = {n.x, n.y, n.z, n.w}, rows[4] = {g.x, g.y, g.z, g.w};
          uint32_t out[4];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float2 x = unpack2<DTYPE>(n_hat[i]), y = unpack2<DTYPE>(rows[i]);
            sums[round] += y.x * x.x + y.y * x.y;
            out[i] = pack2<DTYPE>(b[round] * y.x, b[round] * y.y);
          }
          if (channel < HEAD_V)
            *(uint4*)&dv[(first + (int64_t)t * work.HV) * HEAD_V + channel] =
                make_uint4(out[0], out[1], out[2], out[3]);
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(s.free + ring.stage);
        ring.advance();
      }
#pragma unroll
      for (int round = 0; round < ROUNDS; round++) {
        const int t = (round * VALUE_WARPS + warp) * 4 + lane / 8;
#pragma unroll
        for (int bits = 4; bits > 0; bits /= 2) sums[round] += __shfl_xor_sync(~0u, sums[round], bits);
        if (piece == 0 && t < chunk.tokens) dbeta[first + (int64_t)t * work.HV] = sums[round];
      }
    }
  });
}

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
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int t = warp * 16 + half * 8 + lane / 4;
    DTYPE* row = out + ((chunk.first + t) * H + h) * HEAD_K;
#pragma unroll
    for (int j = 0; j < K_TILES; j += 4) {
      uint32_t r[4];
#pragma unroll
      for (int i = 0; i < 4; i++) r[i] = pack2<DTYPE>(factor * d[j + i][2 * half], factor * d[j + i][2 * half + 1]);
      transpose_quads(r, lane);
      const int column = (j + lane % 4) * 8;
      if (t < chunk.tokens && column < HEAD_K) *(uint4*)&row[column] = make_uint4(r[0], r[1], r[2], r[3]);
    }
  }
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
  const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const Work work = {cu_seqlens, pairs, N, T, H, HV};
  DynSmem smem;
  const Shared s = take_shared(smem);
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
