// Y = P_n (... P_2 (P_1 X + H_1) + H_2 ...) + H_n (ADD), or Y = P X, for stacks of small matrices: states met by
// transfers, one after the other.
//
// Numbers: REAL products and sums, in ascending order of the inner index. Macros: REAL (float or double), ADD, VECTOR
// (elements of P that are read at once; it divides K).
// Matrices of P, X and H begin so many elements after the arrays do, and those of later maps a step after those before.
// Grid: matrices times ceil(columns / 16) blocks of 128 threads: 16 columns, of which a thread has two, in eight rows
// of 128. Shared memory: a tile of P, 128 rows of 128 bytes with gaps, and the rows of X that it meets; the next tile,
// which depends on nothing, is on its way meanwhile. What a map leaves is read from Y and the spare array in turns.
#include "primitives/primitives.cuh"

constexpr int THREADS = 128, COLUMNS = 16, OWN_COLUMNS = 2, OWN_ROWS = 8;
constexpr int ACROSS = COLUMNS / OWN_COLUMNS, DOWN = THREADS / ACROSS, TILE_ROWS = DOWN * OWN_ROWS,
              DEPTH = 128 / sizeof(REAL);
constexpr int VECTORS = DEPTH / VECTOR, LOADS = TILE_ROWS * VECTORS / THREADS;
constexpr int PITCH = VECTORS + 16 / sizeof(REAL) / VECTOR;  // rows that are read together lie in other banks

struct alignas(VECTOR * sizeof(REAL)) Vector {
  REAL at[VECTOR];
};

// The n-th tile of P that a block takes: of which map, from which row and inner index on.
struct Tile {
  int map, row, k;
  PRIM Tile(int n, int K) {
    const int across = (K + DEPTH - 1) / DEPTH, down = (K + TILE_ROWS - 1) / TILE_ROWS;
    map = n / across / down, row = n / across % down * TILE_ROWS, k = n % across * DEPTH;
  }
};

// What a thread brings of the next tile.
struct Ahead {
  Vector at[LOADS];
  PRIM void load(const REAL* p, Tile tile, int K) {
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      const int place = i * THREADS + threadIdx.x;
      const int row = tile.row + place / VECTORS, k = tile.k + place % VECTORS * VECTOR;
      if (row < K && k < K) at[i] = *(const Vector*)(p + (int64_t)row * K + k);
    }
  }
  PRIM void store(Vector* tile) const {
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      const int place = i * THREADS + threadIdx.x;
      tile[place / VECTORS * PITCH + place % VECTORS] = at[i];
    }
  }
};

// A thread's elements of the result.
struct Sums {
  REAL at[OWN_ROWS][OWN_COLUMNS];
  PRIM static int row(int i) { return threadIdx.x / ACROSS + i * DOWN; }
  PRIM static int column(int c) { return threadIdx.x % ACROSS + c * ACROSS; }
  PRIM void clear() {
#pragma unroll
    for (int i = 0; i < OWN_ROWS; i++)
#pragma unroll
      for (int c = 0; c < OWN_COLUMNS; c++) at[i][c] = 0;
  }
  PRIM void add(const Vector* tile, const REAL* rows, int depth) {
#pragma unroll 4
    for (int k = 0; k < depth; k += VECTOR) {
      REAL x[VECTOR][OWN_COLUMNS];
#pragma unroll
      for (int j = 0; j < VECTOR; j++)
#pragma unroll
        for (int c = 0; c < OWN_COLUMNS; c++) x[j][c] = rows[(k + j) * COLUMNS + column(c)];
#pragma unroll
      for (int i = 0; i < OWN_ROWS; i++) {
        const Vector factors = tile[row(i) * PITCH + k / VECTOR];
#pragma unroll
        for (int j = 0; j < VECTOR; j++)
#pragma unroll
          for (int c = 0; c < OWN_COLUMNS; c++) at[i][c] += factors.at[j] * x[j][c];
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    affine(const REAL* p, const REAL* x, const REAL* h, REAL* y, REAL* spare, int64_t p_at, int64_t x_at, int64_t h_at,
           int64_t step, int maps, int K, int columns) {
  DynSmem smem;
  Vector* tile = smem.take<Vector>(TILE_ROWS * PITCH, "tile");
  REAL* rows = smem.take<REAL>(DEPTH * COLUMNS, "rows");
  smem.all_taken(SHARED_BYTES);
  const int slices = (columns + COLUMNS - 1) / COLUMNS;
  const int64_t matrix = blockIdx.x / slices, part = matrix * K * columns + blockIdx.x % slices * COLUMNS;
  const int width = min(COLUMNS, columns - (int)(blockIdx.x % slices) * COLUMNS);
  p += p_at + matrix * K * K, x += x_at + part, y += part;
#if ADD
  h += h_at + part, spare += part;
#endif
  // What map `map` leaves.
  auto state = [&](int map) -> REAL* { return (maps - map) % 2 == 1 ? y : spare; };

  Ahead ahead;
  Sums sums;
  const int tiles = maps * ((K + DEPTH - 1) / DEPTH) * ((K + TILE_ROWS - 1) / TILE_ROWS);
  ahead.load(p, Tile(0, K), K);
  for (int n = 0; n < tiles; n++) {
    const Tile now(n, K), next(n + 1, K);
    const int depth = min(DEPTH, K - now.k);
    const REAL* before = (now.map == 0 ? x : state(now.map - 1)) + (int64_t)now.k * columns;
    __syncthreads();  // the tile before is read, and what a map left is written
#pragma unroll
    for (int at = threadIdx.x; at < DEPTH * COLUMNS; at += THREADS) {
      const int k = at / COLUMNS, column = at % COLUMNS;
      rows[at] = k < depth && column < width ? before[(int64_t)k * columns + column] : 0;
    }
    ahead.store(tile);
    __syncthreads();
    if (n + 1 < tiles) ahead.load(p + next.map * step, next, K);
    if (now.k == 0) sums.clear();
    sums.add(tile, rows, depth);
    if (now.k + DEPTH < K) continue;
#pragma unroll
    for (int i = 0; i < OWN_ROWS; i++)
#pragma unroll
      for (int c = 0; c < OWN_COLUMNS; c++) {
        const int row = now.row + Sums::row(i), column = Sums::column(c);
        if (row >= K || column >= width) continue;
        const int64_t at = (int64_t)row * columns + column;
        REAL sum = sums.at[i][c];
#if ADD
        sum += h[now.map * step + at];
#endif
        state(now.map)[at] = sum;
      }
  }
}
