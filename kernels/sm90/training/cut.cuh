// Transfers that gates cut short. Of what a segment does to a state, chunks count only as far as anything is left of
// them at its end: a chunk multiplies what it is given by no more than
//
//   e^(G_C) prod_t max(1, |1 - b_t k_t k_t|)
//
// since all it does to it is to decay it and, token by token, to take the part along a key away. Where the chunks that
// a walk ends with leave less than 2^-100 of a gradient of the state (2^-126 where no token makes it longer), it begins
// with them: H is theirs alone, and P is 0. In 16 bits that is seen where gradients of earlier tokens are less than
// 2^-92 of those of later ones, and in a NaN, which is forgotten, too.
#pragma once
#include "sm90/decays.cuh"
#include "sm90/training/shared.cuh"

// Binary orders that gates have to take away, and those that keys may bring back.
constexpr float LOST = 126.0f, REGAINED = 26.0f;

// How many chunks at the end of the walk have gates which leave 2^-LOST, or all of them.
PRIM int chunks_that_count(const Work& work, const float* decays, int lane) {
  float before = 0.0f;
  for (int first = 0; first < work.chunks; first += 32) {
    const int c = first + lane;
    float sum = 0.0f;
    if (c < work.chunks) sum = decays_of(decays, work.sequence.slot + c, work.hv, work.HV)[HIGH * CHUNK + CHUNK - 1];
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const float below = __shfl_sync(~0u, sum, max(lane - distance, 0));
      if (lane >= distance) sum += below;
    }
    int last = before + sum < -LOST ? c : work.chunks;
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) last = min(last, __shfl_xor_sync(~0u, last, bits));
    if (last < work.chunks) return last + 1;
    before += __shfl_sync(~0u, sum, 31);
  }
  return work.chunks;
}

// The largest |1 - b k k| of a segment's first tokens, or 1, over a thread's share of them.
PRIM float largest_factor(const Work& work, const DTYPE* k, const float* beta, int H, int tokens) {
  float largest = 1.0f;
  for (int t = threadIdx.x; t < tokens; t += THREADS) {
    const int64_t token = work.sequence.first + t;
    const uint4* row = (const uint4*)(k + (token * H + work.h) * HEAD_K);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < HEAD_K / 8; i++) {
      const uint4 x = row[i];
      const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float2 y = unpack2<DTYPE>(pairs[j]);
        sum += y.x * y.x + y.y * y.y;
      }
    }
    largest = fmaxf(largest, fabsf(1.0f - beta[token * work.HV + work.hv] * sum));
  }
  return largest;
}

// By all threads of a block: whether a transfer is cut short, to chunks that then are all it has. Numbers of warps pass
// through `warps`, which nobody else uses yet.
PRIM bool cut_short(Work& work, float* warps, const DTYPE* k, const float* beta, const float* decays, int H) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, chunks = chunks_that_count(work, decays, lane);
  // Where half and more count, it takes as long to look at keys as is gained; nothing is 0 of 0 chunks.
  if (2 * chunks >= work.chunks) return false;
  float largest = largest_factor(work, k, beta, H, min(chunks * CHUNK, work.sequence.tokens));
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, bits));
  if (lane == 0) warps[warp] = largest;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < THREADS / 32; i++) largest = fmaxf(largest, warps[i]);
  __syncthreads();
  if (largest > exp2f(REGAINED / (float)(CHUNK * chunks))) return false;
  work.chunks = work.values ? chunks : 0;
  return true;
}
