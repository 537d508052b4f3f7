// Y = P X + H (ADD) or P X, for stacks of small matrices: states met by transfers.
//
// Numbers: REAL products and sums, in ascending order of the inner index. Macros: REAL (float or double), ADD.
// Grid: ceil(elements of Y / 256) blocks of 256 threads, one element each. No shared memory.
#include "primitives/primitives.cuh"

extern "C" __global__ void __launch_bounds__(256)
    affine(const REAL* p, const REAL* x, const REAL* h, REAL* y, int64_t count, int K, int columns) {
  const int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
  if (i >= count) return;
  const int column = (int)(i % columns), row = (int)(i / columns % K);
  const int64_t matrix = i / ((int64_t)columns * K);
  const REAL *p_row = p + (matrix * K + row) * K, *x_column = x + matrix * K * columns + column;
  REAL sum = 0;
  for (int k = 0; k < K; k++) sum += p_row[k] * x_column[(int64_t)k * columns];
#if ADD
  sum += h[i];
#endif
  y[i] = sum;
}
