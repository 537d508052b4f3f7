// How sm90/training.cu and sm90/backward_state.cu start: shared memory with its barriers, and the warpgroup that does
// not compute; and how their transfers end.
#pragma once
#include "sm90/training/load.cuh"
#include "sm90/training/walk.cuh"
// With the sizes that they have:
#include "sm90/join.cuh"

// What transfers leave, or walks join: P by its map, H and decays.
struct Transfers {
  const TensorMap* p;
  float *h, *decays;
};

// By all threads. With JOINS the transfers are joined in places of K and Q.
PRIM void start(Shared& s, Joins& joins, const Transfers& transfers) {
  DynSmem smem;
  s = take_shared(smem);
  if constexpr (JOINS) {
    const int buffer = JOIN_STAGE * K_BOXES * TILE;
    joins = take_joins(smem, *transfers.p, transfers.h, transfers.decays, s.k + buffer, s.q + buffer);
    if (threadIdx.x == 0) joins.init();
  }
  smem.all_taken(SHARED_BYTES);
  if (threadIdx.x == 0) init_barriers(s);
  __syncthreads();
}

// The last warpgroup, of which one warp loads.
PRIM void supply(const Shared& s, const Inputs& in, const Work& work, uint64_t* joined, int warp, int lane) {
  if constexpr (MATH == 2) fewer_registers<LOADER_REGISTERS>();
  if (warp == 0) load(s, in, work, joined, lane);
}

// P or H of a transfer, and decays over all its chunks.
PRIM void leave_transfer(const Shared& s, const Work& work, float (&S)[K_TILES][4], const Transfers& to,
                         const Carried& carried, const Part& part) {
  if (work.values) return keep_transfer(to.h, S, work.part, part);
  send_transfer(to.p, s.states + part.warpgroup * K_BOXES * TILE, S, carried.c, work.part, part);
  const int64_t row = (int64_t)work.part * part.HV + work.hv;
  carried.store(to.decays, row, part.column, part.thread);
}
