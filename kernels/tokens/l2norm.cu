// Normalised rows and their gradient, in float, one warp per row of HEAD_K elements:
//
//   r = (sum x^2 + 1e-6)^-1/2,  y = r x                          BACKWARD = 0
//   dx = r (dy - y (y . dy)), dy in `y_or_dx`, replaced by dx     BACKWARD = 1
//
// Numbers: float arithmetic, lanes summed in a fixed tree; y and dx rounded to DTYPE once. y is formed again from x
// for the gradient, unrounded. A row whose squares overflow is taken in a smaller unit. Macros: DTYPE, HEAD_K,
// BACKWARD. Grid: ceil(rows / 8) blocks of 256 threads. No shared memory.
#include "tiles/token.cuh"

constexpr int PER_LANE = (HEAD_K + 31) / 32;

PRIM float sum_over_warp(float x) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(~0u, x, bits);
  return x;
}

extern "C" __global__ void __launch_bounds__(256) l2norm(const DTYPE* x, DTYPE* y_or_dx, int64_t rows) {
  const int64_t row = (int64_t)blockIdx.x * 8 + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;  // a whole warp
  float values[PER_LANE];
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    int c = i * 32 + lane;
    values[i] = c < HEAD_K ? widen(x[row * HEAD_K + c]) : 0.0f;
  }
  const auto [r, unit] = norm_of<DTYPE, float>([&](float unit) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      values[i] *= unit;
      squares += values[i] * values[i];
    }
    return sum_over_warp(squares);
  });
#if BACKWARD
  float gradients[PER_LANE], dot = 0.0f;
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    int c = i * 32 + lane;
    gradients[i] = c < HEAD_K ? widen(y_or_dx[row * HEAD_K + c]) : 0.0f;
    dot += gradients[i] * (r * values[i]);
  }
  dot = sum_over_warp(dot);
#endif
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    int c = i * 32 + lane;
#if BACKWARD
    float result = r * (gradients[i] - r * values[i] * dot) * unit;
#else
    float result = r * values[i];
#endif
    if (c < HEAD_K) y_or_dx[row * HEAD_K + c] = narrow<DTYPE>(result);
  }
}
