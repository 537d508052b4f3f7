// The gradients of a gate's parameters, from the sums that tokens/raw_gate_gradient.cu leaves of runs of tokens:
//
//   dA_log, ddt_bias = the sums over all runs; over the key channels, too, of what is one per head
//
// Numbers: float; a thread sums every LANES-th run, threads are summed in a fixed tree, then channels. Macros: BIAS,
// CHANNELS as in tokens/raw_gate.cu; WIDTH (channels side by side, the power of two from CHANNELS on). Grid: HV blocks
// of 1024 threads. Shared memory: the sums of each thread.
#include "primitives/primitives.cuh"

constexpr int THREADS = 1024, LANES = THREADS / WIDTH;

extern "C" __global__ void __launch_bounds__(THREADS)
    raw_gate_sums(const float2* sums, float* dA_log, float* ddt_bias, int parts, int HV) {
  const int thread = threadIdx.x, channel = thread % WIDTH, lane = thread / WIDTH, hv = blockIdx.x;
  DynSmem smem;
  float2* totals = smem.take<float2>(THREADS, "sums");
  smem.all_taken(SHARED_BYTES);

  float2 total = make_float2(0.0f, 0.0f);
  if (channel < CHANNELS) {
#pragma unroll 4
    for (int part = lane; part < parts; part += LANES) {
      const float2 one = sums[((int64_t)part * HV + hv) * CHANNELS + channel];
      total.x += one.x, total.y += one.y;
    }
  }
  totals[thread] = total;
  // Lanes, then channels: both by halves.
#pragma unroll
  for (int half = THREADS / 2; half > 0; half /= 2) {
    if (BIAS == 2 && half == WIDTH / 2 && thread < CHANNELS) ddt_bias[hv * CHANNELS + thread] = total.x;
    __syncthreads();
    if (thread >= half) continue;
    const float2 other = totals[thread + half];
    total.x += other.x, total.y += other.y;
    totals[thread] = total;
  }
  if (thread > 0) return;
  if (BIAS == 1) ddt_bias[hv] = total.x;
  if (BIAS == 2 && WIDTH == 1) ddt_bias[hv] = total.x;
  dA_log[hv] = total.y;
}
