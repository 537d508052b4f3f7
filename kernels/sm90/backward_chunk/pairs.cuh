// What the two math warpgroups of backward_chunk.cu do with tiles and with pairs of tokens.
#pragma once
#include "sm90/backward_chunk/shared.cuh"
#include "tiles/store.cuh"

// This warp's 16 rows of a box, or (TRANSPOSED) 16 columns, as left operand.
template <bool TRANSPOSED>
PRIM void load_rows(uint32_t (&a)[STEPS][4], const DTYPE* box, int warp, int lane) {
#pragma unroll
  for (int step = 0; step < STEPS; step++)
    if constexpr (TRANSPOSED)
      ldmatrix_x4_trans(a[step], box + swizzled(step * 16 + lane % 8 + lane / 16 * 8, warp * 16 + lane / 8 % 2 * 8));
    else
      ldmatrix_x4(a[step], box + swizzled(warp * 16 + lane % 16, step * 16 + lane / 16 * 8));
}

// What a thread loads at the beginning of a value head, for all math warps at the end: b of a token, and with a gate
// one of HIGH and LOW.
struct Column {
  float b;
#if HAS_GATE
  float G;
#endif
};
PRIM Column load_column(const float* beta, const float* decays, int tokens, int64_t stride, int thread) {
  Column own;
  own.b = thread < tokens ? beta[thread * stride] : 0.0f;
#if HAS_GATE
  own.G = decays[HIGH * CHUNK + thread];
#endif
  return own;
}
PRIM void share_columns(float* columns, const Column& own, int barrier, int thread) {
  if (thread < CHUNK) columns[thread] = own.b;
#if HAS_GATE
  columns[CHUNK + thread] = own.G;
#endif
  named_barrier(barrier, 128);
}

// x of the two rows in which a thread has sums.
PRIM void load_rows_of(float (&rows)[2], const float* x, int warp, int lane) {
  rows[0] = x[warp * 16 + lane / 4], rows[1] = x[warp * 16 + lane / 4 + 8];
}

// Sums of pairs (i, j) of tokens times rows_i, b_j and the decay between them; zero above the diagonal, and on it if
// STRICT.
template <bool STRICT>
PRIM void weigh_pairs(float (&d)[8][4], const float (&rows)[2], const float* columns, int warp, int lane) {
  // Tokens by which rows lie below the diagonal; opaque, so that no comparisons are kept in registers.
  const int diagonal = opaque(warp * 16 + lane / 4 - lane % 4 * 2);
#if HAS_GATE
  const float *high = columns + CHUNK, *low = columns + 2 * CHUNK;
  float high_rows[2], low_rows[2];
  load_rows_of(high_rows, high, warp, lane);
  load_rows_of(low_rows, low, warp, lane);
#endif
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const int column = sum_column(lane, j, 0);
    const float2 b = *(const float2*)&columns[column];
#if HAS_GATE
    const float2 x = *(const float2*)&high[column], y = *(const float2*)&low[column];
    const float2 G[2] = {{x.x, y.x}, {x.y, y.y}};
#endif
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float factor = rows[i / 2] * (i % 2 ? b.y : b.x);
#if HAS_GATE
      factor *= decay_between({high_rows[i / 2], low_rows[i / 2]}, G[i % 2]);
#endif
      d[j][i] = diagonal + i / 2 * 8 - j * 8 - i % 2 >= STRICT ? factor * d[j][i] : 0.0f;
    }
  }
}

// box = E + E^T, from the 16 x 16 block of E at (warp's rows, column); on the diagonal it is zero from there up.
PRIM void write_symmetric(DTYPE* box, const float (&e0)[4], const float (&e1)[4], int row, int column, int lane) {
  if (column > row) return;
  if (column < row) {
    write_box(box, e0, e1, row, column, lane);
    write_box_transposed(box, e0, e1, column, row, lane);
    return;
  }
  uint32_t r[4] = {pack2<DTYPE>(e0[0], e0[1]), pack2<DTYPE>(e0[2], e0[3]), 0, pack2<DTYPE>(e1[2], e1[3])};
  r[2] = movmatrix_trans(r[1]);
  r[0] |= movmatrix_trans(r[0]);  // one of the two is zero
  r[3] |= movmatrix_trans(r[3]);
  stmatrix_x4(box + swizzled(row + lane % 16, column + lane / 16 * 8), r);
}

// `factor` times a sum, 16 rows of which a warp has, to rows of (token, key head).
PRIM void write_gradient(DTYPE* out, const float (&d)[K_TILES][4], float factor, const Chunk& chunk, int H, int h,
                         int thread) {
  const int first = thread / 32 * 16;
  const int64_t row = (chunk.first + first) * H + h;
  store_wide(out + row * HEAD_K, (int64_t)H * HEAD_K, d, factor, chunk.tokens - first, HEAD_K, thread % 32);
}

// A warp is done with Q and K.
PRIM void free_keys(const Shared& s, Ring<KEY_STAGES>& keys, int lane) {
  __syncwarp();
  if (lane == 0) mbarrier_arrive(s.keys_free + keys.stage);
  keys.advance();
}

// With LEAVES_DV: waits for what is known of a value head's tokens, and says that a warp needs it no more.
PRIM const float* wait_for_columns(const Shared& s, const Ring<2>& ring) {
  mbarrier_wait(s.columns_full + ring.stage, ring.parity);
  return s.columns + ring.stage * COLUMNS;
}
PRIM void free_columns(const Shared& s, Ring<2>& ring, int lane) {
  __syncwarp();
  if (lane == 0) mbarrier_arrive(s.columns_free + ring.stage);
  ring.advance();
}
