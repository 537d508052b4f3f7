// The first warpgroup of sm90/backward_chunk.cu: one warp loads, the other three make dV and dbeta.
#pragma once
#include "sm90/backward_chunk/shared.cuh"

PRIM void load(const Shared& s, const Maps& maps, const Work& work, int lane) {
  Ring<SLICE_STAGES> ring;
  Ring<KEY_STAGES> keys;
  int landed[2] = {};  // parities
  for_each_pair(work, [&](const Chunk& chunk, int slot, int h) {
    const int batch = VARLEN ? 0 : (int)(chunk.first / work.T), token = (int)(chunk.first - (int64_t)batch * work.T);
    // Tokens past the end: in a batch they lie outside the array and come as zeros, else they are another sequence's.
    const bool clears = VARLEN && chunk.tokens < CHUNK;
    const int groups = work.HV / work.H;
    auto load_keys = [&] {
      DTYPE *q = s.q + keys.stage * K_BOXES * TILE, *k = s.k + keys.stage * K_BOXES * TILE;
      uint64_t* full = clears ? s.landed + 1 : s.keys_full + keys.stage;
      if (lane == 0) {
        mbarrier_wait(s.keys_free + keys.stage, keys.parity ^ 1);
        mbarrier_arrive_expect(full, 2 * K_BOXES * TILE * 2);
#pragma unroll
        for (int box = 0; box < K_BOXES; box++) {
          tma_load(q + box * TILE, maps.q, full, box * BOX, h, token, batch);
          tma_load(k + box * TILE, maps.k, full, box * BOX, h, token, batch);
        }
      }
      if (clears) {
        __syncwarp();
        mbarrier_wait(s.landed + 1, landed[1]);
        landed[1] ^= 1;
        clear_rows(q, K_BOXES, chunk.tokens, lane);
        clear_rows(k, K_BOXES, chunk.tokens, lane);
        async_proxy_fence();
        __syncwarp();
        if (lane == 0) mbarrier_arrive(s.keys_full + keys.stage);
      }
      keys.advance();
    };
    if (KEYS_FIRST) load_keys();
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
          tma_load(stage + DY_AT, maps.dy, full, slice * BOX, hv, token, batch);
#pragma unroll
          for (int box = 0; box < K_BOXES; box++) {
            tma_load(stage + S_AT + box * TILE, maps.states, full, box * BOX, slice * BOX, hv, slot);
            tma_load(stage + DS_AT + box * TILE, maps.dstates, full, box * BOX, slice * BOX, hv, slot);
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
      // They are needed at the end of a head, and are free at the end of the pair before.
      if (group == 0 && !KEYS_FIRST) load_keys();
    }
  });
}

// The sum of products of eight elements each.
template <class T>
PRIM float dot(const uint4& x, const uint4& y) {
  const uint32_t a[4] = {x.x, x.y, x.z, x.w}, b[4] = {y.x, y.y, y.z, y.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 u = unpack2<T>(a[i]), v = unpack2<T>(b[i]);
    sum += u.x * v.x + u.y * v.y;
  }
  return sum;
}

struct Gradients {
  DTYPE* dv;
  float* dbeta;
};

// dV = b dY and dbeta = rowsum(dY . N^), eight lanes per token, eight channels each; and with a gate c <S, dS'>.
PRIM void make_values(const Shared& s, const Work& work, const float* beta, const float* decays, const Gradients& to,
                      int warp, int lane) {
  constexpr int ROUNDS = (CHUNK / 4 + VALUE_WARPS - 1) / VALUE_WARPS;
  Ring<SLICE_STAGES> ring;
  Ring<1> pairs;
  for_each_pair(work, [&](const Chunk& chunk, int slot, int h) {
    const int groups = work.HV / work.H, piece = lane % 8;
    for (int group = 0; group < groups; group++) {
      const int64_t first = chunk.first * work.HV + h * groups + group;  // row of (token, value head)
      float b[ROUNDS], sums[ROUNDS] = {};
#pragma unroll
      for (int round = 0; round < ROUNDS; round++) {
        const int t = (round * VALUE_WARPS + warp) * 4 + lane / 8;
        b[round] = t < chunk.tokens ? beta[first + (int64_t)t * work.HV] : 0.0f;
      }
#if HAS_GATE
      float states = 0.0f;
#endif
      for (int slice = 0; slice < SLICES; slice++) {
        const DTYPE* stage = s.stages + ring.stage * STAGE;
        mbarrier_wait(s.full + ring.stage, ring.parity);
#if HAS_GATE
        for (int i = (warp * 32 + lane) * 8; i < K_BOXES * TILE; i += VALUE_WARPS * 32 * 8)
          states += dot<DTYPE>(*(const uint4*)&stage[S_AT + i], *(const uint4*)&stage[DS_AT + i]);
#endif
#pragma unroll
        for (int round = 0; round < ROUNDS; round++) {
          const int t = (round * VALUE_WARPS + warp) * 4 + lane / 8, channel = slice * BOX + piece * 8;
          if (t >= chunk.tokens) continue;
          const uint4 n = *(const uint4*)&stage[N_AT + swizzled(t, piece * 8)];
          const uint4 g = *(const uint4*)&stage[DY_AT + swizzled(t, piece * 8)];
          const uint32_t n_hat[4] = {n.x, n.y, n.z, n.w}, rows[4] = {g.x, g.y, g.z, g.w};
          uint32_t out[4];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float2 x = unpack2<DTYPE>(n_hat[i]), y = unpack2<DTYPE>(rows[i]);
            sums[round] += y.x * x.x + y.y * x.y;
            out[i] = pack2<DTYPE>(b[round] * y.x, b[round] * y.y);
          }
          if (channel < HEAD_V)
            *(uint4*)&to.dv[(first + (int64_t)t * work.HV) * HEAD_V + channel] =
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
        if (piece == 0 && t < chunk.tokens) to.dbeta[first + (int64_t)t * work.HV] = sums[round];
      }
#if HAS_GATE
#pragma unroll
      for (int bits = 16; bits > 0; bits /= 2) states += __shfl_xor_sync(~0u, states, bits);
      mbarrier_wait(s.pairs_free, pairs.parity ^ 1);
      if (lane == 0) {
        s.sums.states[warp] = states * decays_of(decays, slot, h * groups + group, work.HV)[READS * CHUNK + CHUNK - 1];
        mbarrier_arrive(s.sums.full);
      }
      __syncwarp();
      pairs.advance();
#endif
    }
  });
}
