// What the roles of sm90/training.cu and sm90/backward_state.cu share: sizes, shared memory and what a block works on.
// Both read core and Pqk of a chunk from sm90/factors.cu, and `rows` of value channels: V, or dO.
//
// With a gate per key channel K and Q are those that meet the state that enters, K e^G and Q e^G, a third tile has what
// is written into the state that leaves, K e^(G_C - G), all of them per value head, and what is left of the state has a
// factor for each of its columns: so a walk is the one without a gate but for these.
//
// The first MATH warpgroups hold 64 value channels each; the last warp loads K, Q, core, Pqk and rows by TMA, and beta
// and decays, up to CHUNK_STAGES chunks ahead. One barrier says that a stage is full; every warp says for itself that
// it is done with one.
#pragma once
#include "sm90/value_gradient.cuh"
#include "tiles/sequence.cuh"
#include "tiles/swizzled.cuh"

static_assert(CHUNK == 64, "the chunk is wgmma's 64 rows");
constexpr bool PER_TOKEN = HAS_GATE == 1, PER_CHANNEL = HAS_GATE == 2;
constexpr bool BEGINS_EARLY = PER_TOKEN && JOINS;  // sm90/training/late.cuh
// A forward transfer makes no outputs.
constexpr bool READS_QUERIES = BACKWARD || !TRANSFER;
constexpr int THREADS = MATH == 2 ? 384 : 160, SLICE = 64 * MATH;
constexpr int KP = HEAD_K <= 64 ? 64 : 128, K_BOXES = KP / BOX, K_STEPS = KP / 16, K_TILES = KP / 8;
constexpr int VALUE_SLICES = (HEAD_V + SLICE - 1) / SLICE;
constexpr int SLICES = VALUE_SLICES + (TRANSFER ? (HEAD_K + SLICE - 1) / SLICE : 0);  // of values, then of P
constexpr int TILE = CHUNK * BOX;                                                     // elements of one box

// With JOINS segments after the first one start from a state that transfers make, in what is K's and Q's from this
// chunk on.
constexpr int JOIN_STAGE = CHUNK_STAGES - 2;
static_assert(JOIN_STAGE >= 0, "two buffers, each as large as two stages of K");

// Registers per thread: 65536 in all, which for one math warpgroup is enough as it comes.
constexpr int LOADER_REGISTERS = 40, MATH_REGISTERS = 232;
static_assert(LOADER_REGISTERS + 2 * MATH_REGISTERS <= 3 * 168, "a warpgroup would wait for registers for ever");
constexpr int MATH_BARRIER = 1;  // and next: named barriers, one per math warpgroup

struct Shared {
  DTYPE *k, *q, *writing, *core, *p, *rows, *states, *o;
  float *beta, *reads, *writes, *carried;
  int* small;  // whether a chunk has tokens of a b that is_small
  uint64_t *full, *free, *landed;
};

PRIM Shared take_shared(DynSmem& smem) {
  Shared s = {};
  s.k = smem.take<DTYPE>(CHUNK_STAGES * K_BOXES * TILE, "k", 1024);
  if constexpr (READS_QUERIES) s.q = smem.take<DTYPE>(CHUNK_STAGES * K_BOXES * TILE, "q", 1024);
  if constexpr (PER_CHANNEL) s.writing = smem.take<DTYPE>(CHUNK_STAGES * K_BOXES * TILE, "k of writes", 1024);
  s.core = smem.take<DTYPE>(CHUNK_STAGES * TILE, "core", 1024);
  if constexpr (READS_QUERIES) s.p = smem.take<DTYPE>(CHUNK_STAGES * TILE, "p", 1024);
  s.rows = smem.take<DTYPE>(CHUNK_STAGES * MATH * TILE, "rows", 1024);
  if constexpr (STATES || TRANSFER) s.states = smem.take<DTYPE>(MATH * K_BOXES * TILE, "states", 1024);
  if constexpr (STATES && !BACKWARD) s.o = smem.take<DTYPE>(MATH * TILE, "o", 1024);
  s.beta = smem.take<float>(CHUNK_STAGES * CHUNK, "beta");
  if constexpr (PER_TOKEN) {
    s.reads = smem.take<float>(CHUNK_STAGES * CHUNK, "reads");
    s.writes = smem.take<float>(CHUNK_STAGES * CHUNK, "writes");
  }
  if constexpr (LEAVES_DV && STATES) s.small = smem.take<int>(CHUNK_STAGES, "small beta");
  if constexpr (PER_CHANNEL) s.carried = smem.take<float>(CHUNK_STAGES * KP, "decays of the state");
  s.full = smem.take<uint64_t>(CHUNK_STAGES, "full");
  s.free = smem.take<uint64_t>(CHUNK_STAGES, "free");
  s.landed = smem.take<uint64_t>(1, "last chunk landed");
  return s;
}

PRIM void init_barriers(const Shared& s) {
  for (int i = 0; i < CHUNK_STAGES; i++) mbarrier_init(s.full + i, 1), mbarrier_init(s.free + i, 4 * MATH);
  mbarrier_init(s.landed, 1);
  mbarrier_init_fence();
}

// What a block works on: a slice of value channels, or of P's columns, of one segment.
struct Work {
  Sequence sequence;
  int chunks, n, part, h, hv, HV, batch;
  int step;     // in the order of the walk, which segment of the sequence
  bool last;    // in that order
  int channel;  // the block's first one
  bool values;  // or P
  int start;    // coordinate of its first token in the tensor maps
  int joined;   // of the segments before it, so many transfers
  int early;    // chunks before its segment, of which nothing leaves: with any, it joins nothing and begins from zero

  // The i-th chunk of the walk.
  PRIM int chunk(int i) const { return BACKWARD ? chunks - 1 - i : i; }
  PRIM int tokens(int c) const { return min(sequence.tokens - c * CHUNK, CHUNK); }
  // The first chunk of the walk of which anything leaves; how many rows of the i-th do.
  PRIM int first() const { return BEGINS_EARLY ? early : 0; }
  PRIM int sent(int i) const { return BEGINS_EARLY && i < early ? 0 : tokens(chunk(i)); }
};

PRIM Work find_work(const int64_t* cu_seqlens, int T, int H, int HV, int segments, int transferred) {
  const int slice = blockIdx.x % SLICES, walked = TRANSFER ? transferred : segments;
  Work w;
  w.hv = blockIdx.x / SLICES % HV, w.part = blockIdx.x / (SLICES * HV), w.h = w.hv / (HV / H), w.HV = HV;
  w.n = w.part / walked, w.step = w.part % walked, w.last = w.step == segments - 1, w.batch = VARLEN ? 0 : w.n;
  w.sequence = find_segment<CHUNK>(cu_seqlens, w.n, {segments}, BACKWARD ? segments - 1 - w.step : w.step, T);
  w.chunks = (w.sequence.tokens + CHUNK - 1) / CHUNK;
  w.values = slice < VALUE_SLICES;
  w.channel = (w.values ? slice : slice - VALUE_SLICES) * SLICE;
  w.start = (int)(w.sequence.first - (int64_t)w.batch * T);
  w.joined = w.step, w.early = 0;
  return w;
}
