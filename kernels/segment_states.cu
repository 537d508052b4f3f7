// The states that enter the segments of a sequence, from what each segment does to a state:
//
//   S_0 = initial state (or zero),   S_(s+1) = P_s S_s + H_s
//
// Numbers: float products and sums, in ascending order of the inner index. Macros: HEAD_K, HEAD_V, SEGMENTS, STATE_VK
// (layout of all states; P is (K, K) always).
// Grid: N * HV * ceil(HEAD_V / 16) blocks of 256 threads; a block has 16 value channels of a sequence's head, a
// thread one of them for every 16th key channel. Arrays: h (N, SEGMENTS - 1, HV, states), p the same with (K, K),
// entering (N, SEGMENTS, HV, states).
// Shared memory: the state's columns twice and 32 columns of P, all float; see cupy_delta/cuda/kernels.py.
#include "tiles/store.cuh"

constexpr int THREADS = 256, VALUES = 16, GROUPS = THREADS / VALUES, DEPTH = 32, P_PITCH = DEPTH + 1;
constexpr int SLICES = (HEAD_V + VALUES - 1) / VALUES, ROWS = (HEAD_K + GROUPS - 1) / GROUPS;

extern "C" __global__ void __launch_bounds__(THREADS)
    segment_states(const float* initial_state, const float* p, const float* h, float* entering, int HV) {
  const int thread = threadIdx.x, column = thread % VALUES, group = thread / VALUES;
  const int slice = blockIdx.x % SLICES, hv = blockIdx.x / SLICES % HV, n = blockIdx.x / (SLICES * HV);
  const int value = slice * VALUES + column;
  DynSmem smem;
  float* first = smem.take<float>(HEAD_K * VALUES, "state");
  float* second = smem.take<float>(HEAD_K * VALUES, "next state");
  float* tile = smem.take<float>(HEAD_K * P_PITCH, "columns of p");

  const int64_t size = (int64_t)HEAD_K * HEAD_V;
  for (int s = 0; s < SEGMENTS; s++) {
    const int64_t entering_at = (((int64_t)n * SEGMENTS + s) * HV + hv) * size;
    float *S = s % 2 ? second : first, *before = s % 2 ? first : second;
    if (s == 0) {
      const float* initial = initial_state + ((int64_t)n * HV + hv) * size;
      for (int key = group; key < HEAD_K; key += GROUPS)
        S[key * VALUES + column] =
            value < HEAD_V && initial_state != nullptr ? initial[state_offset(value, key)] : 0.0f;
    } else {
      const int64_t part = ((int64_t)n * (SEGMENTS - 1) + s - 1) * HV + hv;
      const float *P = p + part * HEAD_K * HEAD_K, *H = h + part * size;
      float sums[ROWS] = {};
      for (int k = 0; k < HEAD_K; k += DEPTH) {
        const int depth = min(DEPTH, HEAD_K - k);
        __syncthreads();
        for (int i = thread; i < HEAD_K * DEPTH; i += THREADS)
          if (i % DEPTH < depth) tile[i / DEPTH * P_PITCH + i % DEPTH] = P[i / DEPTH * HEAD_K + k + i % DEPTH];
        __syncthreads();
        for (int j = 0; j < depth; j++) {
          const float x = before[(k + j) * VALUES + column];
#pragma unroll
          for (int i = 0; i < ROWS; i++)
            if (group + i * GROUPS < HEAD_K) sums[i] += tile[(group + i * GROUPS) * P_PITCH + j] * x;
        }
      }
#pragma unroll
      for (int i = 0; i < ROWS; i++) {
        const int key = group + i * GROUPS;
        if (key < HEAD_K) S[key * VALUES + column] = sums[i] + (value < HEAD_V ? H[state_offset(value, key)] : 0.0f);
      }
    }
    for (int key = group; key < HEAD_K && value < HEAD_V; key += GROUPS)
      entering[entering_at + state_offset(value, key)] = S[key * VALUES + column];
  }
}
