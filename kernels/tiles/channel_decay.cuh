// A gate per key channel, for the kernels that have a chunk to themselves. In blocks of 16 tokens, a thread has a block
// of one or two channels, and the decay between two tokens of a block is the product of those of the gates between
// them: no difference of sums, so nothing is lost, and nothing is above 1, whatever the gates are. What reaches past
// a block is the exponential of its gates' sum, in two floats: an error of a token's decay would grow with T.
//
// Gates below -1000 count as -1000, whose exponential is 0 like that of anything below: -inf too. NaN stays, and spoils
// its own token and channel and later ones only.
//
// Macros: DTYPE, CHUNK.
#pragma once
#include "tiles/decay.cuh"
#include "tiles/fragments.cuh"

constexpr int BLOCK = 16, BLOCKS_OF_CHUNK = CHUNK / BLOCK;

// e^g in place of g in a tile of CHUNK tokens and COLUMNS channels; the sum of the gates of every block and channel,
// and its exponential.
template <int COLUMNS, int THREADS>
PRIM void exponentiate(float* tile, float2* sums, float* decays, int thread) {
  for (int unit = thread; unit < BLOCKS_OF_CHUNK * COLUMNS; unit += THREADS) {
    const int block = unit / COLUMNS, c = unit % COLUMNS;
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int t = 0; t < BLOCK; t++) {
      float& x = tile[(block * BLOCK + t) * pitch_of<float>(COLUMNS) + c];
      const float gate = x < -1000.0f ? -1000.0f : x;
      sum = add_pairs(sum, make_float2(gate, 0.0f));
      x = expf(gate);
    }
    sums[unit] = sum;
    decays[unit] = exp_pair(sum);
  }
}

// The sum of the gates of the blocks `first` to `last` - 1, each `stride` apart; its exponential.
PRIM float decay_of_blocks(const float2* sums, int stride, int first, int last) {
  float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll 1
  for (int block = first; block < last; block++) sum = add_pairs(sum, sums[block * stride]);
  return exp_pair(sum);
}

// Four neighbours of a row.
template <class T>
PRIM float4 load_quad(const T* at) {
  const uint2 x = *(const uint2*)at;
  const float2 low = unpack2<T>(x.x), high = unpack2<T>(x.y);
  return {low.x, low.y, high.x, high.y};
}
template <>
PRIM float4 load_quad(const float* at) {
  return *(const float4*)at;
}

// Two neighbours of a row of HEAD elements, from an even column on, or what there is of them.
template <int HEAD, class T>
PRIM void store_pair(T* row, int column, float2 x) {
  if constexpr (HEAD % 2 == 0) {
    if (column >= HEAD) return;
    if constexpr (sizeof(T) == 2)
      *(uint32_t*)&row[column] = pack2<T>(x.x, x.y);
    else
      *(float2*)&row[column] = x;
  } else {
    if (column < HEAD) row[column] = narrow<T>(x.x);
    if (column + 1 < HEAD) row[column + 1] = narrow<T>(x.y);
  }
}
