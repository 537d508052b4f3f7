// What the walks of training read of every chunk of 64 tokens, all chunks in parallel, on compute capability 9.0. With
// K and Q the rows of a chunk, b = beta:
//
//   M = tril(K K^T, -1)        core = -M (I + diag(b) M)^-1        P = tril(Q K^T)
//
// the core as in portable/factors.cu; P is that of the key head, the same for all of its value heads.
//
// Blocks are small, so that enough of them share a multiprocessor for some to load while others solve. A block makes M
// and P with wgmma. Then each two warps form the core of one value head at a time from the same M: a warp inverts 32
// rows, and both merge what they have, 16 rows each; see tiles/unit_inverse.cuh.
//
// Numbers: products of DTYPE operands with float sums, the core by substitution in float and merges in 3xTF32; results
// rounded once.
//
// Macros: DTYPE (bf16 or f16), HEAD_K (up to 128, a multiple of 8), CHUNK (64), HAS_GATE (0), VARLEN.
// Grid: slots * H blocks of 128 threads. Shared memory: K and Q, and in their place M and two cores; beta; see
// cupy_delta/cuda/sm90/training.py.
#include "tiles/sequence.cuh"
#include "tiles/store.cuh"
#include "tiles/swizzled.cuh"
#include "tiles/unit_inverse.cuh"

static_assert(CHUNK == 64 && !HAS_GATE, "the chunk is wgmma's 64 rows, and P that of the key head");
// As many blocks as registers admit without spilling; value heads at a time.
constexpr int THREADS = 128, BLOCKS = 4, HEADS = 2;
constexpr int KP = HEAD_K <= 64 ? 64 : 128, K_BOXES = KP / BOX, K_STEPS = KP / 16;
constexpr int TILE = CHUNK * BOX, HALF = 32, TRIANGLE = HALF * INVERSE_PITCH;
// M and a core as blocks of 32 x 32 in rows of INVERSE_PITCH: the two on the diagonal, and for M the one below them.
constexpr int SOLVING = (3 + 2 * HEADS) * TRIANGLE * 4, LOADED = 2 * K_BOXES * TILE * 2;

// core's 32 rows from `row` on, as far as they lie in the block on the diagonal, and zero to the right of it.
PRIM void write_diagonal_block(DTYPE* core, int64_t stride, const float* block, int row, int tokens, int lane) {
  const int piece = lane % 4;
#pragma unroll
  for (int i = 0; i < HALF; i += 8) {
    const int r = i + lane / 4;
    uint4 x = {};
    if (piece / 2 <= i / 16) {
      const float4 low = *(const float4*)&block[r * INVERSE_PITCH + piece * 8];
      const float4 high = *(const float4*)&block[r * INVERSE_PITCH + piece * 8 + 4];
      x = make_uint4(pack2<DTYPE>(low.x, low.y), pack2<DTYPE>(low.z, low.w), pack2<DTYPE>(high.x, high.y),
                     pack2<DTYPE>(high.z, high.w));
    }
    if (row + r >= tokens) continue;
    DTYPE* to = core + (row + r) * stride + piece * 8;
    *(uint4*)(to + row) = x;
    if (row == 0) *(uint4*)(to + HALF) = uint4{};
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    wy_factors_hopper(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                      const float* beta, const int64_t* cu_seqlens, DTYPE* core, DTYPE* p, int N, int T, int H,
                      int HV) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int h = blockIdx.x % H, groups = HV / H;
  const Chunk chunk = find_chunk<CHUNK>(cu_seqlens, blockIdx.x / H, N, T);
  if (chunk.tokens <= 0) return;

  DynSmem smem;
  uint8_t* area = smem.take<uint8_t>(SOLVING > LOADED ? SOLVING : LOADED, "k and q, then m and cores", 1024);
  float* betas = smem.take<float>(HEADS * CHUNK, "beta");
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
  // Rows past the end may be another sequence's: none of P is written, and M has zeros there.
  const int row = warp * 16;
#pragma unroll
  for (int j = 0; j < 8; j++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (sum_column(lane, j, i) > row + sum_row(lane, i)) d[j][i] = 0.0f;
  store_wide(p + (chunk.first + row) * H * CHUNK + h * CHUNK, (int64_t)H * CHUNK, d, 1.0f, chunk.tokens - row, CHUNK,
             lane);
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
  typedef const float (&Columns)[4][4];
  if (row < HALF) {
    store_block(m + row * INVERSE_PITCH, (Columns)d[0], lane);
  } else {
    store_block(m21 + (row - HALF) * INVERSE_PITCH, (Columns)d[0], lane);
    store_block(m + row * INVERSE_PITCH, (Columns)d[4], lane);
  }
  __syncthreads();

  for (int group = warp / 2; group < groups; group += HEADS) {
    const int pair = opaque(thread) / 64, half = opaque(thread) / 32 % 2, lane = opaque(thread) % 32;
    float *l = m21 + TRIANGLE + pair * 2 * TRIANGLE, *own = l + half * TRIANGLE, *b = betas + pair * CHUNK;
    const float* own_m = m + half * TRIANGLE;
    const int64_t stride = (int64_t)HV * CHUNK;
    DTYPE* out = core + (first + group) * CHUNK;
    b[half * HALF + lane] = next_beta;
    next_beta = beta_of(group + HEADS);
    __syncwarp();
    const Weights weights = {b + half * HALF};
    invert_diagonal_blocks(own, own_m, weights, lane);
    float corner[2][4];
    merge_diagonal_blocks<float>(corner, own, own_m, weights, lane);
    store_block(own + HALF / 2 * INVERSE_PITCH, corner, lane);
    named_barrier(1 + pair, 64);
    float l21[4][4];
    const int below = HALF + half * 16;
    merge_blocks<float, HALF>(l21, m21, l + TRIANGLE, l, Weights{b}, half * 16, lane);
    store_wide(out + below * stride, stride, l21, 1.0f, chunk.tokens - below, HALF, lane);
    write_diagonal_block(out, stride, own, half * HALF, chunk.tokens, lane);
    named_barrier(1 + pair, 64);  // both are done with the core
  }
}
