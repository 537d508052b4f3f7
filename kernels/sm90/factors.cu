// What the walks of training read of every chunk of 64 tokens, all chunks in parallel, on compute capability 9.0. With
// K and Q the rows of a chunk, b = beta, D the decays between tokens (all 1 without a gate; sm90/decays.cuh):
//
//   M = tril(K K^T . D, -1)        core = -M (I + diag(b) M)^-1        Pqk = tril(Q K^T . D)
//
// the core as in portable/factors.cu. Without a gate Pqk is the same for all value heads of a key head, and left once.
//
// Blocks are small, so that enough of them share a multiprocessor for some to load while others solve. A block makes M
// and Pqk with wgmma, without decays. Then each two warps form the core of one value head at a time from the same M: a
// warp inverts 32 rows, and both merge what they have, 16 rows each; see tiles/unit_inverse.cuh.
//
// Numbers: products of DTYPE operands with float sums, the core by substitution in float and merges in 3xTF32; results
// rounded once.
//
// Macros: DTYPE (bf16 or f16), HEAD_K (up to 128, a multiple of 8), CHUNK (64), HAS_GATE, VARLEN.
// Grid: slots * H blocks of 128 threads. Shared memory: K and Q, and in their place M and two cores; beta; G of each
// warp's value head; see cupy_delta/cuda/sm90/training.py.
#include "sm90/core.cuh"
#include "sm90/decays.cuh"
#include "tiles/sequence.cuh"
#include "tiles/swizzled.cuh"

static_assert(CHUNK == 64, "the chunk is wgmma's 64 rows");
// As many blocks as registers admit without spilling; value heads at a time.
constexpr int THREADS = 128, BLOCKS = 4, HEADS = 2;
constexpr int KP = HEAD_K <= 64 ? 64 : 128, K_BOXES = KP / BOX, K_STEPS = KP / 16;
constexpr int TILE = CHUNK * BOX;
// M and a core as blocks of 32 x 32 in rows of INVERSE_PITCH: the two on the diagonal, and for M the one below them.
// With a gate a core has an M of its own, in whose place it is formed.
constexpr int CORE = 2 + HAS_GATE;
constexpr int SOLVING = (3 + CORE * HEADS) * TRIANGLE * 4, LOADED = 2 * K_BOXES * TILE * 2;

struct Shared {
  DTYPE *k, *q;
  float *m, *m21, *cores;  // in the place of K and Q
  float* betas;            // of the value heads that are solved at a time
  float2* G;               // of this warp's value head
  uint64_t* loaded;
};

PRIM Shared take_shared(DynSmem& smem, int warp) {
  Shared s = {};
  uint8_t* area = smem.take<uint8_t>(SOLVING > LOADED ? SOLVING : LOADED, "k and q, then m and cores", 1024);
  s.k = (DTYPE*)area, s.q = s.k + K_BOXES * TILE;
  s.m = (float*)area, s.m21 = s.m + 2 * TRIANGLE, s.cores = s.m21 + TRIANGLE;
  s.betas = smem.take<float>(HEADS * CHUNK, "beta");
  if constexpr (HAS_GATE) s.G = smem.take<float2>(THREADS / 32 * CHUNK, "G of warps") + warp * CHUNK;
  s.loaded = smem.take<uint64_t>(1, "loaded");
  return s;
}

// What a block works on: a chunk of a key head, with the `groups` value heads of that.
struct Work {
  Chunk chunk;
  int64_t slot, first;  // first: row of its first token and value head
  int h, groups, H, HV;
  const float *beta, *g;

  // Zero where there is no such value head or token.
  PRIM float beta_of(int group, int t) const {
    return group < groups && t < chunk.tokens ? beta[first + (int64_t)t * HV + group] : 0.0f;
  }
  PRIM float2 gates_of(int group, int t) const {
    float2 x = make_float2(0.0f, 0.0f);
    if (group < groups && t < chunk.tokens) x.x = g[first + (int64_t)t * HV + group];
    if (group < groups && t + 1 < chunk.tokens) x.y = g[first + (int64_t)(t + 1) * HV + group];
    return x;
  }
};

struct Results {
  DTYPE *core, *p;
  float* decays;
};

// ---- decays between tokens ----------------------------------------------------------------------

// (HIGH, LOW) of two neighbouring tokens.
PRIM float4 load_pair(const float2* G, int token) { return *(const float4*)&G[token]; }

// Half of a block's 32 rows, or all, times D: rows and columns of the block are tokens from `row` and `column` on.
template <int ROWS>
PRIM void weigh_block(float* to, const float* from, const float2* G, int row, int column, int lane) {
  const int c = lane % 8 * 4;
  const float4 low = load_pair(G, column + c), high = load_pair(G, column + c + 2);
  const float2 columns[4] = {{low.x, low.y}, {low.z, low.w}, {high.x, high.y}, {high.z, high.w}};
#pragma unroll
  for (int i = 0; i < ROWS; i += 4) {
    const int r = i + lane / 8;
    const float2 g = G[row + r];
    const float4 x = *(const float4*)&from[r * INVERSE_PITCH + c];
    auto weigh = [&](float y, int j) { return row + r > column + c + j ? y * decay_between(g, columns[j]) : 0.0f; };
    *(float4*)&to[r * INVERSE_PITCH + c] = make_float4(weigh(x.x, 0), weigh(x.y, 1), weigh(x.z, 2), weigh(x.w, 3));
  }
}

// 16 rows of Pqk, from `row` on.
PRIM void weigh_pairs(float (&p)[8][4], const float (&d)[8][4], const float2* G, int row, int lane) {
  const float2 rows[2] = {G[row + sum_row(lane, 0)], G[row + sum_row(lane, 2)]};
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const float4 x = load_pair(G, sum_column(lane, j, 0));
    const float2 columns[2] = {{x.x, x.y}, {x.z, x.w}};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const bool is_later = row + sum_row(lane, i) >= sum_column(lane, j, i);
      p[j][i] = is_later ? d[j][i] * decay_between(rows[i / 2], columns[i % 2]) : 0.0f;
    }
  }
}

// ---- steps of a block ---------------------------------------------------------------------------

// K and Q, by one thread.
PRIM void load(const Shared& s, const TensorMap* q, const TensorMap* k, const Work& work, int T) {
  mbarrier_init(s.loaded, 1);
  mbarrier_init_fence();
  const int batch = VARLEN ? 0 : (int)(work.chunk.first / T), token = (int)(work.chunk.first - (int64_t)batch * T);
  mbarrier_arrive_expect(s.loaded, LOADED);
#pragma unroll
  for (int box = 0; box < K_BOXES; box++) {
    tma_load(s.k + box * TILE, k, s.loaded, box * BOX, work.h, token, batch);
    tma_load(s.q + box * TILE, q, s.loaded, box * BOX, work.h, token, batch);
  }
}

// d = rows K^T, 16 rows per warp.
PRIM void multiply(float (&d)[8][4], const DTYPE* rows, const DTYPE* k) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < K_STEPS; step++)
    wgmma<DTYPE, false, false>(d, step_along_rows(rows, step), step_along_rows(k, step), step > 0);
  wgmma_commit();
  wgmma_wait<0>();
  pin(d);
}

// d = 0 from the diagonal on, and past the end, where rows may be another sequence's.
PRIM void keep_earlier(float (&d)[8][4], int row, int tokens, int lane) {
#pragma unroll
  for (int j = 0; j < 8; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int r = row + sum_row(lane, i);
      if (sum_column(lane, j, i) >= r || r >= tokens) d[j][i] = 0.0f;
    }
}

// What a warp makes: 16 rows of Pqk and M, and then half the rows of the core of every other value head. Beta and gates
// of a value head are asked for while the one before is computed.
struct Warp {
  const Shared& s;
  const Work& work;
  const Results& out;
  const int thread, warp, lane;

  PRIM int row() const { return warp * 16; }
  PRIM float beta_of(int group) const { return work.beta_of(group, thread % CHUNK); }
  PRIM float2 gates_of(int group) const { return work.gates_of(group, 2 * lane); }
  // G of a value head, in this warp's place, where nobody reads the one before.
  PRIM void keep_sums(const Decays& x) const {
    *(float4*)&s.G[2 * lane] = make_float4(x.high.x, x.low.x, x.high.y, x.low.y);
    __syncwarp();
  }

  // Pqk of the key head. Rows past the end may be another sequence's: none is written.
  PRIM void write_pairs(float (&d)[8][4]) const {
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (sum_column(lane, j, i) > row() + sum_row(lane, i)) d[j][i] = 0.0f;
    store_wide(out.p + (work.chunk.first + row()) * work.H * CHUNK + work.h * CHUNK, (int64_t)work.H * CHUNK, d, 1.0f,
               work.chunk.tokens - row(), CHUNK, lane);
  }
  // Pqk and decays of every value head, `gates` being the first one's.
  PRIM void write_decayed_pairs(const float (&d)[8][4], float2 gates) const {
    const int row = warp * 16;
    for (int group = 0; group < work.groups; group++) {
      const Decays x = sum_gates(gates, lane);
      gates = gates_of(group + 1);
      keep_sums(x);
      if (group % (THREADS / 32) == warp)
        x.store(out.decays + (work.slot * work.HV + work.h * work.groups + group) * DECAY_ROWS * CHUNK, lane);
      float weighed[8][4];
      weigh_pairs(weighed, d, s.G, row, lane);
      store_wide(out.p + (work.first + (int64_t)row * work.HV + group) * CHUNK, (int64_t)work.HV * CHUNK, weighed, 1.0f,
                 work.chunk.tokens - row, CHUNK, lane);
      __syncwarp();
    }
  }

  // The cores, each with the warp that has the other half of its rows.
  PRIM void write_cores(float next_beta, float2 next_gates) const {
    for (int group = warp / 2; group < work.groups; group += HEADS) {
      const int pair = opaque(thread) / 64, half = opaque(thread) / 32 % 2, lane = opaque(thread) % 32;
      float *l = s.cores + pair * CORE * TRIANGLE, *own = l + half * TRIANGLE, *b = s.betas + pair * CHUNK;
      const int64_t stride = (int64_t)work.HV * CHUNK;
      DTYPE* to = out.core + (work.first + group) * CHUNK;
      b[half * HALF + lane] = next_beta;
      next_beta = beta_of(group + HEADS);
      __syncwarp();
      const float *own_m = s.m + half * TRIANGLE, *below_m = s.m21;
      if constexpr (HAS_GATE) {
        keep_sums(sum_gates(next_gates, lane));
        next_gates = gates_of(group + HEADS);
        float* below = l + 2 * TRIANGLE;
        weigh_block<HALF>(own, own_m, s.G, half * HALF, half * HALF, lane);
        const int corner = half * HALF / 2;
        weigh_block<HALF / 2>(below + corner * INVERSE_PITCH, below_m + corner * INVERSE_PITCH, s.G, HALF + corner, 0,
                              lane);
        __syncwarp();
        own_m = own, below_m = below;
      }
      CoreWarp{l, own_m, below_m, b, half, 1 + pair, lane}.write(to, stride, work.chunk.tokens);
      named_barrier(1 + pair, 64);  // both are done with the core
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    wy_factors_hopper(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                      const float* beta, const float* g, const int64_t* cu_seqlens, DTYPE* core, DTYPE* p,
                      float* decays, int N, int T, int H, int HV) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int h = blockIdx.x % H, groups = HV / H;
  const Chunk chunk = find_chunk<CHUNK>(cu_seqlens, blockIdx.x / H, N, T);
  if (chunk.tokens <= 0) return;

  Work work = {chunk, blockIdx.x / H, 0, h, groups, H, HV, beta, g};
  const Results results = {core, p, decays};
  DynSmem smem;
  const Shared s = take_shared(smem, warp);
  smem.all_taken(SHARED_BYTES);
  if (thread == 0) load(s, &q_map, &k_map, work, T);
  work.first = chunk.first * HV + h * groups;
  const Warp w = {s, work, results, thread, warp, lane};
  float beta_ahead = w.beta_of(warp / 2);
  float2 gates_ahead = {};
  if constexpr (HAS_GATE) gates_ahead = w.gates_of(0);
  __syncthreads();
  mbarrier_wait(s.loaded, 0);

  float d[8][4];
  multiply(d, s.q, s.k);
  if constexpr (HAS_GATE) {
    w.write_decayed_pairs(d, gates_ahead);
    gates_ahead = w.gates_of(warp / 2);
  } else {
    w.write_pairs(d);
  }
  multiply(d, s.k, s.k);
  __syncthreads();  // everyone is done with K and Q
  keep_earlier(d, w.row(), chunk.tokens, lane);
  store_rows_of_m(s.m, d, w.row(), lane);
  __syncthreads();
  w.write_cores(beta_ahead, gates_ahead);
}
