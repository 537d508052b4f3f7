// What the roles of sm90/forward.cu share: sizes, registers, shared memory and what a block works on.
#pragma once
#include "sm90/tokens.cuh"
#include "tiles/sequence.cuh"
#include "tiles/swizzled.cuh"
#include "tiles/unit_inverse.cuh"

#define WITH_OUTPUT (!TRANSFER)
// X that transfers have kept is given to all segments that have a transfer.
#define WITH_GIVEN (JOINS && KEPT)
// A block that meets a paired chunk (sm90/tokens.cuh) takes all of its chunks by code for these, without a branch
// beside products, so it looks at its chunks first, and with two slices and whole sequences at those of other value
// heads, too. All gated chunks of float16 are paired.
#define WITH_PAIRS HAS_GATE
#define LOOKS_FIRST (HAS_GATE && !IsHalf<DTYPE>::value)
#define WITHOUT_PAIRS (!HAS_GATE || LOOKS_FIRST)
// Solvers of transfers, and of walks that are given X by them, have one code for both: it comes sooner and takes no
// longer. Elsewhere a branch there costs walks up to a tenth of their time.
#define ONE_SOLVER (LOOKS_FIRST && (TRANSFER || JOINS))
// Whether states on the way are kept.
#ifndef CHECKPOINTS
#define CHECKPOINTS 0
#endif
// Sequences all of whose heads have a start at their second segment (sm90/starts.cu) are left to others, or alone are
// walked, LATE: by segments that start from nothing.
#ifndef STARTS
#define STARTS 0
#endif
#define LATE (STARTS == 2)
// Two solvers invert for themselves; for one, warps of the loading warpgroup do.
#define WITH_INVERTERS (SOLVERS == 1)
// Who sends the output: a warp that is idle else, or the loading one.
#define SENDER (WITH_INVERTERS ? 0 : 3)
// With a gate or two slices registers do not suffice for the output of the chunk before beside the last products.
#define SEND_FIRST (MATH == 2 || HAS_GATE)
// V, whose rows a gate scales, is added to K S; without one it is where sums start.
#define LATE_VALUES HAS_GATE
#if CLUSTER > 1
#define CLUSTERED __cluster_dims__(CLUSTER, 1, 1)
#elif PLACED > 1
#define CLUSTERED __cluster_dims__(PLACED, 1, 1)
#else
#define CLUSTERED
#endif

static_assert(CHUNK == 64, "the chunk is wgmma's 64 rows");
constexpr int WARPGROUPS = 1 + MATH + SOLVERS, THREADS = 128 * WARPGROUPS, SLICE = 64 * MATH;
constexpr int KP = HEAD_K <= 64 ? 64 : 128, K_BOXES = KP / BOX, K_STEPS = KP / 16, K_TILES = KP / 8;
constexpr int VALUE_SLICES = (HEAD_V + SLICE - 1) / SLICE;
constexpr int SLICES = VALUE_SLICES + (TRANSFER ? (HEAD_K + SLICE - 1) / SLICE : 0);  // of values, then of P
constexpr int TILE = CHUNK * BOX;                                                     // elements of one box
// Elements of a buffer of K and Q, and from a box of K to its next: behind each lies one of Q, so that one product
// takes both.
constexpr int KEY_PITCH = (1 + WITH_OUTPUT) * TILE, KEYS = K_BOXES * KEY_PITCH;
// Registers per thread: 65536 in all.
constexpr int LOADER_REGISTERS = WARPGROUPS == 3 ? 88 : MATH == 1 ? 56 : WITH_PAIRS ? 48 : 64;
constexpr int SOLVER_REGISTERS = WARPGROUPS == 3 ? 168 : MATH == 1 ? 120 : 96;
constexpr int MATH_REGISTERS = WARPGROUPS == 3 ? 240 : MATH == 1 ? 216 : WITH_PAIRS ? 184 : 176;
static_assert(LOADER_REGISTERS + MATH * MATH_REGISTERS + SOLVERS * SOLVER_REGISTERS <=
                  512 / WARPGROUPS / 8 * 8 * WARPGROUPS,
              "a warpgroup would wait for registers for ever");
constexpr int SOLVER_BARRIER = 1;                       // and next: named barriers, one per solver
constexpr int MATH_BARRIER = SOLVER_BARRIER + SOLVERS;  // and next: one per math warpgroup
// States are joined in what is K's and Q's from this chunk on.
constexpr int JOIN_STAGE = KEY_STAGES - 2;
static_assert(!JOINS || JOIN_STAGE >= 0, "two buffers");
constexpr int A_STAGES = 2, INVERTERS = CLUSTER > 1 ? 2 : 3;
constexpr int TOKEN_WORDS = HAS_GATE ? TOKENS_END : FACTOR_WORDS;
static_assert(WITH_INVERTERS || SOLVERS == A_STAGES, "a solver that inverts has an A of its own");
static_assert(CLUSTER == 1 || (TRANSFER && WITH_INVERTERS), "of factors, what is sent is X");
static_assert(SLICES % CLUSTER == 0, "the blocks of a cluster share a head");
static_assert(KEY_STAGES % CLUSTER == 0 && FACTOR_STAGES % CLUSTER == 0,
              "what is in a buffer is always solved by the same block");
static_assert(!KEPT || JOINS || CLUSTER > 1, "what is kept is what a thread of a transfer sends to others");
static_assert(!(TRANSFER && JOINS), "a transfer starts from what is known");
static_assert(!LATE || !(TRANSFER || JOINS), "what starts from nothing needs nothing of others");
static_assert(KEY_STAGES >= VALUE_STAGES && KEY_STAGES >= CLUSTER * SOLVERS,
              "no solver begins in a ring's second round");

struct Shared {
  DTYPE *k, *q, *v, *o, *x, *p;
  float *a, *tokens;
  uint64_t *keys_full, *keys_free, *values_full, *values_free, *factors_full, *factors_free, *a_full, *a_free, *landed;
  uint64_t *output_full, *output_free;
};

PRIM Shared take_shared(DynSmem& smem) {
  Shared s = {};
  s.k = smem.take<DTYPE>(KEY_STAGES * KEYS, "k and q", 1024);
#if WITH_OUTPUT
  s.q = s.k + TILE;
  s.o = smem.take<DTYPE>(MATH * TILE, "o", 1024);
  s.p = smem.take<DTYPE>(FACTOR_STAGES * TILE, "p", 1024);
#endif
  s.v = smem.take<DTYPE>(VALUE_STAGES * MATH * TILE, "v", 1024);
  s.x = smem.take<DTYPE>(FACTOR_STAGES * TILE, "x", 1024);
  s.a = smem.take<float>(A_STAGES * CHUNK * INVERSE_PITCH, "a");
  s.tokens = smem.take<float>(KEY_STAGES * TOKEN_WORDS, "tokens");
  auto barriers = [&](int count, const char* name) { return smem.take<uint64_t>(count, name, sizeof(uint64_t)); };
  s.keys_full = barriers(KEY_STAGES, "keys full");
  s.keys_free = barriers(KEY_STAGES, "keys free");
  s.values_full = barriers(VALUE_STAGES, "values full");
  s.values_free = barriers(VALUE_STAGES, "values free");
  s.factors_full = barriers(FACTOR_STAGES, "factors full");
  s.factors_free = barriers(FACTOR_STAGES, "factors free");
  s.a_full = barriers(A_STAGES, "a full");
  s.a_free = barriers(A_STAGES, "a free");
  s.landed = barriers(2, "last chunk landed");
#if WITH_OUTPUT
  s.output_full = barriers(1, "output full");
  s.output_free = barriers(1, "output free");
#endif
  return s;
}

// Zeros where X and P have zeros in every chunk.
PRIM void clear_factors(const Shared& s, int thread) {
  for (int i = thread; i < FACTOR_STAGES * TILE / 8; i += THREADS) {
    *(uint4*)&s.x[i * 8] = {};
#if WITH_OUTPUT
    *(uint4*)&s.p[i * 8] = {};
#endif
  }
  async_proxy_fence();
}

// What a block works on.
struct Work {
  Sequence sequence;
  int chunks, channel, h, hv, HV, batch;  // channel: the block's first one
  bool values;                            // or P
  bool pairs;                             // some of its chunks may be paired
  bool keeps, given;                      // X: stored for the walk that follows; stored by the transfer before
  int start;                              // coordinate of its first token in the tensor maps
  int rank;                               // in its cluster: it solves chunks rank, rank + CLUSTER, ...
  int first_chunk;                        // its slot
  int silent;                             // chunks, the first ones, of which others make outputs
  const float* records;                   // of all chunks, with a gate; see sm90/tokens.cuh
  float* checkpoints;                     // of this sequence's head, HV from one to the next
  int every;                              // tokens between them

  PRIM const float* record(int c) const { return records + ((int64_t)(first_chunk + c) * HV + hv) * RECORD_WORDS; }
  PRIM int tokens(int c) const { return min(sequence.tokens - c * CHUNK, CHUNK); }
};

// Which sequence, which of the segments that are walked, and how many were transferred; up to which one it goes.
struct Place {
  int n, step, walked, transferred, last;
};

struct Sizes {
  int T, H, HV;
};

struct Maps {
  const TensorMap *q, *k, *v, *kept;  // kept: X, of transfers
};
