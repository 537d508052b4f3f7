// The walk of portable/forward.cu with WRITE_STATES, in chunks of 64 tokens on compute capability 9.0: what the
// gradients keep. Per chunk, with S the state, core, Pqk and decays from sm90/factors.cu (r of reads, w of writes, c of
// the state: all 1 without a gate), b = beta, tokens as rows:
//
//   R = V - r K S      N^ = R + core (b R)      N = b N^      O = scale (r Q S + Pqk N)      S' = c S + K^T (w N)
//
// The S entering every chunk, (V, K), and N^ are written for the gradients of the chunks (STATES). Segments are as in
// sm90/forward.cu, which makes their transfers, but with a gate per key channel: then this walk does (TRANSFER), from
// zero for H, and without V from the identity for P; all are walked at once.
//
// A math warpgroup holds 64 value channels of S^T in accumulators, from which S^T, (b R)^T and N^T are left operands of
// wgmma: the chain from S to S' passes nothing through shared memory. Products with Q and Pqk and all stores run while
// the chain waits. N^ leaves through the place of V, or O without it. Roles: sm90/training/walk.cuh.
//
// Numbers: S in float, never rounded between chunks; operands of products are rounded to DTYPE, sums are float.
//
// Macros: DTYPE (bf16 or f16), HEAD_K (up to 128) and HEAD_V, multiples of 8; CHUNK (64), HAS_GATE (2: per key channel,
// with K r, Q r and K w for K and Q, and c per channel), VARLEN, STATE_VK (layout of initial and final state), JOINS
// (more than one segment), TRANSFER, STATES, MATH (1 or 2), CHUNK_STAGES. Grid: N * segments walked * HV * slices
// blocks of 128 MATH + 32 threads; a slice is 64 MATH value channels. Shared memory: CHUNK_STAGES of K, Q, core, Pqk,
// V, beta and decays; S and O on their way out; see cupy_delta/cuda/sm90/training.py.
#define BACKWARD 0
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

// Returns what all chunks leave of a state, of a transfer.
PRIM Carried walk(const Shared& s, const Work& work, float (&S)[K_TILES][4], const Results& results, float scale,
                  int warpgroup, int HV, int thread) {
  const int warp = thread / 32, lane = thread % 32;
  Carried over_chunks;
  if (work.chunks == 0) return over_chunks;
  const int value = work.channel + warpgroup * 64 + warp * 16;  // first value channel of this warp
  DTYPE* state_boxes = s.states + (warpgroup * 4 + warp) * K_BOXES * 16 * BOX;
  Ring<CHUNK_STAGES> ring;
  float R[8][4], O[8][4];  // R, then N^
  uint32_t state[K_STEPS][4], a[4][4];
  round_sums<DTYPE>(state, S);
  clear(O);
  auto rows = [&](int stage) { return s.rows + (stage * MATH + warpgroup) * TILE; };
  auto load_values = [&](int stage) {
#pragma unroll
    for (int j = 0; j < 8; j += 2) read_box_transposed(R[j], R[j + 1], rows(stage), j * 8, warp * 16, lane);
    if (TRANSFER && !work.values) clear(R);
  };
  auto send_output = [&](int c, int tokens) {
    DTYPE* box = STATES ? s.o + warpgroup * TILE : rows(ring.stage);
    uint32_t out[4][4];
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) O[j][i] *= scale;
    round_sums<DTYPE>(out, O);
    send_rows(results.o, out, box, work, c, tokens, value, 1 + warpgroup, HV, thread);
  };
  // Steps of O = Q S.
  auto query = [&](int first, int last, const DTYPE* q) {
#pragma unroll
    for (int step = first; step < last; step++) wgmma<DTYPE, false>(O, state[step], step_along_rows(q, step), step > 0);
    wgmma_commit();
  };
  auto begin = [&](const Ring<CHUNK_STAGES>& at) {
    mbarrier_wait(s.full + at.stage, at.parity);
    // Without a gate V is where the sums of R start.
    if (!PER_TOKEN) load_values(at.stage);
  };
  begin(ring);
  for (int c = 0; c < work.chunks; c++) {
    const DTYPE *k = s.k + ring.stage * K_BOXES * TILE, *q = s.q + ring.stage * K_BOXES * TILE;
    const DTYPE *core = s.core + ring.stage * TILE, *p = s.p + ring.stage * TILE;
    const DTYPE* writing = PER_CHANNEL ? s.writing + ring.stage * K_BOXES * TILE : k;
    const float *b = s.beta + ring.stage * CHUNK, *carried = s.carried + ring.stage * KP;
    const float *reads = s.reads + ring.stage * CHUNK, *writes = s.writes + ring.stage * CHUNK;
    // R = V - r K S, and beside it what is left to do of the chunk before.
    pin(state);
    pin(R);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < K_STEPS; step++)
      wgmma<DTYPE, false, true>(R, state[step], step_along_rows(k, step), !PER_TOKEN || step > 0);
    wgmma_commit();
    if constexpr (OUTPUT) {
      wgmma_wait<1>();
      pin(O);
      send_output(c - 1, c > 0 ? CHUNK : 0);
      // Half of O = Q S while b R is made.
      wgmma_fence();
      query(0, K_STEPS / 2, q);
    }
    if constexpr (PER_TOKEN) carry(S, reads);
    if constexpr (PER_CHANNEL) scale_columns(S, carried, lane);
    if constexpr (PER_CHANNEL && TRANSFER) over_chunks.multiply(carried, value + lane / 4);
    wgmma_wait<BEHIND>();
    pin(R);
    if constexpr (PER_TOKEN) {
      scale_columns(R, reads, lane);
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        float v[2][4];
        read_box_transposed(v[0], v[1], rows(ring.stage), j * 8, warp * 16, lane);
#pragma unroll
        for (int i = 0; i < 4; i++) R[j][i] += v[0][i], R[j + 1][i] += v[1][i];
      }
    }
    // N^ = R + core (b R), and the other half while N is made.
    round_columns<DTYPE>(a, R, b, lane);
    pin(a);
    pin(R);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++) wgmma<DTYPE, false>(R, a[step], step_along_rows(core, step), true);
    wgmma_commit();
    if constexpr (OUTPUT) query(K_STEPS / 2, K_STEPS, q);
    wgmma_wait<BEHIND>();
    pin(R);
    // S' = S + K^T N, and O += Pqk N while S' is rounded.
    uint32_t N[4][4];
#if HAS_GATE == 1
    uint32_t written[4][4];
    round_columns<DTYPE>(written, R, b, writes, lane);
    pin(written);
#else
    uint32_t (&written)[4][4] = a;
    if constexpr (STATES) round_sums<DTYPE>(N, R);
    round_columns<DTYPE>(a, R, b, lane);
    pin(a);
#endif
    pin(S);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++) wgmma<DTYPE, true>(S, written[step], step_of_rows(writing, step), true);
    wgmma_commit();
    if constexpr (PER_TOKEN) {
      round_columns<DTYPE>(a, R, b, lane);
      wgmma_wait<1>();
      pin(O);
      scale_columns(O, reads, lane);
      pin(a);
      pin(O);
      wgmma_fence();
    }
    if constexpr (OUTPUT) {
#pragma unroll
      for (int step = 0; step < 4; step++) wgmma<DTYPE, false>(O, a[step], step_along_rows(p, step), true);
      wgmma_commit();
    }
    if constexpr (PER_TOKEN)
      round_sums<DTYPE>(N, R);
    else
      wgmma_wait<1 + BEHIND>();
    if constexpr (STATES) {
      stage_state(state_boxes, state, lane);
      send_rows(results.corrections, N, rows(ring.stage), work, c, work.tokens(c), value, 1 + warpgroup, HV, thread);
      if (lane == 0) send_state(results.states, state_boxes, work, value, c);
    }
    // The last chunk has no next one, and reads in vain.
    const int before = ring.stage;
    if (c + 1 < work.chunks) ring.advance();
    begin(ring);
    wgmma_wait<BEHIND>();
    pin(S);
    round_sums<DTYPE>(state, S);
    wgmma_wait<0>();
    pin(O);
    free_stage(s, before, thread);
  }
  if constexpr (OUTPUT) {
    // The last place of V may still be read, as the first thread knows.
    if constexpr (!STATES) named_barrier(1 + warpgroup, 128);
    send_output(work.chunks - 1, work.tokens(work.chunks - 1));
  }
  if (lane == 0) tma_store_wait_read<0>();
  return over_chunks;
}

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
#endif
                             const float* beta, const float* decays, const float* initial_state,
                             const int64_t* cu_seqlens, DTYPE* o, float* final_state, DTYPE* corrections, float scale,
                             int T, int H, int HV, int segments, int transferred) {
  const int warpgroup = uniform(threadIdx.x / 128), thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const Work work = find_work(cu_seqlens, T, H, HV, segments, transferred);
  Shared s;
  Joins joins = {};
#if JOINS
  start(s, joins, &transfer_map, h, segment_decays);
#else
  start(s, joins);
#endif
  Maps maps = {&q_map, &k_map, &core_map, &p_map, &v_map};
#if HAS_GATE == 2
  maps.writing = &k_write_map;
#endif
  if (!computes(s, joins, maps, work, beta, decays, HV, warpgroup, warp, lane)) return;
  const int column = work.channel + warpgroup * 64, value = column + warp * 16;
  const int64_t state_at = ((int64_t)work.n * HV + work.hv) * HEAD_K * HEAD_V;
  float S[K_TILES][4];
  clear(S);
  if (TRANSFER && !work.values) add_identity(S, 1.0f, value, lane);
  if (initial_state != nullptr) {
#pragma unroll
    for (int j = 0; j < K_TILES; j++) load_state(S[j], initial_state + state_at, value, j * 8, lane);
  }
  if constexpr (JOINS) join(S, joins, work.n * (int64_t)transferred, work.step, column, work.hv, HV, warpgroup, thread);
  Results results = {{&o_map, o}, {nullptr, corrections}, nullptr};
#if STATES
  results.corrections.map = &n_map, results.states = &states_map;
#endif
  const Carried over_chunks = walk(s, work, S, results, scale, warpgroup, HV, thread);
#if TRANSFER
  leave_transfer(s, work, S, &transfer_map, h, segment_decays, over_chunks, column, HV, warpgroup, thread);
#else
  (void)over_chunks;
  // One per sequence: the last segment's.
  if (work.last) {
#pragma unroll
    for (int j = 0; j < K_TILES; j++) store_state(final_state + state_at, S[j], value, j * 8, lane);
  }
#endif
}
