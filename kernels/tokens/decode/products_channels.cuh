// Tokens of tokens/decode_products.cu with a gate per key channel. Decays go into the rows: what reads the state are k
// and q times the decays up to their token, what is written is k times those after it, in two pieces of 16 bits each.
// Threads make them key by key, and sums over keys of what tokens are to each other.
#pragma once
#include "tokens/decode/products_tokens.cuh"

// Sums of k_s k_t and k_s q_t times the decays between, for s up to t, then those of q_t^2.
constexpr int PAIRS = TOKENS * (TOKENS + 1) / 2, ALL_SUMS = 2 * PAIRS + TOKENS;
PRIM constexpr int pair_of(int t, int s) { return t * (t + 1) / 2 + s; }

// Rows lie so far apart that neighbours are in different banks.
constexpr int PITCH = HEAD_K + 32;
struct alignas(16) ChannelRows {
  DTYPE reads[2][2 * TOKENS][PITCH], writes[2][TOKENS][PITCH];  // by pieces; what reads are rows k, q of every token
  real decays[HEAD_K], sums[WARPS][ALL_SUMS];                   // decays: of all accepted tokens

  template <int ROWS>
  PRIM static void split(DTYPE (&pieces)[2][ROWS][PITCH], int row, int c, real x) {
    const DTYPE first = narrow<DTYPE>(x);
    pieces[0][row][c] = first, pieces[1][row][c] = narrow<DTYPE>(x - widen(first));
  }
  PRIM real total(int i) const {
    real all = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) all += sums[w][i];
    return all;
  }
};

// What all tokens have of one key, on its way.
struct FetchedKey {
  DTYPE k[TOKENS], q[TOKENS];
  GATE_DTYPE g[TOKENS];
  real A_log = 0, bias = 0;

  PRIM void load(const Inputs& x, int64_t first, int c) {
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      const int64_t row = x.key_row(first + t) + c;
      k[t] = asked(&x.k[row]), q[t] = asked(&x.q[row]), g[t] = asked(&x.g[((first + t) * x.HV + x.hv) * HEAD_K + c]);
    }
    if constexpr (RAW_GATE > 0) A_log = asked(&x.A_log[x.hv]);
    if constexpr (BIAS > 0) bias = asked(&x.dt_bias[BIAS == 2 ? (int64_t)x.hv * HEAD_K + c : (int64_t)x.hv]);
  }
  // Rows with a bit in `small` in a smaller unit.
  PRIM void put(ChannelRows& to, real (&sums)[ALL_SUMS], int c, const Inputs& x, int kept, uint32_t small) const {
    real keys[TOKENS], queries[TOKENS], decays[TOKENS], since = 1, after = 1;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      keys[t] = widen(k[t]) * (small >> 2 * t & 1 ? small_unit(since) : (real)1);
      queries[t] = widen(q[t]) * (small >> (2 * t + 1) & 1 ? small_unit(since) : (real)1);
      decays[t] = decay_of(x, g[t], A_log, bias);
      since *= decays[t];
      to.split(to.reads, 2 * t, c, since * keys[t]);
      to.split(to.reads, 2 * t + 1, c, since * queries[t]);
      sums[2 * PAIRS + t] = fused(queries[t], queries[t], sums[2 * PAIRS + t]);
    }
#pragma unroll
    for (int s = TOKENS - 1; s >= 0; s--) {
      real written = keys[s];
#pragma unroll
      for (int t = s; t < TOKENS; t++) {
        if (t > s) written *= decays[t];
        real &with_k = sums[pair_of(t, s)], &with_q = sums[PAIRS + pair_of(t, s)];
        with_k = fused(written, keys[t], with_k), with_q = fused(written, queries[t], with_q);
      }
      to.split(to.writes, s, c, s < kept ? after * keys[s] : (real)0);
      if (s < kept) after *= decays[s];
    }
    to.decays[c] = after;
  }
};

// The tokens of a sequence.
struct NewTokens {
  static constexpr int EACH = (HEAD_K + THREADS - 1) / THREADS;
  ChannelRows& shared;
  FetchedKey fetched[EACH];
  uint32_t small = 0;

  PRIM explicit NewTokens(DynSmem& smem) : shared(*smem.take<ChannelRows>(1, "rows")) {}
  template <class F>
  PRIM static void for_keys(const Place& p, F f) {
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      const int c = e * THREADS + 32 * p.warp + p.lane;
      if (HEAD_K % THREADS == 0 || c < HEAD_K) f(e, c);
    }
  }
  PRIM void ask(const Inputs& x, const Work& work, const Place& p) {
    for_keys(p, [&](int e, int c) { fetched[e].load(x, work.first, c); });
  }
  PRIM void put(const Inputs& x, const Work& work, const Place& p) {
    real sums[ALL_SUMS] = {};
    for_keys(p, [&](int e, int c) { fetched[e].put(shared, sums, c, x, work.kept, small); });
#pragma unroll
    for (int i = 0; i < ALL_SUMS; i++) {
#pragma unroll
      for (int bits = 16; bits > 0; bits /= 2) sums[i] += __shfl_xor_sync(~0u, sums[i], bits);
      if (p.lane == 0) shared.sums[p.warp][i] = sums[i];
    }
  }
  PRIM void meet(const Inputs& x, const Work& work, const Place& p) {
#pragma unroll 1
    for (;;) {
      put(x, work, p);
      __syncthreads();
      if (!L2NORM || small) break;
      small = too_large(p);  // the same for the whole block
      if (!small) break;
      __syncthreads();
    }
  }
  PRIM static int own_token(const Place& p) { return p.part < TOKENS ? (int)p.part : TOKENS - 1; }
  PRIM uint32_t too_large(const Place& p) const {
    const int t = own_token(p);
    uint32_t rows = (uint32_t)overflowed<DTYPE>(shared.total(pair_of(t, t))) << 2 * t |
                    (uint32_t)overflowed<DTYPE>(shared.total(2 * PAIRS + t)) << (2 * t + 1);
    rows |= __shfl_xor_sync(~0u, rows, 1);
    return rows | __shfl_xor_sync(~0u, rows, 2);
  }
  PRIM void multiply(Sums (&sums)[TILES], const State& S, const Place& p) const {
    const bool there = TOKENS == 4 || p.across < 2 * TOKENS;
#pragma unroll
    for (int m = 0; m < GROUPS; m++)
#pragma unroll
      for (int piece = 0; piece < 2; piece++) {
        Pairs<8> row = {};
        if (there) row = load_pairs<8>(&shared.reads[piece][p.across][p.key + 32 * m]);
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
          for (int i = 0; i < TILES; i++)
            mma_m16n8k16<DTYPE>(sums[i].element, S.fragments[m][i][j], row.element[2 * j], row.element[2 * j + 1]);
      }
  }
  PRIM Relations relations(const OwnToken&, const Inputs&, const Place& p) const {
    Relations r(p);
    const int t = own_token(p);
    if constexpr (L2NORM) r.normalise(shared.total(pair_of(t, t)), shared.total(2 * PAIRS + t), small);
#pragma unroll
    for (int s = 0; s < TOKENS; s++) {
      r.decays[s] = 1;
      r.k[s] = s < t ? shared.total(pair_of(t, s)) : (real)0;
      r.q[s] = s <= t ? shared.total(PAIRS + pair_of(t, s)) : (real)0;
    }
    r.since_start = 1;
    return r;
  }

  // The first pieces of what is written are multiplied by both pieces of keys, the second ones by the first.
  PRIM static uint32_t second_half(uint32_t first, const Place& p) { return p.part < 2 ? first : 0; }
  PRIM GroupKeys group(int m, const Relations&, const Inputs&, const Work&, const Place& p) const {
    GroupKeys to = {};
    const int first = p.key - 8 * p.part + p.across / 2 * 8 + 32 * m;
    auto load = [&](uint32_t (&pieces)[4], int piece) {
      Pairs<8> k[2] = {};
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int t = p.part % 2 * 2 + i;
        if (t < TOKENS) k[i] = load_pairs<8>(&shared.writes[piece][t][first]);
      }
      interleave(pieces, k, p);
    };
    load(to.first, 0);
    load(to.second, 1);
#pragma unroll
    for (int e = 0; e < 8; e += 4) {
      const auto some = load_neighbours<4>(shared.decays, p.key + 32 * m + e);
#pragma unroll
      for (int i = 0; i < 4; i++) to.decays[e + i] = some.element[i];
    }
    return to;
  }
};
