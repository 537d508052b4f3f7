// What a scalar gate does inside a chunk of 64 tokens. With G_i the sum of its gates up to token i and C the last
// token, the product of two tokens i >= j gains D_ij = e^(G_i - G_j), what token i reads of the state entering the
// chunk e^(G_i), what token j writes into the one leaving it e^(G_C - G_j), and the state itself e^(G_C): none above 1.
//
// They are formed once, by factors.cu, for all kernels of training: `decays`, (slots, HV, DECAY_ROWS, CHUNK) in float.
// Past the end of a sequence gates count as 0, so that the last read is always e^(G_C).
//
// Numbers: small differences of large sums count, so G is summed in double, in powers of two, and kept as two floats.
// Gates below -1000 count as -1000, whose exponential is 0 like that of anything below: -inf too, of which no
// difference is. NaN stays, and spoils its own token and later ones only.
#pragma once
#include "primitives/primitives.cuh"

constexpr int READS = 0, WRITES = 1, HIGH = 2, LOW = 3, DECAY_ROWS = 4;  // e^G, e^(G_C - G), G log2(e) in two floats

// Of two neighbouring tokens 2 lane and 2 lane + 1, by a warp.
struct Decays {
  float2 reads, writes, high, low;

  PRIM void store(float* decays, int lane) const {
    *(float2*)&decays[READS * CHUNK + 2 * lane] = reads;
    *(float2*)&decays[WRITES * CHUNK + 2 * lane] = writes;
    *(float2*)&decays[HIGH * CHUNK + 2 * lane] = high;
    *(float2*)&decays[LOW * CHUNK + 2 * lane] = low;
  }
};
PRIM Decays sum_gates(float2 g, int lane) {
  auto exponent = [](float x) { return (x < -1000.0f ? -1000.0f : x) * 1.4426950408889634; };
  const double first = exponent(g.x);
  double sum = first + exponent(g.y);
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const double below = __shfl_sync(~0u, sum, max(lane - distance, 0));
    if (lane >= distance) sum += below;
  }
  const double end = __shfl_sync(~0u, sum, 31), below = __shfl_sync(~0u, sum, max(lane - 1, 0));
  // Nothing of the later of two tokens is in the sum of the earlier one.
  const double before = (lane > 0 ? below : 0.0) + first;
  const float2 high = make_float2((float)before, (float)sum);
  return {make_float2(exp2f(high.x), exp2f(high.y)),
          make_float2(exp2f((float)(end - before)), exp2f((float)(end - sum))), high,
          make_float2((float)(before - high.x), (float)(sum - high.y))};
}

// D_ij from (HIGH, LOW) of two tokens; above 1, even infinite, where i < j.
PRIM float decay_between(float2 i, float2 j) { return exp2f((i.x - j.x) + (i.y - j.y)); }

// The rows of one slot and value head.
PRIM const float* decays_of(const float* decays, int64_t slot, int hv, int HV) {
  return decays + (slot * HV + hv) * DECAY_ROWS * CHUNK;
}
