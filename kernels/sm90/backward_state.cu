// The walk of portable/backward_state.cu in chunks of 64 tokens on compute capability 9.0. Per chunk, from the last to
// the first, with dS' the gradient of the state leaving it, core, Pqk and decays from sm90/factors.cu (r of reads, w of
// writes, c of the state: all 1 without a gate), b = beta, dO^ = scale dO:
//
//   dN = Pqk^T dO^ + w K dS'        dY = dN + core^T (b dN)        dS = c dS' + Q^T (r dO^) - K^T (r b dY)
//
// with K r, Q r and K w for K and Q, and c per channel, where the gate has one value per key channel.
//
// dS' of every chunk, (V, K), and dY are written for the gradients of the chunks.
//
// A long sequence of few heads is cut into segments. TRANSFER walks all but the first from zero, and without dO from
// the identity: what is left is H and P of dS' -> P dS' + H. The walk with JOINS goes through all of them at once and
// joins for each those that come after it in the sequence (sm90/join.cuh). Arrays of segments are in the order of the
// walk, last segment first.
//
// A math warpgroup holds 64 value channels of dS^T in accumulators, from which dS'^T, (b dN)^T and (b dY)^T are left
// operands of wgmma: the chain from dS' to dS passes nothing through shared memory. What is not of the chain, the
// products with dO and all stores, runs while the chain waits. dY leaves through the place of dO. Roles:
// sm90/training/walk.cuh.
//
// Numbers: dS in float, never rounded between chunks; operands of products are rounded to DTYPE, sums are float.
//
// Macros: DTYPE (bf16 or f16), HEAD_K (up to 128) and HEAD_V, multiples of 8; CHUNK (64), HAS_GATE, VARLEN,
// STATE_VK (layout of dfinal_state and dinitial_state), JOINS, TRANSFER, STATES (not with TRANSFER), MATH (1 or 2),
// CHUNK_STAGES. Grid: N *
// segments walked * HV * slices blocks of 128 MATH + 32 threads; a slice is 64 MATH value channels. Shared memory:
// CHUNK_STAGES of K, Q, core, Pqk, dO, beta and decays; dS' on its way out; see cupy_delta/cuda/sm90/training.py.
#define BACKWARD 1
#include "sm90/training/start.cuh"
#include "sm90/sums.cuh"
#include "tiles/store.cuh"

// dO^T of 16 value channels as left operand, times scale and, if any are given, the factors of its tokens, or zero:
// tokens 16 step to 16 step + 15 in dO[step].
PRIM void load_gradient(uint32_t (&dO)[4][4], const DTYPE* box, float scale, const float* factors, bool zero, int warp,
                        int lane) {
#pragma unroll
  for (int step = 0; step < 4; step++) {
    ldmatrix_x4_trans(dO[step], box + swizzled(step * 16 + lane % 8 + lane / 16 * 8, warp * 16 + lane / 8 % 2 * 8));
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 x = unpack2<DTYPE>(dO[step][i]);
      float2 f = make_float2(scale, scale);
      if (factors != nullptr) {
        const float2 y = *(const float2*)&factors[sum_column(lane, 2 * step + i / 2, 0)];
        f.x *= y.x, f.y *= y.y;
      }
      dO[step][i] = zero ? 0 : pack2<DTYPE>(f.x * x.x, f.y * x.y);
    }
  }
}

// Returns what all chunks leave of a state, of a transfer.
PRIM Carried walk(const Shared& s, const Work& work, float (&dS)[K_TILES][4], const TensorMap* dstates, const Rows& dy,
                  float scale, int warpgroup, int HV, int thread) {
  const int warp = thread / 32, lane = thread % 32;
  Carried over_chunks;
  if (work.chunks == 0) return over_chunks;
  const int value = work.channel + warpgroup * 64 + warp * 16;  // first value channel of this warp
  DTYPE* state_boxes = s.states + (warpgroup * 4 + warp) * K_BOXES * 16 * BOX;
  Ring<CHUNK_STAGES> ring;
  float dN[8][4];  // then dY
#if HAS_GATE == 1
  float KD[8][4];
#endif
  uint32_t state[K_STEPS][4], dO[4][4], a[4][4];
  round_sums<DTYPE>(state, dS);
  auto rows = [&](int stage) { return s.rows + (stage * MATH + warpgroup) * TILE; };
  // dN = Pqk^T dO^ of the chunk that is next.
  auto begin = [&](int stage) {
    load_gradient(dO, rows(stage), scale, nullptr, !work.values, warp, lane);
    pin(dO);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++)
      wgmma<DTYPE, true>(dN, dO[step], step_of_rows(s.p + stage * TILE, step), step > 0);
    wgmma_commit();
  };
  mbarrier_wait(s.full, 0);
  begin(0);
  wgmma_wait<0>();
  pin(dN);
  for (int i = 0; i < work.chunks; i++) {
    const DTYPE *k = s.k + ring.stage * K_BOXES * TILE, *q = s.q + ring.stage * K_BOXES * TILE;
    const DTYPE* core = s.core + ring.stage * TILE;
    const float* b = s.beta + ring.stage * CHUNK;
    const DTYPE* writing = PER_CHANNEL ? s.writing + ring.stage * K_BOXES * TILE : k;
    const float* carried = s.carried + ring.stage * KP;
#if HAS_GATE == 1
    const float *reads = s.reads + ring.stage * CHUNK, *writes = s.writes + ring.stage * CHUNK;
    float (&sum)[8][4] = KD;
#else
    float (&sum)[8][4] = dN;
    if constexpr (!PER_CHANNEL) pin(dS);
#endif
    // dN += w K dS', and half of dS += Q^T (r dO^) while b dN is made.
    pin(state);
    pin(sum);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < K_STEPS; step++)
      wgmma<DTYPE, false>(sum, state[step], step_along_rows(writing, step), !PER_TOKEN || step > 0);
    wgmma_commit();
#if HAS_GATE == 1
    carry(dS, reads);
    if (TRANSFER) over_chunks.multiply(reads, 0);
    load_gradient(dO, rows(ring.stage), scale, reads, !work.values, warp, lane);
    pin(dO);
#elif HAS_GATE == 2
    scale_columns(dS, carried, lane);
    if (TRANSFER) over_chunks.multiply(carried, value + lane / 4);
#endif
    if constexpr (HAS_GATE) {
      pin(dS);
      wgmma_fence();
    }
#pragma unroll
    for (int step = 0; step < 2; step++) wgmma<DTYPE, true>(dS, dO[step], step_of_rows(q, step), true);
    wgmma_commit();
    wgmma_wait<1>();
    pin(sum);
#if HAS_GATE == 1
    scale_columns(KD, writes, lane);
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int l = 0; l < 4; l++) dN[j][l] += KD[j][l];
#endif
    // dY = dN + core^T (b dN), and the other half while b dY is made.
    round_columns<DTYPE>(a, dN, b, lane);
    pin(a);
    pin(dN);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++) wgmma<DTYPE, true>(dN, a[step], step_of_rows(core, step), true);
    wgmma_commit();
#pragma unroll
    for (int step = 2; step < 4; step++) wgmma<DTYPE, true>(dS, dO[step], step_of_rows(q, step), true);
    wgmma_commit();
    const int c = work.chunk(i);
    if constexpr (STATES) {
      stage_state(state_boxes, state, lane);
      async_proxy_fence();
      __syncwarp();
      if (lane == 0) send_state(dstates, state_boxes, work, value, c);
    }
    wgmma_wait<1>();
    pin(dN);
    // dS -= K^T (r b dY), and the start of the next chunk while dS is rounded; the last one starts in vain.
    uint32_t dY[4][4];
    if constexpr (STATES) round_sums<DTYPE>(dY, dN);
#if HAS_GATE == 1
    round_columns<DTYPE>(a, dN, b, reads, lane);
#else
    round_columns<DTYPE>(a, dN, b, lane);
#endif
    pin(a);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++) wgmma<DTYPE, true, true>(dS, a[step], step_of_rows(k, step), true);
    wgmma_commit();
    wgmma_wait<1>();
    Ring<CHUNK_STAGES> next = ring;
    if (i + 1 < work.chunks) next.advance();
    mbarrier_wait(s.full + next.stage, next.parity);
    begin(next.stage);
    if constexpr (STATES)
      send_rows(dy, dY, rows(ring.stage), work, c, work.tokens(c), value, 1 + warpgroup, HV, thread);
    wgmma_wait<1>();
    pin(dS);
    free_stage(s, ring.stage, thread);
    round_sums<DTYPE>(state, dS);
    wgmma_wait<0>();
    pin(dN);
    ring = next;
  }
  if (lane == 0) tma_store_wait_read<0>();
  return over_chunks;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    backward_state_hopper(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
#if HAS_GATE == 2
                          const __grid_constant__ TensorMap k_write_map,
#endif
                          const __grid_constant__ TensorMap core_map, const __grid_constant__ TensorMap p_map,
                          const __grid_constant__ TensorMap do_map, const __grid_constant__ TensorMap dstates_map,
                          const __grid_constant__ TensorMap dy_map,
#if TRANSFER || JOINS
                          const __grid_constant__ TensorMap transfer_map, float* h, float* segment_decays,
#endif
                          const float* beta, const float* decays, const float* dfinal_state, const int64_t* cu_seqlens,
                          DTYPE* dy, float* dinitial_state, float scale, int T, int H, int HV, int segments,
                          int transferred) {
  const int warpgroup = uniform(threadIdx.x / 128), thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const Work work = find_work(cu_seqlens, T, H, HV, segments, transferred);
  Shared s;
  Joins joins = {};
#if JOINS
  start(s, joins, &transfer_map, h, segment_decays);
#else
  start(s, joins);
#endif
  Maps maps = {&q_map, &k_map, &core_map, &p_map, &do_map};
#if HAS_GATE == 2
  maps.writing = &k_write_map;
#endif
  if (!computes(s, joins, maps, work, beta, decays, HV, warpgroup, warp, lane)) return;
  const int column = work.channel + warpgroup * 64, value = column + warp * 16;
  const int64_t state_at = ((int64_t)work.n * HV + work.hv) * HEAD_K * HEAD_V;
  float dS[K_TILES][4];
  clear(dS);
#if TRANSFER
  if (!work.values) add_identity(dS, 1.0f, value, lane);
#else
  if (dfinal_state != nullptr) {
#pragma unroll
    for (int j = 0; j < K_TILES; j++) load_state(dS[j], dfinal_state + state_at, value, j * 8, lane);
  }
#endif
  if constexpr (JOINS)
    join(dS, joins, work.n * (int64_t)transferred, work.step, column, work.hv, HV, warpgroup, thread);
  const Carried over_chunks = walk(s, work, dS, &dstates_map, {&dy_map, dy}, scale, warpgroup, HV, thread);
#if TRANSFER
  leave_transfer(s, work, dS, &transfer_map, h, segment_decays, over_chunks, column, HV, warpgroup, thread);
#else
  (void)over_chunks;
  // One per sequence, from its first segment.
  if (work.last) {
#pragma unroll
    for (int j = 0; j < K_TILES; j++) store_state(dinitial_state + state_at, dS[j], value, j * 8, lane);
  }
#endif
}
