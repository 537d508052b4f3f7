// Lines of x that a thread asks for ahead, `shift` elements from its own, while another thread writes them.
//
// Grid: 1 block of 64 threads. No shared memory.
#include "primitives/prefetch.cuh"

extern "C" __global__ void __launch_bounds__(64) asked_ahead(float* x, int shift) {
  const int thread = threadIdx.x;
  prefetch_line(&x[thread + shift]);
  x[63 - thread] = thread;
}

template <int BYTES>
struct alignas(BYTES) Some {
  uint8_t bytes[BYTES];
};
template <int BYTES, bool ONCE = false>
PRIM void copy(uint8_t* y, const uint8_t* x, int at) {
  const Some<BYTES> some = ask<ONCE>((const Some<BYTES>*)&x[at]);
  if constexpr (ONCE)
    store_once((Some<BYTES>*)&y[at], some);
  else
    *(Some<BYTES>*)&y[at] = some;
}

// y = x, the 54 bytes of a thread in one access of every size.
//
// Grid: 1 block of 32 threads. No shared memory.
extern "C" __global__ void __launch_bounds__(32) asked_for(uint8_t* y, const uint8_t* x) {
  const int thread = threadIdx.x;
  copy<16>(y, x, 16 * thread);
  copy<8>(y, x, 512 + 8 * thread);
  copy<4>(y, x, 768 + 4 * thread);
  copy<16, true>(y, x, 896 + 16 * thread);
  copy<8, true>(y, x, 1408 + 8 * thread);
  copy<2>(y, x, 1664 + 2 * thread);
}
