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

#if HAS_GATE
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
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    wy_factors_hopper(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                      const float* beta, const float* g, const int64_t* cu_seqlens, DTYPE* core, DTYPE* p,
                      float* decays, int N, int T, int H, int HV) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int h = blockIdx.x % H, groups = HV / H;
  const Chunk chunk = find_chunk<CHUNK>(cu_seqlens, blockIdx.x / H, N, T);
  if (chunk.tokens <= 0) return;

  DynSmem smem;
  uint8_t* area = smem.take<uint8_t>(SOLVING > LOADED ? SOLVING : LOADED, "k and q, then m and cores", 1024);
  float* betas = smem.take<float>(HEADS * CHUNK, "beta");
#if HAS_GATE
  float2* G = smem.take<float2>(THREADS / 32 * CHUNK, "G of warps") + warp * CHUNK;
#endif
  uint64_t* loaded = smem.take<uint64_t>(1, "loaded");
  smem.all_taken(SHARED_BYTES);
  DTYPE *k = (DTYPE*)area, *q = k + K_BOXES * TILE;
  if (thread == 0) {
    mbarrier_init(loaded, 1);
    mbarrier_init_fence();
    const int batch = VARLEN ? 0 : (int)(chunk.first / T), token = (int)(chunk.first - (int64_t)batch * T);
    mbarrier_arrive_expect(loaded, LOADED);
#pragma unroll
    for (int box = 0; box < K_BOXES; box++) {
      tma_load(k + box * TILE, &k_map, loaded, box * BOX, h, token, batch);
      tma_load(q + box * TILE, &q_map, loaded, box * BOX, h, token, batch);
    }
  }
  const int64_t first = chunk.first * HV + h * groups;  // row of (token, value head)
  auto beta_of = [&](int group) {
    const int t = thread % CHUNK;
    return group < groups && t < chunk.tokens ? beta[first + (int64_t)t * HV + group] : 0.0f;
  };
  float next_beta = beta_of(warp / 2);
#if HAS_GATE
  auto gates_of = [&](int group) {
    const int t = 2 * lane;
    float2 x = make_float2(0.0f, 0.0f);
    if (group < groups && t < chunk.tokens) x.x = g[first + (int64_t)t * HV + group];
    if (group < groups && t + 1 < chunk.tokens) x.y = g[first + (int64_t)(t + 1) * HV + group];
    return x;
  };
  // G of a value head, in this warp's place, where nobody reads the one before.
  auto keep_sums = [&](const Decays& x) {
    *(float4*)&G[2 * lane] = make_float4(x.high.x, x.low.x, x.high.y, x.low.y);
    __syncwarp();
  };
  float2 next_gates = gates_of(0);
#endif
  __syncthreads();
  mbarrier_wait(loaded, 0);

  float d[8][4];
  auto multiply = [&](const DTYPE* rows) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < K_STEPS; step++)
      wgmma<DTYPE, false, false>(d, step_along_rows(rows, step), step_along_rows(k, step), step > 0);
    wgmma_commit();
    wgmma_wait<0>();
    pin(d);
  };
  multiply(q);
  // Rows past the end may be another sequence's: none of Pqk is written, and M has zeros there.
  const int row = warp * 16;
#if HAS_GATE
  for (int group = 0; group < groups; group++) {
    const Decays x = sum_gates(next_gates, lane);
    next_gates = gates_of(group + 1);
    keep_sums(x);
    if (group % (THREADS / 32) == warp)
      x.store(decays + ((int64_t)(blockIdx.x / H) * HV + h * groups + group) * DECAY_ROWS * CHUNK, lane);
    float weighed[8][4];
    weigh_pairs(weighed, d, G, row, lane);
    store_wide(p + (first + (int64_t)row * HV + group) * CHUNK, (int64_t)HV * CHUNK, weighed, 1.0f, chunk.tokens - row,
               CHUNK, lane);
    __syncwarp();
  }
  next_gates = gates_of(warp / 2);
#else
#pragma unroll
  for (int j = 0; j < 8; j++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (sum_column(lane, j, i) > row + sum_row(lane, i)) d[j][i] = 0.0f;
  store_wide(p + (chunk.first + row) * H * CHUNK + h * CHUNK, (int64_t)H * CHUNK, d, 1.0f, chunk.tokens - row, CHUNK,
             lane);
#endif
  multiply(k);
  __syncthreads();  // everyone is done with K and Q

  float *m = (float*)area, *m21 = m + 2 * TRIANGLE;
#pragma unroll
  for (int j = 0; j < 8; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int r = row + sum_row(lane, i);
      if (sum_column(lane, j, i) >= r || r >= chunk.tokens) d[j][i] = 0.0f;
    }
  store_rows_of_m(m, d, row, lane);
  __syncthreads();

  for (int group = warp / 2; group < groups; group += HEADS) {
    const int pair = opaque(thread) / 64, half = opaque(thread) / 32 % 2, lane = opaque(thread) % 32;
    float *l = m21 + TRIANGLE + pair * CORE * TRIANGLE, *own = l + half * TRIANGLE, *b = betas + pair * CHUNK;
    const int64_t stride = (int64_t)HV * CHUNK;
    DTYPE* out = core + (first + group) * CHUNK;
    b[half * HALF + lane] = next_beta;
    next_beta = beta_of(group + HEADS);
    __syncwarp();
#if HAS_GATE
    keep_sums(sum_gates(next_gates, lane));
    next_gates = gates_of(group + HEADS);
    const float *own_m = own, *below_m = l + 2 * TRIANGLE;
    weigh_block<HALF>(own, m + half * TRIANGLE, G, half * HALF, half * HALF, lane);
    const int corner_row = half * HALF / 2;
    weigh_block<HALF / 2>(l + 2 * TRIANGLE + corner_row * INVERSE_PITCH, m21 + corner_row * INVERSE_PITCH, G,
                          HALF + corner_row, 0, lane);
    __syncwarp();
#else
    const float *own_m = m + half * TRIANGLE, *below_m = m21;
#endif
    write_core(out, stride, l, own_m, below_m, b, half, chunk.tokens, 1 + pair, lane);
    named_barrier(1 + pair, 64);  // both are done with the core
  }
}
