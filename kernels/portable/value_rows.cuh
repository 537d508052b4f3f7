// What the kernels of chunk-parallel gradients do with a slice of a chunk's values, and how their warps multiply.
//
// Macros: DTYPE, CHUNK, WARPS (a multiple of CHUNK / 16), SLICE (value channels at a time, a multiple of 16).
#pragma once
#include "tiles/fragments.cuh"
#include "tiles/load.cuh"

typedef Mma<DTYPE> Product;
constexpr int THREADS = 32 * WARPS, ROWS = CHUNK / 16, ACROSS = WARPS / ROWS;
constexpr int V_PITCH = pitch_of<DTYPE>(SLICE);

// What a warp has of a sum: the 16 rows from `row` on, and of their tiles of 16 columns every ACROSS-th from the
// across-th on, each of which is a job.
struct Share {
  int row, across, lane;

  PRIM explicit Share(int thread) : row(thread / 32 % ROWS * 16), across(thread / 32 / ROWS), lane(thread % 32) {}
  PRIM int column(int job) const { return (across + job * ACROSS) * 16; }
};

// d[job] += A B: a[row][k] and, per job, b[column][k] (BY_ROWS) or b[k][column], for columns before `columns`.
template <int JOBS, int DEPTH_TOTAL, bool BY_ROWS>
PRIM void multiply_jobs(float (&d)[JOBS][2][4], const DTYPE* a, int a_pitch, const DTYPE* b, int b_pitch, int columns,
                        const Share& mine) {
#pragma unroll
  for (int k = 0; k < DEPTH_TOTAL; k += Product::DEPTH) {
    Product::order_loads();
    typename Product::A fa;
    Product::load_a(fa, a + mine.row * a_pitch + k, a_pitch, mine.lane);
#pragma unroll
    for (int job = 0; job < JOBS; job++) {
      const int column = mine.column(job);
      if (column >= columns) continue;  // the whole warp
      typename Product::B fb;
      if constexpr (BY_ROWS)
        Product::load_b(fb, b + column * b_pitch + k, b_pitch, mine.lane);
      else
        Product::load_b_transposed(fb, b + k * b_pitch + column, b_pitch, mine.lane);
      Product::multiply(d[job][0], d[job][1], fa, fb);
    }
  }
}

template <int JOBS>
PRIM void clear_jobs(float (&d)[JOBS][2][4]) {
#pragma unroll
  for (int job = 0; job < JOBS; job++) clear(d[job]);
}

// Where rows of dV begin, `stride` apart, if this block writes them; how many there are, and channels of a slice.
struct ValueRows {
  DTYPE* dv;
  int64_t stride;
  bool write;
  int tokens, width;
};

// N^ and dY become N = b N^ and -dR = -b dY, by a warp per token; dV = dR is written, and dbeta is summed over the
// slices.
PRIM void weigh_rows(DTYPE* tile_n, DTYPE* tile_r, const float* b, float* b_sums, bool first, const ValueRows& out,
                     int thread) {
  const int lane = thread % 32;
  for (int t = thread / 32; t < CHUNK; t += WARPS) {
    float sum = 0.0f;
    for (int c = lane; c < SLICE; c += 32) {
      DTYPE &n = tile_n[t * V_PITCH + c], &r = tile_r[t * V_PITCH + c];
      const float n_hat = widen(n), dy_t = widen(r), gradient = b[t] * dy_t;
      sum += dy_t * n_hat;
      n = narrow<DTYPE>(b[t] * n_hat);
      r = narrow<DTYPE>(-gradient);
      if (out.write && t < out.tokens && c < out.width) out.dv[t * out.stride + c] = narrow<DTYPE>(gradient);
    }
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(~0u, sum, bits);
    if (lane == 0) b_sums[t] = first ? sum : b_sums[t] + sum;
  }
}
