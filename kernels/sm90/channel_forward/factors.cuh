// What the four warps that make factors do in sm90/channel_forward.cu with scaled rows
// (sm90/channel_forward/scale.cuh): M and Pqk, of whose blocks of 16 x 16 a warp has one on the diagonal and three
// below it, and K and Q as of the chunk's start.
#pragma once
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
    if constexpr (WALKERS_SCALE) {
#pragma unroll 4
      for (int step = 0; step < K_STEPS; step++) multiply(step);
    } else {
#pragma unroll
      for (int step = 0; step < K_STEPS; step++) multiply(step);
    }
  }

  // Own pairs that walkers have left, those of M for the solvers, whose place both halves of the channels have had.
  PRIM void take_own(uint64_t* own_full) const {
    Pairs own = {};
    own.add(at.own_pairs(0, block), lane);
    own.add(at.own_pairs(1, block), lane);
    own.clear_later(lane);
    named_barrier(FACTOR_BARRIER, 128);  // everyone has read
    store_block_of_m(at.own, own.m, block * BLOCK, block * BLOCK, lane);
    __syncwarp();
    if (lane == 0) mbarrier_arrive(own_full);
    own.write_p(at.p, block, block, lane);
  }
  // Own pairs where walkers do not scale.
  PRIM void make_own(Pairs& own) const {
    const int within = min(at.within[block], at.within[COUNT + block]);
    Pairs beyond = {};
    ScaleWarp<4>{at, block, 0, lane}.run(own, beyond, within);
    own.finish(beyond, within, lane);
    own.write_p(at.p, block, block, lane);
    named_barrier(FACTOR_BARRIER, 128);
  }

  // The warp's pairs of blocks that meet, and M of all its pairs in the place of keys for other blocks.
  template <bool APART>
  PRIM void meet_all(const Pairs& own) const {
    const bool queries = Meeting{block}.queries();
    float sums[3][2][4];
    meet<APART>(sums, queries ? at.q : at.k);
    named_barrier(FACTOR_BARRIER, 128);  // everyone is done with these keys, and with rows as of blocks
    float* m = (float*)at.others;
    if constexpr (!WALKERS_SCALE) store_block_of_m(m, own.m, block * BLOCK, block * BLOCK, lane);
#pragma unroll
    for (int n = 0; n < 3; n++) {
      const int later = Meeting::later<APART>(n) * BLOCK, earlier = Meeting::earlier<APART>(n) * BLOCK;
      if (queries)
        write_box(at.p, sums[n][0], sums[n][1], later, earlier, lane);
      else
        store_block_of_m(m, sums[n], later, earlier, lane);
    }
  }

  // The block's K and Q as of the chunk's start: four pieces of each at a time, so that loads do not wait for stores.
  PRIM void bring_to_chunk() const {
    const int first = piece_place(block * BLOCK + lane % 16, lane / 16);
#pragma unroll(WALKERS_SCALE ? 1 : K_BOXES)
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
    Pairs own = {};
    if constexpr (WALKERS_SCALE)
      take_own(s.own_full);
    else
      make_own(own);
    if (Meeting{block}.apart())
      meet_all<true>(own);
    else
      meet_all<false>(own);
    __syncwarp();
    if (lane == 0) mbarrier_arrive(s.pairs_full + stage);
    bring_to_chunk();
    async_proxy_fence();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(s.factors_full + stage);
  }
};

PRIM void make_factors(const Shared& s, const Work& work, int warp, int lane) {
  Place place;
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
  }
}
