// What the portable walks share: what a block works on, and how the tiles of a chunk come to shared memory.
//
// A block has one value head of one sequence (or segment) and a slice of its value channels, a warp ROW_TILES tiles of
// 16 of them. Everything is held transposed, rows = value channels, so that sums are left operands of the next product
// straight from their accumulators.
#pragma once
#include "tiles/decay.cuh"
#include "tiles/fragments.cuh"
#include "tiles/load.cuh"
#include "tiles/sequence.cuh"
#include "tiles/store.cuh"

typedef Mma<DTYPE> Product;
constexpr int THREADS = 32 * WARPS, SLICE = 16 * ROW_TILES * WARPS;
constexpr int KP = padded(HEAD_K), SLICES = (padded(HEAD_V) + SLICE - 1) / SLICE;
constexpr int K_PITCH = pitch_of<DTYPE>(KP), V_PITCH = pitch_of<DTYPE>(SLICE), C_PITCH = pitch_of<DTYPE>(CHUNK);
constexpr int C_TILES = CHUNK / 8, K_TILES = KP / 8;

// What a block works on.
struct Work {
  Sequence sequence;
  int n, part, h, hv, slice, H, HV;  // part: of all sequences' segments

  PRIM int chunks() const { return (sequence.tokens + CHUNK - 1) / CHUNK; }
  PRIM int tokens(int c) const { return min(sequence.tokens - c * CHUNK, CHUNK); }
  PRIM int64_t token(int c) const { return sequence.first + (int64_t)c * CHUNK; }
  // Of a state per sequence or segment, and of one per chunk.
  PRIM int64_t state(int index) const { return ((int64_t)index * HV + hv) * HEAD_K * HEAD_V; }
  PRIM int64_t chunk_row(int c) const { return (sequence.slot + c) * HV + hv; }
  PRIM int64_t chunk_state(int c) const { return chunk_row(c) * HEAD_K * HEAD_V; }
};

// Which of `walked` segments of each sequence a block has.
PRIM Work find_work(const int64_t* cu_seqlens, const Cut& cut, int walked, int T, int H, int HV) {
  Work work;
  work.slice = blockIdx.x % SLICES, work.hv = blockIdx.x / SLICES % HV, work.part = blockIdx.x / (SLICES * HV);
  work.n = work.part / walked, work.h = work.hv / (HV / H), work.H = H, work.HV = HV;
  work.sequence = find_segment<CHUNK>(cu_seqlens, work.n, cut, work.part % walked, T);
  return work;
}

// Loads tiles of a chunk. The caller commits and waits.
struct Loader {
  const Work& work;
  const int64_t key, value;  // rows of its first token, of the key head and of the value head
  const int chunk, tokens, thread;

  PRIM Loader(const Work& work, int chunk, int64_t token, int tokens, int thread)
      : work(work),
        key(token * work.H + work.h),
        value(token * work.HV + work.hv),
        chunk(chunk),
        tokens(tokens),
        thread(thread) {}

  // Of a key head; with a gate per key channel rows are a value head's.
  PRIM void keys(DTYPE* tile, const DTYPE* rows) const {
    if constexpr (PER_CHANNEL) return keys_of_value_head(tile, rows);
    load_tile<DTYPE, CHUNK, KP, HEAD_K, THREADS>(tile, rows + key * HEAD_K, (int64_t)work.H * HEAD_K, tokens, HEAD_K,
                                                 thread);
  }
  PRIM void keys_of_value_head(DTYPE* tile, const DTYPE* rows) const {
    load_tile<DTYPE, CHUNK, KP, HEAD_K, THREADS>(tile, rows + value * HEAD_K, (int64_t)work.HV * HEAD_K, tokens, HEAD_K,
                                                 thread);
  }
  PRIM void pairs(DTYPE* tile, const DTYPE* rows) const {
    load_tile<DTYPE, CHUNK, CHUNK, CHUNK, THREADS>(tile, rows + value * CHUNK, (int64_t)work.HV * CHUNK, tokens, CHUNK,
                                                   thread);
  }
  PRIM void values(DTYPE* tile, const DTYPE* rows) const {
    load_tile<DTYPE, CHUNK, SLICE, HEAD_V, THREADS>(tile, rows + value * HEAD_V + work.slice * SLICE,
                                                    (int64_t)work.HV * HEAD_V, tokens,
                                                    min(SLICE, HEAD_V - work.slice * SLICE), thread);
  }
  PRIM void beta(float* column, const float* numbers) const {
    load_column<CHUNK, THREADS>(column, numbers + value, work.HV, tokens, thread);
  }
  PRIM void decays(const DecayFactors& factors, const ChunkFactors& from) const {
    const ChunkFactors ours = {from.tokens + value, from.channels + work.chunk_row(chunk) * HEAD_K};
    factors.load<THREADS>(ours, work.HV, tokens, thread);
  }
};
