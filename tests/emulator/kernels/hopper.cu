// Small kernels over the primitives of compute capability 9.0.
#include "primitives/hopper.cuh"

#ifndef ELEMENT
#define ELEMENT bf16
#endif
#ifndef N_TILES
#define N_TILES 8
#endif

constexpr int TILE = 64 * 64, TILE_BYTES = TILE * 2, THREADS = 128;

// Where element (row, column) of a swizzled tile of rows of WIDTH (16, 32 or 64) lies.
template <int WIDTH = 64>
PRIM int swizzled_element(int row, int column) {
  return row * WIDTH + ((column / 8 ^ row * WIDTH / 64 % (WIDTH / 8)) * 8 + column % 8);
}

// ---- products: d = A B and then d += A B, A and B of one tile per 64 columns or rows -----------------------------

template <int N>
PRIM void write_sums(float* out, const float (&d)[N][4], int thread) {
  const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
  for (int j = 0; j < N; j++) {
    for (int i = 0; i < 4; i++) out[(row + i / 2 * 8) * 8 * N + 8 * j + column + i % 2] = d[j][i];
  }
}

// A (64 x 64) is given by rows along k, or transposed; B (64 x 8 N_TILES) as rows n along k, or rows k along n.
extern "C" __global__ void __launch_bounds__(THREADS)
    products(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map, float* out) {
  DynSmem smem;
  ELEMENT* a_tile = smem.take<ELEMENT>(TILE, "a", 1024);
  ELEMENT* b_tile = smem.take<ELEMENT>(N_TILES / 8 * TILE, "b", 1024);
  uint64_t* full = smem.take<uint64_t>(1, "full");
  const int thread = threadIdx.x, lane = thread % 32;
  if (thread == 0) {
    mbarrier_init(full, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (thread == 0) {
    mbarrier_arrive_expect(full, (1 + N_TILES / 8) * TILE_BYTES);
    tma_load(a_tile, &a_map, full, 0, 0, 0, 0);
    for (int i = 0; i < N_TILES / 8; i++) {
#if B_BY_COLUMNS
      tma_load(b_tile + i * TILE, &b_map, full, 64 * i, 0, 0, 0);
#else
      tma_load(b_tile + i * TILE, &b_map, full, 0, 0, 64 * i, 0);
#endif
    }
  }
  mbarrier_wait(full, 0);

  float d[N_TILES][4];
  uint32_t a[4][4];
#if A_IN_REGISTERS
  const int row = thread / 32 * 16 + lane % 16;
  for (int k = 0; k < 4; k++) ldmatrix_x4(a[k], &a_tile[swizzled_element(row, 16 * k + lane / 16 * 8)]);
#endif
  pin(d);
  pin(a);
  wgmma_fence();
  for (int step = 0; step < 8; step++) {
    const int k = step % 4;
#if B_BY_COLUMNS
    const uint64_t b = tile_descriptor(b_tile + 16 * 64 * k, TILE_BYTES, 1024);
#else
    const uint64_t b = tile_descriptor(b_tile + 16 * k, 16, 1024);
#endif
#if A_IN_REGISTERS
    wgmma<ELEMENT, B_BY_COLUMNS>(d, a[k], b, step > 0);
#elif A_BY_COLUMNS
    wgmma<ELEMENT, true, B_BY_COLUMNS>(d, tile_descriptor(a_tile + 16 * 64 * k, TILE_BYTES, 1024), b, step > 0);
#else
    wgmma<ELEMENT, false, B_BY_COLUMNS>(d, tile_descriptor(a_tile + 16 * k, 16, 1024), b, step > 0);
#endif
  }
  wgmma_commit();
  wgmma_wait<0>();
  pin(d);
  write_sums(out, d, thread);
}

// ---- a ring: one warpgroup loads tiles, the other multiplies each by itself, d += X X^T, and stores them too ------

// Grid: one block per sequence of `tiles` tiles of 64 rows; x and y are (1, blocks, rows, 64).
extern "C" __global__ void __launch_bounds__(2 * THREADS)
    ring(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap y_map, float* out, int tiles) {
  constexpr int STAGES = 2;
  DynSmem smem;
  ELEMENT* stages = smem.take<ELEMENT>(STAGES * TILE, "stages", 1024);
  ELEMENT* copies = smem.take<ELEMENT>(TILE, "copies", 1024);
  uint64_t* full = smem.take<uint64_t>(STAGES, "full");
  uint64_t* empty = smem.take<uint64_t>(STAGES, "empty");
  const int thread = threadIdx.x % THREADS, warpgroup = threadIdx.x / THREADS, lane = thread % 32, block = blockIdx.x;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      mbarrier_init(&full[i], 1);
      mbarrier_init(&empty[i], THREADS);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (warpgroup == 0) {
    fewer_registers<24>();
    if (thread == 0) {
      for (int t = 0; t < tiles; t++) {
        const int stage = t % STAGES, round = t / STAGES;
        mbarrier_wait(&empty[stage], (round + 1) % 2);
        mbarrier_arrive_expect(&full[stage], TILE_BYTES);
        tma_load(stages + stage * TILE, &x_map, &full[stage], 0, 64 * t, block, 0);
      }
    }
    return;
  }
  more_registers<240>();
  float d[8][4] = {};
  for (int t = 0; t < tiles; t++) {
    const int stage = t % STAGES, round = t / STAGES;
    ELEMENT* tile = stages + stage * TILE;
    mbarrier_wait(&full[stage], round % 2);
    pin(d);
    wgmma_fence();
    for (int k = 0; k < 64; k += 16) {
      const uint64_t rows = tile_descriptor(tile + k, 16, 1024);
      wgmma<ELEMENT, false, false>(d, rows, rows, true);
    }
    wgmma_commit();

    // Meanwhile the tile goes by registers to a second one, and from there to y.
    uint32_t r[4];
    if (thread == 0) tma_store_wait_read<0>();
    named_barrier(1, THREADS);
    for (int i = 0; i < 4; i++) {
      const int at = swizzled_element(thread / 32 * 16 + lane % 16, 16 * i + lane / 16 * 8);
      ldmatrix_x4(r, &tile[at]);
      stmatrix_x4(&copies[at], r);
    }
    async_proxy_fence();
    named_barrier(1, THREADS);
    if (thread == 0) {
      tma_store(&y_map, copies, 0, 64 * t, block, 0);
      tma_store_commit();
    }
    wgmma_wait<0>();
    pin(d);
    mbarrier_arrive(&empty[stage]);
  }
  if (thread == 0) tma_store_wait_read<0>();
  write_sums(out + block * TILE, d, thread);
}

// ---- a box anywhere: loaded and stored at coordinates of their own
// ---------------------------------------------------

extern "C" __global__ void __launch_bounds__(32)
    boxes(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to, const int* at, ELEMENT* seen,
          int elements) {
  DynSmem smem;
  ELEMENT* box = smem.take<ELEMENT>(elements, "box", 1024);
  uint64_t* full = smem.take<uint64_t>(1, "full");
  const int lane = threadIdx.x;
  if (lane == 0) {
    mbarrier_init(full, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(full, elements * 2);
    tma_load(box, &from, full, at[0], at[1], at[2], at[3]);
  }
  __syncwarp();
  mbarrier_wait(full, 0);
  for (int i = lane; i < elements; i += 32) seen[i] = box[swizzled_element<BOX_WIDTH>(i / BOX_WIDTH, i % BOX_WIDTH)];
  __syncwarp();
  if (lane == 0) {
    tma_store(&to, box, at[4], at[5], at[6], at[7]);
    tma_store_commit();
    tma_store_wait_read<0>();
  }
}

// ---- a tile of 16 x 16 by ldmatrix and stmatrix: as it is, and transposed
// --------------------------------------------

extern "C" __global__ void __launch_bounds__(32) transposes(const ELEMENT* x, ELEMENT* same, ELEMENT* transposed) {
  DynSmem smem;
  ELEMENT* from = smem.take<ELEMENT>(16 * 16, "from");
  ELEMENT* to = smem.take<ELEMENT>(16 * 16, "to");
  const int lane = threadIdx.x, row = lane % 16 * 16 + lane / 16 * 8;
  for (int i = lane; i < 256; i += 32) from[i] = x[i];
  __syncwarp();
  uint32_t r[4];
  ldmatrix_x4(r, &from[row]);
  stmatrix_x4(&to[row], r);
  __syncwarp();
  for (int i = lane; i < 256; i += 32) same[i] = to[i];
  __syncwarp();
  // Tile (i, j) to place (j, i), itself transposed.
  stmatrix_x4_trans(&to[(lane / 16 * 8 + lane % 8) * 16 + lane / 8 % 2 * 8], r);
  __syncwarp();
  for (int i = lane; i < 256; i += 32) transposed[i] = to[i];
}
