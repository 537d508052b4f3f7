// Strengths from logits: beta = factor sigmoid(logits), see tiles/raw.cuh.
//
// Numbers: REAL, which beta is, too. Macros: A_DTYPE (of logits), REAL (float or double). Grid: ceil(elements / 256)
// blocks of 256 threads, an element each. No shared memory.
#include "tiles/raw.cuh"

extern "C" __global__ void __launch_bounds__(256)
    raw_beta(const A_DTYPE* logits, REAL* beta, REAL factor, int64_t elements) {
  const int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
  if (i < elements) beta[i] = factor * sigmoid<REAL>(widen(logits[i]));
}
