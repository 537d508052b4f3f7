// Pairs of tokens of one block, with a gate per key channel, whose decays are out of the range of products.
#pragma once
#include "tiles/fragments.cuh"

// M and p of tokens i and j, of which a lane has `sums` over its channels, in a warp's accumulators.
template <class Pairs>
PRIM void put_pair(Pairs& own, float (&sums)[2], int i, int j, int lane) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    sums[0] += __shfl_xor_sync(~0u, sums[0], distance);
    sums[1] += __shfl_xor_sync(~0u, sums[1], distance);
  }
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (sum_row(lane, e) == i && sum_column(lane, h, e) == j) own.m[h][e] = sums[0], own.p[h][e] = sums[1];
}
