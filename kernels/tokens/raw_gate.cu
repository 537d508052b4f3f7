// Gates from logits and parameters, g = -A softplus(x) or bound sigmoid(A x), see tiles/raw.cuh.
//
// A thread has the same VECTOR gates of every token, and forms A once.
//
// Numbers: REAL, which g is, too. Macros: A_DTYPE (of a), REAL (float or double), RAW_GATE, BIAS, CHANNELS (gates per
// value head), VECTOR (neighbours per thread, which divides HV CHANNELS), WIDTH (threads side by side, a power of two).
// Grid: ceil(tokens / rows) * ceil(HV CHANNELS / (WIDTH VECTOR)) blocks of 256 threads. No shared memory.
#include "tiles/raw.cuh"

constexpr int THREADS = 256, LANES = THREADS / WIDTH;

extern "C" __global__ void __launch_bounds__(THREADS) raw_gate(const A_DTYPE* a, const REAL* A_log, const REAL* dt_bias,
                                                               REAL* g, REAL bound, int64_t tokens, int rows, int HV) {
  const RawColumns<VECTOR, WIDTH> at(HV * CHANNELS, rows);
  if (at.column >= at.columns) return;
  RawGate<REAL, RAW_GATE> raw[VECTOR];
  raw_gates_of<CHANNELS, BIAS>(raw, A_log, dt_bias, bound, at.column);
#pragma unroll 4
  for (int64_t t = at.first; t < at.end(tokens); t += LANES) {
    const Neighbours<A_DTYPE, VECTOR> logits = load_neighbours<VECTOR>(a, t * at.columns + at.column);
    Neighbours<REAL, VECTOR> gates;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) gates.element[i] = raw[i].gate(widen(logits.element[i]));
    store_neighbours(g, t * at.columns + at.column, gates);
  }
}
