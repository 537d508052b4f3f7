// What is known of a chunk's tokens, sm90/tokens.cuh, in shared memory: brought by the loading warp of sm90/forward.cu
// with K.
#pragma once
#include "sm90/forward/shared.cuh"

PRIM float* tokens_of(const Shared& s, int stage) { return s.tokens + stage * TOKEN_WORDS; }
PRIM const ChunkGates& gates_of(const float* record) { return *(const ChunkGates*)(record + RECORD_GATES); }
PRIM bool is_paired(const float* record) { return gates_of(record).paired != 0.0f; }

// One chunk after the other: what is written has come from global memory a chunk before.
struct TokenLoader {
  const Work& work;
  const float* beta;  // of the block's first token
  int lane;
  float2 next_beta;
  uint4 next_record[4];  // two of them are what only paired chunks have
  float paired;          // whether that chunk is which is asked for next

  // What is on its way for chunk c.
  PRIM void ask(int c) {
    if constexpr (HAS_GATE) {
      if (c >= work.chunks) return;
      const uint4* record = (const uint4*)work.record(c);
      next_record[0] = record[lane];
      if (lane + 32 < RECORD_HEAD / 4) next_record[1] = record[lane + 32];
      if (WITH_PAIRS && work.pairs) ask_more(record, c);
    } else {
      const int t = c * CHUNK + 2 * lane;
      next_beta.x = t < work.sequence.tokens ? beta[(int64_t)t * work.HV] : 0.0f;
      next_beta.y = t + 1 < work.sequence.tokens ? beta[(int64_t)(t + 1) * work.HV] : 0.0f;
    }
  }
  // What only paired chunks have, which is left alone in others.
  PRIM void ask_more(const uint4* record, int c) {
    if (c == 0) paired = gates_of(work.record(0)).paired;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int at = RECORD_HEAD / 4 + i * 32 + lane;
      if (paired != 0.0f && at < RECORD_WORDS / 4) next_record[2 + i] = record[at];
    }
    if (c + 1 < work.chunks) paired = gates_of(work.record(c + 1)).paired;
  }
  // In other chunks all tokens have the unit of the chunk.
  PRIM void write_more(uint4* words) const {
    const uint32_t is_paired = __shfl_sync(~0u, next_record[1].x, RECORD_GATES / 4 - 32);
    const uint32_t enter = __shfl_sync(~0u, next_record[1].x, RECORD_GATES / 4 + 1 - 32);
    constexpr int WRITES = (RECORD_WRITES - RECORD_READS) / 4, REFERENCE = (RECORD_REFERENCE - RECORD_READS) / 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int at = i * 32 + lane, place = READS_AT / 4 + at + min(gaps_before(at), 2);  // two rows of factors
      const uint32_t x = at < WRITES ? enter : at < REFERENCE ? __float_as_uint(1.0f) : 0;
      if (at < (RECORD_WORDS - RECORD_HEAD) / 4) words[place] = is_paired ? next_record[2 + i] : make_uint4(x, x, x, x);
    }
  }
  PRIM void write(float* to) const {
    if constexpr (HAS_GATE) {
      uint4* words = (uint4*)to;
      constexpr int GAPS = 32 / (CHUNK / 4);  // among the first 32
      words += lane + gaps_before(lane);
      words[0] = next_record[0];
      if (lane + 32 < RECORD_HEAD / 4) words[32 + GAPS] = next_record[1];
      if (WITH_PAIRS && work.pairs) write_more((uint4*)to);
    } else {
      *(float2*)&to[BETA_AT + factor_place(2 * lane)] = next_beta;
    }
  }
};
