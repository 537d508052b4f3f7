// What the kernels of chunk-parallel gradients do with a slice of a chunk's values, and how their warps multiply: a
// warp owns one tile of 16 rows and every ACROSS-th tile of 16 columns.
//
// Macros: DTYPE, CHUNK, WARPS (a multiple of CHUNK / 16), SLICE (value channels at a time, a multiple of 16).
#pragma once
#include "tiles/fragments.cuh"
#include "tiles/load.cuh"

typedef Mma<DTYPE> Product;
constexpr int THREADS = 32 * WARPS, ROWS = CHUNK / 16, ACROSS = WARPS / ROWS;
constexpr int V_PITCH = pitch_of<DTYPE>(SLICE);

// d[job] += A B for the warp's row tile: a[row][k] and, per job, b[column][k] (BY_ROWS) or b[k][column].
template <int JOBS, int DEPTH_TOTAL, bool BY_ROWS>
PRIM void multiply_jobs(float (&d)[JOBS][2][4], const DTYPE* a, int a_pitch, const DTYPE* b, int b_pitch, int across,
                        int columns, int lane) {
#pragma unroll
  for (int k = 0; k < DEPTH_TOTAL; k += Product::DEPTH) {
    Product::order_loads();
    typename Product::A fa;
    Product::load_a(fa, a + k, a_pitch, lane);
#pragma unroll
    for (int job = 0; job < JOBS; job++) {
      const int column = (across + job * ACROSS) * 16;
      if (column >= columns) continue;  // the whole warp
      typename Product::B fb;
      if constexpr (BY_ROWS)
        Product::load_b(fb, b + column * b_pitch + k, b_pitch, lane);
      else
        Product::load_b_transposed(fb, b + k * b_pitch + column, b_pitch, lane);
      Product::multiply(d[job][0], d[job][1], fa, fb);
    }
  }
}

template <int JOBS>
PRIM void clear_jobs(float (&d)[JOBS][2][4]) {
#pragma unroll
  for (int job = 0; job < JOBS; job++) clear(d[job]);
}

// N^ and dY become N = b N^ and -dR = -b dY, by a warp per token; dV = dR is written, or not, and dbeta is summed over
// the slices.
PRIM void weigh_rows(DTYPE* tile_n, DTYPE* tile_r, const float* b, float* b_sums, bool first, DTYPE* dv, int64_t stride,
                     bool write, int tokens, int width, int warp, int lane) {
  for (int t = warp; t < CHUNK; t += WARPS) {
    float sum = 0.0f;
    for (int c = lane; c < SLICE; c += 32) {
      DTYPE &n = tile_n[t * V_PITCH + c], &r = tile_r[t * V_PITCH + c];
      const float n_hat = widen(n), dy_t = widen(r), gradient = b[t] * dy_t;
      sum += dy_t * n_hat;
      n = narrow<DTYPE>(b[t] * n_hat);
      r = narrow<DTYPE>(-gradient);
      if (write && t < tokens && c < width) dv[t * stride + c] = narrow<DTYPE>(gradient);
    }
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(~0u, sum, bits);
    if (lane == 0) b_sums[t] = first ? sum : b_sums[t] + sum;
  }
}
