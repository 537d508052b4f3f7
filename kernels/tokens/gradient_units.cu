// The unit of every sequence and key head, from d, the largest |dO|, and f, the largest |dfinal_state|, both finite:
//
//   unit = 1 if max(d, f) is 0 or in [2^-6, 2^8], else the power of two that takes it to [1, 2);
//   not so small that unit d would be below 2^-10, since dQ comes from dO alone
//
// and dfinal_scaled = unit dfinal_state, or 0 where there is none.
//
// Numbers: exact, but for what leaves the range of float. Macros: HEAD_K, HEAD_V, GROUP (value heads per key head),
// CHUNK, VARLEN. Grid: N * H blocks of 512 threads. Shared memory: a float per warp, twice.
#include "tiles/sequence.cuh"
#include "tokens/units.cuh"

constexpr int THREADS = 512, ELEMENTS = GROUP * HEAD_K * HEAD_V;

PRIM float unit_of(float d, float f) {
  const float size = larger(d, f);
  if (size == 0.0f || (size >= 0x1p-6f && size <= 0x1p8f)) return 1.0f;
  int e = -exponent_of(size);
  if (e < 0 && d > 0.0f) e = min(max(e, -10 - exponent_of(d)), 0);
  return power_of_two(max(min(e, 126), -126));
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gradient_units(const float* sizes, const float* dfinal_state, const int64_t* cu_seqlens, float* units,
                   float* dfinal_scaled, int T, int H) {
  const int thread = threadIdx.x, n = blockIdx.x / H, h = blockIdx.x % H;
  DynSmem smem;
  float* warps = smem.take<float>(THREADS / 32, "dO");
  float* others = smem.take<float>(THREADS / 32, "dfinal_state");
  const Sequence sequence = find_sequence<CHUNK>(cu_seqlens, n, T);
  const int64_t states = (int64_t)blockIdx.x * ELEMENTS;
  float d = 0.0f, f = 0.0f;
  for (int c = thread; c < (sequence.tokens + CHUNK - 1) / CHUNK; c += THREADS)
    d = larger(d, sizes[(sequence.slot + c) * H + h]);
  if (dfinal_state != nullptr)
    for (int i = thread; i < ELEMENTS; i += THREADS) f = larger(f, dfinal_state[states + i]);
  d = largest_of_block<THREADS>(d, warps, thread);
  f = largest_of_block<THREADS>(f, others, thread);
  const float unit = unit_of(d, f);
  if (thread == 0) units[blockIdx.x] = unit;
  for (int i = thread; i < ELEMENTS; i += THREADS)
    dfinal_scaled[states + i] = dfinal_state == nullptr ? 0.0f : unit * dfinal_state[states + i];
}
