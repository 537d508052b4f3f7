// The walk backwards over the chunks of a sequence: the gradient dS of the state. Per chunk, from the last to the
// first, with dS' the gradient of the state leaving it, core, Pqk and decays from factors.cu, b = beta, dO^ = scale dO:
//
//   dN = Pqk^T dO^ + e^(G_C - G) K dS'
//   dY = dN + core^T (b dN)
//   dS = e^(G_C) dS' + Q^T (e^G dO^) - K^T (e^G b dY)
//
// or with a gate per key channel (HAS_GATE = 2), whose decays are in the rows, as in forward.cu,
//
//   dN = Pqk^T dO^ + K^ dS'       dS = diag(e^(G_C)) dS' + Q~^T dO^ - K~^T (b dY)
//
// with G the running sum of g in the chunk (all decays 1 without a gate, tiles/decay.cuh). dY = (I + A)^-T dN is the
// adjoint of the triangular solve; b dY is the gradient of V. dS' of every chunk, (V, K), and dY are written for
// backward_chunk.cu, which needs nothing else of this walk.
//
// Numbers: dS lives in float accumulators and is never rounded between chunks; operands of products are rounded to
// DTYPE, sums are float (float: 3xTF32). Everything is held transposed, rows = value channels, as in forward.cu.
//
// Macros: DTYPE, HEAD_K, HEAD_V, CHUNK, HAS_GATE, VARLEN, STATE_VK (layout of dfinal_state and dinitial_state),
// WARPS, ROW_TILES.
// Grid: N * HV * slices blocks of 32 WARPS threads; a slice is 16 ROW_TILES WARPS value channels.
// Shared memory: two stages of K, Q and dO tiles, core, Pqk, beta and decays of a chunk, or of K^ in place of K and Q
// and then one of these; see
// cupy_delta/cuda/portable/backward.py.
#include "portable/walk.cuh"

// Ties loads to the step they serve where registers are short: hoisted, they would spill. Elsewhere they may be early.
PRIM void order_loads() {
  if constexpr (CHUNK == 64 || sizeof(DTYPE) == 4) __syncwarp();
}

// ---- what is read ------------------------------------------------------------------------------

struct Stage {
  DTYPE *k_write, *d_o, *core, *p;
  DTYPE *k, *q;  // of reads; per key channel one tile each for both stages, k_write else
  float* beta;
  DecayFactors decays;
};

PRIM Stage take_stage(DynSmem& smem) {
  Stage s = {};
  s.k = s.k_write = smem.take<DTYPE>(CHUNK * K_PITCH, "k");
  if constexpr (!PER_CHANNEL) s.q = smem.take<DTYPE>(CHUNK * K_PITCH, "q");
  s.d_o = smem.take<DTYPE>(CHUNK * V_PITCH, "do");
  s.core = smem.take<DTYPE>(CHUNK * C_PITCH, "core");
  s.p = smem.take<DTYPE>(CHUNK * C_PITCH, "p");
  s.beta = smem.take<float>(CHUNK, "beta");
  s.decays = DecayFactors::take(smem);
  return s;
}

// What all blocks of a launch share.
struct Inputs {
  const DTYPE *q, *k, *k_write, *core, *p, *d_o;
  const float* beta;
  ChunkFactors decays;
};

PRIM void load_chunk(const Stage& s, const Inputs& in, const Loader& load) {
  load.keys(s.k_write, in.k_write);
  if constexpr (!PER_CHANNEL) load.keys(s.q, in.q);
  load.values(s.d_o, in.d_o);
  load.pairs(s.core, in.core);
  load.pairs(s.p, in.p);
  load.beta(s.beta, in.beta);
  load.decays(s.decays, in.decays);
}

// Rows that are read last, with a gate per key channel others than those that are written.
PRIM void load_reads(const Stage& s, const Inputs& in, const Loader& load) {
  load.keys(s.k, in.k);
  load.keys(s.q, in.q);
  cp_async_commit();
}

// ---- products of 16 value channels -------------------------------------------------------------

// Sums by the tokens of a chunk, and by key channels.
typedef float TokenSums[C_TILES][4];
typedef float StateSums[K_TILES][4];

// d += a L for a left operand of one step and lower triangular L: later columns of the step are zero.
PRIM void multiply_upper(TokenSums& d, const Product::A& a, const DTYPE* L, int step, int lane) {
#pragma unroll
  for (int n = 0; n <= (step * Product::DEPTH + Product::DEPTH - 1) / 16; n++) {
    typename Product::B b;
    Product::load_b_transposed(b, L + step * Product::DEPTH * C_PITCH + n * 16, C_PITCH, lane);
    Product::multiply(d[2 * n], d[2 * n + 1], a, b);
  }
}

// d = dS rows^T for a tile of K columns.
PRIM void multiply_state(TokenSums& d, const StateSums& dS, const DTYPE* rows, int lane) {
  clear(d);
#pragma unroll
  for (int step = 0; step < KP / Product::DEPTH; step++) {
    typename Product::A a;
    Product::from_sums(a, dS, step);
    order_loads();
#pragma unroll
    for (int j = 0; j < CHUNK / 16; j++) {
      typename Product::B b;
      Product::load_b(b, rows + j * 16 * K_PITCH + step * Product::DEPTH, K_PITCH, lane);
      Product::multiply(d[2 * j], d[2 * j + 1], a, b);
    }
  }
}

// dS += a rows for a left operand of one step and a tile of K columns.
PRIM void add_to_state(StateSums& dS, const Product::A& a, const DTYPE* rows, int step, int lane) {
#pragma unroll
  for (int j = 0; j < KP / 16; j++) {
    typename Product::B b;
    Product::load_b_transposed(b, rows + step * Product::DEPTH * K_PITCH + j * 16, K_PITCH, lane);
    Product::multiply(dS[2 * j], dS[2 * j + 1], a, b);
  }
}

// ---- the walk ----------------------------------------------------------------------------------

// 16 value channels of dS on their way through the chunks.
struct Walker {
  StateSums& dS;
  const float scale;
  const int row, value, lane;  // the first value channel in the slice, and in the head

  // The gradient of the state that the sequence leaves, or zero.
  PRIM void enter(const float* dfinal_state) {
    clear(dS);
    if (dfinal_state == nullptr) return;
#pragma unroll
    for (int j = 0; j < K_TILES; j++) load_state(dS[j], dfinal_state, value, j * 8, lane);
  }

  // From the gradient of the state that leaves a chunk to that of the one that enters it.
  PRIM void step(const Stage& s, DTYPE* dstate, DTYPE* dy, int tokens, int HV) {
    keep_state(dstate);
    TokenSums dN, dY;
    add_outputs(dN, s);
    multiply_state(dY, dS, s.k_write, lane);
    solve(dN, dY, s);
    write_rows(dy, dY, tokens, HV);
    if constexpr (PER_CHANNEL) {
      // All but what is loaded for the next chunk.
      cp_async_wait<1>();
      __syncthreads();
    }
    update(dY, s, tokens);
  }

  // dS' as (V, K).
  PRIM void keep_state(DTYPE* dstate) const {
#pragma unroll
    for (int j = 0; j < K_TILES; j++)
      store_rows<DTYPE, HEAD_K>(dstate + value * HEAD_K + j * 8, dS[j], HEAD_V - value, HEAD_K - j * 8, lane);
  }

  // A of dO^T, tokens of one step.
  PRIM void load_gradient(Product::A& a, const Stage& s, int step) const {
    Product::load_a_transposed(a, s.d_o + step * Product::DEPTH * V_PITCH + row, V_PITCH, lane);
  }

  // dN^T = dO^T Pqk, yet without scale.
  PRIM void add_outputs(TokenSums& dN, const Stage& s) const {
    clear(dN);
#pragma unroll
    for (int step = 0; step < CHUNK / Product::DEPTH; step++) {
      typename Product::A a;
      load_gradient(a, s, step);
      multiply_upper(dN, a, s.p, step, lane);
    }
  }

  // From (K dS')^T in dY: dN is complete with its columns decayed, dY^T = dN^T + (b dN)^T core; dN becomes b dN.
  PRIM void solve(TokenSums& dN, TokenSums& dY, const Stage& s) const {
#pragma unroll
    for (int j = 0; j < C_TILES; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int t = sum_column(lane, j, i);
        dY[j][i] = scale * dN[j][i] + s.decays.write(t) * dY[j][i];
        dN[j][i] = s.beta[t] * dY[j][i];
      }
#pragma unroll
    for (int step = 0; step < CHUNK / Product::DEPTH; step++) {
      typename Product::A a;
      Product::from_sums(a, dN, step);
      order_loads();
      multiply_upper(dY, a, s.core, step, lane);
    }
  }

  // dy[token][channel], for the tokens of a chunk.
  PRIM void write_rows(DTYPE* dy, const TokenSums& dY, int tokens, int HV) const {
#pragma unroll
    for (int j = 0; j < C_TILES; j++)
      store_transposed<DTYPE, HEAD_V>(dy + (int64_t)j * 8 * HV * HEAD_V, (int64_t)HV * HEAD_V, dY[j], HEAD_V - value,
                                      tokens - j * 8, lane);
  }

  // dS^T = dS'^T + scale dO^T Q - (b dY)^T K, all decayed; dY becomes -b dY. Operands are decayed since the first
  // token: that token's own decay, which may be too small for 16 bits, comes to the sums of dS.
  PRIM void update(TokenSums& dY, const Stage& s, int tokens) {
    const float unit = s.decays.read(0), per_unit = unit > 1e-37f ? 1.0f / unit : 0.0f;
#pragma unroll
    for (int j = 0; j < C_TILES; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int t = sum_column(lane, j, i);
        dY[j][i] *= -s.beta[t] * (s.decays.read(t) * per_unit);
      }
    scale_state([&](int key) { return s.decays.carry(tokens, key) * per_unit; });
#pragma unroll
    for (int step = 0; step < CHUNK / Product::DEPTH; step++) {
      const int first = step * Product::DEPTH;
      typename Product::A a;
      load_gradient(a, s, step);
      Product::scale_columns(a, [&](int k) { return scale * (s.decays.read(first + k) * per_unit); }, lane);
      add_to_state(dS, a, s.q, step, lane);
      order_loads();
      Product::from_sums(a, dY, step);
      add_to_state(dS, a, s.k, step, lane);
    }
    scale_state([&](int) { return unit; });
  }

  template <class F>
  PRIM void scale_state(F factor) {
#pragma unroll
    for (int j = 0; j < K_TILES; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) dS[j][i] *= factor(sum_column(lane, j, i));
  }

  PRIM void leave(float* dinitial_state) const {
#pragma unroll
    for (int j = 0; j < K_TILES; j++) store_state(dinitial_state, dS[j], value, j * 8, lane);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    backward_state(const DTYPE* q, const DTYPE* k, const DTYPE* core, const DTYPE* p, const float* beta,
                   const float2* decays,
#if HAS_GATE == 2
                   const DTYPE* k_write, const float* channel_decays,
#endif
                   const DTYPE* d_o, const float* dfinal_state, const int64_t* cu_seqlens, DTYPE* dstates, DTYPE* dy,
                   float* dinitial_state, float scale, int T, int H, int HV) {
  const int thread = threadIdx.x, lane = thread % 32, row = thread / 32 * ROW_TILES * 16;
  const Work work = find_work(cu_seqlens, Cut{1}, 1, T, H, HV);
#if HAS_GATE == 2
  const Inputs inputs = {q, k, k_write, core, p, d_o, beta, {nullptr, channel_decays}};
#else
  const Inputs inputs = {q, k, k, core, p, d_o, beta, {decays, nullptr}};
#endif
  const int64_t state_at = work.state(work.n);
  DynSmem smem;
  Stage first_stage = take_stage(smem), second_stage = take_stage(smem);
  if constexpr (PER_CHANNEL) {
    first_stage.k = second_stage.k = smem.take<DTYPE>(CHUNK * K_PITCH, "k to read");
    first_stage.q = second_stage.q = smem.take<DTYPE>(CHUNK * K_PITCH, "q");
  }
  smem.all_taken(SHARED_BYTES);

  float dS[ROW_TILES][K_TILES][4];
  const int value = work.slice * SLICE + row;
  auto walker = [&](int m) { return Walker{dS[m], scale, row + m * 16, value + m * 16, lane}; };
#pragma unroll
  for (int m = 0; m < ROW_TILES; m++) walker(m).enter(dfinal_state == nullptr ? nullptr : dfinal_state + state_at);
  const int chunks = work.chunks();
  if (chunks > 0)
    load_chunk(first_stage, inputs, Loader(work, chunks - 1, work.token(chunks - 1), work.tokens(chunks - 1), thread));
  cp_async_commit();
  for (int i = 0; i < chunks; i++) {
    const int c = chunks - 1 - i, tokens = work.tokens(c);
    const int64_t token = work.token(c);
    const Stage stage = i % 2 ? second_stage : first_stage, next = i % 2 ? first_stage : second_stage;
    // This stage has arrived, and everyone is done with the other.
    cp_async_wait<0>();
    __syncthreads();
    if constexpr (PER_CHANNEL) load_reads(stage, inputs, Loader(work, c, token, tokens, thread));
    if (c > 0) load_chunk(next, inputs, Loader(work, c - 1, token - CHUNK, CHUNK, thread));
    cp_async_commit();
    DTYPE* rows = dy + (token * HV + work.hv) * HEAD_V + value;
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) walker(m).step(stage, dstates + work.chunk_state(c), rows + m * 16, tokens, HV);
  }
  cp_async_wait<0>();
#pragma unroll
  for (int m = 0; m < ROW_TILES; m++) walker(m).leave(dinitial_state + state_at);
}
