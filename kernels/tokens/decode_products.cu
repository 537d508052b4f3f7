// Decoding on states of 16 bits: up to four new tokens of every sequence, on states in the slots of a pool, in place,
// by products on the tensor cores. With the decays d_t = e^g_t and D_ts = d_(s+1) ... d_t, all tokens read the state
// that was there before them, in one pass over S, and what they write of each other's reads is put right among them:
//
//   n_t = beta_t (v_t - D_t S^T k_t - sum_(s<t) D_ts (k_s . k_t) n_s)
//   o_t = scale (D_t S^T q_t + sum_(s<=t) D_ts (k_s . q_t) n_s)
//   S <- D_m S + sum_(s<=m) D_ms k_s n_s^T,   m the last accepted token
//
// Memory bounds it. The state stays in 16 bits until it is stored: they are the left operand of S^T [k q], whose right
// one are the rows of the tokens as they lie in memory, and take half the registers of sums in float, so that much is
// on the way at once. All products of rows with each other are one more tile. With a (V, K) state a warp has all keys
// of its value channels and needs nobody; with a (K, V) state warps share the keys and pass sums through shared memory.
//
// Numbers: float throughout, sums of products of 16-bit operands, which are exact; n is multiplied by k in two pieces
// of 16 bits, to 2^-16 of it; the state is rounded once, when it is stored. A token's bits depend on no later one, nor
// on how many there are. With L2NORM sums are multiplied by the norms of q and k, of rows whose squares overflow in a
// smaller unit.
//
// Macros: TOKENS, of every sequence (1 to 4), ONE_TOKEN (there is one, and it is accepted), DTYPE and STATE_DTYPE, the
// same of 16 bits, HEAD_K, HEAD_V, GROUP (value heads per key head), HAS_GATE (0, or 1 per head), RAW_GATE and BIAS
// (tiles/raw.cuh; g is then a), RAW_BETA (beta is then logits), GATE_DTYPE, BETA_DTYPE, STATE_VK, ORDERED (1), STREAMED
// (states are not kept in caches), L2NORM, VARLEN (0). TILES: of 16 value channels, of a warp. WARPS: of a block; those
// of a (K, V) state share its keys. AHEAD: states (decode/ahead.cuh), or 0. Grid: N * HV * HEAD_V / CHANNELS blocks of
// 32 WARPS threads. Shared memory: Passed unless STATE_VK.
#if HAS_GATE == 2
#include "tokens/decode/products_channels.cuh"
#else
#include "tokens/decode/products_rows.cuh"
#endif
#include "tokens/decode/ahead.cuh"

// What warps that share keys pass to each other: sums over the keys of each, and what tokens write.
struct Passed {
  Sums sums[SHARERS][TILES][32];
  Pieces written[TILES][32];

  // Over the keys of all warps.
  PRIM Sums total(int tile, const Place& p) const {
    Sums all = {};
#pragma unroll
    for (int w = 0; w < SHARERS; w++) {
      const Sums some = sums[w][tile][p.lane];
#pragma unroll
      for (int e = 0; e < 4; e++) all.element[e] += some.element[e];
    }
    return all;
  }
};

// S <- decay S + sum k n^T, rounded, to memory. `group` gives what a group of keys is multiplied by.
template <class F>
PRIM void store_state(STATE_DTYPE* to, State& S, const Pieces (&written)[TILES], const Place& p, F group) {
#pragma unroll
  for (int m = 0; m < GROUPS; m++) {
    const GroupKeys k = group(m);
    State::store_group(to, m, [&](int i, int e) {
      const float2 first = unpack2<STATE_DTYPE>(S.at(m, i, e, 0)), second = unpack2<STATE_DTYPE>(S.at(m, i, e, 1));
      const real d0 = k.decays[2 * e], d1 = k.decays[2 * e + 1];
      float x[4] = {d0 * first.x, d1 * first.y, d0 * second.x, d1 * second.y};
      const uint32_t a0 = written[i].element[0], a1 = written[i].element[1];
      const uint32_t a[4] = {a0, a1, NewTokens::second_half(a0, p), NewTokens::second_half(a1, p)};
      mma_m16n8k16<DTYPE>(x, a, k.first[e], k.second[e]);
      return Neighbours<float, 4>{x[0], x[1], x[2], x[3]};
    });
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    decode_products(const DTYPE* q, const DTYPE* k, const DTYPE* v, const BETA_DTYPE* beta, const GATE_DTYPE* g,
                    const int64_t* state_indices, const int64_t* output_state_indices, const int64_t* accepted,
                    STATE_DTYPE* state, DTYPE* o, real scale, int HV, uint32_t inverse, int pool_slots,
#if RAW_GATE || RAW_BETA
                    const real* A_log, const real* dt_bias, real bound, real factor,
#endif
                    int64_t pool_stride) {
  const uint32_t slice = blockIdx.x % SLICES;
  const Head head(blockIdx.x / SLICES, HV, inverse);
  const uint32_t n = head.n, hv = head.hv;
  const Place p(threadIdx.x, slice);
  DynSmem smem;
  Passed* passed = SHARERS > 1 ? smem.take<Passed>(1, "passed") : nullptr;
  NewTokens tokens(smem);
  smem.all_taken(SHARED_BYTES);
  const Work work = find_work(nullptr, state_indices, output_state_indices, accepted, n, TOKENS, pool_slots);
  const Ahead ahead(state_indices, HV, inverse);
  Inputs inputs = {q, k, v, beta, g, scale, hv, (uint32_t)HV};
#if RAW_GATE || RAW_BETA
  inputs.A_log = A_log, inputs.dt_bias = dt_bias, inputs.bound = bound, inputs.factor = factor;
#endif
  tokens.ask(inputs, work, p);
  const OwnToken own(inputs, work.first, p);
  if (work.padding) {
#pragma unroll
    for (int i = 0; i < OWN; i++) own.store(o, i, 0, p);
    return;
  }
  auto tile_of = [&](int64_t slot) {
    return state + slot * pool_stride + (int64_t)hv * (HEAD_K * HEAD_V) + p.first_element();
  };
  Loaded loaded;
  loaded.load(tile_of(work.from));
  ahead.fetch(state, pool_slots, pool_stride, threadIdx.x);
  tokens.meet(inputs, work, p);
  State S(loaded);
  Sums sums[TILES] = {};
  tokens.multiply(sums, S, p);
  Pieces written[TILES];
  if constexpr (SHARERS > 1) {
#pragma unroll
    for (int i = 0; i < TILES; i++) passed->sums[p.warp][i][p.lane] = sums[i];
    __syncthreads();
  }
  const Relations r = tokens.relations(own, inputs, p);
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    const int tile = own_tile(i, p);
    if (!is_tile(tile)) break;
    const Solution solved(r, SHARERS > 1 ? passed->total(tile, p) : sums[i], own, i, inputs);
    own.store(o, i, pack2<DTYPE>(solved.o[0], solved.o[1]), p);
    (SHARERS > 1 ? passed->written[tile][p.lane] : written[i]) = solved.pieces(r, work.kept, p);
  }
  if (!work.stores) return;
  if constexpr (SHARERS > 1) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < TILES; i++) written[i] = passed->written[i][p.lane];
  }
  store_state(tile_of(work.to), S, written, p, [&](int m) { return tokens.group(m, r, inputs, work, p); });
}
