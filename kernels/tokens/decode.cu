// Decoding: the new tokens of every sequence, on states in the slots of a pool, in place. Token by token, with the
// decay d = e^g of the head or of each key channel, the equations of tokens/recurrent.cu in one pass over S:
//
//   n = beta (v - S^T d k),   o = scale (S^T d q + (k . q) n),   S <- d S + k n^T
//
// Every token has its output; the state that goes to the pool is the one after the first `accepted` tokens, where that
// is given. It comes from the slot of state_indices and goes to that of output_state_indices, or back.
//
// Memory bounds it: a block asks for everything before it looks at anything: numbers of slots, then rows and a thread's
// whole tile of S in vectors, so that it waits twice and much is on its way at once; where ORDERED, also if the
// compiler would rather not. A thread holds the tile until it stores it; with one new token as it came, in fewer
// registers, so that more threads are on the way. With several tokens it is also near the bound of instructions. So
// what is the same for all value channels is made once per block and token, by one warp, and threads read it from
// shared memory (decode/shared_rows.cuh). One token does not wait for that: every thread reads rows at its own keys,
// unless something is to be formed of logits, with which it is slower of some states (decode/own_rows.cuh). If it is
// EARLY, all that needs no state is made while the state is on its way: blocks of few states wait for memory at the
// same time and then compute at the same time. A tile has one address and constants from there, of few value channels
// and many keys, so that few sums are passed between threads: through shuffles between the lanes that share keys and,
// where WARPS share those of a (K, V) state, through shared memory. Bounds are looked at only where a tile can reach
// beyond the state. Blocks share nothing.
//
// Numbers: float (double for DTYPE double) throughout, sums over a thread's key channels in ascending order, then over
// PARTS threads of a warp in a fixed tree, then over warps in ascending order, those of q and k themselves, too; the
// state is rounded to STATE_DTYPE once, when it is stored. Multiplications and additions that go together are fused by
// name, so that tiles of one shape give a token the same bits in every variant, whatever comes with it. With L2NORM
// sums are multiplied by the norms of q and k, of rows whose squares overflow in a smaller unit, which their elements
// have exactly.
//
// Macros: DTYPE, STATE_DTYPE, HEAD_K, HEAD_V, GROUP (value heads per key head), HAS_GATE (1 per head, 2 per key
// channel), RAW_GATE and BIAS (tiles/raw.cuh; g is then a), RAW_BETA (beta is then logits), GATE_DTYPE, BETA_DTYPE,
// VARLEN, STATE_VK, L2NORM, ONE_TOKEN (T is 1, and it is accepted), EARLY (only with ONE_TOKEN), ORDERED (loads stand
// in the order that they are written in), STREAMED (states are not kept in caches), ROWS_FIRST (with ORDERED: before
// the state), OWN_ROWS (only with ONE_TOKEN), PACKED (a state in 16 bits is unpacked twice, in fewer registers), BATCH,
// BLOCKS (of a multiprocessor, at least, that registers suffice for, or 0). VECTOR: elements of S per access, along the
// contiguous axis, whose size it divides. VALUES: value channels per thread; VECTOR unless STATE_VK. PARTS: threads of
// a warp that share a value channel's keys. BESIDE: neighbouring lanes that take neighbouring value channels, and
// WARPS: warps that share keys; both 1 with STATE_VK, else BESIDE PARTS = 32. All of them powers of two. CHANNELS:
// value channels per block, of whole warps; BESIDE VALUES if WARPS is not 1, else PARTS is at least VALUES. AHEAD:
// states (decode/ahead.cuh), or 0. Grid: N * HV * ceil(HEAD_V / CHANNELS) blocks of CHANNELS / VALUES * PARTS * WARPS
// threads. Shared memory: Tokens unless OWN_ROWS and, if WARPS is not 1, Passed or PassedRows (decode/).
#if OWN_ROWS
#include "tokens/decode/own_rows.cuh"
#else
#include "tokens/decode/shared_rows.cuh"
#endif
#include "tokens/decode/ahead.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    decode(const DTYPE* q, const DTYPE* k, const DTYPE* v, const BETA_DTYPE* beta, const GATE_DTYPE* g,
           const int64_t* cu_seqlens, const int64_t* state_indices, const int64_t* output_state_indices,
           const int64_t* accepted, STATE_DTYPE* state, DTYPE* o, real scale, int T, int HV, uint32_t inverse,
           int pool_slots,
#if RAW_GATE || RAW_BETA
           const real* A_log, const real* dt_bias, real bound, real factor,
#endif
           int64_t pool_stride) {
  const uint32_t slice = blockIdx.x % SLICES;
  const Head head(blockIdx.x / SLICES, HV, inverse);
  const uint32_t n = head.n, hv = head.hv;
  const Place p = find_place(threadIdx.x, slice);
  DynSmem smem;
  NewTokens tokens(smem);
  const Work work = find_work(cu_seqlens, state_indices, output_state_indices, accepted, n, T, pool_slots);
  const Ahead ahead(state_indices, HV, inverse);
  Inputs inputs = {q, k, v, beta, g, scale, hv, (uint32_t)HV};
#if RAW_GATE || RAW_BETA
  inputs.A_log = A_log, inputs.dt_bias = dt_bias, inputs.bound = bound, inputs.factor = factor;
#endif
  auto tile_of = [&](int64_t slot) { return slot * pool_stride + (int64_t)hv * (HEAD_K * HEAD_V) + first_element(p); };
  auto o_of = [&](int t) { return ((work.first + t) * HV + hv) * HEAD_V + p.own; };
  const int at_once = ONE_TOKEN ? 1 : min(work.tokens, BATCH);
  if constexpr (ORDERED && ROWS_FIRST) tokens.ask(inputs, work.first, at_once, p, slice);
  if (work.padding) {
#pragma unroll 1
    for (int t = 0; t < work.tokens; t++)
      if (p.writes_o) o[o_of(t)] = narrow<DTYPE>(0);
    return;
  }
  if constexpr (!ORDERED) tokens.ask(inputs, work.first, at_once, p, slice);
  Loaded given;
  given.load(state + tile_of(work.from), p);
  ahead.fetch(state, pool_slots, pool_stride, threadIdx.x);
  if constexpr (ORDERED && !ROWS_FIRST) tokens.ask(inputs, work.first, at_once, p, slice);
  tokens.take(inputs, work.first, at_once, p, slice);
  if constexpr (ONE_TOKEN) {
    int64_t to, to_o;  // made before the state is there, too
    if constexpr (EARLY) to = made(tile_of(work.to)), to_o = made(o_of(0));
    const NewTokens::Update update = tokens.advance(given, 0, inputs, p);
    if constexpr (PACKED) given.stay_packed();
    if constexpr (!EARLY) {
      if (p.writes_o) o[o_of(0)] = narrow<DTYPE>(update.o);
      to = tile_of(work.to);
    }
    if (work.stores) store(state + to, p, [&](int i, int j) { return update(given, i, j); });
    if (EARLY && p.writes_o) o[to_o] = narrow<DTYPE>(update.o);
  } else {
    Held S;
    S.become([&](int i, int j) { return given(i, j); });
#pragma unroll 1
    for (int t = 0;; t++) {
      if (t == work.kept && work.stores) store(state + tile_of(work.to), p, [&](int i, int j) { return S(i, j); });
      if (t == work.tokens) break;
      if (t > 0 && t % BATCH == 0) {
        const int more = min(work.tokens - t, BATCH);
        tokens.ask(inputs, work.first + t, more, p, slice);
        __syncthreads();
        tokens.take(inputs, work.first + t, more, p, slice);
      }
      const NewTokens::Update update = tokens.advance(S, t % BATCH, inputs, p);
      if (p.writes_o) o[o_of(t)] = narrow<DTYPE>(update.o);
      S.become([&](int i, int j) { return update(S, i, j); });
    }
  }
}
