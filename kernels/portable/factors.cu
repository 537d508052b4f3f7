// The factors of every chunk, all chunks in parallel. With K, Q, V the rows of a chunk, b = beta and
// D_ij = e^(G_i - G_j) for i >= j, G the running sum of g in the chunk (1 without a gate, tiles/decay.cuh):
//
//   M = tril(K K^T . D, -1),   X = (I + diag(b) M)^-1
//   WRITE_CORE:  core = -M X,  p = Pqk = tril(Q K^T . D)     what forward.cu and the gradients read
//   WRITE_WU:  t = T = X diag(b),  w = T (e^G K),  u = T V     the public WY factors
//   decays = (e^G, e^(G_C - G))     with a gate, for walks
//
// X = I + diag(b) core, so T R = b (R + core (b R)): the core serves where T would, without dividing by b.
//
// Numbers: products of DTYPE operands with float sums (float: 3xTF32); the inverse and the core in 3xTF32, see
// tiles/triangular_inverse.cuh; outputs rounded to DTYPE once.
//
// Macros: DTYPE, HEAD_K, HEAD_V, CHUNK, HAS_GATE, VARLEN, WRITE_CORE or WRITE_WU.
// Grid: slots * H blocks of 128 threads; a block serves all value heads of its key head.
// Shared memory: K and Q (WRITE_CORE) or V and T (WRITE_WU) tiles; float CHUNK x CHUNK matrices K K^T, M, X, half a
// scratch and Q K^T (WRITE_CORE); beta and, with a gate, G; see cupy_delta/cuda/portable/factors.py.
#include "portable/wy.cuh"
#include "tiles/decay.cuh"
#include "tiles/fragments.cuh"
#include "tiles/load.cuh"
#include "tiles/sequence.cuh"

// As many blocks as shared memory admits at HEAD_K = 128 (float: as registers do without spilling).
constexpr int THREADS = 128, BLOCKS = sizeof(DTYPE) == 2 ? 5 : 2;
constexpr int KP = padded(HEAD_K), K_PITCH = pitch_of<DTYPE>(KP);

// out = rows columns^T on and below the diagonal, one 16 x 16 tile per warp in turn.
PRIM void lower_products(float* out, const DTYPE* rows, const DTYPE* columns, int warp, int lane) {
  for (int tile = warp; tile < CHUNK / 16 * (CHUNK / 16); tile += THREADS / 32) {
    int r = tile / (CHUNK / 16) * 16, c = tile % (CHUNK / 16) * 16;
    if (c > r) continue;
    float d[2][4];
    clear(d);
    multiply_tiles<DTYPE, 2, KP, false>(d, rows + r * K_PITCH, K_PITCH, columns + c * K_PITCH, K_PITCH, lane);
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) out[(r + sum_row(lane, i)) * A_PITCH + c + sum_column(lane, j, i)] = d[j][i];
  }
}

#if WRITE_WU
constexpr int VP = padded(HEAD_V), V_PITCH = pitch_of<DTYPE>(VP);
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    wy_factors(const DTYPE* q, const DTYPE* k, const DTYPE* v, const float* beta, const float* g,
               const int64_t* cu_seqlens, DTYPE* core, DTYPE* p, float2* decays, DTYPE* t, DTYPE* w, DTYPE* u, int N,
               int T, int H, int HV) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int h = blockIdx.x % H, groups = HV / H;
  const Chunk chunk = find_chunk<CHUNK>(cu_seqlens, blockIdx.x / H, N, T);
  if (chunk.tokens <= 0) return;

  DynSmem smem;
  DTYPE* tile_k = smem.take<DTYPE>(CHUNK * K_PITCH, "k");
#if WRITE_CORE
  DTYPE* tile_q = smem.take<DTYPE>(CHUNK * K_PITCH, "q");
  float* qk = smem.take<float>(CHUNK * A_PITCH, "qk");
#else
  DTYPE* tile_v = smem.take<DTYPE>(CHUNK * V_PITCH, "v");
  DTYPE* tile_t = smem.take<DTYPE>(CHUNK * C_PITCH, "t");
#endif
  float* kk = smem.take<float>(CHUNK * A_PITCH, "kk");
  float* m = smem.take<float>(CHUNK * A_PITCH, "m");
  float* inverse = smem.take<float>(CHUNK * A_PITCH, "inverse");
  float* scratch = smem.take<float>(CHUNK / 2 * A_PITCH, "scratch");
  float* b = smem.take<float>(CHUNK, "beta");
  const Decay decay = Decay::take(smem);
  smem.all_taken(SHARED_BYTES);

  const int64_t key_row = chunk.first * H + h;
  load_tile<DTYPE, CHUNK, KP, HEAD_K, THREADS>(tile_k, k + key_row * HEAD_K, (int64_t)H * HEAD_K, chunk.tokens, HEAD_K,
                                               thread);
#if WRITE_CORE
  load_tile<DTYPE, CHUNK, KP, HEAD_K, THREADS>(tile_q, q + key_row * HEAD_K, (int64_t)H * HEAD_K, chunk.tokens, HEAD_K,
                                               thread);
#endif
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  lower_products(kk, tile_k, tile_k, warp, lane);
#if WRITE_CORE
  lower_products(qk, tile_q, tile_k, warp, lane);
#endif

  for (int group = 0; group < groups; group++) {
    const int64_t row = chunk.first * HV + h * groups + group;  // of (token, value head)
    load_column<CHUNK, THREADS>(b, beta + row, HV, chunk.tokens, thread);
    if (warp == 0) decay.sum(g + row, HV, chunk.tokens, lane);
#if WRITE_WU
    load_tile<DTYPE, CHUNK, VP, HEAD_V, THREADS>(tile_v, v + row * HEAD_V, (int64_t)HV * HEAD_V, chunk.tokens, HEAD_V,
                                                 thread);
#endif
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    decay.store<THREADS>(decays + row, HV, chunk.tokens, thread);
    for (int i = thread; i < CHUNK * CHUNK; i += THREADS) {
      const int r = i / CHUNK, c = i % CHUNK, at = r * A_PITCH + c;
      const float factor = decay.pair(max(r, c), min(r, c));
      m[at] = c < r ? kk[at] * factor : 0.0f;
#if WRITE_CORE
      if (r < chunk.tokens) p[(row + (int64_t)r * HV) * CHUNK + c] = narrow<DTYPE>(c <= r ? qk[at] * factor : 0.0f);
#endif
    }
    __syncthreads();
    invert_unit_lower<CHUNK, THREADS>(inverse, m, b, scratch, thread);

#if WRITE_CORE
    write_core<THREADS>(core + row * CHUNK, (int64_t)HV * CHUNK, m, inverse, chunk.tokens, warp, lane);
    __syncthreads();
#else
    write_t<THREADS>(t + row * CHUNK, (int64_t)HV * CHUNK, tile_t, inverse, b, chunk.tokens, thread);
    __syncthreads();
    const int64_t stride = HV;
    write_product<THREADS, HEAD_V, V_PITCH>(u + row * HEAD_V, stride * HEAD_V, tile_t, tile_v, chunk.tokens, warp,
                                            lane);
    if constexpr (Decay::GATED) {
      // The decays of K go to T, which every value head has of its own.
      __syncthreads();
      for (int i = thread; i < CHUNK * CHUNK; i += THREADS) {
        int r = i / CHUNK, c = i % CHUNK;
        bool inside = c <= r && r < chunk.tokens;
        float decayed = inside ? inverse[r * A_PITCH + c] * b[c] * decay.read(c) : 0.0f;
        tile_t[r * C_PITCH + c] = narrow<DTYPE>(decayed);
      }
      __syncthreads();
    }
    write_product<THREADS, HEAD_K, K_PITCH>(w + row * HEAD_K, stride * HEAD_K, tile_t, tile_k, chunk.tokens, warp,
                                            lane);
    __syncthreads();
#endif
  }
}
