// Arithmetic of the kernels that go token by token, in the type of their sums.
#pragma once
#include "primitives/primitives.cuh"

PRIM float root(float x) { return rsqrtf(x); }
PRIM double root(double x) { return rsqrt(x); }
PRIM float power(float x) { return expf(x); }
PRIM double power(double x) { return exp(x); }
