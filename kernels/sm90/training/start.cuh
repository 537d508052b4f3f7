// How sm90/training.cu and sm90/backward_state.cu start: shared memory and its barriers, and who loads; and how their
// transfers end.
#pragma once
#include "sm90/training/walk.cuh"
// With the sizes that it has:
#include "sm90/join.cuh"

// With JOINS the transfers, too: P by its map, H and decays.
PRIM void start(Shared& s, Joins& joins, const TensorMap* p = nullptr, float* h = nullptr, float* decays = nullptr) {
  DynSmem smem;
  s = take_shared(smem);
  if constexpr (JOINS) {
    const int buffer = JOIN_STAGE * K_BOXES * TILE;
    joins = take_joins(smem, *p, h, decays, s.k + buffer, s.q + buffer);
    if (threadIdx.x == 0) joins.init();
  }
  smem.all_taken(SHARED_BYTES);
  if (threadIdx.x == 0) init_barriers(s);
  __syncthreads();
}

// Whether a thread computes; the last warpgroup loads instead, and is done.
PRIM bool computes(const Shared& s, const Joins& joins, const Maps& maps, const Work& work, const float* beta,
                   const float* decays, int HV, int warpgroup, int warp, int lane) {
  if (warpgroup == MATH) {
    if constexpr (MATH == 2) fewer_registers<LOADER_REGISTERS>();
    if (warp == 0) load(s, maps, work, joins.joined, beta, decays, HV, lane);
    return false;
  }
  if constexpr (MATH == 2) more_registers<MATH_REGISTERS>();
  return true;
}

// P or H of a transfer, and decays over all its chunks.
PRIM void leave_transfer(const Shared& s, const Work& work, float (&S)[K_TILES][4], const TensorMap* map, float* h,
                         float* segment_decays, const Carried& carried, int column, int HV, int warpgroup, int thread) {
  if (work.values) return keep_transfer(h, S, work.part, work.hv, HV, column, thread);
  send_transfer(map, s.states + warpgroup * K_BOXES * TILE, S, carried.c, column, work.part, work.hv, 1 + warpgroup,
                thread);
  const int64_t row = (int64_t)work.part * HV + work.hv;
  carried.store(segment_decays, row, column, thread);
}
