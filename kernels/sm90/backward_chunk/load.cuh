// The first warpgroup of sm90/backward_chunk.cu: one warp loads, the other three make dV and dbeta.
#pragma once
#include "sm90/backward_chunk/shared.cuh"

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
