// Decoding: the new tokens of every sequence, on states in the slots of a pool, in place. Token by token, with the
// decay d = e^g of the head or of each key channel, the equations of tokens/recurrent.cu in one pass over S:
//
//   n = beta (v - S^T d k),   o = scale (S^T d q + (k . q) n),   S <- d S + k n^T
//
// Every token has its output; the state that goes to the pool is the one after the first `accepted` tokens, where that
// is given. It comes from the slot of state_indices and goes to that of output_state_indices, or back.
//
// Memory bounds it: a thread asks for all of its tile of S in vectors before it reads anything else, so that many are
// on their way at once, and holds the tile until it stores it; with one new token as it came, in fewer registers, so
// that more threads are on the way. States of 16 bits are also near the bound of instructions: so a tile has one
// address and constants from there, and bounds are looked at only where it can reach beyond the state. Blocks share
// nothing. Sums pass through shuffles between the lanes that share keys and, where WARPS share those of a (K, V)
// state, through shared memory.
//
// Numbers: float (double for DTYPE double) throughout, sums over a thread's key channels in ascending order, then over
// PARTS threads of a warp in a fixed tree, then over warps in ascending order; the state is rounded to STATE_DTYPE
// once, when it is stored. Multiplications and additions that go together are fused by name, so that a token has the
// same bits in every variant, whatever comes with it. q and k are normalised in the same precision with L2NORM, rows
// whose squares overflow in a smaller unit, which their elements have exactly.
//
// Macros: DTYPE, STATE_DTYPE, HEAD_K, HEAD_V, GROUP (value heads per key head), HAS_GATE (1 per head, 2 per key
// channel), VARLEN, STATE_VK, L2NORM, ONE_TOKEN (T is 1, and it is accepted). VECTOR: elements of S per access, along
// the contiguous axis, whose size it divides. VALUES: value channels per thread; VECTOR unless STATE_VK. PARTS:
// threads of a warp that share a value channel's keys. ACROSS: neighbouring lanes that take neighbouring value
// channels, and WARPS: warps that share keys; both 1 with STATE_VK, else ACROSS PARTS = 32. All of them powers of two.
// CHANNELS: value channels per block, of whole warps; ACROSS VALUES if WARPS is not 1, else PARTS is at least VALUES.
// Grid: N * HV * ceil(HEAD_V / CHANNELS) blocks of CHANNELS / VALUES * PARTS * WARPS threads. Shared memory: sums of
// each warp and what is written, if WARPS is not 1.
#include "tiles/sequence.cuh"
#include "tokens/decode/token.cuh"

// The tokens of a sequence, how many of them its state takes up, and the slots that it comes from and goes to.
struct Work {
  int64_t first, from, to;
  int tokens, kept;
  bool padding, stores;
};
PRIM Work find_work(const int64_t* cu_seqlens, const int64_t* state_indices, const int64_t* output_state_indices,
                    const int64_t* accepted, int n, int T, int pool_slots) {
  const Sequence sequence = find_sequence<1>(cu_seqlens, n, ONE_TOKEN ? 1 : T);
  Work w;
  w.first = sequence.first;
  w.tokens = ONE_TOKEN ? 1 : sequence.tokens;
  w.kept = ONE_TOKEN || accepted == nullptr ? w.tokens : clamp_token(accepted[n], 0, w.tokens);
  w.from = state_indices == nullptr ? n : state_indices[n];
  w.to = output_state_indices == nullptr ? w.from : output_state_indices[n];
  w.padding = w.from < 0 || w.from >= pool_slots;
  w.stores = w.to >= 0 && w.to < pool_slots && (w.kept > 0 || w.to != w.from);
  return w;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    decode(const DTYPE* q, const DTYPE* k, const DTYPE* v, const real* beta, const real* g, const int64_t* cu_seqlens,
           const int64_t* state_indices, const int64_t* output_state_indices, const int64_t* accepted,
           STATE_DTYPE* state, DTYPE* o, real scale, int T, int HV, int pool_slots, int64_t pool_stride) {
  const uint32_t head = blockIdx.x / SLICES, n = head / HV, hv = head % HV;
  const Place p = find_place(threadIdx.x, blockIdx.x % SLICES);
  Passed* passed = nullptr;
  if constexpr (WARPS > 1) {
    DynSmem smem;
    passed = smem.take<Passed>(1, "passed");
    smem.all_taken(SHARED_BYTES);
  }
  const Work work = find_work(cu_seqlens, state_indices, output_state_indices, accepted, n, T, pool_slots);
  auto o_at = [&](int t) { return &o[((work.first + t) * HV + hv) * HEAD_V + p.own]; };
  if (work.padding) {
#pragma unroll 1
    for (int t = 0; t < work.tokens; t++)
      if (p.writes_o) *o_at(t) = narrow<DTYPE>(0);
    return;
  }
  auto tile = [&](int64_t slot) {
    return state + slot * pool_stride + (int64_t)hv * (HEAD_K * HEAD_V) + first_element(p);
  };
  Loaded given;
  given.load(tile(work.from), p);

  const Inputs inputs = {q, k, v, beta, g, hv / GROUP, hv, (uint32_t)HV / GROUP, (uint32_t)HV};
  if constexpr (ONE_TOKEN) {
    Token token;
    token.load(inputs, work.first, p);
    const Update update = advance(given, token, scale, p, passed);
    if (p.writes_o) *o_at(0) = narrow<DTYPE>(update.o);
    if (work.stores) store(tile(work.to), p, [&](int i, int j) { return update(given, token, i, j); });
  } else {
    Held S;
    S.become([&](int i, int j) { return given(i, j); });
    Token token, next;
    if (work.tokens > 0) next.load(inputs, work.first, p);
#pragma unroll 1
    for (int t = 0;; t++) {
      if (t == work.kept && work.stores) store(tile(work.to), p, [&](int i, int j) { return S(i, j); });
      if (t == work.tokens) break;
      token = next;
      if (t + 1 < work.tokens) next.load(inputs, work.first + t + 1, p);
      const Update update = advance(S, token, scale, p, passed);
      if (p.writes_o) *o_at(t) = narrow<DTYPE>(update.o);
      S.become([&](int i, int j) { return update(S, token, i, j); });
    }
  }
}
