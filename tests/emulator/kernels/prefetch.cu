// Lines of x that a thread asks for ahead, `shift` elements from its own, while another thread writes them.
//
// Grid: 1 block of 64 threads. No shared memory.
#include "primitives/prefetch.cuh"

extern "C" __global__ void __launch_bounds__(64) asked_ahead(float* x, int shift) {
  const int thread = threadIdx.x;
  prefetch_line(&x[thread + shift]);
  x[63 - thread] = thread;
}
