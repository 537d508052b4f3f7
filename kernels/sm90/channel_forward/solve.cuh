// The core of a chunk by the two warps of sm90/channel_forward.cu that solve, in the place of M.
#pragma once
#include "sm90/channel_forward/gates.cuh"
#include "sm90/core.cuh"

// `pairs_full`, in this phase, are pairs of blocks that meet. Where walkers scale, M's blocks of 16 on the diagonal are
// there before, in a place of their own.
PRIM void solve(const Stage& at, uint64_t* pairs_full, int parity, uint64_t* own_free, int warp, int lane) {
  float* m = (float*)at.others;
  float *diagonal_blocks = WALKERS_SCALE ? at.own : m, *own = diagonal_blocks + warp * TRIANGLE;
  float below[4][4];
  if constexpr (WALKERS_SCALE) {
    const Weights weights = {at.beta + warp * HALF};
    float corner[2][4];
    invert_diagonal_blocks<float>(own, own, weights, lane);
    mbarrier_wait(pairs_full, parity);
    merge_diagonal_blocks<DTYPE>(corner, own, m + warp * TRIANGLE, weights, lane);
    store_block(own + HALF / 2 * INVERSE_PITCH, corner, lane);
  } else {
    mbarrier_wait(pairs_full, parity);
    const CoreWarp solver = {m, own, m + 2 * TRIANGLE, at.beta, warp, SOLVER_BARRIER, lane};
    solver.template invert<DTYPE>(own);
  }
  named_barrier(SOLVER_BARRIER, 64);
  merge_blocks<DTYPE, HALF>(below, m + 2 * TRIANGLE, diagonal_blocks + TRIANGLE, diagonal_blocks, Weights{at.beta},
                            warp * 16, lane);
  uint4 diagonal[4];
#pragma unroll
  for (int i = 0; i < 4; i++) diagonal[i] = diagonal_piece(own, i * 8, lane);
  if constexpr (WALKERS_SCALE) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(own_free);
  }
  named_barrier(SOLVER_BARRIER, 64);  // M is read
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = warp * HALF + i * 8 + lane / 4;
    *(uint4*)&at.others[swizzled(row, warp * HALF + lane % 4 * 8)] = diagonal[i];
    if (warp == 0) *(uint4*)&at.others[swizzled(row, HALF + lane % 4 * 8)] = {};
  }
#pragma unroll
  for (int j = 0; j < 4; j += 2) write_box(at.others, below[j], below[j + 1], HALF + warp * 16, j * 8, lane);
}

// The first of the two also asks for K and Q, those of the next chunk while factors are made of these.
PRIM void solve_chunks(const Shared& s, const Work& work, const TensorMap* q, const TensorMap* k, int warp, int lane) {
  Ring<STAGES> ring;
  const bool loads = warp == 0 && lane == 0;
  if (loads) load_keys(s, work, q, k, 0);
  for (int c = 0; c < work.chunks; c++, ring.advance()) {
    if (loads && c + 1 < work.chunks) load_keys(s, work, q, k, c + 1);
    __syncwarp();
    if constexpr (WALKERS_SCALE) mbarrier_wait(s.own_full, c % 2);
    solve(Stage(s, 0, ring.stage), s.pairs_full + ring.stage, ring.parity, s.own_free, warp, opaque(lane));
    async_proxy_fence();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(s.core_full + ring.stage);
  }
}
