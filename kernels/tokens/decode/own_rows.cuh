// One token of tokens/decode.cu whose rows every thread reads at its own keys: nothing is passed but sums.
#pragma once
#include "tokens/decode/token.cuh"

// The elements of a row of HEAD_K at a thread's keys, in the largest vectors that fit.
template <class T>
struct Row {
  PRIM static constexpr int largest_vector(int size) {
    return RUN % size == 0 && HEAD_K % size == 0 ? size : largest_vector(size / 2);
  }
  static constexpr int SIZE = largest_vector(16 / (int)sizeof(T));
  typedef Vector<T, SIZE> Access;
  Access vectors[KEYS / SIZE];

  PRIM void load(const T* row, const Place& p) {
#pragma unroll
    for (int i = 0; i < KEYS; i += SIZE)
      if (WHOLE_KEYS || p.key + key_step(i) < HEAD_K)
        vectors[i / SIZE] = asked((const Access*)&row[p.key + key_step(i)]);
  }
  PRIM real operator[](int i) const { return vectors[i / SIZE][i % SIZE]; }
  PRIM void shrink() {  // to a smaller unit
#pragma unroll
    for (auto& x : vectors) x.fill([&](int e) { return x[e] * small_unit(real()); });
  }
};
struct NoRow {
  PRIM void load(const GATE_DTYPE*, const Place&) {}
  PRIM real operator[](int) const { return 0; }
};
template <bool THERE>
struct GateRow {
  typedef Row<real> type;
};
template <>
struct GateRow<false> {
  typedef NoRow type;
};

// A token's keys of q and k, its gate, and the rest for the thread's own value channel.
struct Token {
  Row<DTYPE> q = {}, k = {};
  GateRow<PER_CHANNEL>::type gates = {};
  DTYPE v = {};
  FetchedNumbers numbers = {};

  PRIM void load(const Inputs& x, int64_t row, const Place& p) {
    const int64_t value_row = row * x.HV + x.hv, key_row = x.key_row(row);
    k.load(x.k + key_row, p);
    q.load(x.q + key_row, p);
    if constexpr (PER_CHANNEL) gates.load(x.g + value_row * HEAD_K, p);
    numbers.load(x, row);
    if (p.has_own) v = asked(&x.v[value_row * HEAD_V + p.own]);
  }
};

// What a gate does to the state: nothing, a factor, or one for each key, in which case `all` is 1.
struct Decay {
  real all = 1, each[PER_CHANNEL ? KEYS : 1];
  PRIM Decay(const Token& token, const Inputs& x) {
    if constexpr (HAS_GATE == 1) all = token.numbers.decay(x);
#pragma unroll
    for (int i = 0; i < (PER_CHANNEL ? KEYS : 1); i++) each[i] = PER_CHANNEL ? power(token.gates[i]) : (real)1;
  }
  PRIM real of_key(int i) const { return PER_CHANNEL ? each[i] : (real)1; }
  PRIM real operator[](int i) const { return PER_CHANNEL ? each[i] : all; }
};

// Of rows, too, warps pass sums.
struct PassedRows : Passed {
  real k_q[WARPS], k_k[WARPS], q_q[WARPS];
};

// Of a token's rows: 1 / norm in the unit that they are taken in, a smaller one for rows whose squares overflow.
struct Norms {
  real k = 1, q = 1;
};
PRIM Norms norms(Token& token, const Place& p, PassedRows* passed) {
  if constexpr (!L2NORM) return {};
  bool k_small = false, q_small = false;
#pragma unroll 1
  for (;;) {
    real k_k = 0, q_q = 0;
#pragma unroll
    for (int i = 0; i < KEYS; i++) {
      k_k = fused(token.k[i], token.k[i], k_k);
      q_q = fused(token.q[i], token.q[i], q_q);
    }
    k_k = sum_over_parts(k_k), q_q = sum_over_parts(q_q);
    if constexpr (WARPS > 1) {
      if (p.thread % 32 == 0) passed->k_k[p.thread / 32] = k_k, passed->q_q[p.thread / 32] = q_q;
      __syncthreads();
      k_k = 0, q_q = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) k_k += passed->k_k[w], q_q += passed->q_q[w];
    }
    // The same for the whole block, which has one row of q and one of k.
    const bool k_large = !k_small && overflowed<DTYPE>(k_k), q_large = !q_small && overflowed<DTYPE>(q_q);
    if (!k_large && !q_large) return {root(k_k + (k_small ? 0 : eps(k_k))), root(q_q + (q_small ? 0 : eps(q_q)))};
    if (k_large) token.k.shrink(), k_small = true;
    if (q_large) token.q.shrink(), q_small = true;
    if constexpr (WARPS > 1) __syncthreads();
  }
}

template <class Tile>
PRIM Sums sums_over_keys(const Tile& S, const Token& token, const Decay& decay, const Place& p, PassedRows* passed) {
  real k_sums[VALUES] = {}, q_sums[VALUES] = {}, k_q = 0;
#pragma unroll
  for (int i = 0; i < KEYS; i++) {
    const real k_i = token.k[i], q_i = token.q[i];
    const real k_d = k_i * decay.of_key(i), q_d = q_i * decay.of_key(i);
    k_q = fused(k_i, q_i, k_q);
#pragma unroll
    for (int j = 0; j < VALUES; j++) {
      k_sums[j] = fused(S(i, j), k_d, k_sums[j]);
      q_sums[j] = fused(S(i, j), q_d, q_sums[j]);
    }
  }
  k_q = sum_over_parts(k_q);
  scatter_sums(k_sums, p.part);
  scatter_sums(q_sums, p.part);
  if constexpr (WARPS == 1) return {k_sums[0], q_sums[0], k_q};
  const uint32_t warp = p.thread / 32, lane = p.thread % 32;
  pass_sums(k_sums, q_sums, p, warp, lane, *passed);
  if (lane == 0) passed->k_q[warp] = k_q;
  __syncthreads();
  Sums s = {};
  if (p.thread < CHANNELS) {
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      s.k_S += passed->k_S[w][p.thread];
      s.q_S += passed->q_S[w][p.thread];
      s.k_q += passed->k_q[w];
    }
  }
  return s;
}

// The only token of a sequence.
struct NewTokens {
  Token token;
  PassedRows* passed = nullptr;

  PRIM explicit NewTokens(DynSmem& smem) {
    if constexpr (WARPS > 1) passed = smem.take<PassedRows>(1, "passed");
    smem.all_taken(SHARED_BYTES);
  }
  PRIM void ask(const Inputs& x, int64_t first, int, const Place& p, uint32_t) { token.load(x, first, p); }
  PRIM void take(const Inputs&, int64_t, int, const Place&, uint32_t) {}

  struct Update {
    const Token& token;
    Decay decay;
    real o, n[VALUES];
    template <class Tile>
    PRIM real operator()(const Tile& S, int i, int j) const {
      return fused(token.k[i], n[j], decay[i] * S(i, j));
    }
  };
  template <class Tile>
  PRIM Update advance(const Tile& S, int, const Inputs& x, const Place& p) {
    const Norms r = norms(token, p, passed);
    Update update = {token, Decay(token, x)};
    const Sums s = sums_over_keys(S, token, update.decay, p, passed);
    const Numbers<DTYPE> numbers = {token.numbers.strength(x), update.decay.all, r.k, r.q, token.v};
    const real n = numbers.written(s);
    update.o = numbers.output(s, n, x.scale);
    share(n, update.n, p, passed);
    return update;
  }
};
