// A small kernel of two warpgroups with a switchable mistake for each rule of mbarriers, TMA and wgmma.
//
//   Y = X tile by tile, and D = sum of C_t X_t^T over the tiles X_t of 64 x 64 bf16 and copies C_t = X_t of them.
//
// One thread loads tiles as two boxes into a ring of two stages; a warpgroup copies each with ordinary accesses to a
// second tile, multiplies both and stores the copy. With BUG_X defined the mistake X is made; the line that must be
// blamed carries the comment "blame X", or "blame OPERAND" for all OPERAND_X. Grid: 1 block of 256 threads. Shared
// memory: 24,608 bytes.
#include "primitives/hopper.cuh"

constexpr int TILE = 64 * 64, TILE_BYTES = TILE * 2, BOX = 32 * 64, THREADS = 128, STAGES = 2;

PRIM void load_tiles(bf16* stages, uint64_t* full, uint64_t* empty, const TensorMap* x_map, float* sums, int tiles) {
#ifdef BUG_LOAD_AT_END
  tiles++;
#endif
  for (int t = 0; t < tiles; t++) {
    const int stage = t % STAGES, round = t / STAGES;
    bf16* tile = stages + stage * TILE;
#ifdef BUG_BOX_OVERRUN
    tile += BOX;
#endif
#ifdef BUG_MISALIGNED_BOX
    tile += 64;
#endif
    mbarrier_wait(&empty[stage], (round + 1) % 2);  // blame NO_INIT
    uint64_t* barrier = &full[stage];
#if defined(BUG_FEW_BYTES)
    mbarrier_arrive_expect(barrier, TILE_BYTES / 2);
#elif defined(BUG_MANY_BYTES)
    mbarrier_arrive_expect(barrier, TILE_BYTES + 16);
#elif defined(BUG_ARRIVALS)
    mbarrier_arrive_expect(barrier, TILE_BYTES / 2);
    mbarrier_arrive_expect(barrier, TILE_BYTES / 2);  // blame ARRIVALS
#else
    mbarrier_arrive_expect(barrier, TILE_BYTES);
#endif
#ifdef BUG_NOT_SHARED
    tma_load(sums, x_map, barrier, 0, 0, 64 * t, 0);  // blame NOT_SHARED
#else
    tma_load(tile, x_map, barrier, 0, 0, 64 * t, 0);  // blame NO_INIT_FENCE MISALIGNED_BOX EARLY_RELEASE FEW_BYTES
#endif
    tma_load(tile + BOX, x_map, barrier, 0, 0, 64 * t + 32, 0);  // blame LOAD_AT_END BOX_OVERRUN
  }
}

extern "C" __global__ void __launch_bounds__(2 * THREADS)
    planted(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap y_map, float* sums, int tiles) {
  DynSmem smem;
  bf16* stages = smem.take<bf16>(STAGES * TILE, "stages", 1024);
  bf16* copy = smem.take<bf16>(TILE, "copy", 1024);
  uint64_t* full = smem.take<uint64_t>(STAGES, "full");
  uint64_t* empty = smem.take<uint64_t>(STAGES, "empty");
  const int thread = threadIdx.x % THREADS;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      mbarrier_init(&full[i], 1);
#ifndef BUG_NO_INIT
      mbarrier_init(&empty[i], THREADS);
#endif
    }
#if defined(BUG_INIT_TWICE)
    mbarrier_init(&full[1], 1);  // blame INIT_TWICE
#elif defined(BUG_INIT_ALIGN)
    mbarrier_init((uint64_t*)((uint8_t*)full + 4), 1);  // blame INIT_ALIGN
#endif
#ifndef BUG_NO_INIT_FENCE
    mbarrier_init_fence();
#endif
  }
#ifndef BUG_NO_BARRIER
  __syncthreads();
#endif
  if (threadIdx.x < THREADS) {
    if (thread == 0) load_tiles(stages, full, empty, &x_map, sums, tiles);
    return;
  }

  float d[8][4] = {};
#ifdef BUG_UNIFORM
  const int count = uniform(tiles + threadIdx.x % 32 / 31);  // blame UNIFORM
#else
  const int count = uniform(tiles);
#endif
  for (int t = 0; t < count; t++) {
    const int stage = t % STAGES, round = t / STAGES;
    bf16* tile = stages + stage * TILE;
#if defined(BUG_PARITY)
    mbarrier_wait(&full[stage], (round + 1) % 2);
#elif defined(BUG_ROUND)
    mbarrier_wait(&full[stage], round);  // blame ROUND
#elif !defined(BUG_NO_FULL_WAIT)
    mbarrier_wait(&full[stage], round % 2);  // blame NO_BARRIER MANY_BYTES
#endif
#ifndef BUG_NO_STORE_WAIT
    if (thread == 0) tma_store_wait_read<0>();
#endif
    named_barrier(1, THREADS);
#ifdef BUG_UNINITIALISED
    if (thread > 0)
#endif
      for (int i = thread; i < TILE / 2; i += THREADS) {
        const uint32_t pair = ((uint32_t*)tile)[i];  // blame NO_FULL_WAIT PARITY
        ((uint32_t*)copy)[i] = pair;                 // blame NO_STORE_WAIT
      }
#if defined(BUG_STMATRIX_ALIGN) || defined(BUG_STMATRIX_ROW)
    const uint32_t r[4] = {};
#ifdef BUG_STMATRIX_ALIGN
    stmatrix_x4(&copy[thread * 8 + 4], r);  // blame STMATRIX_ALIGN
#else
    stmatrix_x4(&copy[TILE + thread % 32 * 8], r);  // blame STMATRIX_ROW
#endif
#endif
#ifndef BUG_NO_PROXY_FENCE
    async_proxy_fence();
#endif
#ifndef BUG_NO_COPY_BARRIER
    named_barrier(1, THREADS);
#endif
    if (thread == 0) {
      tma_store(&y_map, copy, 0, 0, 64 * t, 0);  // blame NO_PROXY_FENCE UNINITIALISED
#ifdef BUG_SAME_PLACE
      tma_store(&y_map, copy, 0, 0, 64 * t, 0);  // blame SAME_PLACE
#endif
      tma_store(&y_map, copy + BOX, 0, 0, 64 * t + 32, 0);
      tma_store_commit();
    }
    pin(d);
#ifndef BUG_NO_WGMMA_FENCE
    wgmma_fence();
#endif
    for (int k = 0; k < 64; k += 16) {
#if defined(BUG_OPERAND_ALIGN)
      const uint64_t a = tile_descriptor(copy + 64 + k, 16, 1024);
#elif defined(BUG_OPERAND_LANES)
      const uint64_t a = tile_descriptor(copy + (thread % 32 < 8 ? k : 0), 16, 1024);
#elif defined(BUG_DESCRIPTOR)
      const uint64_t a = tile_descriptor(copy + k, 16, 1024) & ~(3ull << 62);
#elif defined(BUG_OPERAND_END)
      const uint64_t a = tile_descriptor(copy + k, 16, 2048);
#else
      const uint64_t a = tile_descriptor(copy + k, 16, 1024);
#endif
      const uint64_t b = tile_descriptor(tile + k, 16, 1024);
      wgmma<bf16, false, false>(d, a, b, true);  // blame NO_WGMMA_FENCE NO_COPY_BARRIER OPERAND DESCRIPTOR
    }
    wgmma_commit();
#ifdef BUG_TOUCHED_SUMS
    d[1][2] *= 2;  // blame TOUCHED_SUMS
#endif
#ifdef BUG_EARLY_RELEASE
    mbarrier_arrive(&empty[stage]);
#endif
#if defined(BUG_NO_WGMMA_WAIT) || defined(BUG_LATE_WGMMA_WAIT)
    if (t + 1 < tiles)
#endif
      wgmma_wait<0>();
    pin(d);
#ifndef BUG_EARLY_RELEASE
    mbarrier_arrive(&empty[stage]);
#endif
  }
#ifndef BUG_STORE_AT_EXIT
  if (thread == 0) tma_store_wait_read<0>();
#endif
  for (int i = 0; i < 32; i++) sums[i * THREADS + thread] = d[i / 4][i % 4];  // blame NO_WGMMA_WAIT LATE_WGMMA_WAIT
#ifdef BUG_LATE_WGMMA_WAIT
  wgmma_wait<0>();
#endif
#ifdef BUG_PRODUCT_AT_EXIT
  wgmma_fence();
  wgmma<bf16, false, false>(d, tile_descriptor(copy, 16, 1024), tile_descriptor(copy, 16, 1024), true);
#endif
#ifdef BUG_ONE_WARP
  if (thread / 32 == 1) {
    wgmma_fence();
    wgmma<bf16, false, false>(d, tile_descriptor(copy, 16, 1024), tile_descriptor(copy, 16, 1024), true);
    wgmma_commit();
    wgmma_wait<0>();
  }
#endif
}
