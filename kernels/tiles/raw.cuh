// Gates and strengths from what models have, one formula in one place: for kernels that form g or beta, that carry
// their gradients back, and that read raw logits where others read g. With x = a + dt_bias and A = e^A_log:
//
//   RAW_GATE 1: g = -A softplus(x)        dx = -dg A sigmoid(x)               dA_log = dg g
//   RAW_GATE 2: g = bound sigmoid(A x)    dx = dg bound sigmoid'(A x) A       dA_log = dx x
//
// and a strength is beta = factor sigmoid(logits).
//
// Numbers: in `real`, from e = e^-|x|, so that nothing overflows or cancels whatever x is. A gradient of 0 stays 0
// where x is infinite.
//
// Macros: RAW_GATE (0 for none), BIAS (0 none, 1 per head, 2 per channel): see GateParameters.
#pragma once
#include "tiles/token.cuh"

PRIM float log_of_one_and(float x) { return log1pf(x); }
PRIM double log_of_one_and(double x) { return log1p(x); }

// e^-|x|.
template <class real>
PRIM real power_below_one(real x) {
  return power(x < 0 ? x : -x);
}
template <class real>
PRIM real sigmoid(real x) {
  const real e = power_below_one(x);
  return (x < 0 ? e : (real)1) / (1 + e);
}
template <class real>
PRIM real sigmoid_slope(real x) {
  const real e = power_below_one(x);
  return e / ((1 + e) * (1 + e));
}
template <class real>
PRIM real softplus(real x) {
  return (x < 0 ? (real)0 : x) + log_of_one_and(power_below_one(x));  // NaN stays
}

template <class real>
struct RawGradients {  // what one element of dg adds to those of a, which is that of dt_bias, and of A_log
  real x, A_log;
};

// The parameters of one gate: of a value head, or of a key channel of one.
template <class real, int FORMULA>
struct RawGate {
  real A, bias, bound;

  PRIM real gate(real a) const {
    const real x = a + bias;
    if constexpr (FORMULA == 1) return -A * softplus(x);
    return bound * sigmoid(A * x);
  }
  PRIM RawGradients<real> gradients(real a, real dg) const {
    const real x = a + bias;
    if constexpr (FORMULA == 1) {
      const real dx = -dg * A * sigmoid(x);
      return {dx, dx == 0 ? (real)0 : -dg * A * softplus(x)};
    }
    const real dx = dg * bound * sigmoid_slope(A * x) * A;
    return {dx, dx == 0 ? (real)0 : dx * x};
  }
};

// Of value head hv, and c of its PER_HEAD gates: 1, or one per key channel.
template <class real, int FORMULA, int BIAS_KIND, int PER_HEAD>
PRIM RawGate<real, FORMULA> raw_gate_of(const real* A_log, const real* dt_bias, real bound, int hv, int c) {
  real bias = 0;
  if constexpr (BIAS_KIND == 1) bias = dt_bias[hv];
  if constexpr (BIAS_KIND == 2) bias = dt_bias[hv * PER_HEAD + c];
  return {power(A_log[hv]), bias, bound};
}

// Of a block of threads, ACROSS side by side: `part` of the tokens, and of a token's `columns` gates a thread's COUNT.
template <int COUNT, int ACROSS>
struct RawColumns {
  int columns, column, rows;
  int64_t part, first;  // this thread's first token

  PRIM RawColumns(int columns, int rows) : columns(columns), rows(rows) {
    const int across = (columns + ACROSS * COUNT - 1) / (ACROSS * COUNT);
    part = blockIdx.x / across;
    column = (blockIdx.x % across * ACROSS + threadIdx.x % ACROSS) * COUNT;
    first = part * rows + threadIdx.x / ACROSS;
  }
  PRIM int64_t end(int64_t tokens) const { return min((part + 1) * rows, tokens); }
};

template <int PER_HEAD, int BIAS_KIND, class real, int FORMULA, int COUNT>
PRIM void raw_gates_of(RawGate<real, FORMULA> (&raw)[COUNT], const real* A_log, const real* dt_bias, real bound,
                       int column) {
#pragma unroll
  for (int i = 0; i < COUNT; i++)
    raw[i] = raw_gate_of<real, FORMULA, BIAS_KIND, PER_HEAD>(A_log, dt_bias, bound, (column + i) / PER_HEAD,
                                                             (column + i) % PER_HEAD);
}

// Neighbours in memory, in one access.
template <class T, int SIZE>
struct alignas(SIZE * sizeof(T)) Neighbours {
  T element[SIZE];
};
template <int SIZE, class T>
PRIM Neighbours<T, SIZE> load_neighbours(const T* x, int64_t at) {
  return *(const Neighbours<T, SIZE>*)&x[at];
}
template <class T, int SIZE>
PRIM void store_neighbours(T* x, int64_t at, const Neighbours<T, SIZE>& some) {
  *(Neighbours<T, SIZE>*)&x[at] = some;
}
