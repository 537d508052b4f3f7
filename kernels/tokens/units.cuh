// Gradients in a unit of their own: what the kernels of tokens/gradient_*.cu share. The backward is linear in dO and in
// the gradient of the final states. In float16 it keeps its digits only while these are of ordinary size, so a key head
// of a sequence, with its value heads, that has others is computed in a unit of a power of two.
#pragma once
#include "primitives/primitives.cuh"

PRIM int exponent_of(float x) { return (int)(__float_as_uint(x) >> 23) - 127; }  // of x >= 0
PRIM float power_of_two(int e) { return __uint_as_float((uint32_t)(e + 127) << 23); }

// Rows of a key head h: those of tokens from `first` on.
struct Rows {
  int64_t first;
  int tokens, h, H;
};

// Calls f(place) for each of the COLUMNS elements of such rows, or for the first of each STEP of them.
template <int COLUMNS, int STEP, int THREADS, class F>
PRIM void for_elements(const Rows& rows, int thread, F f) {
  for (int i = thread * STEP; i < rows.tokens * COLUMNS; i += THREADS * STEP)
    f(((rows.first + i / COLUMNS) * rows.H + rows.h) * COLUMNS + i % COLUMNS);
}

// y = factor x, for such elements; y may be x.
template <int COLUMNS, int THREADS, class T>
PRIM void scale_elements(const T* x, T* y, float factor, const Rows& rows, int thread) {
  if constexpr (sizeof(T) == 2 && COLUMNS % 2 == 0)
    for_elements<COLUMNS, 2, THREADS>(rows, thread, [&](int64_t at) {
      const float2 both = unpack2<T>(*(const uint32_t*)&x[at]);
      *(uint32_t*)&y[at] = pack2<T>(factor * both.x, factor * both.y);
    });
  else
    for_elements<COLUMNS, 1, THREADS>(rows, thread, [&](int64_t at) { y[at] = narrow<T>(factor * widen(x[at])); });
}

// The larger of a size and of that of x, if x is finite.
PRIM float larger(float size, float x) {
  const float a = x < 0 ? -x : x;
  return a <= 3.40282347e38f && a > size ? a : size;
}

// The largest size that a thread of the block has, for all of them; `warps` holds one per warp.
template <int THREADS>
PRIM float largest_of_block(float size, float* warps, int thread) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) size = larger(size, __shfl_xor_sync(~0u, size, bits));
  if (thread % 32 == 0) warps[thread / 32] = size;
  __syncthreads();
  for (int w = 0; w < THREADS / 32; w++) size = larger(size, warps[w]);
  return size;
}
