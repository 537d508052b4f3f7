// The factors of every chunk with a gate per key channel, all chunks in parallel. With K, Q, V the rows of a chunk,
// b = beta, G the running sum of g in the chunk, per channel, and for tokens i >= j
//
//   <x_i, k_j>_D = sum over channels of x_i e^(G_i - G_j) k_j
//
//   M_ij = <k_i, k_j>_D for i > j,   X = (I + diag(b) M)^-1
//   WRITE_CORE:  core = -M X,  p_ij = <q_i, k_j>_D           what the walks read
//   WRITE_P:  p                                              for chunk_output.cu
//   WRITE_WU:  t = T = X diag(b),  w = T (e^G K),  u = T V   the public WY factors
//   k_read = e^G K,  q_read = e^G Q,  k_write = e^(G_C - G) K,  channel_decays = e^(G_C)     each where it is asked for
//
// In blocks of 16 tokens (tiles/channel_decay.cuh). Pairs within a block go through the decays of one column j after
// the other: with y_j = k_j and y_i = e^(g_i) y_(i-1), M_ij = <k_i, y_i> and p_ij = <q_i, y_i>. Between blocks a > b,
// with s the sum of gates up to the start of a, x_i e^(G_i - s) and k_j e^(s - G_j) are at most x_i and k_j, and their
// products go to the tensor cores.
//
// Numbers: within a block float products and sums; between blocks products of DTYPE operands with float sums (float:
// 3xTF32); the inverse and the core as in factors.cu; outputs rounded to DTYPE once.
//
// Macros: DTYPE, HEAD_K, HEAD_V, CHUNK, VARLEN, at most one of WRITE_CORE, WRITE_P and WRITE_WU.
// Grid: slots * HV blocks of 128 threads (CHUNK = 64: 256).
// Shared memory: K, Q; their rows scaled within blocks, for CHUNK > 16; the tokens' decays, later X and half a scratch;
// sums of blocks' gates; beta, M; p; V, e^G K and T (WRITE_WU); see cupy_delta/cuda/portable/channel_factors.py.
#include "portable/wy.cuh"
#include "tiles/channel_decay.cuh"
#include "tiles/load.cuh"
#include "tiles/sequence.cuh"

constexpr int THREADS = CHUNK == 64 ? 256 : 128, WARPS = THREADS / 32;
constexpr bool WITH_Q = WRITE_CORE || WRITE_P, WITH_M = WRITE_CORE || WRITE_WU, PAIRS = WITH_Q || WITH_M;
constexpr int KP = padded(HEAD_K), K_PITCH = pitch_of<DTYPE>(KP), E_PITCH = pitch_of<float>(KP);
constexpr int VP = padded(HEAD_V), V_PITCH = pitch_of<DTYPE>(VP);
constexpr int X_SIZE = WITH_M ? CHUNK * 3 / 2 * A_PITCH : 0;
constexpr int E_SIZE = CHUNK * E_PITCH > X_SIZE ? CHUNK * E_PITCH : X_SIZE;

struct Tiles {
  DTYPE *k, *q;
  DTYPE *k_late, *q_late, *k_early;  // x_i e^(G_i - s) of all blocks but the first, k_j e^(s - G_j) of all but the last
  DTYPE* k_read;
  float* e;       // e^g
  float2* sums;   // of the gates of every block
  float* decays;  // their exponentials
  float *beta, *m;
  DTYPE *p, *v, *t;

  static PRIM Tiles take(DynSmem& smem) {
    Tiles s = {};
    s.k = smem.take<DTYPE>(CHUNK * K_PITCH, "k");
    if constexpr (WITH_Q) s.q = smem.take<DTYPE>(CHUNK * K_PITCH, "q");
    if constexpr (PAIRS && CHUNK > BLOCK) {
      constexpr int SIZE = (CHUNK - BLOCK) * K_PITCH;
      s.k_early = smem.take<DTYPE>(SIZE, "early k");
      if constexpr (WITH_M) s.k_late = smem.take<DTYPE>(SIZE, "late k");
      if constexpr (WITH_Q) s.q_late = smem.take<DTYPE>(SIZE, "late q");
    }
    s.e = smem.take<float>(E_SIZE, "decays, then the inverse");
    s.sums = smem.take<float2>(BLOCKS_OF_CHUNK * KP, "sums of gates");
    s.decays = smem.take<float>(BLOCKS_OF_CHUNK * KP, "decays of blocks");
    if constexpr (WITH_M) {
      s.beta = smem.take<float>(CHUNK, "beta");
      s.m = smem.take<float>(CHUNK * A_PITCH, "m");
    }
    if constexpr (WITH_Q) s.p = smem.take<DTYPE>(CHUNK * C_PITCH, "p");
    if constexpr (WRITE_WU) {
      s.v = smem.take<DTYPE>(CHUNK * V_PITCH, "v");
      s.k_read = smem.take<DTYPE>(CHUNK * K_PITCH, "e^G k");
      s.t = smem.take<DTYPE>(CHUNK * C_PITCH, "t");
    }
    return s;
  }
};

// Where the rows of a chunk go, `stride` from token to token; null where they are not asked for.
struct Rows {
  DTYPE *k_read, *q_read, *k_write;
  int64_t stride;
};

// The rows of a block, two channels from c on, times their decays: since the start of the block and of the chunk, and
// up to the end of the block and of the chunk.
PRIM void scale_rows(const Tiles& s, const Rows& out, int block, int c, int tokens) {
  const float2* sums = s.sums + c;
  const float2 before = {decay_of_blocks(sums, KP, 0, block), decay_of_blocks(sums + 1, KP, 0, block)};
  const float2 after = {decay_of_blocks(sums, KP, block + 1, BLOCKS_OF_CHUNK),
                        decay_of_blocks(sums + 1, KP, block + 1, BLOCKS_OF_CHUNK)};
  float2 f = make_float2(1.0f, 1.0f);
  auto read = [&](DTYPE* rows, DTYPE* late, DTYPE* tile, const DTYPE* x, int row) {
    const float2 y = load_pair(&x[row * K_PITCH + c]), scaled = {f.x * y.x, f.y * y.y};
    if (late != nullptr && block > 0) store_pair<KP>(late + (row - BLOCK) * K_PITCH, c, scaled);
    const float2 whole = {before.x * scaled.x, before.y * scaled.y};
    if (tile != nullptr) store_pair<KP>(tile + row * K_PITCH, c, whole);
    if (rows != nullptr && row < tokens) store_pair<HEAD_K>(rows + row * out.stride, c, whole);
  };
#pragma unroll 4
  for (int row = block * BLOCK; row < (block + 1) * BLOCK; row++) {
    const float2 e = *(const float2*)&s.e[row * E_PITCH + c];
    f = {f.x * e.x, f.y * e.y};
    read(out.k_read, s.k_late, s.k_read, s.k, row);
    if constexpr (WITH_Q) read(out.q_read, s.q_late, nullptr, s.q, row);
  }
  f = make_float2(1.0f, 1.0f);
#pragma unroll 4
  for (int row = (block + 1) * BLOCK - 1; row >= block * BLOCK; row--) {
    const float2 e = *(const float2*)&s.e[row * E_PITCH + c], k = load_pair(&s.k[row * K_PITCH + c]);
    const float2 scaled = {f.x * k.x, f.y * k.y};
    if (s.k_early != nullptr && block < BLOCKS_OF_CHUNK - 1) store_pair<KP>(s.k_early + row * K_PITCH, c, scaled);
    if (out.k_write != nullptr && row < tokens)
      store_pair<HEAD_K>(out.k_write + row * out.stride, c, make_float2(after.x * scaled.x, after.y * scaled.y));
    f = {f.x * e.x, f.y * e.y};
  }
}

// M and p of a block's own pairs, by a warp: 8 columns j, four from each of two places so that all warps have as many
// pairs. A lane has one column of each four and an eighth of the channels, in quads.
PRIM void multiply_within(const Tiles& s, int block, int half, int lane) {
  constexpr int QUADS = (KP + 31) / 32;
  const int part = lane / 4 * 4, first = block * BLOCK;
  const int columns[2] = {half * 4 + lane % 4, 12 - half * 4 + lane % 4};
  const bool second = lane & 4, queries = lane & 8;
  const int column = first + (second ? columns[1] : columns[0]);
  float y[2][QUADS][4];
#pragma unroll
  for (int x = 0; x < 2; x++)
#pragma unroll
    for (int n = 0; n < QUADS; n++) {
      const int c = part + n * 32;
      float4 k = {};
      if (KP % 32 == 0 || c < KP) k = load_quad(&s.k[(first + columns[x]) * K_PITCH + c]);
      y[x][n][0] = k.x, y[x][n][1] = k.y, y[x][n][2] = k.z, y[x][n][3] = k.w;
    }
#pragma unroll 1
  for (int i = half * 4; i < BLOCK; i++) {
    float m[2] = {}, p[2] = {};
#pragma unroll
    for (int n = 0; n < QUADS; n++) {
      const int c = part + n * 32, at = (first + i) * K_PITCH + c;
      if (KP % 32 != 0 && c >= KP) continue;
      const float4 decays = *(const float4*)&s.e[(first + i) * E_PITCH + c], keys = load_quad(&s.k[at]);
      float4 queried = {};
      if constexpr (WITH_Q) queried = load_quad(&s.q[at]);
      const float e[4] = {decays.x, decays.y, decays.z, decays.w}, k[4] = {keys.x, keys.y, keys.z, keys.w};
      const float q[4] = {queried.x, queried.y, queried.z, queried.w};
#pragma unroll
      for (int x = 0; x < 2; x++) {
        if (x == 1 && i < 12 - half * 4) continue;  // the whole warp
#pragma unroll
        for (int r = 0; r < 4; r++) {
          float& now = y[x][n][r];
          if (i > columns[x]) now *= e[r];
          if constexpr (WITH_M) m[x] += k[r] * now;
          if constexpr (WITH_Q) p[x] += q[r] * now;
        }
      }
    }
    // Of four sums over the lanes of a column a lane keeps one.
    float m_sum = second ? m[1] : m[0], p_sum = second ? p[1] : p[0];
    m_sum += __shfl_xor_sync(~0u, second ? m[0] : m[1], 4);
    p_sum += __shfl_xor_sync(~0u, second ? p[0] : p[1], 4);
    float sum = queries ? p_sum : m_sum;
    sum += __shfl_xor_sync(~0u, queries ? m_sum : p_sum, 8);
    sum += __shfl_xor_sync(~0u, sum, 16);
    const int row = first + i;
    if (lane < 16 && !queries && WITH_M && column < row) s.m[row * A_PITCH + column] = sum;
    if (lane < 16 && queries && WITH_Q && column <= row) s.p[row * C_PITCH + column] = narrow<DTYPE>(sum);
  }
}

// d = the products of the rows of block a with those of block b < a, from their scaled tiles.
PRIM void multiply_between(float (&d)[2][4], const DTYPE* late, const Tiles& s, int a, int b, int lane) {
  typedef Mma<DTYPE> Product;
  clear(d);
#pragma unroll
  for (int k = 0; k < KP; k += Product::DEPTH) {
    Product::order_loads();
    typename Product::A rows;
    typename Product::B columns;
    Product::load_a(rows, late + (a - 1) * BLOCK * K_PITCH + k, K_PITCH, lane);
    for (int between = b + 1; between < a; between++)
      Product::scale_columns(rows, [&](int c) { return s.decays[between * KP + k + c]; }, lane);
    Product::load_b(columns, s.k_early + b * BLOCK * K_PITCH + k, K_PITCH, lane);
    Product::multiply(d[0], d[1], rows, columns);
  }
}

// M and p on and below the diagonal; above it they are zero already.
PRIM void multiply_pairs(const Tiles& s, int warp, int lane) {
  for (int job = warp; job < 2 * BLOCKS_OF_CHUNK; job += WARPS) multiply_within(s, job / 2, job % 2, lane);
  if constexpr (CHUNK > BLOCK) {
    constexpr int BETWEEN = BLOCKS_OF_CHUNK * (BLOCKS_OF_CHUNK - 1) / 2;
    for (int job = warp; job < 2 * BETWEEN; job += WARPS) {
      const bool queries = job >= BETWEEN;
      if (queries ? !WITH_Q : !WITH_M) continue;
      const int pair = job % BETWEEN, a = pair < 1 ? 1 : pair < 3 ? 2 : 3, b = pair - a * (a - 1) / 2;
      float d[2][4];
      multiply_between(d, queries ? s.q_late : s.k_late, s, a, b, lane);
#pragma unroll
      for (int j = 0; j < 2; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int row = a * BLOCK + sum_row(lane, i), column = b * BLOCK + sum_column(lane, j, i);
          if (queries)
            s.p[row * C_PITCH + column] = narrow<DTYPE>(d[j][i]);
          else
            s.m[row * A_PITCH + column] = d[j][i];
        }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, CHUNK == 64 ? 1 : 4)
    channel_factors(const DTYPE* q, const DTYPE* k, const DTYPE* v, const float* beta, const float* g,
                    const int64_t* cu_seqlens, DTYPE* core, DTYPE* p, DTYPE* k_read, DTYPE* q_read, DTYPE* k_write,
                    float* channel_decays, DTYPE* t, DTYPE* w, DTYPE* u, int N, int T, int H, int HV) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int hv = blockIdx.x % HV, h = hv / (HV / H);
  const int64_t slot = blockIdx.x / HV;
  const Chunk chunk = find_chunk<CHUNK>(cu_seqlens, slot, N, T);
  if (chunk.tokens <= 0) return;
  const int tokens = chunk.tokens;
  const int64_t key = (chunk.first * H + h) * HEAD_K, row = chunk.first * HV + hv;
  const int64_t key_stride = (int64_t)H * HEAD_K, stride = HV;

  DynSmem smem;
  const Tiles s = Tiles::take(smem);
  smem.all_taken(SHARED_BYTES);
  load_tile<DTYPE, CHUNK, KP, HEAD_K, THREADS>(s.k, k + key, key_stride, tokens, HEAD_K, thread);
  load_tile<float, CHUNK, KP, HEAD_K, THREADS>(s.e, g + row * HEAD_K, stride * HEAD_K, tokens, HEAD_K, thread);
  if constexpr (WITH_Q) load_tile<DTYPE, CHUNK, KP, HEAD_K, THREADS>(s.q, q + key, key_stride, tokens, HEAD_K, thread);
  if constexpr (WITH_M) load_column<CHUNK, THREADS>(s.beta, beta + row, HV, tokens, thread);
  if constexpr (WRITE_WU)
    load_tile<DTYPE, CHUNK, VP, HEAD_V, THREADS>(s.v, v + row * HEAD_V, stride * HEAD_V, tokens, HEAD_V, thread);
  cp_async_commit();
  for (int i = thread; i < CHUNK * CHUNK; i += THREADS) {
    if constexpr (WITH_M) s.m[i / CHUNK * A_PITCH + i % CHUNK] = 0.0f;
    if constexpr (WITH_Q) s.p[i / CHUNK * C_PITCH + i % CHUNK] = narrow<DTYPE>(0.0f);
  }
  cp_async_wait<0>();
  __syncthreads();
  exponentiate<KP, THREADS>(s.e, s.sums, s.decays, thread);
  __syncthreads();

  auto asked = [&](DTYPE* rows) { return rows == nullptr ? rows : rows + row * HEAD_K; };
  const Rows rows = {asked(k_read), asked(q_read), asked(k_write), stride * HEAD_K};
  for (int unit = thread; unit < BLOCKS_OF_CHUNK * KP / 2; unit += THREADS)
    scale_rows(s, rows, unit / (KP / 2), unit % (KP / 2) * 2, tokens);
  for (int c = thread; c < HEAD_K && channel_decays != nullptr; c += THREADS)
    channel_decays[(slot * HV + hv) * HEAD_K + c] = decay_of_blocks(s.sums + c, KP, 0, BLOCKS_OF_CHUNK);
  if constexpr (!PAIRS) return;
  __syncthreads();
  multiply_pairs(s, warp, lane);
  __syncthreads();

  if constexpr (WITH_Q)
    for (int i = thread; i < tokens * CHUNK; i += THREADS)
      p[row * CHUNK + i / CHUNK * stride * CHUNK + i % CHUNK] = s.p[i / CHUNK * C_PITCH + i % CHUNK];
  if constexpr (WITH_M) {
    float *inverse = s.e, *scratch = s.e + CHUNK * A_PITCH;
    invert_unit_lower<CHUNK, THREADS>(inverse, s.m, s.beta, scratch, thread);
    if constexpr (WRITE_CORE) write_core<THREADS>(core + row * CHUNK, stride * CHUNK, s.m, inverse, tokens, warp, lane);
    if constexpr (WRITE_WU) {
      write_t<THREADS>(t + row * CHUNK, stride * CHUNK, s.t, inverse, s.beta, tokens, thread);
      __syncthreads();
      write_product<THREADS, HEAD_V, V_PITCH>(u + row * HEAD_V, stride * HEAD_V, s.t, s.v, tokens, warp, lane);
      write_product<THREADS, HEAD_K, K_PITCH>(w + row * HEAD_K, stride * HEAD_K, s.t, s.k_read, tokens, warp, lane);
    }
  }
}
