// Gates from logits and parameters, g = -A softplus(x) or bound sigmoid(A x), see tiles/raw.cuh.
//
// Numbers: REAL, which g is, too. Macros: A_DTYPE (of a), REAL (float or double), RAW_GATE, BIAS, CHANNELS (gates per
// value head), VECTOR (neighbours per thread, which divides HV CHANNELS). Grid: ceil(elements / (256 VECTOR)) blocks
// of 256 threads. No shared memory.
#include "tiles/raw.cuh"

template <class T>
struct alignas(VECTOR * sizeof(T)) Vector {
  T element[VECTOR];
};

extern "C" __global__ void __launch_bounds__(256)
    raw_gate(const A_DTYPE* a, const REAL* A_log, const REAL* dt_bias, REAL* g, REAL bound, int64_t elements, int HV) {
  const int64_t first = ((int64_t)blockIdx.x * 256 + threadIdx.x) * VECTOR;
  if (first >= elements) return;
  const int column = (int)(first % (HV * CHANNELS));
  const Vector<A_DTYPE> logits = *(const Vector<A_DTYPE>*)&a[first];
  Vector<REAL> gates;
#pragma unroll
  for (int i = 0; i < VECTOR; i++) {
    const int hv = (column + i) / CHANNELS, c = (column + i) % CHANNELS;
    const auto raw = raw_gate_of<REAL, RAW_GATE, BIAS, CHANNELS>(A_log, dt_bias, bound, hv, c);
    gates.element[i] = raw.gate(widen(logits.element[i]));
  }
  *(Vector<REAL>*)&g[first] = gates;
}
