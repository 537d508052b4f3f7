// The walk over the chunks of 64 tokens of a sequence, factors included, on compute capability 9.0. Per chunk, with S
// the state, b = beta, tokens as rows:
//
//   A = diag(b) tril(K K^T, -1)     X = (I + A)^-1     Pqk = tril(Q K^T)
//   R = V - K S                     N = X (b R)        O = scale (Q S + Pqk N)
//   S' = S + K^T N
//
// N in two halves, so that only 32 x 32 inverses are needed: N1 = X11 (b R1), N2 = X22 (b (R2 - M21 N1)), where
// M21 is A21 without b. M21 counts to twice the digits of DTYPE, so that R2 sees what N1 does to the state.
//
// With a gate the same products: rows of tokens and the state are in units of their own, so that V is scaled on its way
// in, O on its way out, and S once per chunk (sm90/tokens.cuh). Where a chunk forgets more than these units have room
// for, tokens have units of their own, too: X and Pqk hold the decays between them, and what tokens read and write is
// multiplied by powers of two.
//
// What portable/factors.cu and portable/forward.cu compute in two kernels is one here: nothing but inputs and results
// touches global memory.
//
// A long sequence of few heads is cut into segments, of which a launch walks `walked` from `first` on. One with
// TRANSFER leaves what each does to a state: H, from zero, and in slices of its own P, from the identity and without V.
// With JOINS each of several starts from the state that sm90/join.cuh makes of those before it; the last one's is
// left. Of every sequence `transferred` segments were transferred: all but the last one walked, or all. With KEPT a
// transfer leaves X of its chunks, too, so that the walk need not solve them a second time.
//
// Where gates make sequences forget, segments start from nothing instead (sm90/starts.cu): a launch that is LATE walks
// them, with m chunks before each, of which it makes no output, and through those after it that have no start. It has
// the sequences whose second segment has one in all heads; they are left out by launches of another division, in which
// transfers join the others. Which of the two it is depends on no token after those that both walk from the first on.
//
// Warpgroup 0 loads K, Q and V with TMA, some chunks ahead, and what is known of each token, and sends O. The next MATH
// warpgroups hold 64 value channels of S^T each in accumulators, from which S^T, (b R)^T and N^T are left operands of
// wgmma: the chain from state to state passes nothing through shared memory. The last SOLVERS warpgroups take turns to
// make X11, M21, X22 and Pqk, a chunk or more ahead. mbarriers hand tiles over; every warp says for itself that it is
// done with one. With CLUSTER > 1 the blocks of a cluster, slices of one head, solve the chunks in turn and send each
// other X.
//
// Numbers: S in float, never rounded between chunks; operands of products are rounded to DTYPE (S, b R, N, Pqk and
// what X has below its diagonal included), sums are float; the inverse as in tiles/unit_inverse.cuh.
//
// With ON_POOL, and one segment, states come from slots of a pool and go to them (tiles/pool.cuh), rounded once.
//
// Macros: DTYPE (bf16 or f16), HEAD_K (up to 128) and HEAD_V, multiples of 8; CHUNK (64), HAS_GATE, VARLEN, STATE_VK,
// TRANSFER, JOINS (several segments, not with TRANSFER), KEPT (of transfers in clusters, and of the walk that joins
// them), CHECKPOINTS (with one segment: states after every checkpoint_every tokens of a sequence are left, too), STARTS
// (1: there is a late launch, too; 2: this is it), MATH (1 or 2), SOLVERS, CLUSTER (blocks; 1 without TRANSFER), PLACED
// (blocks that are neighbours, else strangers), KEY_STAGES, VALUE_STAGES, FACTOR_STAGES. Grid: N * walked * HV * slices
// blocks of 128 (1 + MATH + SOLVERS) threads; a slice is 64 MATH value channels. Shared memory: rings of K and Q with
// what is known of tokens, of V, of X and Pqk, and of A; O on its way out; see cupy_delta/cuda/sm90/forward.py and, for
// the roles, sm90/forward/.
#include "sm90/forward/factors.cuh"
#include "sm90/join.cuh"
#include "sm90/forward/load.cuh"
#include "sm90/forward/starts.cuh"
#include "sm90/forward/walk.cuh"
#include "sm90/sums.cuh"
#include "tiles/pool.cuh"
#include "tiles/store.cuh"

// Where states come from and go to.
struct States {
  const float* initial;
  float* final;
  const TensorMap* p;  // what transfers leave, see sm90/join.cuh
  float *h, *decays;
  POOL_DTYPE* pool;
  Slots slots;
};

// All of it the same in all threads, and said to be: what the compiler believes to differ takes registers that walkers
// do not have.
PRIM Work describe_work(const Sequence& sequence, const Place& at, int T, int H, int HV) {
  const int slice = blockIdx.x % SLICES, hv = blockIdx.x / SLICES % HV, batch = VARLEN ? 0 : at.n;
  const bool values = slice < VALUE_SLICES;
  Work work;
  work.sequence = sequence;
  work.sequence.tokens = uniform(sequence.tokens);
  work.chunks = uniform((sequence.tokens + CHUNK - 1) / CHUNK);
  work.channel = uniform((values ? slice : slice - VALUE_SLICES) * SLICE);
  work.h = uniform(hv / (HV / H)), work.hv = uniform(hv), work.HV = HV, work.batch = uniform(batch);
  work.values = !TRANSFER || values;
  work.keeps = TRANSFER && KEPT && slice < CLUSTER;
  work.given = WITH_GIVEN && at.step < at.transferred;
  work.start = uniform((int)(sequence.first - (int64_t)batch * T));
  work.rank = slice % CLUSTER;
  work.first_chunk = uniform((int)sequence.slot);
  return work;
}

// What a block works on, unless its segment is for others.
PRIM bool take_work(Work& work, Place& at, const Starts& starts, const int64_t* cu_seqlens, const Cut& cut, int first,
                    const Sizes& sizes) {
  Sequence sequence = find_segment<CHUNK>(cu_seqlens, at.n, cut, first + at.step, sizes.T);
  int silent = 0;
  at.last = at.step;
  if constexpr (STARTS > 0)
    if (starts.suit(at.n) != LATE) return false;
  if constexpr (LATE) {
    silent = start_late(sequence, at, starts, cu_seqlens, cut, blockIdx.x / SLICES % sizes.HV, sizes.T);
    if (silent < 0) return false;
    at.last = uniform(at.last);
  }
  work = describe_work(sequence, at, sizes.T, sizes.H, sizes.HV);
  if constexpr (LATE) work.silent = uniform(silent);
  return true;
}

PRIM void init_barriers(const Shared& s, const Work& work) {
  auto solves = [&](int stage) { return stage % CLUSTER == work.rank; };
  // K is full when it has landed and when what is to be known of its tokens is written.
  for (int i = 0; i < KEY_STAGES; i++)
    mbarrier_init(s.keys_full + i, 2), mbarrier_init(s.keys_free + i, 4 * MATH + 4 * solves(i));
  for (int i = 0; i < VALUE_STAGES; i++)
    mbarrier_init(s.values_full + i, 1), mbarrier_init(s.values_free + i, 4 * MATH);
  for (int i = 0; i < FACTOR_STAGES; i++) {
    mbarrier_init(s.factors_full + i, !solves(i) ? 1 : work.given ? 4 + 1 : WITH_INVERTERS ? 4 + 2 : 4);
    mbarrier_init(s.factors_free + i, 4 * MATH * CLUSTER + work.keeps);
  }
  for (int i = 0; i < A_STAGES; i++) mbarrier_init(s.a_full + i, 4), mbarrier_init(s.a_free + i, 2);
  for (int i = 0; i < 2; i++) mbarrier_init(s.landed + i, 1);
#if WITH_OUTPUT
  mbarrier_init(s.output_full, 4 * MATH);
  mbarrier_init(s.output_free, 1);
#endif
  mbarrier_init_fence();
}

// A block asks first which chunks are paired, then has its shared memory made ready, and decides when all have come
// together anyway: what it waits for is memory. It looks at its own, or, with OTHERS, at those of all value heads that
// walk the same tokens: blocks of two slices hinder each other where some of them take units of tokens and others do
// not.
constexpr bool OTHERS = MATH == 2 && !TRANSFER && !JOINS;
constexpr int MANY = 8;  // one in so many heads is enough
constexpr int WARPS = THREADS / 32;

// Which heads' a launch is given.
#if HAS_GATE && MATH == 2 && !TRANSFER && !JOINS
#define GIVEN_HEADS paired_heads
#else
#define GIVEN_HEADS nullptr
#endif

struct Pairs {
  const Work& work;
  const int* heads;  // a bit each, by group of HEADS; see sm90/gates.cu
  int* found;        // by every warp

  PRIM int groups() const { return (work.HV + HEADS - 1) / HEADS; }
  PRIM int bits_of(int group) const {
    int met = 0;
    const int* words = heads + (int64_t)work.first_chunk * groups();
#pragma unroll 4
    for (int c = threadIdx.x % 32; c < work.chunks; c += 32) met |= words[c * groups() + group];
    return met;
  }
  // Returns this thread's part, which has yet to come.
  PRIM int ask() const {
    if constexpr (OTHERS) return (int)threadIdx.x / 32 < groups() ? bits_of(threadIdx.x / 32) : 0;
    int met = 0;
#pragma unroll 1  // a block has hardly more: code that is unrolled takes longer to come than to run
    for (int c = threadIdx.x; c < work.chunks; c += THREADS) met |= is_paired(work.record(c));
    return met;
  }
  PRIM void leave(int met) const {
    const int warp = threadIdx.x / 32;
    int own = 0, sum = 0;
    met = any_bits(met);
    if constexpr (OTHERS) {
#pragma unroll 1
      for (int group = warp; group < groups(); group += WARPS) {
        if (group > warp) met = any_bits(bits_of(group));
        sum += __popc(met);
        if (group == work.hv / HEADS) own = met >> work.hv % HEADS & 1;
      }
      met = 2 * sum + own;
    }
    if (threadIdx.x % 32 == 0) found[warp] = met;
  }
  // After a barrier.
  PRIM bool suffice() const {
    int met = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++)
      if constexpr (OTHERS)
        met += found[warp];
      else
        met |= found[warp];
    return OTHERS ? met % 2 != 0 || met / 2 * MANY >= work.HV : met != 0;
  }
};

// ---- roles of warpgroups ----------------------------------------------------------------------------------------

// One warp loads; the others invert, or take X that is kept, or send it, or O.
PRIM void supply(const Shared& s, const Work& work, const Maps& maps, const Rows& o, TokenLoader tokens,
                 uint64_t* joined, int warp) {
  fewer_registers<LOADER_REGISTERS>();
  const int lane = tokens.lane;
  if (warp == 0) {
    load(s, maps, work, o, tokens, joined, lane);
  } else if (WITH_OUTPUT && warp == SENDER) {
    for (int c = 0; c < work.chunks; c++) send_output(s, work, o, c, lane);
  } else if (WITH_GIVEN && work.given) {
    if (warp == 1 && lane == 0) load_kept(s, maps.kept, work);
  } else if (WITH_INVERTERS && warp <= INVERTERS) {
    invert(s, work, warp - 1, lane);
  } else if (CLUSTER > 1 && warp == 3 && lane == 0) {
    send(s, maps.kept, work);
  }
  __syncwarp();
}

// From the state that enters to the one that leaves, 64 value channels of it (or 64 columns of P).
PRIM void walk(const Shared& s, const Work& work, const States& states, const Joins& joins, float scale,
               const Place& at) {
  more_registers<MATH_REGISTERS>();
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const int half = MATH == 1 ? 0 : uniform(threadIdx.x / 128) - 1;
  const int column = work.channel + half * 64, value = column + warp * 16;
  const Part part = {column, work.hv, work.HV, half, thread};
  const int64_t head = (int64_t)work.hv * HEAD_K * HEAD_V;
  const int64_t state = ((int64_t)at.n * work.HV + work.hv) * HEAD_K * HEAD_V;
  float S[K_TILES][4];
  clear(S);
  if constexpr (TRANSFER) {
    if (!work.values) add_identity(S, 1.0f, value, lane);
  } else if constexpr (ON_POOL) {
    const int64_t slot = states.slots.read(at.n);
    if (slot >= 0)
#pragma unroll
      for (int j = 0; j < K_TILES; j++) load_state(S[j], states.pool + slot + head, value, j * 8, lane);
  } else if (states.initial != nullptr && (!LATE || work.silent == 0)) {
#pragma unroll
    for (int j = 0; j < K_TILES; j++) load_state(S[j], states.initial + state, value, j * 8, lane);
  }
  if constexpr (JOINS) join(S, joins, at.n * (int64_t)at.transferred, at.step, part);
  float decay = 1.0f;
  if constexpr (TRANSFER && HAS_GATE) pin(S);  // what is made of it before and after is not made in both walks
  if (WITH_PAIRS && work.pairs) {
    if constexpr (WITH_PAIRS) decay = Walker<true>{s, work, S, half, warp, lane, scale}.walk();
  } else {
    if constexpr (WITHOUT_PAIRS) decay = Walker<false>{s, work, S, half, warp, lane, scale}.walk();
  }
  if constexpr (TRANSFER && HAS_GATE) pin(S);
  if constexpr (TRANSFER) {
    const int64_t index = at.n * (int64_t)at.walked + at.step;
    // The buffers of V are free: P has none.
    if (work.values)
      keep_transfer(states.h, S, index, part);
    else
      send_transfer(states.p, s.v + half * K_BOXES * TILE, S, decay, index, part);
    if (HAS_GATE && !work.values && column == 0 && thread == 0) states.decays[index * work.HV + work.hv] = decay;
  } else if constexpr (ON_POOL) {
    const int64_t slot = states.slots.written(at.n);
    if (slot >= 0)
#pragma unroll
      for (int j = 0; j < K_TILES; j++) store_state(states.pool + slot + head, S[j], value, j * 8, lane);
  } else if (at.last == at.walked - 1) {
    // One per sequence, that of the last segment walked.
#pragma unroll
    for (int j = 0; j < K_TILES; j++) store_state(states.final + state, S[j], value, j * 8, lane);
  }
}

PRIM Joins take_joins(DynSmem& smem, const States& states, const Shared& s) {
  if constexpr (!JOINS) return {};
  return take_joins(smem, *states.p, states.h, states.decays, s.k + JOIN_STAGE * KEYS, s.k + (JOIN_STAGE + 1) * KEYS);
}

// What all threads of a block, or of a cluster, do before they part.
PRIM void begin(const Shared& s, Work& work, const Joins& joins, const Pairs& pairs) {
  const int met = LOOKS_FIRST ? pairs.ask() : 0;
  if (threadIdx.x == 0) {
    if constexpr (JOINS) joins.init();
    init_barriers(s, work);
  }
  clear_factors(s, threadIdx.x);
  if constexpr (LOOKS_FIRST) pairs.leave(met);
  if constexpr (CLUSTER > 1)
    cluster_sync();
  else
    __syncthreads();
  if constexpr (LOOKS_FIRST) work.pairs = uniform(pairs.suffice());
}

extern "C" __global__ void CLUSTERED __launch_bounds__(THREADS, 1)
    forward_hopper(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                   const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap o_map,
#if TRANSFER || JOINS
                   const __grid_constant__ TensorMap p_map, float* h, float* decays,
#endif
#if KEPT
                   const __grid_constant__ TensorMap x_map,
#endif
#if CHECKPOINTS
                   float* checkpoints, int checkpoint_every,
#endif
#if ON_POOL
                   const int64_t* state_indices, const int64_t* output_state_indices, const bool* fresh,
                   POOL_DTYPE* state, int64_t pool_stride, int pool_slots,
#endif
#if HAS_GATE && MATH == 2 && !TRANSFER && !JOINS
                   const int* paired_heads,
#endif
#if STARTS
                   const int* starts, int counted,
#endif
                   const float* beta, const float* token_factors, const float* initial_state, const int64_t* cu_seqlens,
                   DTYPE* o, float* final_state, float scale, int T, int H, int HV, int segments, int first_percent,
                   int last_percent, int first, int walked, int transferred) {
#if TRANSFER || JOINS
  const States states = {initial_state, final_state, &p_map, h, decays};
#elif ON_POOL
  const Slots slots = {state_indices, output_state_indices, fresh, pool_stride, pool_slots};
  const States states = {nullptr, nullptr, nullptr, nullptr, nullptr, state, slots};
#else
  const States states = {initial_state, final_state};
#endif
#if KEPT
  const TensorMap* kept = &x_map;
#else
  const TensorMap* kept = nullptr;
#endif
  const int warpgroup = uniform(threadIdx.x / 128), part = blockIdx.x / (SLICES * HV);
  Place at = {uniform(part / walked), uniform(part % walked), walked, transferred};
  Work work;
  if (!take_work(work, at, GIVEN_STARTS, cu_seqlens, {segments, first_percent, last_percent}, first, {T, H, HV}))
    return;
  work.records = token_factors, work.pairs = WITH_PAIRS;
#if CHECKPOINTS
  work.checkpoints =
      checkpoints + (first_checkpoint(work.sequence, at.n, T, checkpoint_every) * HV + work.hv) * HEAD_K * HEAD_V;
  work.every = checkpoint_every;
#endif

  DynSmem smem;
  const Shared s = take_shared(smem);
  const Joins joins = take_joins(smem, states, s);
  int* found = LOOKS_FIRST ? smem.take<int>(WARPS, "paired chunks") : nullptr;
  smem.all_taken(SHARED_BYTES);
  begin(s, work, joins, {work, GIVEN_HEADS, found});

  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  if (warpgroup == 0) {
    supply(s, work, {&q_map, &k_map, &v_map, kept}, {&o_map, o},
           {work, HAS_GATE ? nullptr : beta + work.sequence.first * HV + work.hv, lane}, joins.joined, warp);
  } else if (warpgroup <= MATH) {
    walk(s, work, states, joins, scale, at);
  } else {
    fewer_registers<SOLVER_REGISTERS>();
    const int solver = SOLVERS == 1 ? 0 : warpgroup - 1 - MATH;
    const int thread = threadIdx.x % 128;
    if constexpr (ONE_SOLVER) {
      solve_chunks(s, work, work.pairs, solver, thread);
    } else if (WITH_PAIRS && work.pairs) {
      if constexpr (WITH_PAIRS) solve_chunks(s, work, true, solver, thread);
    } else {
      if constexpr (WITHOUT_PAIRS) solve_chunks(s, work, false, solver, thread);
    }
  }
  // No block leaves while others still read what it sends or say that they are done.
  if constexpr (CLUSTER > 1) cluster_sync();
}
