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

// d[job] += A^T B with A^T[row][k] = a[k][row], b[k][column].
PRIM void multiply_transposed_jobs(float (&d)[K_JOBS][2][4], const DTYPE* a, const DTYPE* b, int across, int lane) {
#pragma unroll
  for (int k = 0; k < CHUNK; k += Product::DEPTH) {
    Product::order_loads();
    typename Product::A fa;
    Product::load_a_transposed(fa, a + k * C_PITCH, C_PITCH, lane);
#pragma unroll
    for (int job = 0; job < K_JOBS; job++) {
      const int column = (across + job * ACROSS) * 16;
      if (column >= KP) continue;
      typename Product::B fb;
      Product::load_b_transposed(fb, b + k * K_PITCH + column, K_PITCH, lane);
      Product::multiply(d[job][0], d[job][1], fa, fb);
    }
  }
}

// sum += diag(factor) A B for a slice of values, rows from `row` on. With a gate, dots[h] += weight * the dot products
// of what is added with the rows of `keys`, the part of this lane.
PRIM void multiply_decayed(float (&sum)[K_JOBS][2][4], const DTYPE* a, const DTYPE* b, const float (&factor)[2],
                           const DTYPE* keys, float weight, float (&dots)[2], int row, int across, int lane) {
  if constexpr (!Decay::GATED) {
    multiply_jobs<K_JOBS, SLICE, false>(sum, a + row * V_PITCH, V_PITCH, b, K_PITCH, across, KP, lane);
  } else {
    float product[K_JOBS][2][4];
    clear_jobs(product);
    multiply_jobs<K_JOBS, SLICE, false>(product, a + row * V_PITCH, V_PITCH, b, K_PITCH, across, KP, lane);
#pragma unroll
    for (int job = 0; job < K_JOBS; job++) {
      const int first = (across + job * ACROSS) * 16;
      if (first >= KP) continue;
      __syncwarp();  // so that few keys are loaded at a time: registers are short
#pragma unroll
      for (int j = 0; j < 2; j++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const float2 key = load_pair(&keys[(row + sum_row(lane, 2 * h)) * K_PITCH + first + sum_column(lane, j, 0)]);
          const float x = factor[h] * product[job][j][2 * h], y = factor[h] * product[job][j][2 * h + 1];
          sum[job][j][2 * h] += x;
          sum[job][j][2 * h + 1] += y;
          dots[h] += weight * (x * key.x + y * key.y);
        }
    }
  }
}

// d = A B^T over all key channels, for 16 rows of either; in a loop, since registers are short.
PRIM void multiply_keys(float (&d)[2][4], const DTYPE* a, const DTYPE* b, int lane) {
  clear(d);
#pragma unroll 1
  for (int k = 0; k < KP; k += 16) multiply_tiles<DTYPE, 2, 16, false>(d, a + k, K_PITCH, b + k, K_PITCH, lane);
}

// The part that this lane has of <S, dS'>, the trace of S dS'^T, over a slice of values.
PRIM float dot_states(const DTYPE* states, const DTYPE* dstates, int warp, int lane) {
  float sum = 0.0f;
#pragma unroll 1
  for (int tile = warp; tile < SLICE / 16; tile += WARPS) {
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

// dPqk and E with their decays, and Z, what their pairs are to the gate.
PRIM void decay_pairs(float (&dPqk)[C_JOBS][2][4], float (&E)[C_JOBS][2][4], float* Z, const Decay& decay,
                      const DTYPE* tile_q, const DTYPE* tile_k, float scale, int row, int across, int lane) {
#pragma unroll
  for (int job = 0; job < C_JOBS; job++) {
    const int first = (across + job * ACROSS) * 16;
    if (first > row) continue;  // the whole warp
    float qk[2][4], kk[2][4];
    multiply_keys(qk, tile_q + row * K_PITCH, tile_k + first * K_PITCH, lane);
    multiply_keys(kk, tile_k + row * K_PITCH, tile_k + first * K_PITCH, lane);
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int r = row + sum_row(lane, i), column = first + sum_column(lane, j, i);
        const float factor = decay.pair(max(r, column), min(r, column));
        float &dp = dPqk[job][j][i], &e = E[job][j][i];
        dp *= factor;
        e *= factor;
        Z[r * C_PITCH + column] = scale * dp * qk[j][i] + e * kk[j][i];
      }
  }
}

PRIM void write_jobs(DTYPE* out, int64_t stride, const float (&d)[K_JOBS][2][4], float factor, int row, int tokens,
                     int across, int lane) {
#pragma unroll
  for (int job = 0; job < K_JOBS; job++)
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int token = row + sum_row(lane, i), column = (across + job * ACROSS) * 16 + sum_column(lane, j, i);
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
  const int row = warp % ROWS * 16, across = warp / ROWS;

  DynSmem smem;
  DTYPE* tile_q = smem.take<DTYPE>(CHUNK * K_PITCH, "q");
  DTYPE* tile_k = smem.take<DTYPE>(CHUNK * K_PITCH, "k");
  DTYPE* tile_s = smem.take<DTYPE>(SLICE * K_PITCH, "state");
  DTYPE* tile_d = smem.take<DTYPE>(SLICE * K_PITCH, "dstate");
  DTYPE* tile_o = smem.take<DTYPE>(CHUNK * V_PITCH, "do");
  DTYPE* tile_n = smem.take<DTYPE>(CHUNK * V_PITCH, "n");
  DTYPE* tile_r = smem.take<DTYPE>(CHUNK * V_PITCH, "minus dr");
  DTYPE* pairs = smem.take<DTYPE>(2 * CHUNK * C_PITCH, "dp and scaled dp");
  DTYPE* scaled_pairs = pairs + CHUNK * C_PITCH;
  float* Z = (float*)pairs;  // before them, with the same pitch
  DTYPE* symmetric = smem.take<DTYPE>(CHUNK * C_PITCH, "e + e^t");
  float* b = smem.take<float>(CHUNK, "beta");
  float* b_sums = smem.take<float>(CHUNK, "dbeta");
  const Decay decay = Decay::take(smem);
  const GateGradient gate = GateGradient::take(smem);
  smem.all_taken(SHARED_BYTES);

  const int64_t key_row = chunk.first * H + h;
  load_tile<DTYPE, CHUNK, KP, HEAD_K, THREADS>(tile_q, q + key_row * HEAD_K, (int64_t)H * HEAD_K, chunk.tokens, HEAD_K,
                                               thread);
  load_tile<DTYPE, CHUNK, KP, HEAD_K, THREADS>(tile_k, k + key_row * HEAD_K, (int64_t)H * HEAD_K, chunk.tokens, HEAD_K,
                                               thread);

  float sum_q[K_JOBS][2][4], sum_k[K_JOBS][2][4];
  clear_jobs(sum_q);
  clear_jobs(sum_k);
  for (int group = 0; group < groups; group++) {
    const int hv = h * groups + group;
    const int64_t value_row = chunk.first * HV + hv, state_at = (slot * HV + hv) * HEAD_K * HEAD_V;
    const int64_t stride = (int64_t)HV * HEAD_V;
    float dPqk[C_JOBS][2][4], E[C_JOBS][2][4];
    clear_jobs(dPqk);
    clear_jobs(E);
    float rho[2] = {}, omega[2] = {}, state_dot = 0.0f;
    load_column<CHUNK, THREADS>(b, beta + value_row, HV, chunk.tokens, thread);
    if (warp == 0) decay.sum(g + value_row, HV, chunk.tokens, lane);
    for (int slice = 0; slice < SLICES; slice++) {
      const int first = slice * SLICE, width = min(SLICE, HEAD_V - first);
      const int64_t at = value_row * HEAD_V + first;
      load_tile<DTYPE, SLICE, KP, HEAD_K, THREADS>(tile_s, states + state_at + first * HEAD_K, HEAD_K, width, HEAD_K,
                                                   thread);
      load_tile<DTYPE, SLICE, KP, HEAD_K, THREADS>(tile_d, dstates + state_at + first * HEAD_K, HEAD_K, width, HEAD_K,
                                                   thread);
      load_tile<DTYPE, CHUNK, SLICE, HEAD_V, THREADS>(tile_o, d_o + at, stride, chunk.tokens, width, thread);
      load_tile<DTYPE, CHUNK, SLICE, HEAD_V, THREADS>(tile_n, corrections + at, stride, chunk.tokens, width, thread);
      load_tile<DTYPE, CHUNK, SLICE, HEAD_V, THREADS>(tile_r, dy + at, stride, chunk.tokens, width, thread);
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();

      weigh_rows(tile_n, tile_r, b, b_sums, slice == 0, dv + at, stride, true, chunk.tokens, width, warp, lane);
      __syncthreads();

      multiply_jobs<C_JOBS, SLICE, true>(dPqk, tile_o + row * V_PITCH, V_PITCH, tile_n, V_PITCH, across, row + 16,
                                         lane);
      multiply_jobs<C_JOBS, SLICE, true>(E, tile_r + row * V_PITCH, V_PITCH, tile_n, V_PITCH, across, row + 16, lane);
      const float read[2] = {decay.read(row + lane / 4), decay.read(row + lane / 4 + 8)};
      const float write[2] = {decay.write(row + lane / 4), decay.write(row + lane / 4 + 8)};
      multiply_decayed(sum_q, tile_o, tile_s, read, tile_q, scale, rho, row, across, lane);
      multiply_decayed(sum_k, tile_n, tile_d, write, tile_k, 1.0f, omega, row, across, lane);
      multiply_decayed(sum_k, tile_r, tile_s, read, tile_k, 1.0f, rho, row, across, lane);
      if constexpr (Decay::GATED) state_dot += dot_states(tile_s, tile_d, warp, lane);
      __syncthreads();
    }
    if (thread < chunk.tokens) dbeta[value_row + (int64_t)thread * HV] = b_sums[thread];

    if constexpr (Decay::GATED) {
      decay_pairs(dPqk, E, Z, decay, tile_q, tile_k, scale, row, across, lane);
      gate.put_rows(rho, omega, row, across, lane);
      gate.put_state(state_dot, warp, lane);
      __syncthreads();
      gate.put_pairs(Z, C_PITCH, warp, lane);
      __syncthreads();
      if (thread < chunk.tokens) dg[value_row + (int64_t)thread * HV] = gate.sum(thread, decay.carry());
    }

#pragma unroll
    for (int job = 0; job < C_JOBS; job++)
#pragma unroll
      for (int j = 0; j < 2; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int column = (across + job * ACROSS) * 16 + sum_column(lane, j, i), r = row + sum_row(lane, i);
          if (column >= CHUNK) continue;
          const float pair = column <= r ? dPqk[job][j][i] : 0.0f;
          pairs[r * C_PITCH + column] = narrow<DTYPE>(pair);
          scaled_pairs[r * C_PITCH + column] = narrow<DTYPE>(scale * pair);
          if (column > r) continue;
          const DTYPE e = narrow<DTYPE>(column < r ? E[job][j][i] : 0.0f);
          symmetric[r * C_PITCH + column] = e;
          if (column < r) symmetric[column * C_PITCH + r] = e;
        }
    __syncthreads();
    multiply_jobs<K_JOBS, CHUNK, false>(sum_q, pairs + row * C_PITCH, C_PITCH, tile_k, K_PITCH, across, KP, lane);
    multiply_jobs<K_JOBS, CHUNK, false>(sum_k, symmetric + row * C_PITCH, C_PITCH, tile_k, K_PITCH, across, KP, lane);
    multiply_transposed_jobs(sum_k, scaled_pairs + row, tile_q, across, lane);
    __syncthreads();
  }
  write_jobs(dq + key_row * HEAD_K, (int64_t)H * HEAD_K, sum_q, scale, row, chunk.tokens, across, lane);
  write_jobs(dk + key_row * HEAD_K, (int64_t)H * HEAD_K, sum_k, 1.0f, row, chunk.tokens, across, lane);
}
