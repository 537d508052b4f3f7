// The loading warp of forward_hopper.cu: K, Q and V of each chunk by TMA, as soon as their buffers are free.
#pragma once
#include "hopper/shared.cuh"

PRIM void load(const Shared& s, const Maps& maps, const Work& work, int lane) {
  Ring<KEY_STAGES> keys;
  Ring<VALUE_STAGES> values;
  constexpr int KEY_BYTES = (1 + WITH_OUTPUT) * K_BOXES * TILE * 2, VALUE_BYTES = MATH * TILE * 2;
  for (int c = 0; c < work.chunks; c++) {
    const int token = work.start + c * CHUNK;
    const int tokens = min(work.sequence.tokens - c * CHUNK, CHUNK);
    // Tokens past the end: in a batch they lie outside the array and come as zeros, else they are another sequence's.
    const bool clears = VARLEN && tokens < CHUNK;
    DTYPE* k = s.k + keys.stage * K_BOXES * TILE;
#if WITH_OUTPUT
    DTYPE* q = s.q + keys.stage * K_BOXES * TILE;
#endif
    uint64_t* keys_landed = clears ? s.landed : s.keys_full + keys.stage;
    if (lane == 0) {
      mbarrier_wait(s.keys_free + keys.stage, keys.parity ^ 1);
      mbarrier_arrive_expect(keys_landed, KEY_BYTES);
#pragma unroll
      for (int box = 0; box < K_BOXES; box++) {
        tma_load(k + box * TILE, maps.k, keys_landed, box * BOX, work.h, token, work.batch);
#if WITH_OUTPUT
        tma_load(q + box * TILE, maps.q, keys_landed, box * BOX, work.h, token, work.batch);
#endif
      }
    }
    if (clears) {
      __syncwarp();
      mbarrier_wait(s.landed, 0);
      clear_rows(k, K_BOXES, tokens, lane);
#if WITH_OUTPUT
      clear_rows(q, K_BOXES, tokens, lane);
#endif
      async_proxy_fence();
      __syncwarp();
      if (lane == 0) mbarrier_arrive(s.keys_full + keys.stage);
    }
    keys.advance();
    if (!work.values) continue;
    DTYPE* v = s.v + values.stage * MATH * TILE;
    uint64_t* values_landed = clears ? s.landed + 1 : s.values_full + values.stage;
    if (lane == 0) {
      mbarrier_wait(s.values_free + values.stage, values.parity ^ 1);
      mbarrier_arrive_expect(values_landed, VALUE_BYTES);
#pragma unroll
      for (int box = 0; box < MATH; box++)
        tma_load(v + box * TILE, maps.v, values_landed, work.channel + box * BOX, work.hv, token, work.batch);
    }
    if (clears) {
      __syncwarp();
      mbarrier_wait(s.landed + 1, 0);
      clear_rows(v, MATH, tokens, lane);
      __syncwarp();
      if (lane == 0) mbarrier_arrive(s.values_full + values.stage);
    }
    values.advance();
  }
}
