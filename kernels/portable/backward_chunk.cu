// The gradients of q, k, v, beta and g, all chunks in parallel. Per chunk and value head, with S the state entering it,
// dS' the gradient of the state leaving it and dY from backward_state.cu, N^ from forward.cu, b = beta, and for i >= j
// D_ij = e^(G_i - G_j), G the running sum of g in the chunk (1 without a gate, tiles/decay.cuh):
//
//   N = b N^      dV = dR = b dY      dbeta = rowsum(dY . N^)
//   dPqk = tril(dO N^T . D)      E = -tril(dR N^T . D, -1)
//   dQ = scale (e^G dO S^T + dPqk K)
//   dK = scale dPqk^T Q + e^(G_C - G) N dS'^T - e^G dR S^T + (E + E^T) K
//
// and dg as in gate_gradient.cuh, with
//
//   Z = scale dPqk . Q K^T + E . K K^T
//   rho = rowsum(e^G (scale Q . dO S^T - K . dR S^T))      omega = rowsum(e^(G_C - G) K . N dS'^T)
//
// Nothing is divided by beta, so beta = 0 is exact. dQ and dK are summed over the value heads of a key head in
// registers, in their order: no atomics, the same bits every time.
//
// Numbers: operands of products in DTYPE, sums in float (float: 3xTF32) and decayed there, results rounded once; dbeta
// and dg in float.
//
// Macros: DTYPE, HEAD_K, HEAD_V, CHUNK, HAS_GATE, VARLEN, WARPS (a multiple of CHUNK / 16), SLICE (value channels
// at a time, a multiple of 16).
// Grid: slots * H blocks of 32 WARPS threads.
// Shared memory: Q and K tiles; slices of S, dS', dO, N and -dR; three CHUNK x CHUNK matrices; beta and dbeta; with
// a gate G and the sums of gate_gradient.cuh; see
// cupy_delta/cuda/portable/backward.py.
#include "portable/gate_gradient.cuh"
#include "portable/value_rows.cuh"
#include "tiles/decay.cuh"
#include "tiles/fragments.cuh"
#include "tiles/load.cuh"
#include "tiles/sequence.cuh"

// Blocks per multiprocessor, as registers allow.
constexpr int BLOCKS = WARPS == 8 ? 1 : Decay::GATED ? 2 : 3;
constexpr int KP = padded(HEAD_K), SLICES = (padded(HEAD_V) + SLICE - 1) / SLICE;
constexpr int K_PITCH = pitch_of<DTYPE>(KP), C_PITCH = pitch_of<DTYPE>(CHUNK);
constexpr int K_JOBS = (KP / 16 + ACROSS - 1) / ACROSS, C_JOBS = (ROWS + ACROSS - 1) / ACROSS;

// What is held of a chunk: Q and K, a slice of a value head, pairs of tokens, and what gates need.
struct Tiles {
  DTYPE *q, *k;
  DTYPE *s, *d, *o, *n, *r;  // S, dS', dO, N^ then N, dY then -dR
  DTYPE *pairs, *scaled_pairs, *symmetric;
  float* Z;  // before the pairs in their place, with the same pitch
  float *b, *b_sums;
  Decay decay;
  GateGradient gate;

  static PRIM Tiles take(DynSmem& smem) {
    Tiles x = {};
    x.q = smem.take<DTYPE>(CHUNK * K_PITCH, "q");
    x.k = smem.take<DTYPE>(CHUNK * K_PITCH, "k");
    x.s = smem.take<DTYPE>(SLICE * K_PITCH, "state");
    x.d = smem.take<DTYPE>(SLICE * K_PITCH, "dstate");
    x.o = smem.take<DTYPE>(CHUNK * V_PITCH, "do");
    x.n = smem.take<DTYPE>(CHUNK * V_PITCH, "n");
    x.r = smem.take<DTYPE>(CHUNK * V_PITCH, "minus dr");
    x.pairs = smem.take<DTYPE>(2 * CHUNK * C_PITCH, "dp and scaled dp");
    x.scaled_pairs = x.pairs + CHUNK * C_PITCH;
    x.Z = (float*)x.pairs;
    x.symmetric = smem.take<DTYPE>(CHUNK * C_PITCH, "e + e^t");
    x.b = smem.take<float>(CHUNK, "beta");
    x.b_sums = smem.take<float>(CHUNK, "dbeta");
    x.decay = Decay::take(smem);
    x.gate = GateGradient::take(smem);
    return x;
  }
};

struct Inputs {
  const DTYPE *corrections, *dy, *d_o, *states, *dstates;
};

// A value head of the chunk: its first row, its state, and elements from token to token.
struct Head {
  int64_t row, state, stride;
  int tokens;
};

// Loads a slice of values. The caller commits and waits.
PRIM void load_slice(const Tiles& x, const Inputs& in, const Head& head, int first, int thread) {
  const int width = min(SLICE, HEAD_V - first), tokens = head.tokens;
  const int64_t at = head.row * HEAD_V + first, state = head.state + first * HEAD_K;
  load_tile<DTYPE, SLICE, KP, HEAD_K, THREADS>(x.s, in.states + state, HEAD_K, width, HEAD_K, thread);
  load_tile<DTYPE, SLICE, KP, HEAD_K, THREADS>(x.d, in.dstates + state, HEAD_K, width, HEAD_K, thread);
  load_tile<DTYPE, CHUNK, SLICE, HEAD_V, THREADS>(x.o, in.d_o + at, head.stride, tokens, width, thread);
  load_tile<DTYPE, CHUNK, SLICE, HEAD_V, THREADS>(x.n, in.corrections + at, head.stride, tokens, width, thread);
  load_tile<DTYPE, CHUNK, SLICE, HEAD_V, THREADS>(x.r, in.dy + at, head.stride, tokens, width, thread);
}

// Sums of a warp: by key channels, and by the tokens of a chunk.
typedef float KeySums[K_JOBS][2][4];
typedef float PairSums[C_JOBS][2][4];

// d[job] += A^T B with A^T[row][k] = a[k][row], b[k][column].
PRIM void multiply_transposed_jobs(KeySums& d, const DTYPE* a, const DTYPE* b, const Share& mine) {
#pragma unroll
  for (int k = 0; k < CHUNK; k += Product::DEPTH) {
    Product::order_loads();
    typename Product::A fa;
    Product::load_a_transposed(fa, a + mine.row + k * C_PITCH, C_PITCH, mine.lane);
#pragma unroll
    for (int job = 0; job < K_JOBS; job++) {
      const int column = mine.column(job);
      if (column >= KP) continue;
      typename Product::B fb;
      Product::load_b_transposed(fb, b + k * K_PITCH + column, K_PITCH, mine.lane);
      Product::multiply(d[job][0], d[job][1], fa, fb);
    }
  }
}

// sum += diag(factor) A B for a slice of values, `factor` for the two rows of a thread. With a gate, dots[h] += weight
// * the dot products of what is added with the rows of `keys`, the part of this lane.
struct Decayed {
  const DTYPE* keys;
  float weight, factor[2];

  PRIM void multiply(KeySums& sum, float (&dots)[2], const DTYPE* a, const DTYPE* b, const Share& mine) const {
    if constexpr (!Decay::GATED) {
      multiply_jobs<K_JOBS, SLICE, false>(sum, a, V_PITCH, b, K_PITCH, KP, mine);
      return;
    }
    const int lane = mine.lane;
    KeySums product;
    clear_jobs(product);
    multiply_jobs<K_JOBS, SLICE, false>(product, a, V_PITCH, b, K_PITCH, KP, mine);
#pragma unroll
    for (int job = 0; job < K_JOBS; job++) {
      const int first = mine.column(job);
      if (first >= KP) continue;
      __syncwarp();  // so that few keys are loaded at a time: registers are short
#pragma unroll
      for (int j = 0; j < 2; j++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int row = mine.row + sum_row(lane, 2 * h);
          const float2 key = load_pair(&keys[row * K_PITCH + first + sum_column(lane, j, 0)]);
          const float x = factor[h] * product[job][j][2 * h], y = factor[h] * product[job][j][2 * h + 1];
          sum[job][j][2 * h] += x;
          sum[job][j][2 * h + 1] += y;
          dots[h] += weight * (x * key.x + y * key.y);
        }
    }
  }
};

// d = A B^T over all key channels, for 16 rows of either; in a loop, since registers are short.
PRIM void multiply_keys(float (&d)[2][4], const DTYPE* a, const DTYPE* b, int lane) {
  clear(d);
#pragma unroll 1
  for (int k = 0; k < KP; k += 16) multiply_tiles<DTYPE, 2, 16, false>(d, a + k, K_PITCH, b + k, K_PITCH, lane);
}

// The part that this lane has of <S, dS'>, the trace of S dS'^T, over a slice of values.
PRIM float dot_states(const DTYPE* states, const DTYPE* dstates, int thread) {
  const int lane = thread % 32;
  float sum = 0.0f;
#pragma unroll 1
  for (int tile = thread / 32; tile < SLICE / 16; tile += WARPS) {
    float d[2][4];
    multiply_keys(d, states + tile * 16 * K_PITCH, dstates + tile * 16 * K_PITCH, lane);
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (sum_row(lane, i) == sum_column(lane, j, i)) sum += d[j][i];
  }
  return sum;
}

// What a warp has of a value head: dPqk and E, and of the gate's gradient reads and writes of its rows, and states.
struct Pairs {
  PairSums dPqk, E;
  float rho[2] = {}, omega[2] = {}, state_dot = 0.0f;

  // Adds a slice of values, to dQ and dK too.
  PRIM void add(KeySums& sum_q, KeySums& sum_k, const Tiles& x, float scale, const Share& mine) {
    multiply_jobs<C_JOBS, SLICE, true>(dPqk, x.o, V_PITCH, x.n, V_PITCH, mine.row + 16, mine);
    multiply_jobs<C_JOBS, SLICE, true>(E, x.r, V_PITCH, x.n, V_PITCH, mine.row + 16, mine);
    const int row = mine.row + mine.lane / 4;
    const float read[2] = {x.decay.read(row), x.decay.read(row + 8)};
    const float write[2] = {x.decay.write(row), x.decay.write(row + 8)};
    Decayed{x.q, scale, {read[0], read[1]}}.multiply(sum_q, rho, x.o, x.s, mine);
    Decayed{x.k, 1.0f, {write[0], write[1]}}.multiply(sum_k, omega, x.n, x.d, mine);
    Decayed{x.k, 1.0f, {read[0], read[1]}}.multiply(sum_k, rho, x.r, x.s, mine);
  }

  // dPqk and E with their decays, and Z, what their pairs are to the gate.
  PRIM void decay(const Tiles& x, float scale, const Share& mine) {
    const int row = mine.row, lane = mine.lane;
#pragma unroll
    for (int job = 0; job < C_JOBS; job++) {
      const int first = mine.column(job);
      if (first > row) continue;  // the whole warp
      float qk[2][4], kk[2][4];
      multiply_keys(qk, x.q + row * K_PITCH, x.k + first * K_PITCH, lane);
      multiply_keys(kk, x.k + row * K_PITCH, x.k + first * K_PITCH, lane);
#pragma unroll
      for (int j = 0; j < 2; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int r = row + sum_row(lane, i), column = first + sum_column(lane, j, i);
          const float factor = x.decay.pair(max(r, column), min(r, column));
          float &dp = dPqk[job][j][i], &e = E[job][j][i];
          dp *= factor;
          e *= factor;
          x.Z[r * C_PITCH + column] = scale * dp * qk[j][i] + e * kk[j][i];
        }
    }
  }

  // To shared memory: dPqk, scale dPqk and E + E^T.
  PRIM void store(const Tiles& x, float scale, const Share& mine) const {
#pragma unroll
    for (int job = 0; job < C_JOBS; job++)
#pragma unroll
      for (int j = 0; j < 2; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int column = mine.column(job) + sum_column(mine.lane, j, i), r = mine.row + sum_row(mine.lane, i);
          if (column >= CHUNK) continue;
          const float pair = column <= r ? dPqk[job][j][i] : 0.0f;
          x.pairs[r * C_PITCH + column] = narrow<DTYPE>(pair);
          x.scaled_pairs[r * C_PITCH + column] = narrow<DTYPE>(scale * pair);
          if (column > r) continue;
          const DTYPE e = narrow<DTYPE>(column < r ? E[job][j][i] : 0.0f);
          x.symmetric[r * C_PITCH + column] = e;
          if (column < r) x.symmetric[column * C_PITCH + r] = e;
        }
  }
};

PRIM void write_jobs(DTYPE* out, int64_t stride, const KeySums& d, float factor, int tokens, const Share& mine) {
#pragma unroll
  for (int job = 0; job < K_JOBS; job++)
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int token = mine.row + sum_row(mine.lane, i), column = mine.column(job) + sum_column(mine.lane, j, i);
        if (token < tokens && column < HEAD_K) out[token * stride + column] = narrow<DTYPE>(factor * d[job][j][i]);
      }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    backward_chunk(const DTYPE* q, const DTYPE* k, const float* beta, const float* g, const DTYPE* corrections,
                   const DTYPE* dy, const DTYPE* d_o, const DTYPE* states, const DTYPE* dstates,
                   const int64_t* cu_seqlens, DTYPE* dq, DTYPE* dk, DTYPE* dv, float* dbeta, float* dg, float scale,
                   int N, int T, int H, int HV) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int h = blockIdx.x % H, groups = HV / H;
  const int64_t slot = blockIdx.x / H;
  const Chunk chunk = find_chunk<CHUNK>(cu_seqlens, slot, N, T);
  if (chunk.tokens <= 0) return;
  const Share mine(thread);
  const Inputs inputs = {corrections, dy, d_o, states, dstates};
  DynSmem smem;
  const Tiles x = Tiles::take(smem);
  smem.all_taken(SHARED_BYTES);

  const int64_t key = (chunk.first * H + h) * HEAD_K, key_stride = (int64_t)H * HEAD_K;
  load_tile<DTYPE, CHUNK, KP, HEAD_K, THREADS>(x.q, q + key, key_stride, chunk.tokens, HEAD_K, thread);
  load_tile<DTYPE, CHUNK, KP, HEAD_K, THREADS>(x.k, k + key, key_stride, chunk.tokens, HEAD_K, thread);
  KeySums sum_q, sum_k;
  clear_jobs(sum_q);
  clear_jobs(sum_k);
  for (int group = 0; group < groups; group++) {
    const int hv = h * groups + group;
    const Head head = {chunk.first * HV + hv, (slot * HV + hv) * HEAD_K * HEAD_V, (int64_t)HV * HEAD_V, chunk.tokens};
    Pairs pairs;
    clear_jobs(pairs.dPqk);
    clear_jobs(pairs.E);
    load_column<CHUNK, THREADS>(x.b, beta + head.row, HV, chunk.tokens, thread);
    if (warp == 0) x.decay.sum(g + head.row, HV, chunk.tokens, lane);
    for (int slice = 0; slice < SLICES; slice++) {
      const int first = slice * SLICE;
      load_slice(x, inputs, head, first, thread);
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
      DTYPE* rows = dv + head.row * HEAD_V + first;
      weigh_rows(x.n, x.r, x.b, x.b_sums, slice == 0,
                 {rows, head.stride, true, chunk.tokens, min(SLICE, HEAD_V - first)}, thread);
      __syncthreads();
      pairs.add(sum_q, sum_k, x, scale, mine);
      if constexpr (Decay::GATED) pairs.state_dot += dot_states(x.s, x.d, thread);
      __syncthreads();
    }
    if (thread < chunk.tokens) dbeta[head.row + (int64_t)thread * HV] = x.b_sums[thread];

    if constexpr (Decay::GATED) {
      pairs.decay(x, scale, mine);
      x.gate.put_rows(pairs.rho, pairs.omega, mine.row, mine.across, lane);
      x.gate.put_state(pairs.state_dot, warp, lane);
      __syncthreads();
      x.gate.put_pairs(x.Z, C_PITCH, warp, lane);
      __syncthreads();
      if (thread < chunk.tokens) dg[head.row + (int64_t)thread * HV] = x.gate.sum(thread, x.decay.carry());
    }
    pairs.store(x, scale, mine);
    __syncthreads();
    multiply_jobs<K_JOBS, CHUNK, false>(sum_q, x.pairs, C_PITCH, x.k, K_PITCH, KP, mine);
    multiply_jobs<K_JOBS, CHUNK, false>(sum_k, x.symmetric, C_PITCH, x.k, K_PITCH, KP, mine);
    multiply_transposed_jobs(sum_k, x.scaled_pairs, x.q, mine);
    __syncthreads();
  }
  write_jobs(dq + key, key_stride, sum_q, scale, chunk.tokens, mine);
  write_jobs(dk + key, key_stride, sum_k, 1.0f, chunk.tokens, mine);
}
