// The transfer of a whole sequence, from those of its segments, on compute capability 9.0:
//
//   P = P_m ... P_1      H = P_m ( ... (P_1 S + H_1) ... ) + H_m
//
// with S given, or zero. A block takes 64 value channels of H, or 64 columns of P, through all segments as
// sm90/join.cuh does.
//
// Numbers: those of sm90/join.cuh; P and H in float. Macros: DTYPE (bf16 or f16), HEAD_K (up to 128) and HEAD_V,
// multiples of 8; CHUNK (64), HAS_GATE, VARLEN (0), WITH_P. Grid: N * HV * slices blocks of 128 threads; slices of H
// come first, then those of P, if there are any. Shared memory: two P of segments.
#include "tiles/swizzled.cuh"

constexpr int MATH = 1, MATH_REGISTERS = 255, MATH_BARRIER = 1;
constexpr int KP = HEAD_K <= 64 ? 64 : 128, K_BOXES = KP / BOX, K_STEPS = KP / 16, K_TILES = KP / 8, TILE = 64 * BOX;
constexpr int H_SLICES = (HEAD_V + BOX - 1) / BOX, P_SLICES = WITH_P ? (HEAD_K + BOX - 1) / BOX : 0;
constexpr int SLICES = H_SLICES + P_SLICES;
#include "sm90/join.cuh"
#include "tiles/store.cuh"

extern "C" __global__ void __launch_bounds__(128, 1)
    joined_transfer_hopper(const __grid_constant__ TensorMap transfer_map, float* segment_h, float* segment_decays,
                           const float* initial_state, float* p, float* h, int HV, int transferred) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int slice = blockIdx.x % SLICES, hv = blockIdx.x / SLICES % HV, n = blockIdx.x / (SLICES * HV);
  const bool is_h = slice < H_SLICES;
  const int column = (is_h ? slice : slice - H_SLICES) * BOX, value = column + warp * 16;
  const int64_t head = (int64_t)n * HV + hv, first = n * (int64_t)transferred;

  const Part part = {column, hv, HV, 0, thread};

  DynSmem smem;
  DTYPE* even = smem.take<DTYPE>(KP * KP, "P of a segment", 1024);
  DTYPE* odd = smem.take<DTYPE>(KP * KP, "P of the next one", 1024);
  const Joins joins = take_joins(smem, transfer_map, segment_h, segment_decays, even, odd);
  smem.all_taken(SHARED_BYTES);
  if (thread == 0) {
    joins.init();
    mbarrier_init_fence();
  }
  __syncthreads();

  float S[K_TILES][4];
  clear(S);
  if (is_h) {
    if (initial_state != nullptr) {
#pragma unroll
      for (int j = 0; j < K_TILES; j++) load_state(S[j], initial_state + head * HEAD_K * HEAD_V, value, j * 8, lane);
    }
    join(S, joins, first, transferred, part);
#pragma unroll
    for (int j = 0; j < K_TILES; j++) store_state(h + head * HEAD_K * HEAD_V, S[j], value, j * 8, lane);
  } else {
    add_identity(S, 1.0f, value, lane);
    join<false>(S, joins, first, transferred, part);
    float* out = p + head * HEAD_K * HEAD_K;
#pragma unroll
    for (int j = 0; j < K_TILES; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int from = value + sum_row(lane, i), to = j * 8 + sum_column(lane, 0, i);
        if (from < HEAD_K && to < HEAD_K) out[to * HEAD_K + from] = S[j][i];
      }
  }
}
