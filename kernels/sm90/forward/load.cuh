// The loading warp of sm90/forward.cu: K and Q, and V, of each chunk by TMA, as soon as their buffers are free, and
// what is to be known of each token.
#pragma once
#include "sm90/forward/tokens.cuh"

// Boxes of 64 channels of a chunk's tokens, PITCH elements from one to the next.
template <int BOXES, int PITCH>
PRIM void load_boxes(DTYPE* tiles, const TensorMap* map, uint64_t* barrier, const Work& work, int channel, int head,
                     int c) {
#pragma unroll
  for (int box = 0; box < BOXES; box++)
    tma_load(tiles + box * PITCH, map, barrier, channel + box * BOX, head, work.start + c * CHUNK, work.batch);
}

// `joined`: from JOIN_STAGE on, buffers of K and Q serve others first.
PRIM void load(const Shared& s, const Maps& maps, const Work& work, TokenLoader& tokens, uint64_t* joined, int lane) {
  // The solvers want K and Q some chunks before the walk wants V.
  constexpr int AHEAD = KEY_STAGES - VALUE_STAGES;
  Ring<KEY_STAGES> keys;
  Ring<VALUE_STAGES> values;
  tokens.ask(0);
  for (int i = 0; i < work.chunks + AHEAD; i++) {
    // Tokens past the end: in a batch they lie outside the array and come as zeros, else they are another sequence's.
    auto clears = [&](int c) { return VARLEN && work.tokens(c) < CHUNK; };
    if (JOINS && i == JOIN_STAGE) mbarrier_wait(joined, 0);
    if (int c = i; c < work.chunks) {
      DTYPE* k = s.k + keys.stage * KEYS;
      uint64_t *full = s.keys_full + keys.stage, *barrier = clears(c) ? s.landed : full;
      if (lane == 0) {
        mbarrier_wait(s.keys_free + keys.stage, keys.parity ^ 1);
        mbarrier_arrive_expect(barrier, KEYS * 2);
        load_boxes<K_BOXES, KEY_PITCH>(k, maps.k, barrier, work, 0, work.h, c);
#if WITH_OUTPUT
        load_boxes<K_BOXES, KEY_PITCH>(s.q + keys.stage * KEYS, maps.q, barrier, work, 0, work.h, c);
#endif
      }
      __syncwarp();
      tokens.write(tokens_of(s, keys.stage), c);
      if (clears(c)) {
        mbarrier_wait(barrier, 0);
        clear_rows(k, KEYS / TILE, work.tokens(c), opaque(lane));
        async_proxy_fence();
      }
      __syncwarp();
      if (lane == 0) {
        mbarrier_arrive(full);
        if (clears(c)) mbarrier_arrive(full);  // for the copies, which have landed
      }
      keys.advance();
    }
    if (int c = i - AHEAD; c >= 0 && work.values) {
      DTYPE* v = s.v + values.stage * MATH * TILE;
      uint64_t *full = s.values_full + values.stage, *barrier = clears(c) ? s.landed + 1 : full;
      if (lane == 0) {
        mbarrier_wait(s.values_free + values.stage, values.parity ^ 1);
        mbarrier_arrive_expect(barrier, MATH * TILE * 2);
        load_boxes<MATH, TILE>(v, maps.v, barrier, work, work.channel, work.hv, c);
      }
      if (clears(c)) {
        __syncwarp();
        mbarrier_wait(barrier, 0);
        clear_rows(v, MATH, work.tokens(c), opaque(lane));
        async_proxy_fence();
        __syncwarp();
        if (lane == 0) mbarrier_arrive(full);
      }
      values.advance();
    }
    if (i < work.chunks) tokens.ask(i + 1);
  }
}
