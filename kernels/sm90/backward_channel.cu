// The gradients of portable/backward_channel.cu for chunks of 64 tokens and as many key heads as value heads, on
// compute capability 9.0, whose shared memory has room for all key channels of a chunk: so the pairs of tokens are
// multiplied once, and what comes from other blocks of 16 tokens goes through the tensor cores
// (sm90/backward_channel/blocks.cuh). With x the sum of a block's gates up to a token, z that of all of them, and
// Kc = e^(z - x) K, Kl = e^x K, Ql = e^x Q, for the tokens of block a
//
//   dq = e^x to_q + pairs within a      to_q = scale dO S^T, decayed over the blocks before a
//                                              + sum over blocks b before a of dPqk_ab Kc_b, decayed over those between
//
// and so on for dk with E, and for what comes from later tokens with transposed pairs, Ql and Kl. dg is summed as in
// portable/channel_gradient.cuh, which also has the pairs within a block.
//
// Four warps have half of the key channels, each of them a block of 16 tokens: as rows of products with the states,
// then of those with other blocks. Then a thread has one or two blocks of a channel.
//
// Numbers: operands of products in DTYPE, sums in float; what stays within a block in float; results rounded once;
// dbeta and dg in float.
//
// Macros: DTYPE (bf16 or f16), HEAD_K (up to 128, a multiple of 8), HEAD_V, CHUNK (64), VARLEN, WARPS (8), SLICE (64),
// KEYS (half the key channels, 64 or 32).
// Grid: slots * H blocks of 256 threads. Shared memory: Q, K; decays of tokens and blocks, sums over blocks; pairs;
// beta and dbeta; and in one place slices of S, dS', dO, N and -dR, then scaled keys and queries, then what comes to
// the tokens of a channel; see cupy_delta/cuda/sm90/channel.py.
#include "sm90/backward_channel/blocks.cuh"
#include "tiles/sequence.cuh"

constexpr int SLICES = (padded(HEAD_V) + SLICE - 1) / SLICE;

// What the products of a slice add.
PRIM void add_slice(Products& products, float (&states)[PARTS], const Half& half, const Tiles& s, int warp, int lane) {
  const Values& x = s.values;
  const int at = warp % COUNT * BLOCK * V_PITCH;
  multiply_tiles<DTYPE, TILES, SLICE, true>(products.from_q, x.o + at, V_PITCH, half.s, K_PITCH, lane);
  multiply_tiles<DTYPE, TILES, SLICE, true>(products.from_k, x.r + at, V_PITCH, half.s, K_PITCH, lane);
  multiply_tiles<DTYPE, TILES, SLICE, true>(products.from_n, x.n + at, V_PITCH, half.d, K_PITCH, lane);
  multiply_tiles<DTYPE, 8, SLICE, false>(products.pairs, (warp < COUNT ? x.o : x.r) + at, V_PITCH, x.n, V_PITCH, lane);
#pragma unroll
  for (int part = 0; part < PARTS; part++)
#pragma unroll 4
    for (int v = half.block(part); v < SLICE; v += COUNT)
      states[part] += widen(half.s[v * K_PITCH + half.c]) * widen(half.d[v * K_PITCH + half.c]);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    backward_channel_hopper(const DTYPE* q, const DTYPE* k, const float* beta, const float* g, const DTYPE* corrections,
                            const DTYPE* dy, const DTYPE* d_o, const DTYPE* states, const DTYPE* dstates,
                            const int64_t* cu_seqlens, DTYPE* dq, DTYPE* dk, DTYPE* dv, float* dbeta, float* dg,
                            float scale, int N, int T, int H) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, block = warp % COUNT;
  const int h = blockIdx.x % H;
  const int64_t slot = blockIdx.x / H;
  const Chunk chunk = find_chunk<CHUNK>(cu_seqlens, slot, N, T);
  if (chunk.tokens <= 0) return;
  const int tokens = chunk.tokens, first_key = warp / COUNT * KEYS, keys = min(KEYS, HEAD_K - first_key);
  const int64_t row = chunk.first * H + h, key = row * HEAD_K + first_key, key_stride = (int64_t)H * HEAD_K;
  const int64_t value_stride = (int64_t)H * HEAD_V, state_at = (slot * H + h) * HEAD_K * HEAD_V + first_key;

  DynSmem smem;
  const Tiles s = take_tiles(smem);
  smem.all_taken(SHARED_BYTES);
  const Half half = s.half(warp / COUNT, thread % HALF_THREADS);
  const Channels& channels = half.channels;
  load_tile<DTYPE, CHUNK, KEYS, HEAD_K, HALF_THREADS>(channels.q, q + key, key_stride, tokens, keys, half.thread);
  load_tile<DTYPE, CHUNK, KEYS, HEAD_K, HALF_THREADS>(channels.k, k + key, key_stride, tokens, keys, half.thread);
  load_tile<float, CHUNK, KEYS, HEAD_K, HALF_THREADS>(channels.e, g + key, key_stride, tokens, keys, half.thread);
  load_column<CHUNK, THREADS>(s.b, beta + row, H, tokens, thread);

  Products products;
  products.clear_all();
  float states_dot[PARTS] = {};
  for (int slice = 0; slice < SLICES; slice++) {
    const int first = slice * SLICE, width = min(SLICE, HEAD_V - first);
    const int64_t at = row * HEAD_V + first, state = state_at + first * HEAD_K;
    load_tile<DTYPE, SLICE, KEYS, HEAD_K, HALF_THREADS>(half.s, states + state, HEAD_K, width, keys, half.thread);
    load_tile<DTYPE, SLICE, KEYS, HEAD_K, HALF_THREADS>(half.d, dstates + state, HEAD_K, width, keys, half.thread);
    load_tile<DTYPE, CHUNK, SLICE, HEAD_V, THREADS>(s.values.o, d_o + at, value_stride, tokens, width, thread);
    load_tile<DTYPE, CHUNK, SLICE, HEAD_V, THREADS>(s.values.n, corrections + at, value_stride, tokens, width, thread);
    load_tile<DTYPE, CHUNK, SLICE, HEAD_V, THREADS>(s.values.r, dy + at, value_stride, tokens, width, thread);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    if (slice == 0) exponentiate<KEYS, HALF_THREADS>(channels.e, channels.sums, channels.decays, half.thread);
    weigh_rows(s.values.n, s.values.r, s.b, s.b_sums, slice == 0, {dv + at, value_stride, true, tokens, width}, thread);
    __syncthreads();
    add_slice(products, states_dot, half, s, warp, lane);
    __syncthreads();
  }
  if (thread < tokens) dbeta[row + (int64_t)thread * H] = s.b_sums[thread];
  products.store_pairs(s, scale, block, warp, lane);
  half.scale_tiles(states_dot);
  __syncthreads();
  products.gather_before(half, s, scale, block, lane);
  products.gather_behind(half, s, block, lane);
  __syncthreads();
  products.store(half, block, lane);
  half.decay_sums();
  __syncthreads();
  half.write_gradients({dq + key, dk + key, dg + key, key_stride, tokens, keys}, s.own);
}
