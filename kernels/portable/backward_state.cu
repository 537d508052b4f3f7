// The walk backwards over the chunks of a sequence: the gradient dS of the state. Per chunk, from the last to the
// first, with dS' the gradient of the state leaving it, core, Pqk and decays from factors.cu, b = beta, dO^ = scale dO:
//
//   dN = Pqk^T dO^ + e^(G_C - G) K dS'
//   dY = dN + core^T (b dN)
//   dS = e^(G_C) dS' + Q^T (e^G dO^) - K^T (e^G b dY)
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
// Shared memory: two stages of K, Q and dO tiles, core, Pqk, beta and decays of a chunk; see
// cupy_delta/cuda/portable/backward.py.
#include "tiles/decay.cuh"
#include "tiles/fragments.cuh"
#include "tiles/load.cuh"
#include "tiles/sequence.cuh"
#include "tiles/store.cuh"

typedef Mma<DTYPE> Product;
constexpr int THREADS = 32 * WARPS, SLICE = 16 * ROW_TILES * WARPS;
constexpr int KP = padded(HEAD_K), SLICES = (padded(HEAD_V) + SLICE - 1) / SLICE;
constexpr int K_PITCH = pitch_of<DTYPE>(KP), V_PITCH = pitch_of<DTYPE>(SLICE), C_PITCH = pitch_of<DTYPE>(CHUNK);
constexpr int C_TILES = CHUNK / 8, K_TILES = KP / 8;

// Ties loads to the step they serve where registers are short: hoisted, they would spill. Elsewhere they may be early.
PRIM void order_loads() {
  if constexpr (CHUNK == 64 || sizeof(DTYPE) == 4) __syncwarp();
}

struct Stage {
  DTYPE *k, *q, *d_o, *core, *p;
  float* beta;
  DecayFactors decays;
};

PRIM Stage take_stage(DynSmem& smem) {
  Stage s;
  s.k = smem.take<DTYPE>(CHUNK * K_PITCH, "k");
  s.q = smem.take<DTYPE>(CHUNK * K_PITCH, "q");
  s.d_o = smem.take<DTYPE>(CHUNK * V_PITCH, "do");
  s.core = smem.take<DTYPE>(CHUNK * C_PITCH, "core");
  s.p = smem.take<DTYPE>(CHUNK * C_PITCH, "p");
  s.beta = smem.take<float>(CHUNK, "beta");
  s.decays = DecayFactors::take(smem);
  return s;
}

struct Inputs {
  const DTYPE *q, *k, *core, *p, *d_o;
  const float* beta;
  const float2* decays;
};

PRIM void load_chunk(const Stage& s, const Inputs& in, int64_t first, int tokens, int h, int hv, int slice, int H,
                     int HV, int thread) {
  const int64_t key = first * H + h, value = first * HV + hv;
  load_tile<DTYPE, CHUNK, KP, HEAD_K, THREADS>(s.k, in.k + key * HEAD_K, (int64_t)H * HEAD_K, tokens, HEAD_K, thread);
  load_tile<DTYPE, CHUNK, KP, HEAD_K, THREADS>(s.q, in.q + key * HEAD_K, (int64_t)H * HEAD_K, tokens, HEAD_K, thread);
  load_tile<DTYPE, CHUNK, SLICE, HEAD_V, THREADS>(s.d_o, in.d_o + value * HEAD_V + slice * SLICE, (int64_t)HV * HEAD_V,
                                                  tokens, min(SLICE, HEAD_V - slice * SLICE), thread);
  load_tile<DTYPE, CHUNK, CHUNK, CHUNK, THREADS>(s.core, in.core + value * CHUNK, (int64_t)HV * CHUNK, tokens, CHUNK,
                                                 thread);
  load_tile<DTYPE, CHUNK, CHUNK, CHUNK, THREADS>(s.p, in.p + value * CHUNK, (int64_t)HV * CHUNK, tokens, CHUNK, thread);
  load_column<CHUNK, THREADS>(s.beta, in.beta + value, HV, tokens, thread);
  s.decays.load<THREADS>(in.decays + value, HV, tokens, thread);
}

// d (16 x CHUNK) += a L for a left operand of one step and lower triangular L: later columns of the step are zero.
PRIM void multiply_upper(float (&d)[C_TILES][4], const Product::A& a, const DTYPE* L, int step, int lane) {
#pragma unroll
  for (int n = 0; n <= (step * Product::DEPTH + Product::DEPTH - 1) / 16; n++) {
    typename Product::B b;
    Product::load_b_transposed(b, L + step * Product::DEPTH * C_PITCH + n * 16, C_PITCH, lane);
    Product::multiply(d[2 * n], d[2 * n + 1], a, b);
  }
}

// dS (16 x K) += a rows for a left operand of one step and a tile of K columns.
PRIM void multiply_into_state(float (&dS)[K_TILES][4], const Product::A& a, const DTYPE* rows, int step, int lane) {
#pragma unroll
  for (int j = 0; j < KP / 16; j++) {
    typename Product::B b;
    Product::load_b_transposed(b, rows + step * Product::DEPTH * K_PITCH + j * 16, K_PITCH, lane);
    Product::multiply(dS[2 * j], dS[2 * j + 1], a, b);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    backward_state(const DTYPE* q, const DTYPE* k, const DTYPE* core, const DTYPE* p, const float* beta,
                   const float2* decays, const DTYPE* d_o, const float* dfinal_state, const int64_t* cu_seqlens,
                   DTYPE* dstates, DTYPE* dy, float* dinitial_state, float scale, int T, int H, int HV) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int slice = blockIdx.x % SLICES, hv = blockIdx.x / SLICES % HV, n = blockIdx.x / (SLICES * HV);
  const int h = hv / (HV / H);
  const int row = warp * ROW_TILES * 16, value = slice * SLICE + row;  // first value channel of this warp
  const Sequence sequence = find_sequence<CHUNK>(cu_seqlens, n, T);
  const int chunks = (sequence.tokens + CHUNK - 1) / CHUNK;
  const int64_t state_at = ((int64_t)n * HV + hv) * HEAD_K * HEAD_V;
  const Inputs inputs = {q, k, core, p, d_o, beta, decays};

  DynSmem smem;
  Stage first_stage = take_stage(smem), second_stage = take_stage(smem);
  smem.all_taken(SHARED_BYTES);

  float dS[ROW_TILES][K_TILES][4];
#pragma unroll
  for (int m = 0; m < ROW_TILES; m++) {
    clear(dS[m]);
    if (dfinal_state != nullptr) {
#pragma unroll
      for (int j = 0; j < K_TILES; j++) load_state(dS[m][j], dfinal_state + state_at, value + m * 16, j * 8, lane);
    }
  }

  if (chunks > 0)
    load_chunk(first_stage, inputs, sequence.first + (int64_t)(chunks - 1) * CHUNK,
               sequence.tokens - (chunks - 1) * CHUNK, h, hv, slice, H, HV, thread);
  cp_async_commit();
  for (int i = 0; i < chunks; i++) {
    const int c = chunks - 1 - i;
    const Stage stage = i % 2 ? second_stage : first_stage, next = i % 2 ? first_stage : second_stage;
    const int64_t token = sequence.first + (int64_t)c * CHUNK;
    const int tokens = min(sequence.tokens - c * CHUNK, CHUNK);
    // This stage has arrived, and everyone is done with the other.
    cp_async_wait<0>();
    __syncthreads();
    if (c > 0) load_chunk(next, inputs, token - CHUNK, CHUNK, h, hv, slice, H, HV, thread);
    cp_async_commit();

    DTYPE* dstate = dstates + ((sequence.slot + c) * HV + hv) * HEAD_K * HEAD_V;
    DTYPE* g_out = dy + (token * HV + hv) * HEAD_V + value;
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
      for (int j = 0; j < K_TILES; j++)
        store_rows<DTYPE, HEAD_K>(dstate + (value + m * 16) * HEAD_K + j * 8, dS[m][j], HEAD_V - value - m * 16,
                                  HEAD_K - j * 8, lane);

      // dN^T is scale dO^T Pqk + dS'^T K^T, columns of the latter decayed; dY holds the latter until it is added.
      float dN[C_TILES][4], dY[C_TILES][4];
      clear(dN);
#pragma unroll
      for (int step = 0; step < CHUNK / Product::DEPTH; step++) {
        typename Product::A a;
        Product::load_a_transposed(a, stage.d_o + step * Product::DEPTH * V_PITCH + row + m * 16, V_PITCH, lane);
        multiply_upper(dN, a, stage.p, step, lane);
      }
      clear(dY);
#pragma unroll
      for (int step = 0; step < KP / Product::DEPTH; step++) {
        typename Product::A a;
        Product::from_sums(a, dS[m], step);
        order_loads();
#pragma unroll
        for (int j = 0; j < CHUNK / 16; j++) {
          typename Product::B b;
          Product::load_b(b, stage.k + j * 16 * K_PITCH + step * Product::DEPTH, K_PITCH, lane);
          Product::multiply(dY[2 * j], dY[2 * j + 1], a, b);
        }
      }

      // dY^T = dN^T + (b dN)^T core; dN becomes b dN; at the end dY becomes -b dY, decayed since the first token: that
      // token's own decay, which may be too small for 16 bits, comes to the sums of dS.
      const float unit = stage.decays.read(0), per_unit = unit > 1e-37f ? 1.0f / unit : 0.0f;
#pragma unroll
      for (int j = 0; j < C_TILES; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int t = sum_column(lane, j, e);
          dY[j][e] = scale * dN[j][e] + stage.decays.write(t) * dY[j][e];
          dN[j][e] = stage.beta[t] * dY[j][e];
        }
#pragma unroll
      for (int step = 0; step < CHUNK / Product::DEPTH; step++) {
        typename Product::A a;
        Product::from_sums(a, dN, step);
        order_loads();
        multiply_upper(dY, a, stage.core, step, lane);
      }
#pragma unroll
      for (int j = 0; j < C_TILES; j++) {
        store_transposed<DTYPE, HEAD_V>(g_out + m * 16 + (int64_t)j * 8 * HV * HEAD_V, (int64_t)HV * HEAD_V, dY[j],
                                        HEAD_V - value - m * 16, tokens - j * 8, lane);
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int t = sum_column(lane, j, e);
          dY[j][e] *= -stage.beta[t] * (stage.decays.read(t) * per_unit);
        }
      }

      // dS^T = dS'^T + scale dO^T Q - (b dY)^T K, all decayed
      const float carry = stage.decays.carry(tokens) * per_unit;
#pragma unroll
      for (int j = 0; j < K_TILES; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) dS[m][j][e] *= carry;
#pragma unroll
      for (int step = 0; step < CHUNK / Product::DEPTH; step++) {
        const int first = step * Product::DEPTH;
        typename Product::A a;
        Product::load_a_transposed(a, stage.d_o + first * V_PITCH + row + m * 16, V_PITCH, lane);
        Product::scale_columns(a, [&](int k) { return scale * (stage.decays.read(first + k) * per_unit); }, lane);
        multiply_into_state(dS[m], a, stage.q, step, lane);
        order_loads();
        Product::from_sums(a, dY, step);
        multiply_into_state(dS[m], a, stage.k, step, lane);
      }
#pragma unroll
      for (int j = 0; j < K_TILES; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) dS[m][j][e] *= unit;
    }
  }
  cp_async_wait<0>();

#pragma unroll
  for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
    for (int j = 0; j < K_TILES; j++) store_state(dinitial_state + state_at, dS[m][j], value + m * 16, j * 8, lane);
}
