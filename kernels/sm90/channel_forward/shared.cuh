// What the roles of sm90/channel_forward.cu share: sizes, registers, shared memory and what a block works on.
#pragma once
#include "tiles/fragments.cuh"
#include "tiles/sequence.cuh"
#include "tiles/swizzled.cuh"
#include "tiles/unit_inverse.cuh"

#ifndef CUT
#define CUT 0
#endif
static_assert(CHUNK == 64, "chunks of wgmma's 64 rows");
static_assert(!VARLEN || !CUT, "ragged sequences are walked whole");
static_assert(HEAD_K > 64 && HEAD_K <= 128 && HEAD_V > 64 && HEAD_V <= 128, "two tiles of either");
static_assert(!CUT || !IsHalf<DTYPE>::value, "what a lead leaves needs the exponents of a float");
constexpr int KP = 128, K_BOXES = KP / BOX, K_STEPS = KP / 16, K_TILES = KP / 8, TILE = CHUNK * BOX;
constexpr int BLOCK = 16, COUNT = CHUNK / BLOCK, SLICE = 128;
// Of K and Q, and of everything else that is made for a chunk.
constexpr int KEY_STAGES = 2, STAGES = 3;

// Two warpgroups walk, one makes factors, and of the last one two warps sum gates and two solve.
constexpr int MATH = 2, THREADS = 128 * (MATH + 2);
// Those that walk scale rows, too, where they have the registers: not beside leads, which take theirs.
constexpr bool WALKERS_SCALE = !CUT;
constexpr int MATH_REGISTERS = WALKERS_SCALE ? 184 : 176, FACTOR_REGISTERS = WALKERS_SCALE ? 72 : 88,
              OTHER_REGISTERS = 72;
static_assert(MATH * MATH_REGISTERS + FACTOR_REGISTERS + OTHER_REGISTERS <= 512, "or one would wait for ever");
constexpr int MATH_BARRIER = 1, FACTOR_BARRIER = 3, SOLVER_BARRIER = 4;

// Floats of a block's own pairs over half of the channels.
constexpr int OWN_PAIRS = 2 * BLOCK * BLOCK * 3 / 4;
// Powers of two, for which float16 has no exponents. Rows of them, per key channel: see sm90/channel_forward/gates.cuh.
typedef bf16 Power;
constexpr int UNTIL = 0, WRITES = 3, READS = 7, POWER_ROWS = 11;

struct Shared {
  DTYPE *k, *q;      // KEY_STAGES: rows of tokens; then scaled as of their block's start; then as of the chunk's
  DTYPE* writes;     // STAGES: half of the sums of gates, later keys as they are written into the state
  DTYPE* others;     // the other half, later keys for blocks that follow, then M, then core
  DTYPE *p, *rows;   // Pqk; one of V, and O on its way out
  Power* powers;     // POWER_ROWS
  float* exponents;  // F of the blocks after the first one, and of the next chunk
  float* carried;    // what is left of the state per key channel
  float* units;      // of the state that leaves, in its units
  float* beta;
  float* own_pairs;  // one: of each half of the channels and block but the last; then of M, then of core
  int* within;       // of each half of the channels and block, the first token that is out of range
  int* declined;     // whether the call is, as those that walk have seen it
  uint64_t *keys_full, *keys_free, *sums_full, *scaled_full, *pairs_full, *factors_full, *core_full, *stage_free;
  uint64_t *values_full, *rows_done, *own_full, *own_free;
};

PRIM Shared take_shared(DynSmem& smem) {
  Shared s;
  s.k = smem.take<DTYPE>(KEY_STAGES * K_BOXES * TILE, "k", 1024);
  s.q = smem.take<DTYPE>(KEY_STAGES * K_BOXES * TILE, "q", 1024);
  s.writes = smem.take<DTYPE>(STAGES * K_BOXES * TILE, "sums, k of writes", 1024);
  s.others = smem.take<DTYPE>(STAGES * K_BOXES * TILE, "sums, k of pairs, m, core", 1024);
  s.p = smem.take<DTYPE>(STAGES * TILE, "p", 1024);
  s.rows = smem.take<DTYPE>(MATH * TILE, "v and o", 1024);
  s.powers = smem.take<Power>(STAGES * POWER_ROWS * KP, "powers");
  s.exponents = smem.take<float>(STAGES * COUNT * KP, "exponents");
  s.carried = smem.take<float>(STAGES * KP, "decays of the state");
  s.units = smem.take<float>(KP, "units of the state");
  s.beta = smem.take<float>(STAGES * CHUNK, "beta");
  if constexpr (WALKERS_SCALE) s.own_pairs = smem.take<float>(2 * (COUNT - 1) * OWN_PAIRS, "own pairs");
  s.within = smem.take<int>(STAGES * 2 * COUNT, "tokens within range");
#if CUT
  s.declined = smem.take<int>(1, "declined");
#endif
  auto barriers = [&](int count, const char* name) { return smem.take<uint64_t>(count, name, sizeof(uint64_t)); };
  s.keys_full = barriers(KEY_STAGES, "keys full");
  s.keys_free = barriers(KEY_STAGES, "keys free");
  s.sums_full = barriers(STAGES, "sums full");
  if constexpr (WALKERS_SCALE) s.scaled_full = barriers(STAGES, "scaled full");
  s.pairs_full = barriers(STAGES, "pairs full");
  s.factors_full = barriers(STAGES, "factors full");
  s.core_full = barriers(STAGES, "core full");
  s.stage_free = barriers(STAGES, "stage free");
  s.values_full = barriers(MATH, "values full");
  if constexpr (WALKERS_SCALE) {
    s.rows_done = barriers(MATH, "rows done");
    s.own_full = barriers(1, "own pairs of m full");
    s.own_free = barriers(1, "own pairs free");
  }
  return s;
}

PRIM void init_barriers(const Shared& s) {
  for (int i = 0; i < KEY_STAGES; i++) mbarrier_init(s.keys_full + i, 1), mbarrier_init(s.keys_free + i, 4 * MATH);
  for (int i = 0; i < STAGES; i++) {
    mbarrier_init(s.sums_full + i, 2), mbarrier_init(s.stage_free + i, 4 * MATH);
    if constexpr (WALKERS_SCALE) mbarrier_init(s.scaled_full + i, 4 * MATH);
    mbarrier_init(s.pairs_full + i, 4), mbarrier_init(s.factors_full + i, 4), mbarrier_init(s.core_full + i, 2);
  }
  for (int i = 0; i < MATH; i++) {
    mbarrier_init(s.values_full + i, 1);
    if constexpr (WALKERS_SCALE) mbarrier_init(s.rows_done + i, 4);
  }
  if constexpr (WALKERS_SCALE) mbarrier_init(s.own_full, 4), mbarrier_init(s.own_free, 2);
  mbarrier_init_fence();
}

// Where eight neighbouring channels of a row lie, `piece` of 16, in the tiles that wgmma reads. Pieces further on, of
// neighbouring rows too, are one exclusive or and one addition away, as in all of these places. In `others` all lie
// `^ OTHER`, so that both halves of a row's sums are in different banks.
PRIM int piece_place(int row, int piece) { return piece / 8 * TILE + row * BOX + (piece % 8 ^ row % 8) * 8; }
constexpr int OTHER = 4 * 8;

// What of a chunk lies in its stages.
struct Stage {
  DTYPE *k, *q, *writes, *others, *p;
  Power* powers;
  float *exponents, *carried, *beta, *own;
  int* within;

  PRIM Stage(const Shared& s, int key_stage, int stage)
      : k(s.k + key_stage * K_BOXES * TILE),
        q(s.q + key_stage * K_BOXES * TILE),
        writes(s.writes + stage * K_BOXES * TILE),
        others(s.others + stage * K_BOXES * TILE),
        p(s.p + stage * TILE),
        powers(s.powers + stage * POWER_ROWS * KP),
        exponents(s.exponents + stage * COUNT * KP),
        carried(s.carried + stage * KP),
        beta(s.beta + stage * CHUNK),
        own(s.own_pairs),
        within(s.within + stage * 2 * COUNT) {}

  PRIM uint4 eight_powers(int row, int piece) const { return *(const uint4*)&powers[row * KP + piece * 8]; }
  // Where a block's own pairs wait, as of half of the channels: the last block has no keys for blocks that follow.
  PRIM float* own_pairs(int half, int block) const {
    return block + 1 == COUNT ? (float*)&others[half * TILE + block * BLOCK * BOX]
                              : own + (half * (COUNT - 1) + block) * OWN_PAIRS;
  }

  // Where the sums of gates lie of four channels side by side, which have their place in one of two halves.
  PRIM float* sums(int half, int place) const {
    return (float*)(half == 0 ? writes + place : others + (place ^ OTHER));
  }
};

// What a block works on: a sequence, or with CUT a segment of it and the chunks of its lead, and a value head.
struct Work {
  Sequence sequence;
  int chunks, h, hv, HV;
  int batch, n;                     // the row of the tensor maps, and the sequence
  int start = 0;                    // coordinate of its first token in the tensor maps
  bool begins = true, ends = true;  // with the sequence
  // With CUT: how many chunks come before its own; with which of all those that walk look whether the call is declined;
  // how many come later, if it is not; and where that and what the lead does to a state are.
  int lead = 0, looks = -1, later = 0;
  int* declined = nullptr;
  uint4* p = nullptr;

  PRIM int tokens(int c) const { return min(sequence.tokens - c * CHUNK, CHUNK); }
};
// The same in all threads, and said to be: what the compiler believes to differ takes registers that there are not.
#if !CUT
PRIM Work find_work(const int64_t* cu_seqlens, int T, int H, int HV) {
  Work w;
  const int hv = blockIdx.x % HV, n = blockIdx.x / HV;
  w.hv = uniform(hv), w.n = uniform(n), w.h = uniform(hv / (HV / H)), w.HV = HV;
  w.batch = VARLEN ? 0 : w.n;
  w.sequence = find_sequence<CHUNK>(cu_seqlens, w.n, T);
  if (VARLEN) {
    w.start = uniform((int)w.sequence.first);
    w.sequence.first = w.start, w.sequence.tokens = uniform(w.sequence.tokens);
  }
  w.chunks = uniform((w.sequence.tokens + CHUNK - 1) / CHUNK);
  return w;
}
#endif

// Both rings.
struct Place {
  Ring<KEY_STAGES> key;
  Ring<STAGES> stage;
  PRIM void advance() { key.advance(), stage.advance(); }
  // Of the chunk before.
  PRIM Place before() const {
    static_assert(KEY_STAGES == 2, "the other one");
    const bool wraps = stage.stage == 0;
    return {{key.stage ^ 1, key.parity ^ (key.stage == 0)},
            {wraps ? STAGES - 1 : stage.stage - 1, stage.parity ^ wraps}};
  }
};
