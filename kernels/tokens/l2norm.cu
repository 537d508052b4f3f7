// Normalised rows and their gradient, in float, of one array or of two:
//
//   r = (sum x^2 + 1e-6)^-1/2,  y = r x                          BACKWARD = 0
//   dx = r (dy - y (y . dy)), dy in `y_or_dx`, replaced by dx     BACKWARD = 1
//
// Numbers: float arithmetic, a thread's elements summed one after the other and lanes in a fixed tree; y and dx rounded
// to DTYPE once. y is formed again from x for the gradient, unrounded. A row whose squares overflow is taken in a
// smaller unit. Macros: DTYPE, HEAD_K, BACKWARD. No shared memory.
// Grid: blocks of 256 threads for the arrays in turns, each of 512 / LANES rows: lanes side by side have 16 bytes of a
// row at a time where rows begin at multiples of that, and a thread has parts of two rows.
#include "tiles/token.cuh"

PRIM constexpr int least(int x, int y) { return x < y ? x : y; }
PRIM constexpr int power_of_two_from(int x) { return x <= 1 ? 1 : 2 * power_of_two_from((x + 1) / 2); }

constexpr int THREADS = 256, ROWS = 2;
constexpr int VECTOR = least(HEAD_K & -HEAD_K, 16 / sizeof(DTYPE)), VECTORS = HEAD_K / VECTOR;
constexpr int LANES = least(32, power_of_two_from(VECTORS)), PER_LANE = (VECTORS + LANES - 1) / LANES;
constexpr int GROUPS = THREADS / LANES;

struct alignas(VECTOR * sizeof(DTYPE)) Vector {
  DTYPE at[VECTOR];
};

// A thread's part of a row.
struct Part {
  float at[PER_LANE][VECTOR];
  PRIM void load(const DTYPE* row, int lane) {
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      const int at_vector = i * LANES + lane;
      if (at_vector < VECTORS) {
        const Vector x = ((const Vector*)row)[at_vector];
#pragma unroll
        for (int j = 0; j < VECTOR; j++) at[i][j] = widen(x.at[j]);
      } else {
#pragma unroll
        for (int j = 0; j < VECTOR; j++) at[i][j] = 0.0f;
      }
    }
  }
  PRIM void store(DTYPE* row, int lane) const {
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      const int at_vector = i * LANES + lane;
      Vector x;
#pragma unroll
      for (int j = 0; j < VECTOR; j++) x.at[j] = narrow<DTYPE>(at[i][j]);
      if (at_vector < VECTORS) ((Vector*)row)[at_vector] = x;
    }
  }
  PRIM void scale(float factor) {
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
#pragma unroll
      for (int j = 0; j < VECTOR; j++) at[i][j] *= factor;
  }
};

// Over the lanes of a row; those of others may be elsewhere.
PRIM float dot(const Part& x, const Part& y) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < PER_LANE; i++)
#pragma unroll
    for (int j = 0; j < VECTOR; j++) sum += x.at[i][j] * y.at[i][j];
  const uint32_t row = LANES == 32 ? ~0u : ((1u << LANES % 32) - 1) << threadIdx.x % 32 / LANES * LANES;
#pragma unroll
  for (int bits = LANES / 2; bits > 0; bits /= 2) sum += __shfl_xor_sync(row, sum, bits);
  return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    l2norm(const DTYPE* x, DTYPE* y_or_dx, const DTYPE* x2, DTYPE* y_or_dx2, int64_t rows) {
  const int arrays = x2 == nullptr ? 1 : 2;
  if (blockIdx.x % arrays == 1) x = x2, y_or_dx = y_or_dx2;
  const int lane = threadIdx.x % LANES;
  const int64_t first = (int64_t)(blockIdx.x / arrays) * GROUPS * ROWS + threadIdx.x / LANES;
  Part X[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; i++)
    if (first + i * GROUPS < rows) X[i].load(x + (first + i * GROUPS) * HEAD_K, lane);
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    if (first + i * GROUPS >= rows) return;  // all lanes of the row
    DTYPE* own = y_or_dx + (first + i * GROUPS) * HEAD_K;
#if BACKWARD
    Part D;
    D.load(own, lane);
#endif
    const auto [r, unit] = norm_of<DTYPE, float>([&](float unit) {
      X[i].scale(unit);
      return dot(X[i], X[i]);
    });
    X[i].scale(r);
#if BACKWARD
    const float along = dot(X[i], D);
#pragma unroll
    for (int n = 0; n < PER_LANE; n++)
#pragma unroll
      for (int j = 0; j < VECTOR; j++) X[i].at[n][j] = r * (D.at[n][j] - X[i].at[n][j] * along) * unit;
#endif
    X[i].store(own, lane);
  }
}
