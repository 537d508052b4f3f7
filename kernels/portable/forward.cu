// The walk over the chunks of a sequence: state pass and, fused with it, the output. Per chunk, with S the state,
// core, Pqk and decays from factors.cu, G the running sum of g (all decays 1 without a gate), tokens as rows:
//
//   R = V - e^G K S       N^ = R + core (b R)       N = b N^       O = scale (e^G Q S + Pqk N)
//   S' = e^(G_C) S + (e^(G_C - G) K)^T N
//   FROM_FACTORS:  N = U - W S,  S' as above        the building block: W holds e^G, no output
//
// With a gate per key channel (HAS_GATE = 2) its decays are in the rows, as channel_factors.cu leaves them, and one is
// left for every channel of the state: K~ = e^G K and Q~ = e^G Q read it, K^ = e^(G_C - G) K is written.
//
//   R = V - K~ S       O = scale (Q~ S + Pqk N)       S' = diag(e^(G_C)) S + K^^T N
//
// A long sequence of few heads is cut into SEGMENTS. TRANSFER walks all but the last from zero and, with ZERO_V, from
// the identity: what is left is H and P of S -> P S + H. segment_states.cu joins them to the states that enter the
// segments, from which the walk with SEGMENTS goes through all of them at once.
//
// Numbers: the state lives in float accumulators and is never rounded between chunks; operands of products are
// rounded to DTYPE (S, b R and N included), sums are float (float: 3xTF32). Everything is held transposed, rows =
// value channels: then S^T, R^T and N^T are left operands straight from their accumulators.
//
// With CHECKPOINTS and one segment, states after every checkpoint_every tokens of a sequence are left, too. With
// ON_POOL and one segment, states come from slots of a pool and go to them (tiles/pool.cuh), rounded once.
//
// Macros: DTYPE, HEAD_K, HEAD_V, CHUNK, HAS_GATE, VARLEN, STATE_VK (layout of initial and final state),
// FROM_FACTORS, ZERO_V (no values, from the identity: a transfer's P), SEGMENTS, TRANSFER, WRITE_STATES (the state
// entering each chunk, in STATES_DTYPE, and per token N^: states (V, K) for backward_chunk.cu; FROM_FACTORS: N, and
// states (K, V)), WARPS, ROW_TILES (16-row tiles of value channels per warp). Grid: N * segments walked * HV * slices
// blocks of 32 WARPS threads; a slice is 16 ROW_TILES WARPS value channels. Shared memory: two stages of K, Q (or W)
// and V tiles, core, Pqk, beta and decays of a chunk, and one K^; see cupy_delta/cuda/portable/forward.py.
#include "portable/walk.cuh"
#include "tiles/pool.cuh"

#ifndef CHECKPOINTS
#define CHECKPOINTS 0
#endif

constexpr bool WITH_OUTPUT = !FROM_FACTORS && !TRANSFER;
// With a gate per key channel what is read and what is written are other rows, of which the latter come last.
constexpr bool LATE_KEYS = PER_CHANNEL && !FROM_FACTORS;
// Blocks per multiprocessor: all registers for two tiles, where shared memory holds no second block, and where the
// compiler would rather spill; else as it sees fit.
constexpr bool ON_120 = KSM >= 1200 && FROM_FACTORS && !WRITE_STATES;
constexpr bool SPILLS = PER_CHANNEL ? FROM_FACTORS : sizeof(DTYPE) == 4 && (HEAD_K <= 64 || ON_120);
constexpr int BLOCKS = ROW_TILES == 2 || (KSM >= 1200 && sizeof(DTYPE) == 2) || SPILLS ? 1 : 0;
constexpr int WALKED = TRANSFER ? SEGMENTS - 1 : SEGMENTS;  // of each sequence's segments

// Accumulators of a warp: its value channels by the tokens of a chunk, and by key channels.
typedef float TokenSums[ROW_TILES][C_TILES][4];
typedef float StateSums[ROW_TILES][K_TILES][4];

// ---- what is read ------------------------------------------------------------------------------

struct Stage {
  DTYPE *k, *q_or_w, *v, *core, *p;
  DTYPE* k_write;  // k, or one tile for both stages
  float* beta;
  DecayFactors decays;
};

PRIM Stage take_stage(DynSmem& smem) {
  Stage s = {};
  s.k = smem.take<DTYPE>(CHUNK * K_PITCH, "k");
  if constexpr (!TRANSFER) s.q_or_w = smem.take<DTYPE>(CHUNK * K_PITCH, "q or w");
  s.v = smem.take<DTYPE>(CHUNK * V_PITCH, "v");
  if constexpr (!FROM_FACTORS) s.core = smem.take<DTYPE>(CHUNK * C_PITCH, "core");
  if constexpr (WITH_OUTPUT) s.p = smem.take<DTYPE>(CHUNK * C_PITCH, "p");
  if constexpr (!FROM_FACTORS) s.beta = smem.take<float>(CHUNK, "beta");
  s.decays = DecayFactors::take(smem);
  s.k_write = s.k;
  return s;
}

// What all blocks of a launch share.
struct Inputs {
  const DTYPE *q_or_w, *k, *v, *core, *p;
  const float* beta;
  ChunkFactors decays;
};

PRIM void load_chunk(const Stage& s, const Inputs& in, const Loader& load) {
  load.keys(s.k, in.k);
  if constexpr (FROM_FACTORS) load.keys_of_value_head(s.q_or_w, in.q_or_w);
  if constexpr (WITH_OUTPUT) {
    load.keys(s.q_or_w, in.q_or_w);
    load.pairs(s.p, in.p);
  }
  if constexpr (!FROM_FACTORS) {
    load.pairs(s.core, in.core);
    load.beta(s.beta, in.beta);
  }
  load.decays(s.decays, in.decays);
  if constexpr (!ZERO_V) load.values(s.v, in.v);
}

// ---- products ----------------------------------------------------------------------------------

// R[m] = S[m] rows^T and, in the same pass over S, O[m] = S[m] queries^T if there are any, for CHUNK x K tiles.
PRIM void multiply_state(TokenSums& R, TokenSums& O, const StateSums& S, const DTYPE* rows, const DTYPE* queries,
                         int lane) {
#pragma unroll
  for (int m = 0; m < ROW_TILES; m++) {
    clear(R[m]);
    clear(O[m]);
  }
#pragma unroll
  for (int step = 0; step < KP / Product::DEPTH; step++) {
    Product::order_loads();
    typename Product::A a[ROW_TILES];
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) Product::from_sums(a[m], S[m], step);
#pragma unroll
    for (int j = 0; j < CHUNK / 16; j++) {
      const int at = j * 16 * K_PITCH + step * Product::DEPTH;
      typename Product::B b;
      Product::load_b(b, rows + at, K_PITCH, lane);
#pragma unroll
      for (int m = 0; m < ROW_TILES; m++) Product::multiply(R[m][2 * j], R[m][2 * j + 1], a[m], b);
      // There are queries, but the compiler does not know: else it loads them early, and registers do not suffice. With
      // all registers taken by S, or with two tiles, it does not.
      if (!WITH_OUTPUT || (KP < 256 && ROW_TILES == 1 && queries == nullptr)) continue;
      Product::load_b(b, queries + at, K_PITCH, lane);
#pragma unroll
      for (int m = 0; m < ROW_TILES; m++) Product::multiply(O[m][2 * j], O[m][2 * j + 1], a[m], b);
    }
  }
}

// d[m] += rows[m] L^T for lower triangular L: column tiles before the step's are zero.
PRIM void multiply_lower(TokenSums& d, const TokenSums& rows, const DTYPE* L, int lane) {
#pragma unroll
  for (int k = 0; k < CHUNK / Product::DEPTH; k++) {
    Product::order_loads();
    typename Product::A a[ROW_TILES];
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) Product::from_sums(a[m], rows[m], k);
#pragma unroll
    for (int n = k * Product::DEPTH / 16; n < CHUNK / 16; n++) {
      typename Product::B b;
      Product::load_b(b, L + n * 16 * C_PITCH + k * Product::DEPTH, C_PITCH, lane);
#pragma unroll
      for (int m = 0; m < ROW_TILES; m++) Product::multiply(d[m][2 * n], d[m][2 * n + 1], a[m], b);
    }
  }
}

// S[m] += N[m] rows, for a CHUNK x K tile.
PRIM void add_to_state(StateSums& S, const TokenSums& N, const DTYPE* rows, int lane) {
#pragma unroll
  for (int step = 0; step < CHUNK / Product::DEPTH; step++) {
    Product::order_loads();
    typename Product::A a[ROW_TILES];
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) Product::from_sums(a[m], N[m], step);
#pragma unroll
    for (int j = 0; j < KP / 16; j++) {
      typename Product::B b;
      Product::load_b_transposed(b, rows + step * Product::DEPTH * K_PITCH + j * 16, K_PITCH, lane);
#pragma unroll
      for (int m = 0; m < ROW_TILES; m++) Product::multiply(S[m][2 * j], S[m][2 * j + 1], a[m], b);
    }
  }
}

// Every element d, of which `factor` is given row tile, column tile and index.
template <int TILES, class F>
PRIM void scale_sums(float (&d)[ROW_TILES][TILES][4], F factor, int lane) {
#pragma unroll
  for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) d[m][j][i] *= factor(sum_column(lane, j, i));
}

// ---- the walk ----------------------------------------------------------------------------------

// What is written; rows of tokens have HV * HEAD_V elements.
struct Outputs {
  DTYPE* o;
  float* final_state;
  STATES_DTYPE* states;
  DTYPE* corrections;
  float* checkpoints;  // of the sequence's first state
  int every;           // tokens between them
};

// A warp on its way through the chunks, with 16 ROW_TILES value channels of the state.
struct Walker {
  const Work& work;
  const Outputs& out;
  StateSums& S;
  const float scale;
  const int row, value, lane;  // the first value channel in the slice, and in the head

  // The state that enters the first chunk: the one given, zero, or the identity. Its address is formed where it is
  // read: before the loops it would take registers.
  template <class Address>
  PRIM void enter(bool given, Address state) {
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
      clear(S[m]);
      if constexpr (ZERO_V) {
        set_identity(S[m], value + m * 16);
      } else if (given) {
#pragma unroll
        for (int j = 0; j < K_TILES; j++) load_state(S[m][j], state(), value + m * 16, j * 8, lane);
      }
    }
  }

  PRIM void set_identity(float (&d)[K_TILES][4], int first) const {
#pragma unroll
    for (int j = 0; j < K_TILES; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) d[j][i] = first + sum_row(lane, i) == sum_column(lane, j, i) ? 1.0f : 0.0f;
  }

  // From the state that enters chunk c to the one that leaves it.
  PRIM void step(const Stage& s, int c, int64_t token, int tokens) {
    if constexpr (WRITE_STATES) keep_state(out.states + work.chunk_state(c));
    TokenSums R, N, O;
    multiply_state(R, O, S, FROM_FACTORS ? s.q_or_w : s.k, WITH_OUTPUT ? s.q_or_w : nullptr, lane);
    correct(R, N, O, s);
    if constexpr (!FROM_FACTORS) multiply_lower(N, R, s.core, lane);
    if constexpr (WRITE_STATES) write_rows(out.corrections, N, token, tokens);
    if constexpr (!FROM_FACTORS) scale_sums(N, [&](int t) { return s.beta[t]; }, lane);
    if constexpr (WITH_OUTPUT) {
      multiply_lower(O, N, s.p, lane);
      scale_sums(O, [&](int) { return scale; }, lane);
      write_rows(out.o, O, token, tokens);
    }
    if constexpr (LATE_KEYS) {
      // All but what is loaded for the next chunk.
      cp_async_wait<1>();
      __syncthreads();
    }
    update(N, s, tokens);
    if constexpr (CHECKPOINTS) keep_checkpoint((c + 1) * CHUNK);
  }

  // The state that enters a chunk, as (V, K), or from factors as (K, V).
  PRIM void keep_state(STATES_DTYPE* state) const {
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
      for (int j = 0; j < K_TILES; j++) {
        const int channel = value + m * 16, key = j * 8;
        if constexpr (FROM_FACTORS)
          store_transposed<STATES_DTYPE, HEAD_V>(state + key * HEAD_V + channel, HEAD_V, S[m][j], HEAD_V - channel,
                                                 HEAD_K - key, lane);
        else
          store_rows<STATES_DTYPE, HEAD_K>(state + channel * HEAD_K + key, S[m][j], HEAD_V - channel, HEAD_K - key,
                                           lane);
      }
  }

  // From K S in R and Q S in O: N starts as R = V - e^G K S, R becomes b R, and O is decayed. From factors, with W S in
  // R: N = U - W S.
  PRIM void correct(TokenSums& R, TokenSums& N, TokenSums& O, const Stage& s) const {
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
      for (int j = 0; j < C_TILES; j += 2) {
        float u[2][4];
        if constexpr (ZERO_V)
          clear(u);
        else
          Product::read_transposed(u[0], u[1], s.v + j * 8 * V_PITCH + row + m * 16, V_PITCH, lane);
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            float& r = R[m][j + half][i];
            if constexpr (FROM_FACTORS) {
              N[m][j + half][i] = u[half][i] - r;
            } else {
              const int t = sum_column(lane, j + half, i);
              r *= s.decays.read(t);
              O[m][j + half][i] *= s.decays.read(t);
              N[m][j + half][i] = u[half][i] - r;
              r = s.beta[t] * (u[half][i] - r);
            }
          }
      }
  }

  // S' = e^(G_C) S + (e^(G_C - G) K)^T N; N is decayed.
  PRIM void update(TokenSums& N, const Stage& s, int tokens) {
    scale_sums(S, [&](int key) { return s.decays.carry(tokens, key); }, lane);
    scale_sums(N, [&](int t) { return s.decays.write(t); }, lane);
    add_to_state(S, N, s.k_write, lane);
  }

  // rows[token][channel] of chunk c, for the channels of this warp.
  PRIM void write_rows(DTYPE* rows, const TokenSums& d, int64_t token, int tokens) const {
    const int64_t stride = (int64_t)work.HV * HEAD_V;
    rows += (token * work.HV + work.hv) * HEAD_V + value;
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
      for (int j = 0; j < C_TILES; j++)
        store_transposed<DTYPE, HEAD_V>(rows + m * 16 + j * 8 * stride, stride, d[m][j], HEAD_V - value - m * 16,
                                        tokens - j * 8, lane);
  }

  // The state after so many tokens, if it is to be kept.
  PRIM void keep_checkpoint(int tokens) const {
    if (tokens > work.sequence.tokens || tokens % out.every != 0) return;
    store_sums(checkpoint(tokens / out.every - 1), S);
  }
  PRIM float* checkpoint(int index) const { return out.checkpoints + (int64_t)index * work.HV * HEAD_K * HEAD_V; }

  // A transfer leaves a state per segment, a whole walk one per sequence: the last segment's.
  PRIM void leave() const {
    if (!TRANSFER && work.part % WALKED < SEGMENTS - 1) return;
    store_sums(out.final_state + work.state(TRANSFER ? work.part : work.n), S);
  }

  template <class T>
  PRIM void store_sums(T* state, const StateSums& S) const {
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
      for (int j = 0; j < K_TILES; j++) store_state(state, S[m][j], value + m * 16, j * 8, lane);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    forward(const DTYPE* q_or_w, const DTYPE* k, const DTYPE* v, const DTYPE* core, const DTYPE* p, const float* beta,
            const float2* decays,
#if HAS_GATE == 2
            const DTYPE* k_write, const float* channel_decays,
#endif
#if CHECKPOINTS
            float* checkpoints, int checkpoint_every,
#endif
#if ON_POOL
            const int64_t* state_indices, const int64_t* output_state_indices, const bool* fresh, POOL_DTYPE* state,
            int64_t pool_stride, int pool_slots,
#endif
            const float* initial_state, const int64_t* cu_seqlens, DTYPE* o, float* final_state, STATES_DTYPE* states,
            DTYPE* corrections, float scale, int T, int H, int HV) {
  const int thread = threadIdx.x, row = thread / 32 * ROW_TILES * 16;
  const Work work = find_work(cu_seqlens, Cut{SEGMENTS}, WALKED, T, H, HV);
#if HAS_GATE == 2
  const Inputs inputs = {q_or_w, FROM_FACTORS ? k_write : k, v, core, p, beta, {nullptr, channel_decays}};
#else
  const DTYPE* k_write = k;
  const Inputs inputs = {q_or_w, k, v, core, p, beta, {decays, nullptr}};
#endif
#if CHECKPOINTS
  const int64_t before = first_checkpoint(work.sequence, work.n, T, checkpoint_every);
  checkpoints += (before * HV + work.hv) * HEAD_K * HEAD_V;
  const Outputs outputs = {o, final_state, states, corrections, checkpoints, checkpoint_every};
#else
  const Outputs outputs = {o, final_state, states, corrections, nullptr, 0};
#endif
  DynSmem smem;
  Stage first_stage = take_stage(smem), second_stage = take_stage(smem);
  if constexpr (LATE_KEYS) first_stage.k_write = second_stage.k_write = smem.take<DTYPE>(CHUNK * K_PITCH, "k to write");
  smem.all_taken(SHARED_BYTES);

  StateSums S;
  Walker walker = {work, outputs, S, scale, row, work.slice * SLICE + row, thread % 32};
#if ON_POOL
  const Slots slots = {state_indices, output_state_indices, fresh, pool_stride, pool_slots};
  POOL_DTYPE* head = state + (int64_t)work.hv * HEAD_K * HEAD_V;
  const int64_t read = slots.read(work.n), written = slots.written(work.n);
  walker.enter(read >= 0, [&] { return head + read; });
#else
  walker.enter(initial_state != nullptr, [&] { return initial_state + work.state(work.part); });
#endif
  const int chunks = work.chunks();
  if (chunks > 0) load_chunk(first_stage, inputs, Loader(work, 0, work.sequence.first, work.tokens(0), thread));
  cp_async_commit();
  for (int c = 0; c < chunks; c++) {
    const int64_t token = work.token(c);
    const int tokens = work.tokens(c);
    const Stage stage = c % 2 ? second_stage : first_stage, next = c % 2 ? first_stage : second_stage;
    // This stage has arrived, and everyone is done with the other.
    cp_async_wait<0>();
    __syncthreads();
    if constexpr (LATE_KEYS) {
      Loader(work, c, token, tokens, thread).keys(stage.k_write, k_write);
      cp_async_commit();
    }
    if (c + 1 < chunks) load_chunk(next, inputs, Loader(work, c + 1, token + CHUNK, work.tokens(c + 1), thread));
    cp_async_commit();
    walker.step(stage, c, token, tokens);
  }
  cp_async_wait<0>();
  if constexpr (CHECKPOINTS)
    if (has_gap(work.sequence, outputs.every)) {
      StateSums zero;
#pragma unroll
      for (int m = 0; m < ROW_TILES; m++) clear(zero[m]);
      walker.store_sums(walker.checkpoint(work.sequence.tokens / outputs.every), zero);
    }
#if ON_POOL
  if (written >= 0) walker.store_sums(head + written, S);
#else
  walker.leave();
#endif
}
