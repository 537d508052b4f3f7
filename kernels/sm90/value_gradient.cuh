// With LEAVES_DV the reverse walk leaves dV = b dY where it would leave dY: what gradients of chunks need of it is b
// dY, but for dbeta = rowsum(dY . N^), which is then divided by b, in float. Of tokens whose b is too small for that
// the walk leaves dY, too.
#pragma once
#include "primitives/primitives.cuh"

#if !LEAVES_DV
#define LEAVES_DV 0
#endif

// Below, b dY of an ordinary dY comes near to what DTYPE has no more digits for.
PRIM bool is_small(float b) { return fabsf(b) < 0x1p-24f; }

// Of eight numbers each, which lie side by side.
template <class T>
PRIM float dot_eight(const T* a, const T* b) {
  const uint4 x = *(const uint4*)a, y = *(const uint4*)b;
  const uint32_t left[4] = {x.x, x.y, x.z, x.w}, right[4] = {y.x, y.y, y.z, y.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 u = unpack2<T>(left[i]), v = unpack2<T>(right[i]);
    sum += u.x * v.x + u.y * v.y;
  }
  return sum;
}
