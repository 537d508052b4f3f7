// What kernels that decode are given: tokens, what makes their gates and strengths, and slots of a pool.
#pragma once
#include "tiles/raw.cuh"
#include "tiles/sequence.cuh"

typedef Sum<DTYPE>::type real;
constexpr bool PER_CHANNEL = HAS_GATE == 2;

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
    beta = x.beta[value_row];
    if constexpr (HAS_GATE == 1) {
      g = x.g[value_row];
      if constexpr (RAW_GATE > 0) A_log = x.A_log[x.hv];
      if constexpr (BIAS > 0) bias = x.dt_bias[x.hv];
    }
  }
  PRIM real strength(const Inputs& x) const {
    return RAW_BETA ? x.factor * sigmoid((real)widen(beta)) : (real)widen(beta);
  }
  PRIM real decay(const Inputs& x) const { return HAS_GATE == 1 ? decay_of(x, g, A_log, bias) : (real)1; }
};
