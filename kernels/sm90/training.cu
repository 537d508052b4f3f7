// The walk of portable/forward.cu with WRITE_STATES, in chunks of 64 tokens on compute capability 9.0: what the
// gradients keep. Per chunk, with S the state, core, Pqk and decays from sm90/factors.cu (r of reads, w of writes, c of
// the state: all 1 without a gate), b = beta, tokens as rows:
//
//   R = V - r K S      N^ = R + core (b R)      N = b N^      O = scale (r Q S + Pqk N)      S' = c S + K^T (w N)
//
// The S entering every chunk, (V, K), and N^ are written for the gradients of the chunks (STATES). Segments are as in
// sm90/forward.cu, which makes their transfers, but with a gate: then this walk does (TRANSFER), from zero for H, and
// without V from the identity for P; all are walked at once. Where a gate per head forgets, segments begin early
// instead (sm90/training/late.cuh).
//
// A math warpgroup holds 64 value channels of S^T in accumulators, from which S^T, (b R)^T and N^T are left operands of
// wgmma: the chain from S to S' passes nothing through shared memory. Products with Q and Pqk and all stores run while
// the chain waits. N^ leaves through the place of V, or O without it. Roles: sm90/training/.
//
// Numbers: S in float, never rounded between chunks; operands of products are rounded to DTYPE, sums are float.
//
// Macros: DTYPE (bf16 or f16), HEAD_K (up to 128) and HEAD_V, multiples of 8; CHUNK (64), HAS_GATE (2: per key channel,
// with K r, Q r and K w for K and Q, and c per channel), VARLEN, STATE_VK (layout of initial and final state), JOINS
// (more than one segment), TRANSFER, STATES, MATH (1 or 2), CHUNK_STAGES; IF_DECLINED (leaves at once if
// sm90/channel_forward.cu has walked the segments). Grid: N * segments walked * HV * slices
// blocks of 160 threads, 384 with MATH = 2; a slice is 64 MATH value channels. Shared memory: CHUNK_STAGES of K, Q,
// core, Pqk, V, beta and decays; S and O on their way out; see cupy_delta/cuda/sm90/training.py.
#define BACKWARD 0
#include "sm90/training/late.cuh"
#include "sm90/training/start.cuh"
#include "sm90/sums.cuh"
#include "tiles/store.cuh"

constexpr bool OUTPUT = !TRANSFER;
// Of products on their way, those with Q and Pqk behind the chain's.
constexpr int BEHIND = OUTPUT ? 1 : 0;

struct Results {
  Rows o, corrections;
  const TensorMap* states;
};

// A math warpgroup has sums R, later N^, of a chunk, O, and S over all chunks.
typedef float TokenSums[8][4];
typedef float StateSums[K_TILES][4];
// Left operands of its products: S, and what is made of R.
typedef uint32_t StateOperand[K_STEPS][4];
typedef uint32_t TokenOperand[4][4];

// Steps of O = Q S.
PRIM void query(TokenSums& O, const StateOperand& state, int first, int last, const DTYPE* q) {
#pragma unroll
  for (int step = first; step < last; step++) wgmma<DTYPE, false>(O, state[step], step_along_rows(q, step), step > 0);
  wgmma_commit();
}

struct Walker {
  const Shared& s;
  const Work& work;
  const Results& results;
  const Part& part;
  const float scale;
  StateSums& S;
  // Of the warp: its first value channel, and where it stages states.
  const int warp = part.warp(), lane = part.lane(), value = work.channel + part.warpgroup * 64 + warp * 16;
  DTYPE* const state_boxes = s.states + (part.warpgroup * 4 + warp) * K_BOXES * 16 * BOX;

  PRIM DTYPE* rows(int stage) const { return s.rows + (stage * MATH + part.warpgroup) * TILE; }

  // Returns what all chunks leave of a state, of a transfer.
  PRIM Carried walk() {
    const int thread = part.thread;
    Carried over_chunks;
    if (work.chunks == 0) return over_chunks;
    Ring<CHUNK_STAGES> ring;
    TokenSums R, O;
    StateOperand state;
    TokenOperand a;
    round_sums<DTYPE>(state, S);
    clear(O);
    begin(R, ring);
    for (int c = 0; c < work.chunks; c++) {
      const Stage at(s, ring.stage);
      correct(R, state, at);
      // Beside it what is left to do of the chunk before, and half of O = Q S while b R is made.
      if constexpr (OUTPUT) {
        wgmma_wait<1>();
        pin(O);
        send_output(O, ring.stage, c - 1, c > (BEGINS_EARLY ? work.early : 0) ? CHUNK : 0);
        wgmma_fence();
        query(O, state, 0, K_STEPS / 2, at.q);
      }
      if constexpr (PER_TOKEN) carry(S, at.reads);
      if constexpr (PER_TOKEN && TRANSFER) over_chunks.multiply(at.reads, 0);
      if constexpr (PER_CHANNEL) scale_columns(S, at.carried, lane);
      if constexpr (PER_CHANNEL && TRANSFER) over_chunks.multiply(at.carried, value + lane / 4);
      wgmma_wait<BEHIND>();
      pin(R);
      if constexpr (PER_TOKEN) add_values(R, at.reads, ring.stage);
      write(R, O, state, a, at);
      // S' = S + K^T N, and O += Pqk N while S' is rounded.
      TokenOperand corrections;
      if constexpr (PER_TOKEN) {
        TokenOperand written;
        round_columns<DTYPE>(written, R, at.b, at.writes, lane);
        add_to_state(written, at.writing);
        if constexpr (OUTPUT) {
          round_columns<DTYPE>(a, R, at.b, lane);
          wgmma_wait<1>();
          pin(O);
          scale_columns(O, at.reads, lane);
          pin(a);
          pin(O);
          wgmma_fence();
        }
      } else {
        if constexpr (STATES) round_sums<DTYPE>(corrections, R);
        round_columns<DTYPE>(a, R, at.b, lane);
        add_to_state(a, at.writing);
      }
      if constexpr (OUTPUT) add_within_chunk(O, a, at.p);
      if constexpr (PER_TOKEN && STATES) round_sums<DTYPE>(corrections, R);
      if constexpr (!PER_TOKEN) wgmma_wait<1 + BEHIND>();
      if constexpr (STATES) leave(state, corrections, ring.stage, c);
      // The last chunk has no next one, and reads in vain.
      const int before = ring.stage;
      if (c + 1 < work.chunks) ring.advance();
      begin(R, ring);
      wgmma_wait<BEHIND>();
      pin(S);
      round_sums<DTYPE>(state, S);
      wgmma_wait<0>();
      pin(O);
      free_stage(s, before, thread);
    }
    if constexpr (OUTPUT) {
      // The last place of V may still be read, as the first thread knows.
      if constexpr (!STATES) named_barrier(MATH_BARRIER + part.warpgroup, 128);
      const bool leaves = !BEGINS_EARLY || work.chunks > work.early;
      send_output(O, ring.stage, work.chunks - 1, leaves ? work.tokens(work.chunks - 1) : 0);
    }
    if (lane == 0) tma_store_wait_read<0>();
    return over_chunks;
  }

  // Waits for a chunk. Without a gate per token V is where the sums of R start.
  PRIM void begin(TokenSums& R, const Ring<CHUNK_STAGES>& ring) const {
    mbarrier_wait(s.full + ring.stage, ring.parity);
    if constexpr (PER_TOKEN) return;
#pragma unroll
    for (int j = 0; j < 8; j += 2) read_box_transposed(R[j], R[j + 1], rows(ring.stage), j * 8, warp * 16, lane);
    if (TRANSFER && !work.values) clear(R);
  }

  // R = V - K S, or -K S, to be multiplied by r before V is added.
  PRIM void correct(TokenSums& R, StateOperand& state, const Stage& at) const {
    pin(state);
    pin(R);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < K_STEPS; step++)
      wgmma<DTYPE, false, true>(R, state[step], step_along_rows(at.k, step), !PER_TOKEN || step > 0);
    wgmma_commit();
  }
  PRIM void add_values(TokenSums& R, const float* reads, int stage) const {
    scale_columns(R, reads, lane);
    if (TRANSFER && !work.values) return;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      float v[2][4];
      read_box_transposed(v[0], v[1], rows(stage), j * 8, warp * 16, lane);
#pragma unroll
      for (int i = 0; i < 4; i++) R[j][i] += v[0][i], R[j + 1][i] += v[1][i];
    }
  }

  // N^ = R + core (b R), and the other half of Q S while N is made.
  PRIM void write(TokenSums& R, TokenSums& O, const StateOperand& state, TokenOperand& a, const Stage& at) const {
    round_columns<DTYPE>(a, R, at.b, lane);
    pin(a);
    pin(R);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++) wgmma<DTYPE, false>(R, a[step], step_along_rows(at.core, step), true);
    wgmma_commit();
    if constexpr (OUTPUT) query(O, state, K_STEPS / 2, K_STEPS, at.q);
    wgmma_wait<BEHIND>();
    pin(R);
  }

  // O += Pqk N.
  PRIM void add_within_chunk(TokenSums& O, const TokenOperand& N, const DTYPE* p) const {
#pragma unroll
    for (int step = 0; step < 4; step++) wgmma<DTYPE, false>(O, N[step], step_along_rows(p, step), true);
    wgmma_commit();
  }

  // What the gradients read: the state that entered the chunk, and N^ through the place of V.
  PRIM void leave(const StateOperand& state, const TokenOperand& corrections, int stage, int c) {
    stage_state(state_boxes, state, lane);
    send_rows(results.corrections, corrections, rows(stage), work, c, work.sent(c), part);
    if (lane == 0 && c >= work.first()) send_state(results.states, state_boxes, work, value, c);
  }
  PRIM void add_to_state(TokenOperand& N, const DTYPE* k) {
    pin(N);
    pin(S);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++) wgmma<DTYPE, true>(S, N[step], step_of_rows(k, step), true);
    wgmma_commit();
  }

  // O of chunk c, done, through a place of its own, or that of V.
  PRIM void send_output(TokenSums& O, int stage, int c, int tokens) const {
    DTYPE* box = STATES ? s.o + part.warpgroup * TILE : rows(stage);
    TokenOperand out;
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) O[j][i] *= scale;
    round_sums<DTYPE>(out, O);
    send_rows(results.o, out, box, work, c, tokens, part);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    forward_residuals_hopper(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
#if HAS_GATE == 2
                             const __grid_constant__ TensorMap k_write_map,
#endif
                             const __grid_constant__ TensorMap core_map, const __grid_constant__ TensorMap p_map,
                             const __grid_constant__ TensorMap v_map,
#if STATES
                             const __grid_constant__ TensorMap states_map, const __grid_constant__ TensorMap n_map,
#endif
                             const __grid_constant__ TensorMap o_map,
#if TRANSFER || JOINS
                             const __grid_constant__ TensorMap transfer_map, float* h, float* segment_decays,
#if HAS_GATE == 1
                             const int* starts,
#endif
#endif
                             const float* beta, const float* decays, const float* initial_state,
                             const int64_t* cu_seqlens, DTYPE* o, float* final_state, DTYPE* corrections,
#if IF_DECLINED
                             const int* declined,
#endif
                             float scale, int T, int H, int HV, int segments, int transferred) {
#if IF_DECLINED
  if (*declined == 0) return;
#endif
  const int warpgroup = uniform(threadIdx.x / 128), thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  Work work = find_work(cu_seqlens, T, H, HV, segments, transferred);
#if HAS_GATE == 1 && TRANSFER
  if (starts != nullptr && !Starts(starts, work, segments).join(work, segments)) return;
#elif HAS_GATE == 1 && JOINS
  begin_early(work, Starts(starts, work, segments), cu_seqlens, T);
#endif
  Shared s;
  Joins joins = {};
#if TRANSFER || JOINS
  const Transfers transfers = {&transfer_map, h, segment_decays};
#else
  const Transfers transfers = {};
#endif
  start(s, joins, transfers);
  Inputs inputs = {&q_map, &k_map, &core_map, &p_map, &v_map};
#if HAS_GATE == 2
  inputs.writing = &k_write_map;
#endif
  inputs.beta = beta, inputs.decays = decays;
  if (warpgroup == MATH) return supply(s, inputs, work, joins.joined, warp, lane);
  if constexpr (MATH == 2) more_registers<MATH_REGISTERS>();
  const int column = work.channel + warpgroup * 64, value = column + warp * 16;
  const Part part = {column, work.hv, HV, warpgroup, thread};
  const int64_t state_at = ((int64_t)work.n * HV + work.hv) * HEAD_K * HEAD_V;
  float S[K_TILES][4];
  clear(S);
  if (TRANSFER && !work.values) add_identity(S, 1.0f, value, lane);
  if (initial_state != nullptr && work.early == 0) {
#pragma unroll
    for (int j = 0; j < K_TILES; j++) load_state(S[j], initial_state + state_at, value, j * 8, lane);
  }
  if constexpr (JOINS) join(S, joins, work.n * (int64_t)transferred, work.joined, part);
  Results results = {{&o_map, o}, {nullptr, corrections}, nullptr};
#if STATES
  results.corrections.map = &n_map, results.states = &states_map;
#endif
  const Carried over_chunks = Walker{s, work, results, part, scale, S}.walk();
  if constexpr (TRANSFER) {
    leave_transfer(s, work, S, transfers, over_chunks, part);
  } else if (work.last) {
    // One per sequence: the last segment's.
#pragma unroll
    for (int j = 0; j < K_TILES; j++) store_state(final_state + state_at, S[j], value, j * 8, lane);
  }
}
