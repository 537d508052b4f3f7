// The states that enter the segments of a sequence, from what each segment does to a state:
//
//   S_0 = initial state (or zero),   S_(s+1) = P_s S_s + H_s
//
// Numbers: float products and sums, in ascending order of the inner index. Macros: HEAD_K, HEAD_V, SEGMENTS, STATE_VK
// (layout of all states; P is (K, K) always).
// Grid: N * HV * ceil(HEAD_V / 8) blocks of 128 threads; a block has 8 value channels of a sequence's head, a thread
// two of them for every 32nd key channel. Arrays: segment_h (N, SEGMENTS - 1, HV, states), segment_p the same with (K,
// K), entering (N, SEGMENTS, HV, states). Shared memory: the block's columns of the state twice, float. P is read from
// global memory ahead of its use, as no step waits for it.
#include "tiles/store.cuh"

constexpr int THREADS = 128, VALUES = 8, PAIRS = VALUES / 2, GROUPS = THREADS / PAIRS, DEPTH = 16;
constexpr int SLICES = (HEAD_V + VALUES - 1) / VALUES, ROWS = (HEAD_K + GROUPS - 1) / GROUPS;
constexpr int KP = (HEAD_K + DEPTH - 1) / DEPTH * DEPTH;

// Columns k to k + DEPTH - 1 of every 32nd row of P from `group` on; zero outside.
PRIM void load_columns(float (&x)[ROWS][DEPTH], const float* P, int group, int k) {
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    const int row = group + i * GROUPS;
    if constexpr (HEAD_K % 4 == 0) {
#pragma unroll
      for (int j = 0; j < DEPTH; j += 4) {
        float4 y = {};
        if (row < HEAD_K && k + j < HEAD_K) y = *(const float4*)&P[row * HEAD_K + k + j];
        x[i][j] = y.x, x[i][j + 1] = y.y, x[i][j + 2] = y.z, x[i][j + 3] = y.w;
      }
    } else {
#pragma unroll
      for (int j = 0; j < DEPTH; j++) x[i][j] = row < HEAD_K && k + j < HEAD_K ? P[row * HEAD_K + k + j] : 0.0f;
    }
  }
}

PRIM void multiply_columns(float (&sums)[ROWS][2], const float (&x)[ROWS][DEPTH], const float* S, int k) {
#pragma unroll
  for (int j = 0; j < DEPTH; j++) {
    const float2 s = *(const float2*)&S[(k + j) * VALUES];
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      sums[i][0] += x[i][j] * s.x;
      sums[i][1] += x[i][j] * s.y;
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) segment_states(const float* initial_state, const float* segment_p,
                                                                     const float* segment_h, float* entering, int HV) {
  const int thread = threadIdx.x, column = thread % PAIRS * 2, group = thread / PAIRS;
  const int slice = blockIdx.x % SLICES, hv = blockIdx.x / SLICES % HV, n = blockIdx.x / (SLICES * HV);
  const int value = slice * VALUES + column;
  DynSmem smem;
  float* first = smem.take<float>(KP * VALUES, "state");
  float* second = smem.take<float>(KP * VALUES, "next state");
  smem.all_taken(SHARED_BYTES);

  const int64_t size = (int64_t)HEAD_K * HEAD_V, square = (int64_t)HEAD_K * HEAD_K;
  // Row i of this thread: key channel group + 32 i, zero past the end.
  auto element = [&](const float* state, int key, int j) {
    return key < HEAD_K && value + j < HEAD_V ? state[state_offset(value + j, key)] : 0.0f;
  };
  float ahead[ROWS][DEPTH];
  if constexpr (SEGMENTS > 1)
    load_columns(ahead, segment_p + ((int64_t)n * (SEGMENTS - 1) * HV + hv) * square, group, 0);
  for (int s = 0; s < SEGMENTS; s++) {
    float *S = s % 2 ? second : first, *before = s % 2 ? first : second;
    float sums[ROWS][2];
    if (s == 0) {
      const float* initial = initial_state + ((int64_t)n * HV + hv) * size;
#pragma unroll
      for (int i = 0; i < ROWS; i++)
#pragma unroll
        for (int j = 0; j < 2; j++)
          sums[i][j] = initial_state != nullptr ? element(initial, group + i * GROUPS, j) : 0.0f;
    } else {
      const int64_t part = ((int64_t)n * (SEGMENTS - 1) + s - 1) * HV + hv;
      const float *P = segment_p + part * square, *next = s + 1 < SEGMENTS ? P + HV * square : P;
      float now[ROWS][DEPTH];
#pragma unroll
      for (int i = 0; i < ROWS; i++) sums[i][0] = sums[i][1] = 0.0f;
      for (int k = 0; k < KP; k += DEPTH) {
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
          for (int j = 0; j < DEPTH; j++) now[i][j] = ahead[i][j];
        load_columns(ahead, k + DEPTH < KP ? P : next, group, (k + DEPTH) % KP);
        multiply_columns(sums, now, before + column, k);
      }
#pragma unroll
      for (int i = 0; i < ROWS; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) sums[i][j] += element(segment_h + part * size, group + i * GROUPS, j);
    }
    float* out = entering + (((int64_t)n * SEGMENTS + s) * HV + hv) * size;
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      const int key = group + i * GROUPS;
      if (key < KP) *(float2*)&S[key * VALUES + column] = make_float2(sums[i][0], sums[i][1]);
#pragma unroll
      for (int j = 0; j < 2; j++)
        if (key < HEAD_K && value + j < HEAD_V) out[state_offset(value + j, key)] = sums[i][j];
    }
    __syncthreads();
  }
}
