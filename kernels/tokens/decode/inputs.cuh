// What kernels that decode are given: tokens, what makes their gates and strengths, and slots of a pool.
#pragma once
#include "primitives/prefetch.cuh"
#include "tiles/raw.cuh"
#include "tiles/sequence.cuh"

typedef Sum<DTYPE>::type real;
constexpr bool PER_CHANNEL = HAS_GATE == 2;

// *p, which is asked for where this stands if loads are in order.
template <class T>
PRIM T asked(const T* p) {
  if constexpr (ORDERED) return ask(p);
  return *p;
}
// Neighbours in memory, asked for in one access.
template <int SIZE, class T>
PRIM Neighbours<T, SIZE> ask_neighbours(const T* x, int64_t at) {
  return asked((const Neighbours<T, SIZE>*)&x[at]);
}

// A vector of a state's elements, from memory and to it.
template <class T>
PRIM T load_part(const T* p) {
  if constexpr (STREAMED && sizeof(T) >= 8) return ask<true>(p);
  return *p;
}
template <class T>
PRIM void store_part(T* p, const T& x) {
  if constexpr (STREAMED && sizeof(T) >= 8)
    store_once(p, x);
  else
    *p = x;
}

// Which of all heads a block has: head hv of sequence n. To divide takes longer than `inverse`, (2^32 - 1) / HV, but
// fewer registers where loads are not in order.
struct Head {
  uint32_t n, hv;
  PRIM Head(uint32_t head, uint32_t HV, uint32_t inverse) {
    n = ORDERED ? (uint64_t)head * inverse >> 32 : head / HV;
    hv = head - n * HV;
    if (ORDERED && hv >= HV) n++, hv -= HV;
  }
};

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
  w.from = state_indices == nullptr ? n : asked(&state_indices[n]);
  w.to = output_state_indices == nullptr ? w.from : asked(&output_state_indices[n]);
  w.kept = ONE_TOKEN || accepted == nullptr ? w.tokens : clamp_token(asked(&accepted[n]), 0, w.tokens);
  w.padding = w.from < 0 || w.from >= pool_slots;
  w.stores = w.to >= 0 && w.to < pool_slots && (w.kept > 0 || w.to != w.from);
  return w;
}

// The arrays of all tokens, and the heads that are asked for. beta and g may be logits of what parameters make of them.
struct Inputs {
  const DTYPE *q, *k, *v;
  const BETA_DTYPE* beta;
  const GATE_DTYPE* g;
  real scale;
  uint32_t hv, HV;
  const real *A_log, *dt_bias;
  real bound, factor;

  PRIM uint32_t key_head() const { return hv / GROUP; }
  PRIM uint32_t key_heads() const { return HV / GROUP; }
  PRIM int64_t key_row(int64_t token) const { return (token * key_heads() + key_head()) * HEAD_K; }
};

// e^g, g of parameters where it is raw.
PRIM real decay_of(const Inputs& x, GATE_DTYPE g, real A_log, real bias) {
  if constexpr (RAW_GATE == 0) return power(widen(g));
  return power(RawGate<real, RAW_GATE>{power(A_log), bias, x.bound}.gate(widen(g)));
}

// beta and the gate per head of a token. To load asks for all of it; nothing is looked at before what follows.
struct FetchedNumbers {
  BETA_DTYPE beta;
  GATE_DTYPE g = {};
  real A_log = 0, bias = 0;

  PRIM void load(const Inputs& x, int64_t token) {
    const int64_t value_row = token * x.HV + x.hv;
    beta = asked(&x.beta[value_row]);
    if constexpr (HAS_GATE == 1) {
      g = asked(&x.g[value_row]);
      if constexpr (RAW_GATE > 0) A_log = asked(&x.A_log[x.hv]);
      if constexpr (BIAS > 0) bias = asked(&x.dt_bias[x.hv]);
    }
  }
  PRIM real strength(const Inputs& x) const {
    return RAW_BETA ? x.factor * sigmoid((real)widen(beta)) : (real)widen(beta);
  }
  PRIM real decay(const Inputs& x) const { return HAS_GATE == 1 ? decay_of(x, g, A_log, bias) : (real)1; }
};
