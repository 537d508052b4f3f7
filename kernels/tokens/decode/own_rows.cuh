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
  Decay() = default;
  PRIM Decay(const Token& token, const Inputs& x) {
    if constexpr (HAS_GATE == 1) all = early(token.numbers.decay(x));
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

// Of a token's rows, over all keys: k . q if it is EARLY, and squares where they are to be normalised.
struct RowSums {
  real k_q = 0, k_k = 0, q_q = 0;
};
PRIM RowSums sums_of_rows(const Token& token, const Place& p, PassedRows* passed) {
  RowSums s;
#pragma unroll
  for (int i = 0; i < KEYS; i++) {
    if constexpr (EARLY) s.k_q = fused(token.k[i], token.q[i], s.k_q);
    if constexpr (L2NORM) {
      s.k_k = fused(token.k[i], token.k[i], s.k_k);
      s.q_q = fused(token.q[i], token.q[i], s.q_q);
    }
  }
  if constexpr (EARLY) s.k_q = sum_over_parts(s.k_q);
  if constexpr (L2NORM) s.k_k = sum_over_parts(s.k_k), s.q_q = sum_over_parts(s.q_q);
  if constexpr (WARPS == 1) return s;
  const uint32_t warp = p.thread / 32;
  if (p.thread % 32 == 0) {
    if constexpr (EARLY) passed->k_q[warp] = s.k_q;
    if constexpr (L2NORM) passed->k_k[warp] = s.k_k, passed->q_q[warp] = s.q_q;
  }
  __syncthreads();
  s = {};
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    if constexpr (EARLY) s.k_q += passed->k_q[w];
    if constexpr (L2NORM) s.k_k += passed->k_k[w], s.q_q += passed->q_q[w];
  }
  return s;
}

// k . q, and 1 / norm in the unit that rows are taken in, a smaller one for rows whose squares overflow.
struct RowNumbers {
  real k_q = 0, k_norm = 1, q_norm = 1;
};
PRIM RowNumbers numbers_of_rows(Token& token, const Place& p, PassedRows* passed) {
  if constexpr (!L2NORM) return {};
  bool k_small = false, q_small = false;
#pragma unroll 1
  for (;;) {
    const RowSums s = sums_of_rows(token, p, passed);
    // The same for the whole block, which has one row of q and one of k.
    const bool k_large = !k_small && overflowed<DTYPE>(s.k_k), q_large = !q_small && overflowed<DTYPE>(s.q_q);
    if (!k_large && !q_large)
      return {s.k_q, root(s.k_k + (k_small ? 0 : eps(s.k_k))), root(s.q_q + (q_small ? 0 : eps(s.q_q)))};
    if (k_large) token.k.shrink(), k_small = true;
    if (q_large) token.q.shrink(), q_small = true;
    if constexpr (WARPS > 1) __syncthreads();
  }
}
// The same, for which the compiler makes fewer instructions, but slower steps of many states with more than 16 bits.
PRIM RowNumbers numbers_of_early_rows(Token& token, const Place& p, PassedRows* passed) {
  RowSums s = sums_of_rows(token, p, passed);
  if constexpr (!L2NORM) return {s.k_q};
  const bool k_large = overflowed<DTYPE>(s.k_k), q_large = overflowed<DTYPE>(s.q_q);
  // A shuffle tells the compiler that all lanes go the same way.
  if (__shfl_sync(~0u, (int)(k_large || q_large), 0)) {
    if (k_large) token.k.shrink();
    if (q_large) token.q.shrink();
    if constexpr (WARPS > 1) __syncthreads();
    s = sums_of_rows(token, p, passed);
  }
  return {s.k_q, root(s.k_k + (k_large ? 0 : eps(s.k_k))), root(s.q_q + (q_large ? 0 : eps(s.q_q)))};
}

template <class Tile>
PRIM Sums sums_over_keys(const Tile& S, const Token& token, const Decay& decay, const Place& p, PassedRows* passed) {
  real k_sums[VALUES] = {}, q_sums[VALUES] = {}, k_q = 0;
#pragma unroll
  for (int i = 0; i < KEYS; i++) {
    const real k_i = token.k[i], q_i = token.q[i];
    const real k_d = k_i * decay.of_key(i), q_d = q_i * decay.of_key(i);
    if constexpr (!EARLY) k_q = fused(k_i, q_i, k_q);
#pragma unroll
    for (int j = 0; j < VALUES; j++) {
      k_sums[j] = fused(S(i, j), k_d, k_sums[j]);
      q_sums[j] = fused(S(i, j), q_d, q_sums[j]);
    }
  }
  if constexpr (!EARLY) k_q = sum_over_parts(k_q);
  scatter_sums(k_sums, p.part);
  scatter_sums(q_sums, p.part);
  if constexpr (WARPS == 1) return {k_sums[0], q_sums[0], k_q};
  const uint32_t warp = p.thread / 32, lane = p.thread % 32;
  pass_sums(k_sums, q_sums, p, warp, lane, *passed);
  if (!EARLY && lane == 0) passed->k_q[warp] = k_q;
  __syncthreads();
  Sums s = {};
  if (p.thread < CHANNELS) {
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      s.k_S += passed->k_S[w][p.thread];
      s.q_S += passed->q_S[w][p.thread];
      if constexpr (!EARLY) s.k_q += passed->k_q[w];
    }
  }
  return s;
}

// The only token of a sequence. If it is EARLY, what needs no state is made while the state is on its way.
struct NewTokens {
  Token token;
  Decay decay;
  RowNumbers rows;
  real strength;
  PassedRows* passed = nullptr;

  PRIM explicit NewTokens(DynSmem& smem) {
    if constexpr (WARPS > 1) passed = smem.take<PassedRows>(1, "passed");
    smem.all_taken(SHARED_BYTES);
  }
  PRIM void ask(const Inputs& x, int64_t first, int, const Place& p, uint32_t) { token.load(x, first, p); }
  PRIM void take(const Inputs& x, int64_t, int, const Place& p, uint32_t) {
    if constexpr (!EARLY) return;
    strength = early(token.numbers.strength(x)), decay = Decay(token, x);
    rows = numbers_of_early_rows(token, p, passed);
  }

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
    const RowNumbers r = EARLY ? rows : numbers_of_rows(token, p, passed);
    Update update = {token, EARLY ? decay : Decay(token, x)};
    Sums s = sums_over_keys(S, token, update.decay, p, passed);
    if constexpr (EARLY) s.k_q = r.k_q;
    const real beta = EARLY ? strength : token.numbers.strength(x);
    const Numbers<DTYPE> numbers = {beta, update.decay.all, r.k_norm, r.q_norm, token.v};
    const real n = numbers.written(s);
    update.o = numbers.output(s, n, x.scale);
    share(n, update.n, p, passed);
    return update;
  }
};
