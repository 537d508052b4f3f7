// The gradient of a gate's logits from dg, and per run of tokens what its parameters' have of them:
//
//   da = dx,   sums = (sum of dx, sum of dA_log) over `rows` tokens, for every gate of a token; see tiles/raw.cuh
//
// Numbers: float, da rounded to A_DTYPE; a thread sums every LANES-th token, threads are summed in a fixed tree.
// Macros, grid: those of tokens/raw_gate.cu. Shared memory: the sums of each thread.
#include "tiles/raw.cuh"

constexpr int THREADS = 256, LANES = THREADS / WIDTH;

extern "C" __global__ void __launch_bounds__(THREADS)
    raw_gate_gradient(const A_DTYPE* a, const float* A_log, const float* dt_bias, const float* dg, A_DTYPE* da,
                      float2* sums, float bound, int64_t tokens, int rows, int HV) {
  const RawColumns<VECTOR, WIDTH> at(HV * CHANNELS, rows);
  const bool inside = at.column < at.columns;
  const int thread = threadIdx.x;
  DynSmem smem;
  float2* totals = smem.take<float2>(THREADS * VECTOR, "sums");
  smem.all_taken(SHARED_BYTES);

  float2 total[VECTOR] = {};
  if (inside) {
    RawGate<float, RAW_GATE> raw[VECTOR];
    raw_gates_of<CHANNELS, BIAS>(raw, A_log, dt_bias, bound, at.column);
#pragma unroll 4
    for (int64_t t = at.first; t < at.end(tokens); t += LANES) {
      const int64_t place = t * at.columns + at.column;
      const Neighbours<A_DTYPE, VECTOR> logits = load_neighbours<VECTOR>(a, place);
      const Neighbours<float, VECTOR> entering = load_neighbours<VECTOR>(dg, place);
      Neighbours<A_DTYPE, VECTOR> leaving;
#pragma unroll
      for (int i = 0; i < VECTOR; i++) {
        const RawGradients<float> d = raw[i].gradients(widen(logits.element[i]), entering.element[i]);
        leaving.element[i] = narrow<A_DTYPE>(d.x);
        total[i].x += d.x, total[i].y += d.A_log;
      }
      store_neighbours(da, place, leaving);
    }
  }
#pragma unroll
  for (int i = 0; i < VECTOR; i++) totals[i * THREADS + thread] = total[i];
#pragma unroll
  for (int half = THREADS / 2; half >= WIDTH; half /= 2) {
    __syncthreads();
    if (thread >= half) continue;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
      const float2 other = totals[i * THREADS + thread + half];
      total[i].x += other.x, total[i].y += other.y;
      totals[i * THREADS + thread] = total[i];
    }
  }
  if (thread >= WIDTH || !inside) return;
#pragma unroll
  for (int i = 0; i < VECTOR; i++) sums[at.part * at.columns + at.column + i] = total[i];
}
