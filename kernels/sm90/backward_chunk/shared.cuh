// What the roles of sm90/backward_chunk.cu share: sizes, registers, shared memory and what a block works on.
#pragma once
#include "tiles/sequence.cuh"
#include "tiles/swizzled.cuh"

static_assert(CHUNK == 64, "the chunk is wgmma's 64 rows");
constexpr int VALUE_WARPS = 3, THREADS = 384;
// Per thread. A block starts with 168 for each, what 65536 are for 384 threads in steps of 8, and cannot have more
// later.
constexpr int VALUE_REGISTERS = 88, MATH_REGISTERS = 208;
static_assert(VALUE_REGISTERS + 2 * MATH_REGISTERS <= 3 * 168, "a warpgroup would wait for registers for ever");
constexpr int KP = HEAD_K <= 64 ? 64 : 128, K_BOXES = KP / BOX, K_TILES = KP / 8;
constexpr int SLICES = (HEAD_V + BOX - 1) / BOX;
constexpr int TILE = CHUNK * BOX, STEPS = CHUNK / 16;
constexpr int BETA_BARRIER = 1;
// A stage: boxes of dO, N^ and G, then 64 rows of S and of D'.
constexpr int N_AT = TILE, G_AT = 2 * TILE, S_AT = 3 * TILE, D_AT = (3 + K_BOXES) * TILE;
constexpr int STAGE = (3 + 2 * K_BOXES) * TILE;

struct Shared {
  DTYPE *stages, *q, *k, *pairs, *symmetric;  // pairs: scale dP; symmetric: E + E^T
  float* b;
  uint64_t *full, *free, *keys_full, *keys_free, *pairs_full, *pairs_free, *landed;
};

PRIM Shared take_shared(DynSmem& smem) {
  Shared s;
  s.stages = smem.take<DTYPE>(SLICE_STAGES * STAGE, "stages", 1024);
  s.q = smem.take<DTYPE>(K_BOXES * TILE, "q", 1024);
  s.k = smem.take<DTYPE>(K_BOXES * TILE, "k", 1024);
  s.pairs = smem.take<DTYPE>(TILE, "scaled dp", 1024);
  s.symmetric = smem.take<DTYPE>(TILE, "e + e^t", 1024);
  s.b = smem.take<float>(2 * CHUNK, "beta");
  s.full = smem.take<uint64_t>(SLICE_STAGES, "full");
  s.free = smem.take<uint64_t>(SLICE_STAGES, "free");
  s.keys_full = smem.take<uint64_t>(1, "keys full");
  s.keys_free = smem.take<uint64_t>(1, "keys free");
  s.pairs_full = smem.take<uint64_t>(1, "pairs full");
  s.pairs_free = smem.take<uint64_t>(1, "pairs free");
  s.landed = smem.take<uint64_t>(2, "ragged chunk landed");
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

struct Maps {
  const TensorMap *q, *k, *n, *g, *d_o, *states, *dstates;
};
