// Values and outputs between global memory and the walkers' boxes, one of each warpgroup, by a thread of
// sm90/channel_forward.cu that waits where the walkers would: for the box, before V takes the place of O.
#pragma once
#include "sm90/channel_forward/shared.cuh"

struct Carrier {
  const Shared& s;
  const Work& work;
  const TensorMap *v, *o;

  PRIM DTYPE* box(int warpgroup) const { return s.rows + warpgroup * TILE; }
  PRIM void bring_values(int warpgroup, int c) const {
    uint64_t* full = s.values_full + warpgroup;
    mbarrier_arrive_expect(full, TILE * 2);
    tma_load(box(warpgroup), v, full, warpgroup * BOX, work.hv, work.start + c * CHUNK, work.batch);
  }
  PRIM void begin() const {
#pragma unroll
    for (int i = 0; i < MATH; i++) bring_values(i, 0);
  }
  // O of chunk c away, and V of the next one.
  PRIM void exchange(int c) const {
#pragma unroll 1
    for (int i = 0; i < MATH; i++) {
      mbarrier_wait(s.rows_done + i, c & 1);
      if (!VARLEN || work.tokens(c) == CHUNK) {
        tma_store(o, box(i), i * BOX, work.hv, work.start + c * CHUNK, work.batch);
        tma_store_commit();
        tma_store_wait_read<0>();
      }
      if (c + 1 < work.chunks) bring_values(i, c + 1);
    }
  }
};
