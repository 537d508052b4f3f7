// The first warpgroup of sm90/backward_chunk.cu: one warp loads, the other three make dV, or have
// other work.
#pragma once
#include "sm90/backward_chunk/gates.cuh"
#include "sm90/backward_chunk/pairs.cuh"
#include "tiles/store.cuh"

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

// dV = b dY, eight lanes per token, eight channels each.
PRIM void make_values(const Shared& s, const Work& work, const float* beta, DTYPE* dv, int warp, int lane) {
  constexpr int ROUNDS = (CHUNK / 4 + VALUE_WARPS - 1) / VALUE_WARPS;
  Ring<SLICE_STAGES> ring;
  for_each_pair(work, [&](const Chunk& chunk, int, int h) {
    const int groups = work.HV / work.H, piece = lane % 8;
    for (int group = 0; group < groups; group++) {
      const int64_t first = chunk.first * work.HV + h * groups + group;  // row of (token, value head)
      float b[ROUNDS];
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
          if (t >= chunk.tokens || channel >= HEAD_V) continue;
          const uint4 dy = *(const uint4*)&stage[DY_AT + swizzled(t, piece * 8)];
          const uint32_t rows[4] = {dy.x, dy.y, dy.z, dy.w};
          uint32_t out[4];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float2 y = unpack2<DTYPE>(rows[i]);
            out[i] = pack2<DTYPE>(b[round] * y.x, b[round] * y.y);
          }
          store_eight(dv + (first + (int64_t)t * work.HV) * HEAD_V, channel,
                      make_uint4(out[0], out[1], out[2], out[3]));
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(s.free + ring.stage);
        ring.advance();
      }
    }
  });
}

#if LEAVES_DV
// Columns of every value head, up to two of them ahead.
PRIM void bring_columns(const Shared& s, const Work& work, const float* beta, const float* decays, int lane) {
  Ring<2> ring;
  for_each_pair(work, [&](const Chunk& chunk, int slot, int h) {
    const int groups = work.HV / work.H;
    for (int group = 0; group < groups; group++) {
      const int hv = h * groups + group;
      const float* rows = decays_of(decays, slot, hv, work.HV);
      float x[2][5];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int t = i * 32 + lane;
        x[i][0] = t < chunk.tokens ? beta[(chunk.first + t) * work.HV + hv] : 0.0f;
        x[i][1] = rows[HIGH * CHUNK + t], x[i][2] = rows[LOW * CHUNK + t];
        x[i][3] = rows[READS * CHUNK + t], x[i][4] = rows[WRITES * CHUNK + t];
      }
      mbarrier_wait(s.columns_free + ring.stage, ring.parity ^ 1);
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 5; j++) s.columns[ring.stage * COLUMNS + j * CHUNK + i * 32 + lane] = x[i][j];
      __syncwarp();
      if (lane == 0) mbarrier_arrive(s.columns_full + ring.stage);
      ring.advance();
    }
  });
}

PRIM void write_gate_gradients(const Shared& s, const Work& work, float* dg, int lane) {
  Ring<1> ring;
  for_each_pair(work, [&](const Chunk& chunk, int, int h) {
    const int groups = work.HV / work.H;
    for (int group = 0; group < groups; group++) {
      mbarrier_wait(s.sums.full, ring.parity);
      write_gate_gradient(dg + chunk.first * work.HV + h * groups + group, s.sums, chunk.tokens, work.HV, lane);
      __syncwarp();
      if (lane == 0) mbarrier_arrive(s.pairs_free);
      ring.advance();
    }
  });
}

// dbeta of tokens whose b is_small: eight lanes per token, eight channels each.
PRIM void sum_small(const Shared& s, const Work& work, const DTYPE* n, const DTYPE* small_dy, float* dbeta, int lane) {
  Ring<2> ring;
  for_each_pair(work, [&](const Chunk& chunk, int, int h) {
    const int groups = work.HV / work.H;
    for (int group = 0; group < groups; group++) {
      const float* b = wait_for_columns(s, ring);
      int small = is_small(b[lane]) || is_small(b[lane + 32]);
#pragma unroll
      for (int bits = 16; bits > 0; bits /= 2) small |= __shfl_xor_sync(~0u, small, bits);
      for (int tokens = small ? 0 : CHUNK; tokens < chunk.tokens; tokens += 4) {
        const int t = tokens + lane / 8;
        const int64_t row = (chunk.first + t) * work.HV + h * groups + group;
        const bool asked = t < chunk.tokens && is_small(b[t]);
        float sum = 0.0f;
        for (int channel = lane % 8 * 8; asked && channel < HEAD_V; channel += BOX)
          sum += dot_eight<DTYPE>(n + row * HEAD_V + channel, small_dy + row * HEAD_V + channel);
#pragma unroll
        for (int bits = 1; bits < 8; bits *= 2) sum += __shfl_xor_sync(~0u, sum, bits);
        if (asked && lane % 8 == 0) dbeta[row] = sum;
      }
      free_columns(s, ring, lane);
    }
  });
}
#endif
