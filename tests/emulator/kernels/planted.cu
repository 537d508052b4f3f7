// A small kernel with a switchable mistake for each kind that the emulator must find.
//
//   Y_b = X_b X_b^T for tiles X of 16 x 32 bf16, two per block, double-buffered; then row sums.
//
// One warp multiplies, both warps copy. With BUG_X defined the mistake X is made; the line that must
// be blamed carries the comment "blame X". Grid: one block per two tiles. Shared memory: 3,712 bytes.
#include "primitives/primitives.cuh"

constexpr int ROWS = 16, DEPTH = 32, PITCH = DEPTH + 8, TILES = 2;

PRIM void load_tile(bf16* tile, const bf16* x, int thread) {
  int row = thread / 4, column = thread % 4 * 8;
  cp_async<16>(&tile[row * PITCH + column], &x[row * DEPTH + column], 16);  // blame WEAK_WAIT NO_WAIT
  cp_async_commit();
}

extern "C" __global__ void __launch_bounds__(64) planted(const bf16* x, float* y, float* sums, int* count) {
  DynSmem smem;
  bf16* tiles = smem.take<bf16>(TILES * ROWS * PITCH, "tiles");
  float* products = smem.take<float>(ROWS * (ROWS + 1), "products");
  float* totals = smem.take<float>(ROWS, "totals");
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  x += (int64_t)blockIdx.x * TILES * ROWS * DEPTH;
#ifndef BUG_TWO_BLOCKS
  y += (int64_t)blockIdx.x * TILES * ROWS * ROWS;
#endif
  sums += (int64_t)blockIdx.x * TILES * ROWS;

#ifdef BUG_EARLY_EXIT
  if (thread == 63) return;
#endif
  load_tile(tiles, x, thread);
  for (int t = 0; t < TILES; t++) {
    bf16* tile = tiles + t % 2 * ROWS * PITCH;
    if (t + 1 < TILES)
      load_tile(tiles + (t + 1) % 2 * ROWS * PITCH, x + (t + 1) * ROWS * DEPTH, thread);
    else
      cp_async_commit();
#if defined(BUG_WEAK_WAIT)
    cp_async_wait<2>();
#elif !defined(BUG_NO_WAIT)
    cp_async_wait<1>();
#endif
#if defined(BUG_DIVERGENT_BARRIER)
    if (warp == 0) {
      __syncthreads();
    } else {
      __syncthreads();  // blame DIVERGENT_BARRIER
    }
#elif defined(BUG_LANE_BARRIER)
    if (lane != 5) __syncthreads();  // blame LANE_BARRIER
#elif !defined(BUG_NO_BARRIER)
    __syncthreads();  // blame EARLY_EXIT
#endif
    if (warp == 0) {
      float d[2][4] = {};
      for (int k = 0; k < DEPTH; k += 16) {
        uint32_t a[4], b[4];
#if defined(BUG_LDMATRIX_ROW)
        ldmatrix_x4(a, &tile[(lane % 16 + 2 * ROWS) * PITCH + k + lane / 16 * 8]);  // blame LDMATRIX_ROW
#elif defined(BUG_LDMATRIX_ALIGN)
        ldmatrix_x4(a, &tile[lane % 16 * PITCH + k + lane / 16 * 4]);  // blame LDMATRIX_ALIGN
#else
        ldmatrix_x4(a, &tile[lane % 16 * PITCH + k + lane / 16 * 8]);  // blame NO_BARRIER
#endif
        ldmatrix_x4(b, &tile[(lane % 8 + lane / 16 * 8) * PITCH + k + lane / 8 % 2 * 8]);
#ifdef BUG_LANE_MMA
        if (lane < 31)
#endif
          mma_m16n8k16<bf16>(d[0], a, b[0], b[1]);
        mma_m16n8k16<bf16>(d[1], a, b[2], b[3]);  // blame LANE_MMA
      }
#ifdef BUG_REGISTER_ARRAY
      int beyond = lane == 7 ? 2 : 0;
#else
      int beyond = 0;
#endif
      for (int j = 0; j < 2; j++)
        for (int i = 0; i < 4; i++) {
          int row = lane / 4 + i / 2 * 8, column = j * 8 + lane % 4 * 2 + i % 2;
          float value = d[j + beyond][i];  // blame REGISTER_ARRAY
          products[row * (ROWS + 1) + column] = value;
          y[t * ROWS * ROWS + row * ROWS + column] = value;  // blame TWO_BLOCKS
        }
#ifndef BUG_NO_SYNCWARP
      __syncwarp();
#endif
      if (lane < ROWS) {
        float sum = 0;
        for (int c = 0; c < ROWS; c++) sum += products[lane * (ROWS + 1) + c];  // blame NO_SYNCWARP
        totals[lane] = sum;
      }
#if defined(BUG_SHARED_OVERRUN)
      if (lane == 0) totals[ROWS] = 0;  // blame SHARED_OVERRUN
#elif defined(BUG_NEIGHBOUR)
      if (lane == 0) products[ROWS * (ROWS + 1)] = 0;  // blame NEIGHBOUR
#endif
    }
#ifdef BUG_TWO_WARPS
    if (lane == 0) totals[0] = 1;  // blame TWO_WARPS
#endif
    __syncthreads();
#ifdef BUG_UNINITIALISED
    if (warp == 1 && lane == 0) sums[0] = products[ROWS];  // blame UNINITIALISED
#endif
#ifdef BUG_MISALIGNED
    if (warp == 1 && lane == 0) *(float2*)&sums[0] = *(float2*)&products[1];  // blame MISALIGNED
#endif
#ifdef BUG_REUSE
    if (warp == 0 && lane < ROWS) totals[lane] = 0;  // blame REUSE
#endif
    if (warp == 1 && lane < ROWS) sums[t * ROWS + lane] = totals[lane];
#ifdef BUG_GLOBAL_OVERRUN
    if (warp == 1 && lane == 0) sums[(gridDim.x - blockIdx.x) * TILES * ROWS] = 0;  // blame GLOBAL_OVERRUN
#endif
    __syncthreads();
  }
#ifdef BUG_COPY_AT_EXIT
  if (blockIdx.x == 0) load_tile(tiles, x, thread);
#else
  cp_async_wait<0>();
#endif
#ifdef BUG_BARRIER_COUNT
  if (warp == 0) named_barrier(1, 64);  // blame BARRIER_COUNT
  if (warp == 1) named_barrier(1, 32);  // blame BARRIER_COUNT
#endif
  if (thread == 0) atomicAdd(count, 1);
}
