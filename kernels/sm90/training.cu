// The walk of portable/forward.cu with WRITE_STATES, in chunks of 64 tokens on compute capability 9.0: what the
// gradients keep. Per chunk, with S the state, core, Pqk and decays from sm90/factors.cu (r of reads, w of writes, c of
// the state: all 1 without a gate), b = beta, tokens as rows:
//
//   R = V - r K S      N^ = R + core (b R)      N = b N^      O = scale (r Q S + Pqk N)      S' = c S + K^T (w N)
//
// The S entering every chunk, (V, K), and N^ are written for the gradients of the chunks. Segments are as in
// sm90/forward.cu, which makes their transfers; all are walked at once.
//
// A math warpgroup holds 64 value channels of S^T in accumulators, from which S^T, (b R)^T and N^T are left operands of
// wgmma: the chain from S to S' passes nothing through shared memory. Products with Q and Pqk and all stores run while
// the chain waits. N^ leaves through the place of V. Roles: sm90/training/walk.cuh.
//
// Numbers: S in float, never rounded between chunks; operands of products are rounded to DTYPE, sums are float.
//
// Macros: DTYPE (bf16 or f16), HEAD_K (up to 128) and HEAD_V, multiples of 8; CHUNK (64), HAS_GATE, VARLEN,
// STATE_VK (layout of initial and final state), JOINS (more than one segment), TRANSFER (0), MATH (1 or 2),
// CHUNK_STAGES. Grid: N * segments * HV * slices blocks of 128 MATH + 32 threads; a slice is 64 MATH value channels.
// Shared memory: CHUNK_STAGES of K, Q, core, Pqk, V, beta and decays; S and O on their way out; see
// cupy_delta/cuda/sm90/training.py.
#define BACKWARD 0
#include "sm90/training/start.cuh"
#include "sm90/sums.cuh"
#include "tiles/store.cuh"

PRIM void walk(const Shared& s, const Work& work, float (&S)[K_TILES][4], const TensorMap* states, const Rows& o,
               const Rows& corrections, float scale, int warpgroup, int HV, int thread) {
  const int warp = thread / 32, lane = thread % 32;
  if (work.chunks == 0) return;
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
  };
  DTYPE* o_box = s.o + warpgroup * TILE;
  auto send_output = [&](int c, int tokens) {
    uint32_t out[4][4];
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) O[j][i] *= scale;
    round_sums<DTYPE>(out, O);
    send_rows(o, out, o_box, work, c, tokens, value, 1 + warpgroup, HV, thread);
  };
  auto begin = [&](const Ring<CHUNK_STAGES>& at) {
    mbarrier_wait(s.full + at.stage, at.parity);
    // Without a gate V is where the sums of R start.
    if (!HAS_GATE) load_values(at.stage);
  };
  begin(ring);
  for (int c = 0; c < work.chunks; c++) {
    const DTYPE *k = s.k + ring.stage * K_BOXES * TILE, *q = s.q + ring.stage * K_BOXES * TILE;
    const DTYPE *core = s.core + ring.stage * TILE, *p = s.p + ring.stage * TILE;
    const float* b = s.beta + ring.stage * CHUNK;
#if HAS_GATE
    const float *reads = s.reads + ring.stage * CHUNK, *writes = s.writes + ring.stage * CHUNK;
#endif
    // R = V - r K S, and beside it what is left to do of the chunk before.
    pin(state);
    pin(R);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < K_STEPS; step++)
      wgmma<DTYPE, false, true>(R, state[step], step_along_rows(k, step), !HAS_GATE || step > 0);
    wgmma_commit();
    wgmma_wait<1>();
    pin(O);
    send_output(c - 1, c > 0 ? CHUNK : 0);
    // Half of O = Q S while b R is made.
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < K_STEPS / 2; step++)
      wgmma<DTYPE, false>(O, state[step], step_along_rows(q, step), step > 0);
    wgmma_commit();
#if HAS_GATE
    carry(S, reads);
#endif
    wgmma_wait<1>();
    pin(R);
#if HAS_GATE
    scale_columns(R, reads, lane);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      float v[2][4];
      read_box_transposed(v[0], v[1], rows(ring.stage), j * 8, warp * 16, lane);
#pragma unroll
      for (int i = 0; i < 4; i++) R[j][i] += v[0][i], R[j + 1][i] += v[1][i];
    }
#endif
    // N^ = R + core (b R), and the other half while N is made.
    round_columns<DTYPE>(a, R, b, lane);
    pin(a);
    pin(R);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++) wgmma<DTYPE, false>(R, a[step], step_along_rows(core, step), true);
    wgmma_commit();
#pragma unroll
    for (int step = K_STEPS / 2; step < K_STEPS; step++)
      wgmma<DTYPE, false>(O, state[step], step_along_rows(q, step), true);
    wgmma_commit();
    wgmma_wait<1>();
    pin(R);
    // S' = S + K^T N, and O += Pqk N while S' is rounded.
    uint32_t N[4][4];
#if HAS_GATE
    uint32_t written[4][4];
    round_columns<DTYPE>(written, R, b, writes, lane);
    pin(written);
#else
    uint32_t (&written)[4][4] = a;
    round_sums<DTYPE>(N, R);
    round_columns<DTYPE>(a, R, b, lane);
    pin(a);
#endif
    pin(S);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++) wgmma<DTYPE, true>(S, written[step], step_of_rows(k, step), true);
    wgmma_commit();
#if HAS_GATE
    round_columns<DTYPE>(a, R, b, lane);
    wgmma_wait<1>();
    pin(O);
    scale_columns(O, reads, lane);
    pin(a);
    pin(O);
    wgmma_fence();
#endif
#pragma unroll
    for (int step = 0; step < 4; step++) wgmma<DTYPE, false>(O, a[step], step_along_rows(p, step), true);
    wgmma_commit();
#if HAS_GATE
    round_sums<DTYPE>(N, R);
#else
    wgmma_wait<2>();
#endif
    stage_state(state_boxes, state, lane);
    send_rows(corrections, N, rows(ring.stage), work, c, work.tokens(c), value, 1 + warpgroup, HV, thread);
    if (lane == 0) send_state(states, state_boxes, work, value, c);
    // The last chunk has no next one, and reads in vain.
    const int before = ring.stage;
    if (c + 1 < work.chunks) ring.advance();
    begin(ring);
    wgmma_wait<1>();
    pin(S);
    round_sums<DTYPE>(state, S);
    wgmma_wait<0>();
    pin(O);
    free_stage(s, before, thread);
  }
  send_output(work.chunks - 1, work.tokens(work.chunks - 1));
  if (lane == 0) tma_store_wait_read<0>();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    forward_residuals_hopper(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                             const __grid_constant__ TensorMap core_map, const __grid_constant__ TensorMap p_map,
                             const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap states_map,
                             const __grid_constant__ TensorMap o_map, const __grid_constant__ TensorMap n_map,
#if JOINS
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
  const Maps maps = {&q_map, &k_map, &core_map, &p_map, &v_map};
  if (!computes(s, joins, maps, work, beta, decays, HV, warpgroup, warp, lane)) return;
  const int column = work.channel + warpgroup * 64, value = column + warp * 16;
  const int64_t state_at = ((int64_t)work.n * HV + work.hv) * HEAD_K * HEAD_V;
  float S[K_TILES][4];
  clear(S);
  if (initial_state != nullptr) {
#pragma unroll
    for (int j = 0; j < K_TILES; j++) load_state(S[j], initial_state + state_at, value, j * 8, lane);
  }
  if constexpr (JOINS) join(S, joins, work.n * (int64_t)transferred, work.step, column, work.hv, HV, warpgroup, thread);
  walk(s, work, S, &states_map, {&o_map, o}, {&n_map, corrections}, scale, warpgroup, HV, thread);
  // One per sequence: the last segment's.
  if (work.last) {
#pragma unroll
    for (int j = 0; j < K_TILES; j++) store_state(final_state + state_at, S[j], value, j * 8, lane);
  }
}
