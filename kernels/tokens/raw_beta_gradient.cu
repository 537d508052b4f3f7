// The gradient of the logits of strengths: dlogits = dbeta factor sigmoid'(logits), see tiles/raw.cuh.
//
// Numbers: float, dlogits rounded to A_DTYPE. Macros: A_DTYPE (of logits). Grid: ceil(elements / 256) blocks of 256
// threads, an element each. No shared memory.
#include "tiles/raw.cuh"

extern "C" __global__ void __launch_bounds__(256)
    raw_beta_gradient(const A_DTYPE* logits, const float* dbeta, A_DTYPE* dlogits, float factor, int64_t elements) {
  const int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
  if (i < elements) dlogits[i] = narrow<A_DTYPE>(dbeta[i] * factor * sigmoid_slope<float>(widen(logits[i])));
}
