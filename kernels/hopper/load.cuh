// The loading warp of forward_hopper.cu: K, and Q and V, of each chunk by TMA, as soon as their buffers are free.
#pragma once
#include "hopper/shared.cuh"

// Boxes of 64 channels of a chunk's tokens.
template <int BOXES>
PRIM void load_boxes(DTYPE* tiles, const TensorMap* map, uint64_t* barrier, const Work& work, int channel, int head,
                     int c) {
#pragma unroll
  for (int box = 0; box < BOXES; box++)
    tma_load(tiles + box * TILE, map, barrier, channel + box * BOX, head, work.start + c * CHUNK, work.batch);
}

PRIM void load(const Shared& s, const Maps& maps, const Work& work, int lane) {
  // The solvers want K some chunks before the walk wants Q and V.
  constexpr int AHEAD = KEY_STAGES - ROW_STAGES;
  const bool with_rows = WITH_OUTPUT || work.values;
  Ring<KEY_STAGES> keys;
  Ring<ROW_STAGES> rows;
  for (int i = 0; i < work.chunks + AHEAD; i++) {
    // Tokens past the end: in a batch they lie outside the array and come as zeros, else they are another sequence's.
    auto clears = [&](int c) { return VARLEN && work.tokens(c) < CHUNK; };
    if (int c = i; c < work.chunks) {
      DTYPE* k = s.k + keys.stage * K_BOXES * TILE;
      uint64_t *full = s.keys_full + keys.stage, *barrier = clears(c) ? s.landed : full;
      if (lane == 0) {
        mbarrier_wait(s.keys_free + keys.stage, keys.parity ^ 1);
        mbarrier_arrive_expect(barrier, K_BOXES * TILE * 2);
        load_boxes<K_BOXES>(k, maps.k, barrier, work, 0, work.h, c);
      }
      if (clears(c)) {
        __syncwarp();
        mbarrier_wait(barrier, 0);
        clear_rows(k, K_BOXES, work.tokens(c), lane);
        async_proxy_fence();
        __syncwarp();
        if (lane == 0) mbarrier_arrive(full);
      }
      keys.advance();
    }
    if (int c = i - AHEAD; c >= 0 && with_rows) {
      DTYPE *q = s.q + rows.stage * K_BOXES * TILE, *v = s.v + rows.stage * MATH * TILE;
      uint64_t *full = s.rows_full + rows.stage, *barrier = clears(c) ? s.landed + 1 : full;
      if (lane == 0) {
        mbarrier_wait(s.rows_free + rows.stage, rows.parity ^ 1);
        mbarrier_arrive_expect(barrier, (WITH_OUTPUT * K_BOXES + MATH) * TILE * 2);
#if WITH_OUTPUT
        load_boxes<K_BOXES>(q, maps.q, barrier, work, 0, work.h, c);
#endif
        load_boxes<MATH>(v, maps.v, barrier, work, work.channel, work.hv, c);
      }
      if (clears(c)) {
        __syncwarp();
        mbarrier_wait(barrier, 0);
#if WITH_OUTPUT
        clear_rows(q, K_BOXES, work.tokens(c), lane);
#endif
        clear_rows(v, MATH, work.tokens(c), lane);
        async_proxy_fence();
        __syncwarp();
        if (lane == 0) mbarrier_arrive(full);
      }
      rows.advance();
    }
  }
}
