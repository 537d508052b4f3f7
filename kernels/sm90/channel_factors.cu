// What the walks read of every chunk of 64 tokens with a gate per key channel, all chunks in parallel, on compute
// capability 9.0. With K and Q the rows of a chunk, b = beta, G the running sum of g per channel, and for tokens i >= j
//
//   <x_i, k_j>_D = sum over channels of x_i e^(G_i - G_j) k_j
//
//   M_ij = <k_i, k_j>_D for i > j      core = -M (I + diag(b) M)^-1      p_ij = <q_i, k_j>_D
//   k_read = e^G K      q_read = e^G Q      k_write = e^(G_C - G) K      channel_decays = e^(G_C)
//
// A warp has the rows of a block of 16 tokens. With x the running sum of a block's gates and z that of all of them, in
// powers of two, 2^x and 2^(z - x) are at most 1: they make the tiles, and the products with earlier blocks
// (channel_factors/pairs.cuh). Pairs within the block go through 2^(x_i + HALF_RANGE) 2^(-x_j - HALF_RANGE), whose
// operands float, but no 16-bit type, has room for: tokens up to which a block's gates leave 2^-RANGE and more, 5
// natural logarithms for each of 16 tokens. Pairs of later tokens are formed one by one. Which of the two a token has
// follows from gates up to its own, and so does everything else but k_write and channel_decays.
//
// Memory bounds this: blocks are small, so that three share a multiprocessor, of which some load while others compute.
//
// Numbers: sums of at most 16 gates in float; a gate below 2^-LOWEST counts as that, which float has no number for. NaN
// stays, and spoils its own token and later ones. Products within a block in TF32, between blocks of DTYPE operands;
// sums in float, the core as in sm90/factors.cu; results rounded once.
//
// Macros: DTYPE (bf16 or f16), GATE (float or DTYPE), HEAD_K (up to 128, a multiple of 8), CHUNK (64), HAS_GATE (2),
// VARLEN; IF_DECLINED, as in sm90/channel_forward.cu. Grid: slots * HV blocks of 128 threads, with IF_DECLINED fewer
// that take turns, as each one that leaves takes its time. Shared memory: x, then scaled keys, then M and the core in
// its place; K and Q, then what is read; decays over blocks; beta; see cupy_delta/cuda/sm90/channel.py.
#include "primitives/hopper.cuh"
#include "sm90/channel_factors/pairs.cuh"
#include "sm90/core.cuh"
#include "tiles/sequence.cuh"

#if IF_DECLINED
// Blocks that take turns; no address is kept from turn to turn.
PRIM int own_thread() { return opaque(threadIdx.x); }
PRIM bool has_another(uint32_t& block, uint32_t blocks) {
  block += gridDim.x;
  if (block >= blocks) return false;
  __syncthreads();  // shared memory is read
  return true;
}
#else
PRIM int own_thread() { return threadIdx.x; }
#endif

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    channel_factors_hopper(const DTYPE* q, const DTYPE* k, const float* beta, const GATE* g, const int64_t* cu_seqlens,
                           DTYPE* core, DTYPE* p, DTYPE* k_read, DTYPE* q_read, DTYPE* k_write, float* channel_decays,
#if IF_DECLINED
                           const int* declined, uint32_t blocks,
#endif
                           int N, int T, int H, int HV) {
#if IF_DECLINED
  if (*declined == 0) return;
#endif
  DynSmem smem;
  const Shared s = take_shared(smem);
  smem.all_taken(SHARED_BYTES);
  uint32_t block = blockIdx.x;
  do {
    const int thread = own_thread(), warp = thread / 32, lane = thread % 32;
    const int hv = block % HV, h = hv / (HV / H);
    const int64_t slot = block / HV;
    const Chunk chunk = find_chunk<CHUNK>(cu_seqlens, slot, N, T);
#if IF_DECLINED
    if (chunk.tokens <= 0) continue;
#else
    if (chunk.tokens <= 0) return;
#endif
    const int tokens = chunk.tokens;
    const int64_t key = (chunk.first * H + h) * HEAD_K, first = chunk.first * HV + hv;
    const int64_t key_stride = (int64_t)H * HEAD_K, row_stride = (int64_t)HV * HEAD_K,
                  pair_stride = (int64_t)HV * CHUNK;
    load_tile<DTYPE, CHUNK, KP, HEAD_K, THREADS>(s.k, k + key, key_stride, tokens, HEAD_K, thread);
    load_tile<DTYPE, CHUNK, KP, HEAD_K, THREADS>(s.q, q + key, key_stride, tokens, HEAD_K, thread);
    cp_async_commit();
    if (thread < CHUNK) s.beta[thread] = thread < tokens ? beta[first + (int64_t)thread * HV] : 0.0f;
    const int row = warp * BLOCK;
    const int within = sum_gates(s, g + first * HEAD_K, row_stride, tokens - row, warp, lane);
    cp_async_wait<0>();
    __syncthreads();
    multiply_decays(s, channel_decays + (slot * HV + hv) * HEAD_K, thread);
    __syncthreads();

    Own own = {}, beyond = {};
    if (within < BLOCK) multiply_one_by_one(beyond, s, warp, within, lane);
    scale_block(own, {k_read + first * HEAD_K, q_read + first * HEAD_K, k_write + first * HEAD_K, row_stride, tokens},
                s, warp, lane);
    own.finish(beyond, within, lane);
    DTYPE* pairs = p + first * CHUNK;
    write_pairs(pairs + row * pair_stride + row, pair_stride, own.p, tokens - row, lane);
    write_zeros(pairs + row * pair_stride, pair_stride, warp, tokens - row, lane);
    __syncthreads();

    Met met[3];
    const Meeting meeting = {warp};
#pragma unroll
    for (int n = 0; n < 3; n++) {
      if (n >= meeting.count()) continue;
      const int a = meeting.later(n) * BLOCK, b = meeting.earlier(n) * BLOCK;
      if (meeting.apart())
        met[n].multiply<true>(s, meeting.later(n), meeting.earlier(n), lane);
      else
        met[n].multiply<false>(s, meeting.later(n), meeting.earlier(n), lane);
      write_pairs(pairs + a * pair_stride + b, pair_stride, met[n].p, tokens - a, lane);
    }
    __syncthreads();  // everyone is done with the scaled keys

    store_block_of_m(s.x, own.m, row, row, lane);
#pragma unroll
    for (int n = 0; n < 3; n++)
      if (n < meeting.count())
        store_block_of_m(s.x, met[n].m, meeting.later(n) * BLOCK, meeting.earlier(n) * BLOCK, lane);
    __syncthreads();
    if (warp < 2)
      CoreWarp{s.x, s.x + warp * TRIANGLE, s.x + 2 * TRIANGLE, s.beta, warp, 1, lane}.write(core + first * CHUNK,
                                                                                            pair_stride, tokens);
#if IF_DECLINED
  } while (has_another(block, blocks));
#else
  } while (false);
#endif
}
