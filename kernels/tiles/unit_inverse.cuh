// The inverse of I + A for a strictly lower triangular A of 32 x 32 floats in shared memory, by one warp.
//
// L = (I + A)^-1 - I. The 16 x 16 blocks on the diagonal by forward substitution, a column per lane; then
//
//   L21 = -(I + L22) A21 (I + L11)
//
// with the identities in float and the products in TF32. As in triangular_inverse.cuh every factor is a product of
// I - beta k k^T, so nothing grows.
//
// It is made for a place beside wgmma, which needs most of the bandwidth of shared memory and keeps an mma waiting for
// a batch of its own: few accesses, few mma.
#pragma once
#include "tiles/fragments.cuh"

constexpr int INVERSE_PITCH = 36;  // floats per row: 16-byte aligned, eight rows in different banks

// Products with 16 x 8 left and 8 x 16 right operands, as Mma<float> has them: in three terms of TF32 for f16, and in
// one for bf16, which rounds the result to fewer digits than TF32 has. There the tensor cores leave out what follows.
template <class T>
struct MergeProduct : Mma<float> {
  static PRIM void load_a(A& a, const float* tile, int lane) { Mma<float>::load_a(a, tile, INVERSE_PITCH, lane); }
  // d += A B with B[k][n] = tile[k * INVERSE_PITCH + n]
  static PRIM void multiply(float (&d)[2][4], const A& a, const float* tile, int lane) {
    B b;
    load_b_transposed(b, tile, INVERSE_PITCH, lane);
    Mma<float>::multiply(d[0], d[1], a, b);
  }
};
template <>
struct MergeProduct<bf16> {
  struct A {
    uint32_t r[4];
  };
  static PRIM void load_a(A& a, const float* tile, int lane) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float2 x = *(const float2*)&tile[(lane / 4 + h * 8) * INVERSE_PITCH + lane % 4 * 2];
      a.r[h] = __float_as_uint(x.x), a.r[h + 2] = __float_as_uint(x.y);
    }
  }
  static PRIM void from_sums(A& a, const float (&d)[2][4], int step) {
#pragma unroll
    for (int h = 0; h < 2; h++)
      a.r[h] = __float_as_uint(d[step][2 * h]), a.r[h + 2] = __float_as_uint(d[step][2 * h + 1]);
  }
  static PRIM void multiply(float (&d)[2][4], const A& a, const float* tile, int lane) {
    const float* at = tile + lane % 4 * 2 * INVERSE_PITCH + lane / 4;
    mma_m16n8k8_tf32(d[0], a.r, __float_as_uint(at[0]), __float_as_uint(at[INVERSE_PITCH]));
    mma_m16n8k8_tf32(d[1], a.r, __float_as_uint(at[8]), __float_as_uint(at[INVERSE_PITCH + 8]));
  }
};

// A 16 x 16 block as accumulators.
PRIM void load_block(float (&d)[2][4], const float* block, int lane) {
#pragma unroll
  for (int j = 0; j < 2; j++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float2 x = *(const float2*)&block[(lane / 4 + h * 8) * INVERSE_PITCH + sum_column(lane, j, 0)];
      d[j][2 * h] = x.x, d[j][2 * h + 1] = x.y;
    }
}

// L in place of A for the two blocks on the diagonal, whose own diagonal and what is above it are zero.
PRIM void invert_diagonal_blocks(float* a, int lane) {
  const int c = lane % 16;
  float* block = a + lane / 16 * 16 * (INVERSE_PITCH + 1);
  float column[16];
#pragma unroll
  for (int i = 0; i < 16; i++) {
    // Two sums: half the latency.
    float sums[2] = {block[i * INVERSE_PITCH + c], 0.0f};
#pragma unroll
    for (int k = 0; k < i; k += 4) {
      const float4 x = *(const float4*)&block[i * INVERSE_PITCH + k];
      sums[0] += x.x * column[k];
      if (k + 1 < i) sums[1] += x.y * column[k + 1];
      if (k + 2 < i) sums[0] += x.z * column[k + 2];
      if (k + 3 < i) sums[1] += x.w * column[k + 3];
    }
    column[i] = -(sums[0] + sums[1]);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 16; i++) block[i * INVERSE_PITCH + c] = column[i];
  __syncwarp();
}

// L21, as accumulators, once the blocks on the diagonal are inverted; T is what it will be rounded to.
template <class T>
PRIM void merge_diagonal_blocks(float (&l21)[2][4], const float* a, int lane) {
  typedef MergeProduct<T> Product;
  const float *a21 = a + 16 * INVERSE_PITCH, *l22 = a21 + 16;
  typename Product::A rows;
  float W[2][4];  // (I + L22) A21
  load_block(W, a21, lane);
#pragma unroll
  for (int step = 0; step < 2; step++) {
    Product::load_a(rows, l22 + step * 8, lane);
    Product::multiply(W, rows, a21 + step * 8 * INVERSE_PITCH, lane);
  }
#pragma unroll
  for (int j = 0; j < 2; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) l21[j][i] = W[j][i];
#pragma unroll
  for (int step = 0; step < 2; step++) {
    Product::from_sums(rows, W, step);
    Product::multiply(l21, rows, a + step * 8 * INVERSE_PITCH, lane);
  }
#pragma unroll
  for (int j = 0; j < 2; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) l21[j][i] = -l21[j][i];
}
