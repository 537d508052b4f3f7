// The gradient of a gate's logits from dg, and per run of tokens what its parameters' have of them:
//
//   da = dx,   sums = (sum of dx, sum of dA_log) over ROWS tokens, for every gate of a token; see tiles/raw.cuh
//
// Numbers: float, da rounded to A_DTYPE; a thread sums every LANES-th token, threads are summed in a fixed tree.
// Macros: A_DTYPE, RAW_GATE, BIAS, CHANNELS as in tokens/raw_gate.cu; WIDTH (gates that a block has side by side, a
// power of two), ROWS (tokens per block). Grid: ceil(tokens / ROWS) * ceil(HV CHANNELS / WIDTH) blocks of 256 threads.
// Shared memory: the sums of each thread.
#include "tiles/raw.cuh"

constexpr int THREADS = 256, LANES = THREADS / WIDTH;

extern "C" __global__ void __launch_bounds__(THREADS)
    raw_gate_gradient(const A_DTYPE* a, const float* A_log, const float* dt_bias, const float* dg, A_DTYPE* da,
                      float2* sums, float bound, int64_t tokens, int HV) {
  const int columns = HV * CHANNELS, across = (columns + WIDTH - 1) / WIDTH, thread = threadIdx.x;
  const int64_t part = blockIdx.x / across, first = part * ROWS;
  const int column = blockIdx.x % across * WIDTH + thread % WIDTH, lane = thread / WIDTH;
  DynSmem smem;
  float2* totals = smem.take<float2>(THREADS, "sums");
  smem.all_taken(SHARED_BYTES);

  float2 total = make_float2(0.0f, 0.0f);
  if (column < columns) {
    const auto raw =
        raw_gate_of<float, RAW_GATE, BIAS, CHANNELS>(A_log, dt_bias, bound, column / CHANNELS, column % CHANNELS);
#pragma unroll 4
    for (int64_t t = first + lane; t < tokens && t < first + ROWS; t += LANES) {
      const int64_t at = t * columns + column;
      const RawGradients<float> d = raw.gradients(widen(a[at]), dg[at]);
      da[at] = narrow<A_DTYPE>(d.x);
      total.x += d.x, total.y += d.A_log;
    }
  }
  totals[thread] = total;
#pragma unroll
  for (int half = LANES / 2; half > 0; half /= 2) {
    __syncthreads();
    if (lane >= half) continue;
    const float2 other = totals[thread + half * WIDTH];
    total.x += other.x, total.y += other.y;
    totals[thread] = total;
  }
  if (lane == 0 && column < columns) sums[part * columns + column] = total;
}
