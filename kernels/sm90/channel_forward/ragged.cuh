// What sm90/channel_forward.cu asks of ragged sequences before it walks.
#pragma once
#include "sm90/channel_forward/shared.cuh"

// The most tokens that a sequence has, by every warp.
PRIM int longest_sequence(const int64_t* cu_seqlens, int N, int T) {
  int longest = 0;
  for (int n = threadIdx.x % 32; n < N; n += 32) {
    const int start = clamp_token(cu_seqlens[n], 0, T);
    longest = max(longest, clamp_token(cu_seqlens[n + 1], start, T) - start);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) longest = max(longest, __shfl_xor_sync(~0u, longest, distance));
  return longest;
}

// Of a sequence without tokens, the final state.
PRIM void keep_state(const float* initial, float* final) {
  constexpr int SIZE = HEAD_K * HEAD_V;
  const int64_t state = (int64_t)blockIdx.x * SIZE;
  for (int i = threadIdx.x; i < SIZE; i += THREADS) final[state + i] = initial == nullptr ? 0.0f : initial[state + i];
}
