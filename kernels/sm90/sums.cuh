// Accumulators of a math warpgroup in 16 bits: as left operands, and on their way to global memory.
#pragma once
#include "tiles/fragments.cuh"
#include "tiles/swizzled.cuh"

// d in 16 bits, as left operand, or as stmatrix takes it.
template <class T, int TILES>
PRIM void round_sums(uint32_t (&a)[TILES / 2][4], const float (&d)[TILES][4]) {
#pragma unroll
  for (int j = 0; j < TILES; j++)
#pragma unroll
    for (int h = 0; h < 2; h++) a[j / 2][j % 2 * 2 + h] = pack2<T>(d[j][2 * h], d[j][2 * h + 1]);
}
// The same with column t of d times factor[t].
template <class T, int TILES>
PRIM void round_columns(uint32_t (&a)[TILES / 2][4], const float (&d)[TILES][4], const float* factor, int lane) {
#pragma unroll
  for (int j = 0; j < TILES; j++) {
    const float2 f = *(const float2*)&factor[sum_column(lane, j, 0)];
#pragma unroll
    for (int h = 0; h < 2; h++) a[j / 2][j % 2 * 2 + h] = pack2<T>(f.x * d[j][2 * h], f.y * d[j][2 * h + 1]);
  }
}

// d[column t] times factor[t].
template <int TILES>
PRIM void scale_columns(float (&d)[TILES][4], const float* factor, int lane) {
#pragma unroll
  for (int j = 0; j < TILES; j++) {
    const float2 f = *(const float2*)&factor[sum_column(lane, j, 0)];
    d[j][0] *= f.x, d[j][1] *= f.y, d[j][2] *= f.x, d[j][3] *= f.y;
  }
}

// box[token][channel] = a for the 16 channels of this warp among a box's 64.
template <class T>
PRIM void stage_rows(T* box, const uint32_t (&a)[4][4], int warp, int lane) {
#pragma unroll
  for (int j = 0; j < 4; j++)
    stmatrix_x4_trans(box + swizzled(j * 16 + lane % 8 + lane / 16 * 8, warp * 16 + lane / 8 % 2 * 8), a[j]);
}
// out[token][channel] = box[token][channel] for the same channels, `width` of which there are.
template <class T>
PRIM void write_rows(T* out, int64_t stride, const T* box, int tokens, int width, int warp, int lane) {
  uint4 x[4];
#pragma unroll
  for (int i = 0; i < 4; i++) x[i] = *(const uint4*)&box[swizzled(i * 16 + lane % 16, warp * 16 + lane / 16 * 8)];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int token = i * 16 + lane % 16, half = lane / 16;
    if (token < tokens && half * 8 < width) *(uint4*)&out[token * stride + half * 8] = x[i];
  }
}

// What a math warpgroup holds, transposed: of a value head's state 64 value channels, or of a transfer's P 64 columns.
struct Part {
  int column;     // the first one
  int hv, HV;     // the value head, of how many
  int warpgroup;  // which of the math warpgroups, each with a named barrier from MATH_BARRIER on
  int thread;     // in it

  PRIM int warp() const { return thread / 32; }
  PRIM int lane() const { return thread % 32; }
};

// Where rows of (token, value head) go.
struct Rows {
  const TensorMap* map;
  DTYPE* rows;
};
// The rows of chunk c, 16 value channels per warp, through a box that the warpgroup shares: by TMA, or one by one where
// what follows in memory is another sequence's.
template <class Work>
PRIM void send_rows(const Rows& out, const uint32_t (&a)[4][4], DTYPE* box, const Work& work, int c, int tokens,
                    const Part& part) {
  const int warp = part.warp(), lane = part.lane(), value = part.column + warp * 16;
  stage_rows(box, a, warp, lane);
  async_proxy_fence();
  named_barrier(MATH_BARRIER + part.warpgroup, 128);
  if (tokens == CHUNK || (!VARLEN && tokens > 0)) {
    if (part.thread == 0) {
      tma_store(out.map, box, value, work.hv, work.start + c * CHUNK, work.batch);
      tma_store_commit();
    }
  } else {
    const int64_t row = (work.sequence.first + (int64_t)c * CHUNK) * part.HV + work.hv;
    write_rows(out.rows + row * HEAD_V + value, (int64_t)part.HV * HEAD_V, box, tokens, HEAD_V - value, warp, lane);
  }
}

// d += factor on the diagonal, of rows from `row` on.
template <int TILES>
PRIM void add_identity(float (&d)[TILES][4], float factor, int row, int lane) {
#pragma unroll
  for (int j = 0; j < TILES; j++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (row + sum_row(lane, i) == sum_column(lane, j, i)) d[j][i] += factor;
}
// d -= c on the diagonal: one number, or one of each of a thread's two rows.
template <int TILES>
PRIM void subtract_diagonal(float (&d)[TILES][4], float c, int row, int lane) {
  add_identity(d, -c, row, lane);
}
template <int TILES>
PRIM void subtract_diagonal(float (&d)[TILES][4], float2 c, int row, int lane) {
#pragma unroll
  for (int j = 0; j < TILES; j++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (row + sum_row(lane, i) == sum_column(lane, j, i)) d[j][i] -= i < 2 ? c.x : c.y;
}
