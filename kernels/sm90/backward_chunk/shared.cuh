// What the roles of sm90/backward_chunk.cu share: sizes, registers, shared memory and what a block works on.
#pragma once
#include "sm90/decays.cuh"
#include "sm90/value_gradient.cuh"
#include "tiles/sequence.cuh"
#include "tiles/swizzled.cuh"

static_assert(CHUNK == 64, "the chunk is wgmma's 64 rows");
constexpr int VALUE_WARPS = 3, THREADS = 384;
constexpr int KP = HEAD_K <= 64 ? 64 : 128, K_BOXES = KP / BOX, K_TILES = KP / 8;
constexpr int SLICES = (HEAD_V + BOX - 1) / BOX;
// Per thread, as the compiler needs them. A block starts with 168 for each, what 65536 are for 384 threads in steps of
// 8, and cannot have more later.
constexpr int VALUE_REGISTERS = !HAS_GATE ? 88 : SLICES > 1 ? 64 : 56, QUERY_REGISTERS = HAS_GATE ? 216 : 184;
constexpr int KEY_REGISTERS = HAS_GATE && SLICES > 1 ? 224 : 232;
static_assert(VALUE_REGISTERS + QUERY_REGISTERS + KEY_REGISTERS <= 3 * 168,
              "a warpgroup would wait for registers for ever");
constexpr int TILE = CHUNK * BOX, STEPS = CHUNK / 16;
constexpr int QUERY_BARRIER = 1, KEY_BARRIER = 2;
// What is known of tokens: b, and HIGH and LOW of decays; with LEAVES_DV, whose third warp brings them, reads and
// writes, too.
constexpr int COLUMNS = (1 + 2 * HAS_GATE + 2 * LEAVES_DV) * CHUNK, READS_AT = 3 * CHUNK, WRITES_AT = 4 * CHUNK;
// A stage: boxes of dO, N^ and dY, or dV, then 64 rows of S and of dS'.
constexpr int N_AT = TILE, DY_AT = 2 * TILE, S_AT = 3 * TILE, DS_AT = (3 + K_BOXES) * TILE;
constexpr int STAGE = (3 + 2 * K_BOXES) * TILE;

// With a gate Q and K are read with every slice, not at the end of a value head: so they are loaded first, a pair
// ahead.
constexpr bool KEYS_FIRST = HAS_GATE;
static_assert(!KEYS_FIRST || KEY_STAGES > 1, "a ring of one would keep the loads of slices waiting");

// What dg of a value head is summed from: of pairs of tokens, per math warp; reads of S by queries and by keys; writes
// into the next state; c <S, dS'>, per warp of queries.
struct Sums {
  float *pairs, *query_reads, *key_reads, *writes, *states;
  uint64_t* full;
};

struct Shared {
  DTYPE *stages, *q, *k, *pairs, *symmetric;  // pairs: scale dPqk; symmetric: E + E^T
  float* columns;
  Sums sums;
  uint64_t *full, *free, *keys_full, *keys_free, *pairs_full, *pairs_free, *landed, *columns_full, *columns_free;
};

PRIM Shared take_shared(DynSmem& smem) {
  Shared s = {};
  s.stages = smem.take<DTYPE>(SLICE_STAGES * STAGE, "stages", 1024);
  s.q = smem.take<DTYPE>(KEY_STAGES * K_BOXES * TILE, "q", 1024);
  s.k = smem.take<DTYPE>(KEY_STAGES * K_BOXES * TILE, "k", 1024);
  s.pairs = smem.take<DTYPE>(TILE, "scaled dp", 1024);
  s.symmetric = smem.take<DTYPE>(TILE, "e + e^t", 1024);
  s.columns = smem.take<float>(2 * COLUMNS, "columns");
#if HAS_GATE
  s.sums.pairs = smem.take<float>(8 * CHUNK, "sums of pairs");
  s.sums.query_reads = smem.take<float>(CHUNK, "reads by queries");
  s.sums.key_reads = smem.take<float>(CHUNK, "reads by keys");
  s.sums.writes = smem.take<float>(CHUNK, "writes");
  s.sums.states = smem.take<float>(4, "sums of states");
  s.sums.full = smem.take<uint64_t>(1, "sums full");
#endif
  s.full = smem.take<uint64_t>(SLICE_STAGES, "full");
  s.free = smem.take<uint64_t>(SLICE_STAGES, "free");
  s.keys_full = smem.take<uint64_t>(KEY_STAGES, "keys full");
  s.keys_free = smem.take<uint64_t>(KEY_STAGES, "keys free");
  s.pairs_full = smem.take<uint64_t>(1, "pairs full");
  s.pairs_free = smem.take<uint64_t>(1, "pairs free");
  s.landed = smem.take<uint64_t>(2, "ragged chunk landed");
#if LEAVES_DV
  s.columns_full = smem.take<uint64_t>(2, "columns full");
  s.columns_free = smem.take<uint64_t>(2, "columns free");
#endif
  return s;
}

// The pairs of chunk and key head of one block.
struct Work {
  const int64_t* cu_seqlens;
  int pairs, N, T, H, HV;
};

// Calls body(chunk, slot, key head) for each pair; every role goes through the same ones.
template <class Body>
PRIM void for_each_pair(const Work& work, Body body) {
  for (int pair = blockIdx.x; pair < work.pairs; pair += gridDim.x) {
    const int slot = pair / work.H;
    const Chunk chunk = find_chunk<CHUNK>(work.cu_seqlens, slot, work.N, work.T);
    if (chunk.tokens > 0) body(chunk, slot, pair % work.H);
  }
}

// Of 64 x 64 sums, of which a warp has 16 rows, the diagonal: of the two rows in which a lane has sums, or zero where
// others have it. True: the lane has it.
PRIM bool take_diagonal(float (&x)[2], const float (&d)[8][4], int warp, int lane) {
  const bool has_it = lane / 8 == lane % 4, second = lane / 4 % 2;
  x[0] = x[1] = 0.0f;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const int half = j % 2;
    if (has_it && j / 2 == warp) x[half] = second ? d[j][2 * half + 1] : d[j][2 * half];
  }
  return has_it;
}

struct Maps {
  const TensorMap *q, *k, *n, *dy, *d_o, *states, *dstates;
};
