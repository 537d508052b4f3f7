// What is known of a chunk's tokens, sm90/tokens.cuh, in shared memory: brought by the loading warp of sm90/forward.cu
// with K.
#pragma once
#include "sm90/forward/shared.cuh"

PRIM float* tokens_of(const Shared& s, int stage) { return s.tokens + stage * TOKEN_WORDS; }
PRIM const ChunkGates& gates_of(const float* tokens) { return *(const ChunkGates*)(tokens + GATES_AT); }
PRIM bool is_paired(const float* tokens) { return HAS_GATE && gates_of(tokens).paired != 0.0f; }

// One chunk after the other: what is written has come from global memory a chunk before.
struct TokenLoader {
  const Work& work;
  const float* beta;  // of the block's first token
  int lane;
  float2 next_beta;
  uint4 next_record[2];

  // What is on its way for chunk c.
  PRIM void ask(int c) {
    if constexpr (HAS_GATE) {
      if (c >= work.chunks) return;
      const uint4* record = (const uint4*)work.record(c);
      next_record[0] = record[lane];
      if (lane + 32 < RECORD_HEAD / 4) next_record[1] = record[lane + 32];
    } else {
      const int t = c * CHUNK + 2 * lane;
      next_beta.x = t < work.sequence.tokens ? beta[(int64_t)t * work.HV] : 0.0f;
      next_beta.y = t + 1 < work.sequence.tokens ? beta[(int64_t)(t + 1) * work.HV] : 0.0f;
    }
  }
  // What only paired chunks have comes without having been asked for.
  PRIM void write(float* to, int c) const {
    if constexpr (HAS_GATE) {
      uint4* words = (uint4*)to;
      words[lane] = next_record[0];
      if (lane + 32 < RECORD_HEAD / 4) words[lane + 32] = next_record[1];
      if (__shfl_sync(~0u, next_record[1].x, GATES_AT / 4 - 32) == 0) return;
      const uint4* record = (const uint4*)work.record(c);
      for (int i = RECORD_HEAD / 4 + lane; i < RECORD_WORDS / 4; i += 32) words[i] = record[i];
    } else {
      *(float2*)&to[BETA_AT + factor_place(2 * lane)] = next_beta;
    }
  }
};
