// The gradients of portable/backward_channel.cu for chunks of 64 tokens on compute capability 9.0, through the tensor
// cores. With x the sum of a block's gates up to a token, z that of all of them, and Kc = e^(z - x) K, Kl = e^x K,
// Ql = e^x Q, for the tokens of block a
//
//   dq = e^x to_q + pairs within a      to_q = scale dO S^T, decayed over the blocks before a
//                                              + sum over blocks b before a of dPqk_ab Kc_b, decayed over those between
//
// and so on for dk with E, and for what comes from later tokens with transposed pairs, Ql and Kl
// (backward_channel/blocks.cuh); pairs within a block in backward_channel/within.cuh. For a channel, with Z_ij the
// products, decays included, times what comes back to them,
//
//   dg_t = sum of Z_ij over all i >= t > j
//
// where the state that enters stands for a token before the first, and the gradient of the one that leaves for a token
// after the last. Every term holds e^(g_t) itself, so none is large where their sum is small, and dg is 0 for g = -inf.
//
// All products are transposed: their rows are channels, whose decays and sums are a lane's own. A block of threads has
// half of the key channels, or all of up to 64, so that two blocks share a multiprocessor, of which one loads while the
// other computes. A warp has 16 tokens and 32 channels. With GROUPED it goes through the value heads of a key head,
// each with gates of its own, one after the other, and their dq and dk are summed in that order.
//
// Numbers: operands of products in DTYPE, within a block in TF32; sums in float, and beta in the sums; results rounded
// once, after all value heads; dbeta and dg in float. Sums of at most 16 gates in float, gates as in
// sm90/gate_powers.cuh.
//
// Macros: DTYPE (bf16 or f16), GATE (float or DTYPE), HEAD_K (up to 128, a multiple of 8), HEAD_V, CHUNK (64), VARLEN,
// KEYS (64), SLICE (value channels at a time); GROUPED (several value heads per key head). Grid: slots * H * slices of
// key channels blocks of 256 threads, with GROUPED as many as there is room for, which take all of these in turns.
// Shared memory: Q, K and sums of gates, then their gradients; sums over blocks; pairs within blocks; beta; and in one
// place slices of S, dS', dO, N^ and dY, then scaled keys and queries and pairs of blocks; see
// cupy_delta/cuda/sm90/channel.py.
#include "sm90/backward_channel/within.cuh"
#include "tiles/sequence.cuh"

constexpr int SLICES = (padded(HEAD_V) + SLICE - 1) / SLICE;

// What is given, and where gradients go.
struct Arrays {
  const DTYPE *q, *k;
  const float* beta;
  const GATE* g;
  const DTYPE *corrections, *dy, *d_o, *states, *dstates;
  const int64_t* cu_seqlens;
  DTYPE *dq, *dk, *dv;
  float *dbeta, *dg;
  float4* waiting;  // see backward_channel/within.cuh
  float scale;
  int N, T, H, groups;  // value heads of a key head
};

// Those of a chunk, key head and slice of key channels, which are an item, for one of its value heads.
PRIM void add_gradients(const Arrays& of, const Shared& s, unsigned thread, unsigned item, int head) {
  const Warp warp(thread);
  const int key_slice = item % KEY_SLICES, h = item / KEY_SLICES % of.H;
  const int64_t slot = item / KEY_SLICES / of.H;
  const Chunk chunk = find_chunk<CHUNK>(of.cu_seqlens, slot, of.N, of.T);
  if (chunk.tokens <= 0) return;
  const int tokens = chunk.tokens, first_key = key_slice * KEYS, keys = min(KEYS, HEAD_K - first_key);
  const int hv = h * of.groups + head, HV = of.H * of.groups;
  const int64_t row = chunk.first * HV + hv, gate = row * HEAD_K + first_key, gate_stride = (int64_t)HV * HEAD_K;
  const int64_t key = GROUPED ? (chunk.first * of.H + h) * HEAD_K + first_key : gate;
  const int64_t key_stride = (int64_t)of.H * HEAD_K, value_stride = (int64_t)HV * HEAD_V;
  const int64_t value = row * HEAD_V, state = (slot * HV + hv) * HEAD_K * HEAD_V + first_key;

  load_gates(s.x, of.g + gate, gate_stride, tokens, keys, thread);
  if (head == 0) {
    load_tile<DTYPE, CHUNK, KEYS, HEAD_K, THREADS>(s.q, of.q + key, key_stride, tokens, keys, thread);
    load_tile<DTYPE, CHUNK, KEYS, HEAD_K, THREADS>(s.k, of.k + key, key_stride, tokens, keys, thread);
  }
  const Sources sources = {of.d_o + value,     of.corrections + value, of.dy + value, of.states + state,
                           of.dstates + state, value_stride,           tokens,        keys};
  const Values values = s.values();
  sources.load(values, 0, thread);
  cp_async_commit();
  if (thread < CHUNK) s.b[thread] = thread < tokens ? of.beta[row + (int64_t)thread * HV] : 0.0f;

  Products products;
  products.clear_all();
  ValueGradients gradients(key_slice, thread);
  for (int slice = 0; slice < SLICES; slice++) {
    const int first = slice * SLICE;
    cp_async_wait<0>();
    __syncthreads();
    if (slice == 0) sum_gates(s, warp);
    gradients.add_slice(values, s.b, of.dv + value + first, value_stride, tokens, min(SLICE, HEAD_V - first));
    products.add_slice(values, warp, first / 16);
    __syncthreads();
    if (slice + 1 < SLICES) sources.load(values, first + SLICE, (unsigned)opaque(thread) % THREADS);
    cp_async_commit();
  }
  cp_async_wait<0>();
  gradients.write_dbeta(of.dbeta + row, HV, tokens);
  products.store_pairs(s, of.scale, warp);
  products.weigh(s, of.scale, warp);
  store_sums(s.states + warp.block * KEYS, products.states, warp);
  scale_tiles(s, warp);
  __syncthreads();
  gather_before(products.from, s, warp);
  gather_behind(products.from, s, warp);
  __syncthreads();
  const bool last = head + 1 == of.groups;
  finish_gradients(products.from, s, {of.waiting, head == 0, last}, warp);
  const Gradients out = {of.dq, of.dk, of.dg, key, key_stride, gate, gate_stride, tokens, keys};
  out.write_all(s, last, Warp((unsigned)opaque(thread) % THREADS));
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    backward_channel_hopper(const DTYPE* q, const DTYPE* k, const float* beta, const GATE* g, const DTYPE* corrections,
                            const DTYPE* dy, const DTYPE* d_o, const DTYPE* states, const DTYPE* dstates,
                            const int64_t* cu_seqlens, DTYPE* dq, DTYPE* dk, DTYPE* dv, float* dbeta, float* dg,
#if GROUPED
                            float4* waiting, int groups, int items,
#endif
                            float scale, int N, int T, int H) {
#if !GROUPED
  float4* const waiting = nullptr;
  const int groups = 1;
#endif
  const Arrays arrays = {q,  k,  beta,  g,  corrections, dy,    d_o, states, dstates, cu_seqlens, dq,
                         dk, dv, dbeta, dg, waiting,     scale, N,   T,      H,       groups};
  DynSmem smem;
  const Shared s = take_shared(smem);
  smem.all_taken(SHARED_BYTES);
#if GROUPED
  const int turns = (items - blockIdx.x + gridDim.x - 1) / gridDim.x * groups;
#pragma unroll 1
  for (int turn = 0; turn < turns; turn++) {
    // No address is kept from turn to turn, for want of registers.
    const unsigned item = blockIdx.x + opaque(turn) / groups * gridDim.x;
    add_gradients(arrays, s, (unsigned)opaque(threadIdx.x) % THREADS, item, turn % groups);
    __syncthreads();
  }
#else
  add_gradients(arrays, s, threadIdx.x, blockIdx.x, 0);
#endif
}
