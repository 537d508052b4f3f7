// The core of a chunk of 64 tokens by two warps, from M in shared memory: core = -M (I + diag(b) M)^-1. A warp inverts
// 32 rows, and both merge what they have, 16 rows each; see tiles/unit_inverse.cuh. Rounded once.
#pragma once
#include "tiles/store.cuh"
#include "tiles/unit_inverse.cuh"

constexpr int HALF = 32, TRIANGLE = HALF * INVERSE_PITCH;

// Eight elements of the lane's row among the eight from `first` on of a block on the diagonal, in DTYPE; zero to the
// right of the 16 x 16 blocks.
PRIM uint4 diagonal_piece(const float* block, int first, int lane) {
  const int piece = lane % 4, row = first + lane / 4;
  uint4 x = {};
  if (piece / 2 <= first / 16) {
    const float4 low = *(const float4*)&block[row * INVERSE_PITCH + piece * 8];
    const float4 high = *(const float4*)&block[row * INVERSE_PITCH + piece * 8 + 4];
    x = make_uint4(pack2<DTYPE>(low.x, low.y), pack2<DTYPE>(low.z, low.w), pack2<DTYPE>(high.x, high.y),
                   pack2<DTYPE>(high.z, high.w));
  }
  return x;
}

// core's 32 rows from `row` on, as far as they lie in the block on the diagonal, and zero to the right of it.
PRIM void write_diagonal_block(DTYPE* core, int64_t stride, const float* block, int row, int tokens, int lane) {
  const int piece = lane % 4;
#pragma unroll
  for (int i = 0; i < HALF; i += 8) {
    const int r = i + lane / 4;
    const uint4 x = diagonal_piece(block, i, lane);
    if (row + r >= tokens) continue;
    DTYPE* to = core + (row + r) * stride;
    store_eight(to, row + piece * 8, x);
    if (row == 0) store_eight(to, HALF + piece * 8, uint4{});
  }
}

// 16 rows of M from `row` on, as accumulators, to blocks of 32 x 32: two on the diagonal, then the one below them.
PRIM void store_rows_of_m(float* m, const float (&d)[8][4], int row, int lane) {
  typedef const float (&Columns)[4][4];
  if (row < HALF) {
    store_block(m + row * INVERSE_PITCH, (Columns)d[0], lane);
  } else {
    store_block(m + 2 * TRIANGLE + (row - HALF) * INVERSE_PITCH, (Columns)d[0], lane);
    store_block(m + row * INVERSE_PITCH, (Columns)d[4], lane);
  }
}

// 16 x 16 of M at (row, column), likewise.
PRIM void store_block_of_m(float* m, const float (&d)[2][4], int row, int column, int lane) {
  const int block = row < HALF ? 0 : column < HALF ? 2 : 1;
  store_block(m + block * TRIANGLE + row % HALF * INVERSE_PITCH + column % HALF, d, lane);
}

// One of the two warps on the core of a chunk.
struct CoreWarp {
  float* l;                      // where the blocks on the diagonal are made
  const float *own_m, *below_m;  // the blocks of M: this warp's, which may lie in the place of its own l, and the last
  const float* b;                // weights of all rows
  int half, barrier, lane;       // of the rows; the barrier is of both warps

  // The core to rows of `out`, as far as there are tokens.
  PRIM void write(DTYPE* out, int64_t stride, int tokens) const {
    float* own = l + half * TRIANGLE;
    invert(own);
    named_barrier(barrier, 64);
    float l21[4][4];
    const int below = HALF + half * 16;
    merge_blocks<float, HALF>(l21, below_m, l + TRIANGLE, l, Weights{b}, half * 16, lane);
    store_wide(out + below * stride, stride, l21, 1.0f, tokens - below, HALF, lane);
    write_diagonal_block(out, stride, own, half * HALF, tokens, lane);
  }

  // The warp's block on the diagonal; Terms is what merge_blocks takes.
  template <class Terms = float>
  PRIM void invert(float* own) const {
    const Weights weights = {b + half * HALF};
    invert_diagonal_blocks<float>(own, own_m, weights, lane);
    float corner[2][4];
    merge_diagonal_blocks<Terms>(corner, own, own_m, weights, lane);
    __syncwarp();  // it may take the place of M's
    store_block(own + HALF / 2 * INVERSE_PITCH, corner, lane);
  }
};
