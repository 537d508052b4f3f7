// The inverse of I + A, by warps, for a strictly lower triangular A of 32 x 32 floats in shared memory, or of 64 x 64
// in blocks of 32 x 32. More generally, with weights b of the rows,
//
//   L = -M (I + diag(b) M)^-1
//
// which is (I + A)^-1 - I for M = A and b = 1, and what portable/factors.cu calls core for b = beta. The 16 x 16 blocks
// on the diagonal by forward substitution, a column per lane; then neighbours merge,
//
//   L21 = -(I + L22 diag(b2)) M21 (I + diag(b1) L11)
//
// with the identities in float and the products in TF32. As in triangular_inverse.cuh every factor is a product of
// I - beta k k^T, so nothing grows.
//
// It is made for a place beside wgmma, which needs most of the bandwidth of shared memory and keeps an mma waiting for
// a batch of its own: few accesses, few mma.
#pragma once
#include "tiles/fragments.cuh"

constexpr int INVERSE_PITCH = 36;  // floats per row: 16-byte aligned, eight rows in different banks

// b, in shared memory, or all 1.
struct Weights {
  const float* b;
  PRIM float4 quad(int k) const { return *(const float4*)&b[k]; }
  PRIM float2 pair(int k) const { return *(const float2*)&b[k]; }
  PRIM Weights from(int k) const { return {b + k}; }
};
struct Ones {
  PRIM float4 quad(int) const { return make_float4(1.0f, 1.0f, 1.0f, 1.0f); }
  PRIM float2 pair(int) const { return make_float2(1.0f, 1.0f); }
  PRIM Ones from(int) const { return {}; }
};

// Products with 16 x 8 left and 8 x 16 right operands, as Mma<float> has them: in three terms of TF32, and where
// results are rounded to bf16, to fewer digits than TF32 has, in one. There the tensor cores leave out what follows.
template <class T>
struct MergeProduct : Mma<float> {
  static PRIM void set(A& a, int i, float x) { split(a.high[i], a.low[i], x); }
  // d += A B with B[k][n] = tile[k * INVERSE_PITCH + n]
  static PRIM void multiply(float (&d0)[4], float (&d1)[4], const A& a, const float* tile, int lane) {
    B b;
    load_b_transposed(b, tile, INVERSE_PITCH, lane);
    Mma<float>::multiply(d0, d1, a, b);
  }
};
template <>
struct MergeProduct<bf16> {
  struct A {
    uint32_t r[4];
  };
  static PRIM void set(A& a, int i, float x) { a.r[i] = __float_as_uint(x); }
  static PRIM void multiply(float (&d0)[4], float (&d1)[4], const A& a, const float* tile, int lane) {
    const float* at = tile + lane % 4 * 2 * INVERSE_PITCH + lane / 4;
    mma_m16n8k8_tf32(d0, a.r, __float_as_uint(at[0]), __float_as_uint(at[INVERSE_PITCH]));
    mma_m16n8k8_tf32(d1, a.r, __float_as_uint(at[8]), __float_as_uint(at[INVERSE_PITCH + 8]));
  }
};

// 16 rows as accumulators.
template <int TILES>
PRIM void load_block(float (&d)[TILES][4], const float* block, int lane) {
#pragma unroll
  for (int j = 0; j < TILES; j++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float2 x = *(const float2*)&block[(lane / 4 + h * 8) * INVERSE_PITCH + sum_column(lane, j, 0)];
      d[j][2 * h] = x.x, d[j][2 * h + 1] = x.y;
    }
}
template <int TILES>
PRIM void store_block(float* block, const float (&d)[TILES][4], int lane) {
#pragma unroll
  for (int j = 0; j < TILES; j++)
#pragma unroll
    for (int h = 0; h < 2; h++)
      *(float2*)&block[(lane / 4 + h * 8) * INVERSE_PITCH + sum_column(lane, j, 0)] =
          make_float2(d[j][2 * h], d[j][2 * h + 1]);
}

// x as T has it; T = float leaves it.
template <class T>
PRIM float rounded_to(float x) {
  return unpack2<T>(pack2<T>(x, x)).x;
}
template <>
PRIM float rounded_to<float>(float x) {
  return x;
}

// L from M, or in its place, for the two blocks on the diagonal of 32 rows, whose own diagonal and what is above it are
// zero. Entries are rounded to T one row after the other, so that a row makes up for what the rounding of those before
// it does to its token.
template <class T, class B>
PRIM void invert_diagonal_blocks(float* l, const float* m, B b, int lane) {
  const int c = lane % 16, at = lane / 16 * 16 * (INVERSE_PITCH + 1);
  const float* block = m + at;
  float column[16], weighted[16], weight[16];
#pragma unroll
  for (int k = 0; k < 16; k += 4) {
    const float4 x = b.from(lane / 16 * 16).quad(k);
    weight[k] = x.x, weight[k + 1] = x.y, weight[k + 2] = x.z, weight[k + 3] = x.w;
  }
#pragma unroll
  for (int i = 0; i < 16; i++) {
    // Two sums: half the latency.
    float sums[2] = {block[i * INVERSE_PITCH + c], 0.0f};
#pragma unroll
    for (int k = 0; k < i; k += 4) {
      const float4 x = *(const float4*)&block[i * INVERSE_PITCH + k];
      sums[0] += x.x * weighted[k];
      if (k + 1 < i) sums[1] += x.y * weighted[k + 1];
      if (k + 2 < i) sums[0] += x.z * weighted[k + 2];
      if (k + 3 < i) sums[1] += x.w * weighted[k + 3];
    }
    column[i] = rounded_to<T>(-(sums[0] + sums[1]));
    weighted[i] = weight[i] * column[i];
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 16; i++) l[at + i * INVERSE_PITCH + c] = column[i];
  __syncwarp();
}

// 16 rows of L21 from `row` on, as accumulators, once L11 and L22, of SIZE (16 or 32) rows each, are there. T is what
// they will be rounded to, or float for three terms.
template <class T, int SIZE, class B>
PRIM void merge_blocks(float (&l21)[SIZE / 8][4], const float* m21, const float* l22, const float* l11, B b, int row,
                       int lane) {
  typedef MergeProduct<T> Product;
  constexpr int STEPS = SIZE / 8;
  typename Product::A rows;
  float W[STEPS][4];  // (I + L22 diag(b2)) M21
  load_block(W, m21 + row * INVERSE_PITCH, lane);
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    if (step * 8 >= row + 16) continue;
    const float2 f = b.from(SIZE).pair(step * 8 + lane % 4 * 2);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float2 x = *(const float2*)&l22[(row + lane / 4 + h * 8) * INVERSE_PITCH + step * 8 + lane % 4 * 2];
      Product::set(rows, h, f.x * x.x);
      Product::set(rows, h + 2, f.y * x.y);
    }
#pragma unroll
    for (int j = 0; j < STEPS; j += 2)
      Product::multiply(W[j], W[j + 1], rows, m21 + step * 8 * INVERSE_PITCH + j * 8, lane);
  }
#pragma unroll
  for (int j = 0; j < STEPS; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) l21[j][i] = W[j][i];
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    const float2 f = b.pair(step * 8 + lane % 4 * 2);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      Product::set(rows, h, f.x * W[step][2 * h]);
      Product::set(rows, h + 2, f.y * W[step][2 * h + 1]);
    }
#pragma unroll
    for (int j = 0; j < STEPS; j += 2)
      if (j / 2 <= step / 2) Product::multiply(l21[j], l21[j + 1], rows, l11 + step * 8 * INVERSE_PITCH + j * 8, lane);
  }
#pragma unroll
  for (int j = 0; j < STEPS; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) l21[j][i] = -l21[j][i];
}

// L21 of 32 rows, as accumulators, once the blocks on the diagonal are inverted.
template <class T, class B>
PRIM void merge_diagonal_blocks(float (&l21)[2][4], const float* l, const float* m, B b, int lane) {
  const float* m21 = m + 16 * INVERSE_PITCH;
  merge_blocks<T, 16>(l21, m21, l + 16 * (INVERSE_PITCH + 1), l, b, 0, lane);
}
