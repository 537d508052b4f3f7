// What both kernels of factors leave of a chunk's M and X = (I + diag(b) M)^-1, in shared memory: the core, or T.
//
// Macros: DTYPE, CHUNK.
#pragma once
#include "tiles/fragments.cuh"
#include "tiles/load.cuh"
#include "tiles/triangular_inverse.cuh"

constexpr int A_PITCH = inverse_pitch<CHUNK>();  // of all float CHUNK x CHUNK matrices
constexpr int C_PITCH = pitch_of<DTYPE>(CHUNK);

// core = -M X for the tokens of the chunk, `stride` elements from row to row.
template <int THREADS>
PRIM void write_core(DTYPE* core, int64_t stride, const float* m, const float* inverse, int tokens, int warp,
                     int lane) {
  for (int tile = warp; tile < CHUNK / 16 * (CHUNK / 16); tile += THREADS / 32) {
    int r = tile / (CHUNK / 16) * 16, c = tile % (CHUNK / 16) * 16;
    float d[2][4];
    clear(d);
    if (c <= r) multiply_tiles<float, 2, CHUNK, true>(d, m + r * A_PITCH, A_PITCH, inverse + c, A_PITCH, lane);
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int token = r + sum_row(lane, i), column = c + sum_column(lane, j, i);
        if (token < tokens) core[token * stride + column] = narrow<DTYPE>(column < token ? -d[j][i] : 0.0f);
      }
  }
}

// T = X diag(b), into a tile and for the tokens of the chunk.
template <int THREADS>
PRIM void write_t(DTYPE* t, int64_t stride, DTYPE* tile_t, const float* inverse, const float* b, int tokens,
                  int thread) {
  for (int i = thread; i < CHUNK * CHUNK; i += THREADS) {
    int r = i / CHUNK, c = i % CHUNK;
    bool inside = c <= r && r < tokens;
    DTYPE rounded = narrow<DTYPE>(inside ? inverse[r * A_PITCH + c] * b[c] : 0.0f);
    tile_t[r * C_PITCH + c] = rounded;
    if (r < tokens) t[r * stride + c] = rounded;
  }
}

// out[token][column] = T tile, for the tokens of the chunk.
template <int THREADS, int HEAD, int PITCH>
PRIM void write_product(DTYPE* out, int64_t stride, const DTYPE* t, const DTYPE* tile, int tokens, int warp, int lane) {
  constexpr int STEPS = padded(HEAD) / 16;
  for (int job = warp; job < CHUNK / 16 * STEPS; job += THREADS / 32) {
    int r = job / STEPS * 16, c = job % STEPS * 16;
    float d[2][4];
    clear(d);
    multiply_tiles<DTYPE, 2, CHUNK, true>(d, t + r * C_PITCH, C_PITCH, tile + c, PITCH, lane);
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int row = r + sum_row(lane, i), column = c + sum_column(lane, j, i);
        if (row < tokens && column < HEAD) out[row * stride + column] = narrow<DTYPE>(d[j][i]);
      }
  }
}
