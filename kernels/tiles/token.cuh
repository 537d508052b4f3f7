// Arithmetic of the kernels that go token by token, in the type of their sums.
#pragma once
#include "primitives/primitives.cuh"

PRIM float root(float x) { return rsqrtf(x); }
PRIM double root(double x) { return rsqrt(x); }
PRIM float power(float x) { return expf(x); }
PRIM double power(double x) { return exp(x); }
// x y + z, rounded once: written out where variants of a kernel are to agree to the bit.
PRIM float fused(float x, float y, float z) { return fmaf(x, y, z); }
PRIM double fused(double x, double y, double z) { return fma(x, y, z); }

// Rows whose squares overflow are taken in a unit of a power of two: of their up to 256 elements one is at least 2^60
// (2^508 in double), so that in the unit no square overflows and the eps is nothing beside them.
PRIM float small_unit(float) { return 0x1p-70f; }
PRIM double small_unit(double) { return 0x1p-540; }
PRIM float eps(float) { return 1e-6f; }
PRIM double eps(double) { return 1e-6; }

template <class T>
struct Squares {  // of elements of type T
  template <class real>
  PRIM static bool overflow(real sum) {
    return !(sum <= (sizeof(real) == 8 ? (real)1.7976931348623157e308 : (real)3.40282347e38));
  }
};
template <>
struct Squares<f16> {
  PRIM static bool overflow(float) { return false; }
};
// Whether a sum of squares of elements of type T is not finite.
template <class T, class real>
PRIM bool overflowed(real squares) {
  return Squares<T>::overflow(squares);
}

// r unit = (sum x^2 + eps)^-1/2, for a row x that is taken as unit x.
template <class real>
struct Norm {
  real r, unit;
};
// The norm of a row of elements of type T, from sum_of_squares(unit), the same for all threads that meet in it.
template <class T, class real, class F>
PRIM Norm<real> norm_of(F sum_of_squares) {
  const real squares = sum_of_squares((real)1);
  if (!overflowed<T>(squares)) return {root(squares + eps(squares)), 1};
  const real unit = small_unit(squares);
  return {root(sum_of_squares(unit)), unit};
}
