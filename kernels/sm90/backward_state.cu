// The walk of portable/backward_state.cu in chunks of 64 tokens on compute capability 9.0. Per chunk, from the last to
// the first, with dS' the gradient of the state leaving it, core, Pqk and decays from sm90/factors.cu (r of reads, w of
// writes, c of the state: all 1 without a gate), b = beta, dO^ = scale dO:
//
//   dN = Pqk^T dO^ + w K dS'        dY = dN + core^T (b dN)        dS = c dS' + Q^T (r dO^) - K^T (r b dY)
//
// with K r, Q r and K w for K and Q, and c per channel, where the gate has one value per key channel.
//
// dS' of every chunk, (V, K), and dY are written for the gradients of the chunks; with LEAVES_DV b dY for dY, which is
// dV.
//
// A long sequence of few heads is cut into segments. TRANSFER walks all but the first from zero, and without dO from
// the identity: what is left is H and P of dS' -> P dS' + H. The walk with JOINS goes through all of them at once and
// joins for each those that come after it in the sequence (sm90/join.cuh). Arrays of segments are in the order of the
// walk, last segment first. Where a gate per head forgets, segments begin early instead (sm90/training/late.cuh).
//
// A math warpgroup holds 64 value channels of dS^T in accumulators, from which dS'^T, (b dN)^T and (b dY)^T are left
// operands of wgmma: the chain from dS' to dS passes nothing through shared memory. What is not of the chain, the
// products with dO and all stores, runs while the chain waits. dY leaves through the place of dO. Roles:
// sm90/training/.
//
// Numbers: dS in float, never rounded between chunks; operands of products are rounded to DTYPE, sums are float.
//
// Macros: DTYPE (bf16 or f16), HEAD_K (up to 128) and HEAD_V, multiples of 8; CHUNK (64), HAS_GATE, VARLEN, STATE_VK
// (layout of dfinal_state and dinitial_state), JOINS, TRANSFER, STATES (not with TRANSFER), LEAVES_DV
// (sm90/value_gradient.cuh), MATH (1 or 2), CHUNK_STAGES. Grid: N * segments walked * HV * slices blocks of 160
// threads, 384 with MATH = 2; a slice is 64 MATH value channels. Shared memory: CHUNK_STAGES of K, Q, core, Pqk, dO,
// beta and decays; dS' on its way out; see cupy_delta/cuda/sm90/training.py.
#define BACKWARD 1
#include "sm90/training/late.cuh"
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

// A math warpgroup has sums dN, later dY, of a chunk, with a gate KD = K dS' apart from them, and dS over all chunks.
typedef float TokenSums[8][4];
typedef float StateSums[K_TILES][4];
// Left operands of its products: dS', dO^, and what is made of dN.
typedef uint32_t StateOperand[K_STEPS][4];
typedef uint32_t TokenOperand[4][4];

struct Walker {
  const Shared& s;
  const Work& work;
  const TensorMap* dstates;
  const Rows& dy;
  DTYPE* small_dy;
  const Part& part;
  const float scale;
  StateSums& dS;
  // Of the warp: its first value channel, and where it stages states.
  const int warp = part.warp(), lane = part.lane(), value = work.channel + part.warpgroup * 64 + warp * 16;
  DTYPE* const state_boxes = s.states + (part.warpgroup * 4 + warp) * K_BOXES * 16 * BOX;

  PRIM DTYPE* rows(int stage) const { return s.rows + (stage * MATH + part.warpgroup) * TILE; }

  // Returns what all chunks leave of a state, of a transfer.
  PRIM Carried walk() {
    Carried over_chunks;
    if (work.chunks == 0) return over_chunks;
    Ring<CHUNK_STAGES> ring;
    TokenSums dN, KD;
    StateOperand state;
    TokenOperand dO, a;
    round_sums<DTYPE>(state, dS);
    mbarrier_wait(s.full, 0);
    begin(dN, dO, 0);
    wgmma_wait<0>();
    pin(dN);
    for (int i = 0; i < work.chunks; i++) {
      const Stage at(s, ring.stage);
      // dN += w K dS', and half of dS += Q^T (r dO^) while b dN is made.
      if constexpr (PER_TOKEN)
        read_state(KD, state, at.writing);
      else
        read_state(dN, state, at.writing);
      if constexpr (PER_TOKEN) {
        carry(dS, at.reads);
        if (TRANSFER) over_chunks.multiply(at.reads, 0);
        load_gradient(dO, rows(ring.stage), scale, at.reads, !work.values, warp, lane);
        pin(dO);
      } else if constexpr (PER_CHANNEL) {
        scale_columns(dS, at.carried, lane);
        if (TRANSFER) over_chunks.multiply(at.carried, value + lane / 4);
      }
      if constexpr (HAS_GATE) {
        pin(dS);
        wgmma_fence();
      }
      add_queries(dO, at.q, 0);
      wgmma_wait<1>();
      if constexpr (PER_TOKEN) {
        pin(KD);
        scale_columns(KD, at.writes, lane);
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
          for (int l = 0; l < 4; l++) dN[j][l] += KD[j][l];
      } else {
        pin(dN);
      }
      // dY = dN + core^T (b dN), and the other half while b dY is made.
      correct(dN, a, at);
      add_queries(dO, at.q, 2);
      const int c = work.chunk(i);
      if constexpr (STATES) send_gradient(state, c, i >= work.first());
      wgmma_wait<1>();
      pin(dN);
      // dS -= K^T (r b dY), and the start of the next chunk while dS is rounded; the last one starts in vain.
      TokenOperand dY;
      if constexpr (STATES) round_result(dY, dN, at, ring.stage, c, work.sent(i));
      if constexpr (PER_TOKEN)
        round_columns<DTYPE>(a, dN, at.b, at.reads, lane);
      else
        round_columns<DTYPE>(a, dN, at.b, lane);
      subtract_keys(a, at.k);
      wgmma_wait<1>();
      Ring<CHUNK_STAGES> next = ring;
      if (i + 1 < work.chunks) next.advance();
      mbarrier_wait(s.full + next.stage, next.parity);
      begin(dN, dO, next.stage);
      if constexpr (STATES) send_rows(dy, dY, rows(ring.stage), work, c, work.sent(i), part);
      wgmma_wait<1>();
      pin(dS);
      free_stage(s, ring.stage, part.thread);
      round_sums<DTYPE>(state, dS);
      wgmma_wait<0>();
      pin(dN);
      ring = next;
    }
    if (lane == 0) tma_store_wait_read<0>();
    return over_chunks;
  }

  // dN = Pqk^T dO^ of a chunk.
  PRIM void begin(TokenSums& dN, TokenOperand& dO, int stage) const {
    load_gradient(dO, rows(stage), scale, nullptr, !work.values, warp, lane);
    pin(dO);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++)
      wgmma<DTYPE, true>(dN, dO[step], step_of_rows(s.p + stage * TILE, step), step > 0);
    wgmma_commit();
  }

  // d += K dS', or with a gate per token d = K dS'.
  PRIM void read_state(TokenSums& d, StateOperand& state, const DTYPE* k) {
    if constexpr (!HAS_GATE) pin(dS);
    pin(state);
    pin(d);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < K_STEPS; step++)
      wgmma<DTYPE, false>(d, state[step], step_along_rows(k, step), !PER_TOKEN || step > 0);
    wgmma_commit();
  }

  // Two steps of dS += Q^T dO^.
  PRIM void add_queries(const TokenOperand& dO, const DTYPE* q, int first) {
#pragma unroll
    for (int step = first; step < first + 2; step++) wgmma<DTYPE, true>(dS, dO[step], step_of_rows(q, step), true);
    wgmma_commit();
  }

  PRIM void correct(TokenSums& dN, TokenOperand& a, const Stage& at) const {
    round_columns<DTYPE>(a, dN, at.b, lane);
    pin(a);
    pin(dN);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++) wgmma<DTYPE, true>(dN, a[step], step_of_rows(at.core, step), true);
    wgmma_commit();
  }

  PRIM void subtract_keys(TokenOperand& a, const DTYPE* k) {
    pin(a);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++) wgmma<DTYPE, true, true>(dS, a[step], step_of_rows(k, step), true);
    wgmma_commit();
  }

  // What is left of dY, done: itself, or dV.
  PRIM void round_result(TokenOperand& result, const TokenSums& dY, const Stage& at, int stage, int c,
                         int tokens) const {
    if constexpr (LEAVES_DV) {
      round_columns<DTYPE>(result, dY, at.b, lane);
      if (s.small[stage]) leave_small(dY, at.b, c, tokens);
    } else {
      round_sums<DTYPE>(result, dY);
    }
  }

  // dY of tokens that dV does not tell it of.
  PRIM void leave_small(const TokenSums& dY, const float* b, int c, int tokens) const {
    const int64_t row = (work.sequence.first + (int64_t)c * CHUNK) * part.HV + work.hv;
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int t = sum_column(lane, j, i), channel = value + sum_row(lane, i);
        if (t < tokens && channel < HEAD_V && is_small(b[t]))
          small_dy[(row + (int64_t)t * part.HV) * HEAD_V + channel] = narrow<DTYPE>(dY[j][i]);
      }
  }

  // dS' of chunk c, for the gradients of it.
  PRIM void send_gradient(const StateOperand& state, int c, bool leaves) const {
    stage_state(state_boxes, state, lane);
    async_proxy_fence();
    __syncwarp();
    if (lane == 0 && leaves) send_state(dstates, state_boxes, work, value, c);
  }
};

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
#if HAS_GATE == 1
                          const int* starts,
#endif
#endif
                          const float* beta, const float* decays, const float* dfinal_state, const int64_t* cu_seqlens,
                          DTYPE* dy,
#if LEAVES_DV && STATES
                          DTYPE* small_dy,
#endif
                          float* dinitial_state, float scale, int T, int H, int HV, int segments, int transferred) {
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
  Inputs inputs = {&q_map, &k_map, &core_map, &p_map, &do_map};
#if HAS_GATE == 2
  inputs.writing = &k_write_map;
#endif
  inputs.beta = beta, inputs.decays = decays;
  if (warpgroup == MATH) return supply(s, inputs, work, joins.joined, warp, lane);
  if constexpr (MATH == 2) more_registers<MATH_REGISTERS>();
  const int column = work.channel + warpgroup * 64, value = column + warp * 16;
  const Part part = {column, work.hv, HV, warpgroup, thread};
  const int64_t state_at = ((int64_t)work.n * HV + work.hv) * HEAD_K * HEAD_V;
  float dS[K_TILES][4];
  clear(dS);
#if TRANSFER
  if (!work.values) add_identity(dS, 1.0f, value, lane);
#else
  if (dfinal_state != nullptr && work.early == 0) {
#pragma unroll
    for (int j = 0; j < K_TILES; j++) load_state(dS[j], dfinal_state + state_at, value, j * 8, lane);
  }
#endif
  if constexpr (JOINS) join(dS, joins, work.n * (int64_t)transferred, work.joined, part);
  const Rows rows = {&dy_map, dy};
#if LEAVES_DV && STATES
  DTYPE* small = small_dy;
#else
  DTYPE* small = nullptr;
#endif
  const Carried over_chunks = Walker{s, work, &dstates_map, rows, small, part, scale, dS}.walk();
  if constexpr (TRANSFER) {
    leave_transfer(s, work, dS, transfers, over_chunks, part);
  } else if (work.last) {
    // One per sequence, from its first segment.
#pragma unroll
    for (int j = 0; j < K_TILES; j++) store_state(dinitial_state + state_at, dS[j], value, j * 8, lane);
  }
}
