// The outputs of every chunk, all chunks in parallel: with S the state entering the chunk, N its v_new and
// D_ij = e^(G_i - G_j) for i >= j, G the running sum of g in the chunk (all 1 without a gate),
//
//   O = scale (e^G Q S + tril(Q K^T . D) N)
//
// With a gate per key channel q holds e^G and p the pairs, as channel_factors.cu leaves them.
//
// Numbers: operands rounded to DTYPE (S and the pairs included), sums in float (float: 3xTF32), O rounded once.
// Macros: DTYPE, HEAD_K, HEAD_V, CHUNK, HAS_GATE, VARLEN, SLICE (value channels per block, a multiple of 16).
// Grid: slots * HV * ceil(padded(HEAD_V) / SLICE) blocks of 128 threads.
// Shared memory: Q and K tiles, the slice of N and of S, the pairs, G; see cupy_delta/cuda/portable/forward.py.
#include "tiles/decay.cuh"
#include "tiles/fragments.cuh"
#include "tiles/load.cuh"
#include "tiles/sequence.cuh"

constexpr int THREADS = 128, KP = padded(HEAD_K), SLICES = (padded(HEAD_V) + SLICE - 1) / SLICE;
constexpr int K_PITCH = pitch_of<DTYPE>(KP), V_PITCH = pitch_of<DTYPE>(SLICE), C_PITCH = pitch_of<DTYPE>(CHUNK);

// pairs = tril(Q K^T . D)
PRIM void multiply_pairs(DTYPE* pairs, const DTYPE* tile_q, const DTYPE* tile_k, const Decay& decay, int tokens,
                         int warp, int lane) {
  for (int tile = warp; tile < CHUNK / 16 * (CHUNK / 16); tile += THREADS / 32) {
    int r = tile / (CHUNK / 16) * 16, c = tile % (CHUNK / 16) * 16;
    float d[2][4];
    clear(d);
    if (c <= r)
      multiply_tiles<DTYPE, 2, KP, false>(d, tile_q + r * K_PITCH, K_PITCH, tile_k + c * K_PITCH, K_PITCH, lane);
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int row = r + sum_row(lane, i), column = c + sum_column(lane, j, i);
        const bool inside = column <= row && row < tokens;
        const float factor = decay.pair(max(row, column), min(row, column));
        pairs[row * C_PITCH + column] = narrow<DTYPE>(inside ? d[j][i] * factor : 0.0f);
      }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    chunk_output(const DTYPE* q, const DTYPE* k, const DTYPE* p, const DTYPE* v_new, const float* states,
                 const float* g, const int64_t* cu_seqlens, DTYPE* o, float scale, int N, int T, int H, int HV) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int slice = blockIdx.x % SLICES, hv = blockIdx.x / SLICES % HV, h = hv / (HV / H);
  const int64_t slot = blockIdx.x / (SLICES * HV);
  const Chunk chunk = find_chunk<CHUNK>(cu_seqlens, slot, N, T);
  if (chunk.tokens <= 0) return;
  const int first = slice * SLICE, width = min(SLICE, HEAD_V - first);

  DynSmem smem;
  DTYPE* tile_q = smem.take<DTYPE>(CHUNK * K_PITCH, "q");
  DTYPE* tile_k = PER_CHANNEL ? nullptr : smem.take<DTYPE>(CHUNK * K_PITCH, "k");
  DTYPE* tile_n = smem.take<DTYPE>(CHUNK * V_PITCH, "v_new");
  DTYPE* state = smem.take<DTYPE>(KP * V_PITCH, "state");
  DTYPE* pairs = smem.take<DTYPE>(CHUNK * C_PITCH, "pairs");
  const Decay decay = Decay::take(smem);
  smem.all_taken(SHARED_BYTES);
  if (warp == 0) decay.sum(g + chunk.first * HV + hv, HV, chunk.tokens, lane);

  const int64_t row = chunk.first * HV + hv, key_row = PER_CHANNEL ? row : chunk.first * H + h;
  const int64_t key = key_row * HEAD_K, key_stride = (int64_t)(PER_CHANNEL ? HV : H) * HEAD_K;
  const int64_t value = row * HEAD_V + first;
  load_tile<DTYPE, CHUNK, KP, HEAD_K, THREADS>(tile_q, q + key, key_stride, chunk.tokens, HEAD_K, thread);
  if constexpr (PER_CHANNEL)
    load_tile<DTYPE, CHUNK, CHUNK, CHUNK, THREADS>(pairs, p + row * CHUNK, (int64_t)HV * CHUNK, chunk.tokens, CHUNK,
                                                   thread);
  else
    load_tile<DTYPE, CHUNK, KP, HEAD_K, THREADS>(tile_k, k + key, key_stride, chunk.tokens, HEAD_K, thread);
  load_tile<DTYPE, CHUNK, SLICE, HEAD_V, THREADS>(tile_n, v_new + value, (int64_t)HV * HEAD_V, chunk.tokens, width,
                                                  thread);
  cp_async_commit();
  const float* S = states + (slot * HV + hv) * HEAD_K * HEAD_V + first;
  for (int i = thread; i < KP * SLICE; i += THREADS) {
    int row = i / SLICE, column = i % SLICE;
    bool inside = row < HEAD_K && column < width;
    state[row * V_PITCH + column] = narrow<DTYPE>(inside ? S[(int64_t)row * HEAD_V + column] : 0.0f);
  }
  cp_async_wait<0>();
  __syncthreads();

  if constexpr (!PER_CHANNEL) {
    multiply_pairs(pairs, tile_q, tile_k, decay, chunk.tokens, warp, lane);
    __syncthreads();
  }

  for (int tile = warp; tile < CHUNK / 16 * (SLICE / 16); tile += THREADS / 32) {
    int r = tile / (SLICE / 16) * 16, c = tile % (SLICE / 16) * 16;
    float d[2][4];
    clear(d);
    multiply_tiles<DTYPE, 2, KP, true>(d, tile_q + r * K_PITCH, K_PITCH, state + c, V_PITCH, lane);
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) d[j][i] *= decay.read(r + sum_row(lane, i));
    multiply_tiles<DTYPE, 2, CHUNK, true>(d, pairs + r * C_PITCH, C_PITCH, tile_n + c, V_PITCH, lane);
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int row = r + sum_row(lane, i), column = c + sum_column(lane, j, i);
        if (row < chunk.tokens && column < width)
          o[value + (int64_t)row * HV * HEAD_V + column] = narrow<DTYPE>(scale * d[j][i]);
      }
  }
}
