// X = (I + A)^-1 for A = diag(b) M, M strictly lower triangular of C x C, C = 16, 32 or 64, in shared memory.
//
// 16 x 16 diagonal blocks by forward substitution in float, one column per lane. Then blocks merge,
// X21 = -X22 (A21 X11), on the tensor cores in 3xTF32: small products, where 16-bit operands would cost digits that
// correlated keys then amplify. Every block of X diag(beta), of A21 X11 and of X is a product of factors
// I - beta k k^T times a unit key, so entries stay below 2 for beta in [0, 2]. A Neumann series squares A first and
// loses that bound.
#pragma once
#include "tiles/fragments.cuh"
#include "tiles/load.cuh"

// Row pitch of all matrices here, in elements.
template <int C>
PRIM constexpr int inverse_pitch() {
  return pitch_of<float>(C);
}

// One 16 x 16 block on the diagonal, by one warp: lane c holds column c of X.
PRIM void invert_block(float* x, const float* m, const float* b, int pitch, int lane) {
  float column[16];
  int c = lane % 16;
#pragma unroll
  for (int i = 0; i < 16; i++) {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < i; k++) sum += m[i * pitch + k] * column[k];
    column[i] = (i == c ? 1.0f : 0.0f) - b[i] * sum;
  }
  if (lane < 16) {
#pragma unroll
    for (int i = 0; i < 16; i++) x[i * pitch + c] = column[i];
  }
}

// Inverts I + diag(b) tril(m, -1) into x, upper triangle zero. Only blocks of `m` on and below the diagonal are read,
// and of the diagonal ones only the strict lower triangle. `scratch` holds C / 2 rows. All threads of a block of at
// least C / 16 warps call it; ends with a barrier.
template <int C, int THREADS>
PRIM void invert_unit_lower(float* x, const float* m, const float* b, float* scratch, int thread) {
  constexpr int pitch = inverse_pitch<C>();
  const int warp = thread / 32, lane = thread % 32;
  for (int i = thread; i < C * C; i += THREADS) {
    int r = i / C, c = i % C;
    if (r / 16 != c / 16) x[r * pitch + c] = 0.0f;
  }
  if (warp < C / 16) invert_block(x + warp * 16 * (pitch + 1), m + warp * 16 * (pitch + 1), b + warp * 16, pitch, lane);
  __syncthreads();
#pragma unroll
  for (int half = 16; half < C; half *= 2) {
    const int tiles = half / 16, pairs = C / (2 * half), jobs = pairs * tiles * tiles;
    const int pair = warp / (tiles * tiles), row = warp / tiles % tiles * 16, column = warp % tiles * 16;
    const int corner = pair * 2 * half * (pitch + 1), below = corner + half * pitch;
    // Y = A21 X11, then X21 = -X22 Y; one 16 x 16 tile per warp.
    const float* weights = b + pair * 2 * half + half + row;
    if (warp < jobs) {
      float y[2][4];
      clear(y);
      for (int k = 0; k < half; k += 16)
        multiply_tiles<float, 2, 16, true>(y, m + below + row * pitch + k, pitch, x + corner + k * pitch + column,
                                           pitch, lane);
      float* out = scratch + (pair * half + row) * pitch + column;
#pragma unroll
      for (int j = 0; j < 2; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          out[sum_row(lane, i) * pitch + sum_column(lane, j, i)] = weights[sum_row(lane, i)] * y[j][i];
    }
    __syncthreads();
    if (warp < jobs) {
      float z[2][4];
      clear(z);
      for (int k = 0; k < half; k += 16)
        multiply_tiles<float, 2, 16, true>(z, x + below + half + row * pitch + k, pitch,
                                           scratch + (pair * half + k) * pitch + column, pitch, lane);
      float* out = x + below + row * pitch + column;
#pragma unroll
      for (int j = 0; j < 2; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) out[sum_row(lane, i) * pitch + sum_column(lane, j, i)] = -z[j][i];
    }
    __syncthreads();
  }
}
