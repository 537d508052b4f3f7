// The loading warp of sm90/forward.cu: K and Q, and V, of each chunk by TMA, as soon as their buffers are free, and
// what is to be known of each token.
#pragma once
#include "sm90/forward/tokens.cuh"
#include "sm90/sums.cuh"

// Boxes of 64 channels of a chunk's tokens, PITCH elements from one to the next.
template <int BOXES, int PITCH>
PRIM void load_boxes(DTYPE* tiles, const TensorMap* map, uint64_t* barrier, const Work& work, int channel, int head,
                     int c) {
#pragma unroll
  for (int box = 0; box < BOXES; box++)
    tma_load(tiles + box * PITCH, map, barrier, channel + box * BOX, head, work.start + c * CHUNK, work.batch);
}

// Rows from `tokens` on, by a warp, in few registers.
template <int BOXES>
PRIM void clear_tail(DTYPE* tiles, int tokens, int lane) {
#pragma unroll 1
  for (int row = tokens + lane / 8; row < CHUNK; row += 4)
#pragma unroll 1
    for (int box = 0; box < BOXES; box++) *(uint4*)&tiles[box * TILE + row * BOX + lane % 8 * 8] = {};
}

// The output of chunk c, by a warp: by TMA, or row by row where what follows in memory is another sequence's. Walkers
// do not wait until their writes are seen by TMA: it is for the sender to make them so.
PRIM void send_output(const Shared& s, const Work& work, const Rows& o, int c, int lane) {
  mbarrier_wait(s.output_full, c % 2);
  const int tokens = LATE && c < work.silent ? 0 : work.tokens(c);
  if (tokens == CHUNK || (!VARLEN && (!LATE || tokens > 0))) {
    if (lane == 0) {
      async_proxy_fence();
#pragma unroll
      for (int half = 0; half < MATH; half++)
        tma_store(o.map, s.o + half * TILE, work.channel + half * BOX, work.hv, work.start + c * CHUNK, work.batch);
      tma_store_commit(), tma_store_wait_read<0>();
    }
  } else {
    constexpr int PIECES = SLICE / 8;  // of a row
#pragma unroll 1
    for (int i = opaque(lane); i < tokens * PIECES; i += 32) {
      const int token = i / PIECES, piece = i % PIECES, channel = work.channel + piece * 8;
      const int64_t row = (work.sequence.first + c * CHUNK + token) * work.HV + work.hv;
      const DTYPE* box = s.o + piece / 8 * TILE;
      if (channel < HEAD_V)
        *(uint4*)&o.rows[row * HEAD_V + channel] = *(const uint4*)&box[swizzled(token, piece % 8 * 8)];
    }
  }
  __syncwarp();
  if (lane == 0) mbarrier_arrive(s.output_free);
}

// `joined`: from JOIN_STAGE on, buffers of K and Q serve others first.
PRIM void load(const Shared& s, const Maps& maps, const Work& work, const Rows& o, TokenLoader& tokens,
               uint64_t* joined, int lane) {
  // The solvers want K and Q some chunks before the walk wants V.
  constexpr int AHEAD = KEY_STAGES - VALUE_STAGES;
  Ring<KEY_STAGES> keys;
  Ring<VALUE_STAGES> values;
  tokens.ask(0);
  // The last output comes a buffer's round after the last K.
  constexpr bool SENDS = WITH_OUTPUT && SENDER == 0;
  for (int i = 0; i < work.chunks + (SENDS ? KEY_STAGES : AHEAD); i++) {
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
      tokens.write(tokens_of(s, keys.stage));
      if (clears(c)) {
        mbarrier_wait(barrier, 0);
        clear_tail<KEYS / TILE>(k, work.tokens(c), opaque(lane));
        async_proxy_fence();
      }
      __syncwarp();
      if (lane == 0) {
        mbarrier_arrive(full);
        if (clears(c)) mbarrier_arrive(full);  // for the copies, which have landed
      }
      keys.advance();
    }
    if (int c = i - AHEAD; c >= 0 && c < work.chunks && work.values) {
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
        clear_tail<MATH>(v, work.tokens(c), opaque(lane));
        async_proxy_fence();
        __syncwarp();
        if (lane == 0) mbarrier_arrive(full);
      }
      values.advance();
    }
    if (i < work.chunks) tokens.ask(i + 1);
    if constexpr (SENDS)
      if (int c = i - KEY_STAGES; c >= 0) send_output(s, work, o, c, lane);
  }
}
