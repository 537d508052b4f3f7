// A gate per key channel in powers of two, and what TF32 leaves out of them, on compute capability 9.0.
#pragma once
#include "primitives/primitives.cuh"

// The tensor cores leave out what TF32 has no digits for. Factors are larger by what that is on average.
constexpr float KEPT = 1.0f + 1.0f / 2896;

// The power of two of a decay; what float has no number for counts as one that rounds to zero. NaN stays.
PRIM float gate_power(float g) {
  constexpr float LOWEST = -160.0f;
  const float power = 1.44269504f * g;
  return power < LOWEST ? LOWEST : power;
}
