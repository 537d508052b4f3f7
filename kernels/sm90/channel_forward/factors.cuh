// What the four warps that make factors do in sm90/channel_forward.cu with scaled rows
// (sm90/channel_forward/scale.cuh): M and Pqk, of whose blocks of 16 x 16 a warp has one on the diagonal and three
// below it, and K and Q as of the chunk's start. Where walkers scale, the last one also carries V and O.
#pragma once
#include "sm90/channel_forward/carry.cuh"
#include "sm90/channel_forward/scale.cuh"
#include "sm90/core.cuh"

static_assert(2 * TRIANGLE <= 2 * (COUNT - 1) * OWN_PAIRS, "own pairs of M take the place of their halves");

// Of the six pairs of blocks that meet a warp has M or Pqk of three: of those without a block in between, or with.
struct Meeting {
  int warp;
  PRIM bool queries() const { return warp % 2 == 1; }
  PRIM bool apart() const { return warp / 2 == 1; }
  template <bool APART>
  static PRIM constexpr int later(int n) {
    return APART ? (n == 0 ? 2 : 3) : n + 1;
  }
  template <bool APART>
  static PRIM constexpr int earlier(int n) {
    return APART ? n % 2 : n;
  }
};

struct FactorWarp {
  const Stage& at;
  int block, lane;

  // Later blocks' rows by keys of earlier ones, three pairs at once. APART: keys of block 0 and rows of block 3 are
  // brought to where block 2 begins, where keys of block 1 and rows of block 2 are.
  template <bool APART>
  PRIM void meet(float (&sums)[3][2][4], const DTYPE* tile) const {
    const int late = piece_place(lane % 16, lane / 16),
              soon = piece_place(lane % 8 + lane / 16 * 8, lane / 8 % 2) ^ OTHER;
    constexpr int FIRST = Meeting::later<APART>(0), BLOCKS = APART ? 2 : 3;
#pragma unroll
    for (int n = 0; n < 3; n++) clear(sums[n]);
    auto multiply = [&](int step) {
      const int turn = step % 4 * 16, box = step / 4 * TILE;
      uint32_t rows[BLOCKS][4], early[BLOCKS][4];
#pragma unroll
      for (int n = 0; n < BLOCKS; n++) {
        ldmatrix_x4(rows[n], tile + (late ^ turn) + box + (FIRST + n) * BLOCK * BOX);
        ldmatrix_x4(early[n], at.others + (soon ^ turn) + box + n * BLOCK * BOX);
      }
      if constexpr (APART) {
        const Power* f = at.powers + step * 16 + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          early[0][i] = times<DTYPE>(early[0][i], *(const uint32_t*)(f + (UNTIL + 1) * KP + i % 2 * 8));
          rows[1][i] = times<DTYPE>(rows[1][i], *(const uint32_t*)(f + (UNTIL + 2) * KP + i / 2 * 8));
        }
      }
#pragma unroll
      for (int n = 0; n < 3; n++) {
        const int later = Meeting::later<APART>(n) - FIRST, earlier = Meeting::earlier<APART>(n);
#pragma unroll
        for (int h = 0; h < 2; h++)
          mma_m16n8k16<DTYPE>(sums[n][h], rows[later], early[earlier][2 * h], early[earlier][2 * h + 1]);
      }
    };
#pragma unroll
    for (int step = 0; step < K_STEPS; step++) multiply(step);
  }

  // Where walkers scale: rows of block 3, or of blocks 1 and 2, of K or of Q, by keys of all earlier blocks, and these
  // rows as of the chunk's start. Between pairs with a block in between is where block 2 begins, as above. LAST: block
  // 3.
  template <bool LAST>
  PRIM void meet_and_bring(float (&sums)[3][2][4], DTYPE* tile) const {
    constexpr int ROWS = LAST ? 1 : 2, EARLY = LAST ? 3 : 2, FIRST = LAST ? 3 : 1;
    const int late = piece_place(lane % 16, lane / 16),
              soon = piece_place(lane % 8 + lane / 16 * 8, lane / 8 % 2) ^ OTHER;
#pragma unroll
    for (int n = 0; n < 3; n++) clear(sums[n]);
#pragma unroll 1
    for (int step = 0; step < K_STEPS; step++) {
      const int turn = step % 4 * 16, box = step / 4 * TILE;
      const Power* f = at.powers + step * 16 + lane % 4 * 2;
      auto power = [&](int row, int i) { return *(const uint32_t*)(f + row * KP + i * 8); };
      uint32_t rows[ROWS][4], early[EARLY][4], apart[4];
#pragma unroll
      for (int n = 0; n < ROWS; n++) ldmatrix_x4(rows[n], tile + (late ^ turn) + box + (FIRST + n) * BLOCK * BOX);
#pragma unroll
      for (int n = 0; n < EARLY; n++) ldmatrix_x4(early[n], at.others + (soon ^ turn) + box + n * BLOCK * BOX);
      auto multiply = [&](float (&d)[2][4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
#pragma unroll
        for (int h = 0; h < 2; h++) mma_m16n8k16<DTYPE>(d[h], a, b[2 * h], b[2 * h + 1]);
      };
      if constexpr (LAST) {
        multiply(sums[2], rows[0], early[2]);
#pragma unroll
        for (int i = 0; i < 4; i++) apart[i] = times<DTYPE>(rows[0][i], power(UNTIL + 2, i / 2));
        multiply(sums[1], apart, early[1]);
      } else {
        multiply(sums[0], rows[0], early[0]);
        multiply(sums[2], rows[1], early[1]);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) early[0][i] = times<DTYPE>(early[0][i], power(UNTIL + 1, i % 2));
      if constexpr (LAST)
        multiply(sums[0], apart, early[0]);
      else
        multiply(sums[1], rows[1], early[0]);
#pragma unroll
      for (int n = 0; n < ROWS; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) rows[n][i] = times<DTYPE>(rows[n][i], power(READS + FIRST + n, i / 2));
        stmatrix_x4(tile + (late ^ turn) + box + (FIRST + n) * BLOCK * BOX, rows[n]);
      }
    }
  }
  template <bool LAST>
  PRIM void meet_all_and_bring() const {
    const bool queries = Meeting{block}.queries();
    float sums[3][2][4];
    meet_and_bring<LAST>(sums, queries ? at.q : at.k);
    named_barrier(FACTOR_BARRIER, 128);  // everyone is done with these keys
#pragma unroll
    for (int n = 0; n < 3; n++) store_met(sums[n], queries, LAST ? 3 : n == 0 ? 1 : 2, LAST ? n : n / 2);
  }
  // A pair of blocks to Pqk, or to M in the place of keys for other blocks.
  PRIM void store_met(const float (&sums)[2][4], bool queries, int later, int earlier) const {
    if (queries)
      write_box(at.p, sums[0], sums[1], later * BLOCK, earlier * BLOCK, lane);
    else
      store_block_of_m((float*)at.others, sums, later * BLOCK, earlier * BLOCK, lane);
  }

  // Own pairs that walkers have left, those of M for the solvers, whose place both halves of the channels have had.
  PRIM void take_own(uint64_t* own_full) const {
    Pairs own = {};
    own.add(at.own_pairs(0, block), lane);
    own.add(at.own_pairs(1, block), lane);
    own.clear_later(lane);
    named_barrier(FACTOR_BARRIER, 128);  // everyone has read
    store_block_of_m(at.own, own.m, block * BLOCK, block * BLOCK, lane);
    say(own_full);
    own.write_p(at.p, block, block, lane);
  }
  // Own pairs where walkers do not scale.
  PRIM void make_own(Pairs& own) const {
    ScaleWarp<4>{at, block, 0, lane}.run(own, min(at.within[block], at.within[COUNT + block]));
    own.clear_later(lane);
    own.write_p(at.p, block, block, lane);
    named_barrier(FACTOR_BARRIER, 128);
  }

  // The warp's pairs of blocks that meet there, and M of all its pairs.
  template <bool APART>
  PRIM void meet_all(const Pairs& own) const {
    const bool queries = Meeting{block}.queries();
    float sums[3][2][4];
    meet<APART>(sums, queries ? at.q : at.k);
    named_barrier(FACTOR_BARRIER, 128);  // everyone is done with these keys, and with rows as of blocks
    store_block_of_m((float*)at.others, own.m, block * BLOCK, block * BLOCK, lane);
#pragma unroll
    for (int n = 0; n < 3; n++) store_met(sums[n], queries, Meeting::later<APART>(n), Meeting::earlier<APART>(n));
  }

  // The block's K and Q as of the chunk's start: four pieces of each at a time, so that loads do not wait for stores.
  PRIM void bring_to_chunk() const {
    const int first = piece_place(block * BLOCK + lane % 16, lane / 16);
#pragma unroll
    for (int box = 0; box < K_BOXES; box++) {
      uint4 k[4], q[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int place = (first ^ i * 16) + box * TILE;
        const uint4 power = at.eight_powers(READS + block, box * 8 + i * 2 + lane / 16);
        k[i] = times(eight(at.k, place), power), q[i] = times(eight(at.q, place), power);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int place = (first ^ i * 16) + box * TILE;
        eight(at.k, place) = k[i], eight(at.q, place) = q[i];
      }
    }
  }

  // All that the solvers and walkers need, which barriers say is there.
  PRIM void run(const Shared& s, int stage) const {
    if constexpr (WALKERS_SCALE) {
      take_own(s.own_full);
      if (Meeting{block}.apart())
        meet_all_and_bring<true>();
      else
        meet_all_and_bring<false>();
      say(s.pairs_full + stage);
    } else {
      Pairs own = {};
      make_own(own);
      if (Meeting{block}.apart())
        meet_all<true>(own);
      else
        meet_all<false>(own);
      say(s.pairs_full + stage);
      bring_to_chunk();
    }
    async_proxy_fence();
    say(s.factors_full + stage);
  }
  PRIM void say(uint64_t* barrier) const {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier);
  }
};

PRIM void make_factors(const Shared& s, const Work& work, const Carrier& carrier, int warp, int lane) {
  Place place;
  const bool carries = WALKERS_SCALE && warp == 3 && lane == 0;
  if (carries) carrier.begin();
  for (int c = 0; c < work.chunks; c++, place.advance()) {
    const int stage = place.stage.stage;
    const Stage at(s, place.key.stage, stage);
    if constexpr (WALKERS_SCALE) {
      mbarrier_wait(s.scaled_full + stage, place.stage.parity);
    } else {
      mbarrier_wait(s.keys_full + place.key.stage, place.key.parity);
      mbarrier_wait(s.sums_full + stage, place.stage.parity);
    }
    // Said to be in range, so that nothing is divided with a sign.
    FactorWarp{at, warp & 3, opaque(lane) & 31}.run(s, stage);
    if (carries && c > 0) carrier.exchange(c - 1);
    if constexpr (WALKERS_SCALE) __syncwarp();
  }
  if (carries) carrier.exchange(work.chunks - 1);
}
