// The gradients of q, k, v, beta and g with a gate per key channel, all chunks in parallel. Per chunk and value head,
// with S the state entering it, dS' the gradient of the state leaving it and dY from backward_state.cu, N^ from
// forward.cu, b = beta, G the running sum of g in the chunk, and D_ij = e^(G_i - G_j) for i >= j, all per channel:
//
//   N = b N^      dV = dR = b dY      dbeta = rowsum(dY . N^)
//   dPqk = scale tril(dO N^T)      E = -tril(dR N^T, -1)
//   dq_i = e^(G_i) scale dO_i S^T + sum_(j <= i) dPqk_ij D_ij k_j
//   dk_i = -e^(G_i) dR_i S^T + e^(G_C - G_i) N_i dS'^T + sum_(j < i) E_ij D_ij k_j
//          + sum_(j >= i) (dPqk_ji D_ji q_j + E_ji D_ji k_j)
//
// and dg as in channel_gradient.cuh, with Z_ij = dPqk_ij q_i D_ij k_j + E_ij k_i D_ij k_j, and likewise for states.
//
// Nothing is divided by beta, so beta = 0 is exact. dq and dk are summed over the value heads of a key head in
// registers, in their order: no atomics, the same bits every time.
//
// Numbers: operands of products with values in DTYPE, sums in float (float: 3xTF32); all that has decays in float;
// results rounded once; dbeta and dg in float.
//
// Macros: DTYPE, HEAD_K, HEAD_V, CHUNK, VARLEN, WARPS (a multiple of CHUNK / 16), SLICE (value channels at a time, a
// multiple of 16), KEYS (key channels of a block of threads, a multiple of 16; at most 32 WARPS for every 16 tokens).
// Grid: slots * H * slices of key channels blocks of 32 WARPS threads.
// Shared memory: Q, K; decays of tokens and blocks, sums over blocks; beta and dbeta; and in one place slices of S,
// dS', dO, N and -dR, then the products with states and the pairs; see cupy_delta/cuda/portable/backward_channel.py.
#include "portable/channel_gradient.cuh"
#include "portable/value_rows.cuh"
#include "tiles/sequence.cuh"

constexpr int SLICES = (padded(HEAD_V) + SLICE - 1) / SLICE, KEY_SLICES = (padded(HEAD_K) + KEYS - 1) / KEYS;
constexpr int K_JOBS = (KEYS / 16 + ACROSS - 1) / ACROSS, C_JOBS = (ROWS + ACROSS - 1) / ACROSS;
// Blocks per multiprocessor, as registers allow.
constexpr int BLOCKS = WARPS == 8 ? 1 : KSM >= 900 && sizeof(DTYPE) == 2 ? 3 : 2;
// Bytes of the place that is used twice.
constexpr int VALUE_BYTES = (2 * SLICE * K_PITCH + 3 * CHUNK * V_PITCH) * sizeof(DTYPE);
constexpr int PAIR_BYTES = 3 * CHUNK * X_PITCH * sizeof(float) + CHUNK * PAIR_PITCH * sizeof(float2);
constexpr int TWICE = VALUE_BYTES > PAIR_BYTES ? VALUE_BYTES : PAIR_BYTES;

// A slice of values, in the place that is used twice.
struct Values {
  DTYPE *s, *d, *o, *n, *r;  // S, dS', dO, N^ then N, dY then -dR
};

struct Tiles {
  Channels channels;
  Values values;
  float *b, *b_sums;

  static PRIM Tiles take(DynSmem& smem) {
    Tiles s = {};
    Channels& x = s.channels;
    x.q = smem.take<DTYPE>(CHUNK * K_PITCH, "q");
    x.k = smem.take<DTYPE>(CHUNK * K_PITCH, "k");
    x.e = smem.take<float>(CHUNK * X_PITCH, "decays");
    x.sums = smem.take<float2>(UNITS, "sums of gates");
    x.decays = smem.take<float>(UNITS, "decays of blocks");
    if constexpr (CHUNK > BLOCK) x.through = smem.take<float>(ROWS * (ROWS - 1) / 2 * KEYS, "products of blocks");
    x.written = smem.take<float>(UNITS, "products with the leaving state");
    x.states = smem.take<float>(UNITS, "products of states");
    s.b = smem.take<float>(CHUNK, "beta");
    s.b_sums = smem.take<float>(CHUNK, "dbeta");
    float* twice = smem.take<float>(TWICE / 4, "values, then products");
    s.values.s = (DTYPE*)twice, s.values.d = s.values.s + SLICE * K_PITCH;
    s.values.o = s.values.d + SLICE * K_PITCH, s.values.n = s.values.o + CHUNK * V_PITCH;
    s.values.r = s.values.n + CHUNK * V_PITCH;
    x.from_q = twice, x.from_k = twice + CHUNK * X_PITCH, x.from_n = x.from_k + CHUNK * X_PITCH;
    x.pairs = (float2*)(x.from_n + CHUNK * X_PITCH);
    return s;
  }
};

// The products of a value head, as accumulators of a warp.
struct Products {
  float dPqk[C_JOBS][2][4], E[C_JOBS][2][4];
  float from_q[K_JOBS][2][4], from_k[K_JOBS][2][4], from_n[K_JOBS][2][4];

  PRIM Products() {
    clear_jobs(dPqk), clear_jobs(E);
    clear_jobs(from_q), clear_jobs(from_k), clear_jobs(from_n);
  }
  PRIM void add(const Values& x, const Share& mine) {
    const int rows = mine.row + 16;
    multiply_jobs<C_JOBS, SLICE, true>(dPqk, x.o, V_PITCH, x.n, V_PITCH, rows, mine);
    multiply_jobs<C_JOBS, SLICE, true>(E, x.r, V_PITCH, x.n, V_PITCH, rows, mine);
    multiply_jobs<K_JOBS, SLICE, false>(from_q, x.o, V_PITCH, x.s, K_PITCH, KEYS, mine);
    multiply_jobs<K_JOBS, SLICE, false>(from_k, x.r, V_PITCH, x.s, K_PITCH, KEYS, mine);
    multiply_jobs<K_JOBS, SLICE, false>(from_n, x.n, V_PITCH, x.d, K_PITCH, KEYS, mine);
  }
  PRIM void store(const Channels& s, float scale, const Share& mine) const {
    const int row = mine.row, lane = mine.lane;
#pragma unroll
    for (int job = 0; job < C_JOBS; job++)
#pragma unroll
      for (int x = 0; x < 8; x++) {
        const int i = row + sum_row(lane, x % 4), j = mine.column(job) + sum_column(lane, x / 4, x % 4);
        if (j >= row + 16) continue;
        float2 pair = {scale * dPqk[job][x / 4][x % 4], E[job][x / 4][x % 4]};
        if (j >= i) pair.y = 0.0f;
        if (j > i) pair.x = 0.0f;
        s.pairs[j * PAIR_PITCH + i] = pair;
        if (j < row) s.pairs[i * PAIR_PITCH + j] = pair;
      }
#pragma unroll
    for (int job = 0; job < K_JOBS; job++)
#pragma unroll
      for (int x = 0; x < 8; x++) {
        const int column = mine.column(job) + sum_column(lane, x / 4, x % 4);
        const int at = (row + sum_row(lane, x % 4)) * X_PITCH + column;
        if (column >= KEYS) continue;
        s.from_q[at] = scale * from_q[job][x / 4][x % 4];
        s.from_k[at] = from_k[job][x / 4][x % 4];
        s.from_n[at] = from_n[job][x / 4][x % 4];
      }
  }
};

// The part that a unit has of rowsum(S . dS'), for its channel.
PRIM float dot_states(const Values& x, int a, int c) {
  float sum = 0.0f;
#pragma unroll 4
  for (int v = a; v < SLICE; v += BLOCKS_OF_CHUNK) sum += widen(x.s[v * K_PITCH + c]) * widen(x.d[v * K_PITCH + c]);
  return sum;
}

// A unit's gradients of q and k, to rows `stride` apart.
PRIM void write_unit(DTYPE* out, int64_t stride, const Rows& x, const Unit& unit, int tokens, int keys) {
#pragma unroll
  for (int i = 0; i < BLOCK; i++) {
    const int token = unit.a * BLOCK + i;
    if (token < tokens && unit.c < keys) out[token * stride + unit.c] = narrow<DTYPE>(x[i]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    backward_channel(const DTYPE* q, const DTYPE* k, const float* beta, const float* g, const DTYPE* corrections,
                     const DTYPE* dy, const DTYPE* d_o, const DTYPE* states, const DTYPE* dstates,
                     const int64_t* cu_seqlens, DTYPE* dq, DTYPE* dk, DTYPE* dv, float* dbeta, float* dg, float scale,
                     int N, int T, int H, int HV) {
  const int thread = threadIdx.x;
  const int key_slice = blockIdx.x % KEY_SLICES, h = blockIdx.x / KEY_SLICES % H, groups = HV / H;
  const int64_t slot = blockIdx.x / (KEY_SLICES * H);
  const Chunk chunk = find_chunk<CHUNK>(cu_seqlens, slot, N, T);
  if (chunk.tokens <= 0) return;
  const int tokens = chunk.tokens;
  const Share mine(thread);
  const int first_key = key_slice * KEYS, keys = min(KEYS, HEAD_K - first_key);

  DynSmem smem;
  const Tiles s = Tiles::take(smem);
  smem.all_taken(SHARED_BYTES);
  const Channels& channels = s.channels;
  const int64_t key = (chunk.first * H + h) * HEAD_K + first_key, key_stride = (int64_t)H * HEAD_K;
  load_tile<DTYPE, CHUNK, KEYS, HEAD_K, THREADS>(channels.q, q + key, key_stride, tokens, keys, thread);
  load_tile<DTYPE, CHUNK, KEYS, HEAD_K, THREADS>(channels.k, k + key, key_stride, tokens, keys, thread);

  Rows sum_q = {}, sum_k = {};
  Unit unit = {thread / KEYS, thread % KEYS};
  const bool has_unit = thread < UNITS;
  for (int group = 0; group < groups; group++) {
    const int64_t value_row = chunk.first * HV + h * groups + group, stride = (int64_t)HV * HEAD_V;
    const int64_t state_at = (slot * HV + h * groups + group) * HEAD_K * HEAD_V + first_key;
    const int64_t gate_at = value_row * HEAD_K + first_key, gate_stride = (int64_t)HV * HEAD_K;
    load_column<CHUNK, THREADS>(s.b, beta + value_row, HV, tokens, thread);
    load_tile<float, CHUNK, KEYS, HEAD_K, THREADS>(channels.e, g + gate_at, gate_stride, tokens, keys, thread);
    Products products;
    float states_dot = 0.0f;
    for (int slice = 0; slice < SLICES; slice++) {
      const int first = slice * SLICE, width = min(SLICE, HEAD_V - first);
      const int64_t at = value_row * HEAD_V + first, state = state_at + first * HEAD_K;
      load_tile<DTYPE, SLICE, KEYS, HEAD_K, THREADS>(s.values.s, states + state, HEAD_K, width, keys, thread);
      load_tile<DTYPE, SLICE, KEYS, HEAD_K, THREADS>(s.values.d, dstates + state, HEAD_K, width, keys, thread);
      load_tile<DTYPE, CHUNK, SLICE, HEAD_V, THREADS>(s.values.o, d_o + at, stride, tokens, width, thread);
      load_tile<DTYPE, CHUNK, SLICE, HEAD_V, THREADS>(s.values.n, corrections + at, stride, tokens, width, thread);
      load_tile<DTYPE, CHUNK, SLICE, HEAD_V, THREADS>(s.values.r, dy + at, stride, tokens, width, thread);
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
      if (slice == 0) exponentiate<KEYS, THREADS>(channels.e, channels.sums, channels.decays, thread);
      weigh_rows(s.values.n, s.values.r, s.b, s.b_sums, slice == 0, {dv + at, stride, key_slice == 0, tokens, width},
                 thread);
      __syncthreads();
      products.add(s.values, mine);
      if (has_unit) states_dot += dot_states(s.values, unit.a, unit.c);
      __syncthreads();
    }
    if (key_slice == 0 && thread < tokens) dbeta[value_row + (int64_t)thread * HV] = s.b_sums[thread];
    products.store(channels, scale, mine);
    if (has_unit) {
      const float decay = decay_of_blocks(channels.sums + unit.c, KEYS, 0, BLOCKS_OF_CHUNK);
      channels.states[unit.a * KEYS + unit.c] = states_dot * decay;
    }
    __syncthreads();
    if (has_unit) {
      unit.load(channels);
      unit.from_before(channels, sum_q, sum_k);
      unit.from_behind(channels, sum_k);
      unit.within(&channels.pairs[unit.a * BLOCK * (PAIR_PITCH + 1)], PAIR_PITCH, sum_q, sum_k);
    }
    __syncthreads();
    if (has_unit) {
      unit.add_through(channels);
#pragma unroll
      for (int i = 0; i < BLOCK; i++) {
        const int token = unit.a * BLOCK + i;
        if (token < tokens && unit.c < keys) dg[gate_at + token * gate_stride + unit.c] = unit.dg[i];
      }
    }
    __syncthreads();
  }
  if (!has_unit) return;
  write_unit(dq + key, key_stride, sum_q, unit, tokens, keys);
  write_unit(dk + key, key_stride, sum_k, unit, tokens, keys);
}
