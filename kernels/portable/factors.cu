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

constexpr int VP = padded(HEAD_V), V_PITCH = pitch_of<DTYPE>(VP);

struct Tiles {
  DTYPE *k, *q, *v, *t;
  float *qk, *kk, *m, *inverse, *scratch, *b;
  Decay decay;

  static PRIM Tiles take(DynSmem& smem) {
    Tiles x = {};
    x.k = smem.take<DTYPE>(CHUNK * K_PITCH, "k");
    if constexpr (WRITE_CORE) {
      x.q = smem.take<DTYPE>(CHUNK * K_PITCH, "q");
      x.qk = smem.take<float>(CHUNK * A_PITCH, "qk");
    } else {
      x.v = smem.take<DTYPE>(CHUNK * V_PITCH, "v");
      x.t = smem.take<DTYPE>(CHUNK * C_PITCH, "t");
    }
    x.kk = smem.take<float>(CHUNK * A_PITCH, "kk");
    x.m = smem.take<float>(CHUNK * A_PITCH, "m");
    x.inverse = smem.take<float>(CHUNK * A_PITCH, "inverse");
    x.scratch = smem.take<float>(CHUNK / 2 * A_PITCH, "scratch");
    x.b = smem.take<float>(CHUNK, "beta");
    x.decay = Decay::take(smem);
    return x;
  }
};

// M with its decays, and Pqk to its rows, `stride` apart.
PRIM void decay_pairs(const Tiles& x, DTYPE* p, int64_t stride, int tokens, int thread) {
  for (int i = thread; i < CHUNK * CHUNK; i += THREADS) {
    const int r = i / CHUNK, c = i % CHUNK, at = r * A_PITCH + c;
    const float factor = x.decay.pair(max(r, c), min(r, c));
    x.m[at] = c < r ? x.kk[at] * factor : 0.0f;
    if constexpr (WRITE_CORE) {
      if (r < tokens) p[r * stride + c] = narrow<DTYPE>(c <= r ? x.qk[at] * factor : 0.0f);
    }
  }
}

// T diag(e^G): the decays of K go to T, which every value head has of its own.
PRIM void decay_t(const Tiles& x, int tokens, int thread) {
  for (int i = thread; i < CHUNK * CHUNK; i += THREADS) {
    int r = i / CHUNK, c = i % CHUNK;
    bool inside = c <= r && r < tokens;
    float decayed = inside ? x.inverse[r * A_PITCH + c] * x.b[c] * x.decay.read(c) : 0.0f;
    x.t[r * C_PITCH + c] = narrow<DTYPE>(decayed);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    wy_factors(const DTYPE* q, const DTYPE* k, const DTYPE* v, const float* beta, const float* g,
               const int64_t* cu_seqlens, DTYPE* core, DTYPE* p, float2* decays, DTYPE* t, DTYPE* w, DTYPE* u, int N,
               int T, int H, int HV) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int h = blockIdx.x % H, groups = HV / H;
  const Chunk chunk = find_chunk<CHUNK>(cu_seqlens, blockIdx.x / H, N, T);
  const int tokens = chunk.tokens;
  if (tokens <= 0) return;
  DynSmem smem;
  const Tiles x = Tiles::take(smem);
  smem.all_taken(SHARED_BYTES);

  const int64_t key = (chunk.first * H + h) * HEAD_K, key_stride = (int64_t)H * HEAD_K, stride = HV;
  load_tile<DTYPE, CHUNK, KP, HEAD_K, THREADS>(x.k, k + key, key_stride, tokens, HEAD_K, thread);
  if constexpr (WRITE_CORE)
    load_tile<DTYPE, CHUNK, KP, HEAD_K, THREADS>(x.q, q + key, key_stride, tokens, HEAD_K, thread);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  lower_products(x.kk, x.k, x.k, warp, lane);
  if constexpr (WRITE_CORE) lower_products(x.qk, x.q, x.k, warp, lane);

  for (int group = 0; group < groups; group++) {
    const int64_t row = chunk.first * HV + h * groups + group;  // of (token, value head)
    load_column<CHUNK, THREADS>(x.b, beta + row, HV, tokens, thread);
    if (warp == 0) x.decay.sum(g + row, HV, tokens, lane);
    if constexpr (WRITE_WU)
      load_tile<DTYPE, CHUNK, VP, HEAD_V, THREADS>(x.v, v + row * HEAD_V, stride * HEAD_V, tokens, HEAD_V, thread);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    x.decay.store<THREADS>(decays + row, HV, tokens, thread);
    decay_pairs(x, p + row * CHUNK, stride * CHUNK, tokens, thread);
    __syncthreads();
    invert_unit_lower<CHUNK, THREADS>(x.inverse, x.m, x.b, x.scratch, thread);
    if constexpr (WRITE_CORE) {
      write_core<THREADS>(core + row * CHUNK, stride * CHUNK, x.m, x.inverse, tokens, warp, lane);
    } else {
      write_t<THREADS>(t + row * CHUNK, stride * CHUNK, x.t, x.inverse, x.b, tokens, thread);
      __syncthreads();
      write_product<THREADS, HEAD_V, V_PITCH>(u + row * HEAD_V, stride * HEAD_V, x.t, x.v, tokens, warp, lane);
      if constexpr (Decay::GATED) {
        __syncthreads();
        decay_t(x, tokens, thread);
        __syncthreads();
      }
      write_product<THREADS, HEAD_K, K_PITCH>(w + row * HEAD_K, stride * HEAD_K, x.t, x.k, tokens, warp, lane);
    }
    __syncthreads();
  }
}
