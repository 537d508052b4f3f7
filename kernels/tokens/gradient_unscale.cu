// Out of the units of tokens/gradient_units.cu, in place, and only of heads whose unit is not 1:
//
//   dQ, dK, dV, dbeta and dinitial_state, and dg with a gate, become what they are over the unit
//
// Numbers: multiplied by a power of two, rounded to nearest where that leaves the normal range. Macros: DTYPE (bf16 or
// f16), HEAD_K, HEAD_V, GROUP (value heads per key head), CHUNK, HAS_GATE, VARLEN. Grid: slots * H blocks of 256
// threads, `pairs`, and N * H more for the states. Shared memory: none.
#include "tiles/sequence.cuh"
#include "tokens/units.cuh"

constexpr int THREADS = 256, GATES = GROUP * (HAS_GATE == 2 ? HEAD_K : 1);  // per token and key head

extern "C" __global__ void __launch_bounds__(THREADS)
    gradient_unscale(const float* units, const int64_t* cu_seqlens, DTYPE* dq, DTYPE* dk, DTYPE* dv, float* dbeta,
#if HAS_GATE
                     float* dg,
#endif
                     float* dinitial_state, int pairs, int N, int T, int H) {
  const int thread = threadIdx.x, h = blockIdx.x % H;
  if (blockIdx.x >= pairs) {  // the states of a key head
    const int64_t head = blockIdx.x - pairs;
    const float factor = power_of_two(-exponent_of(units[head]));
    if (factor == 1.0f) return;
    scale_elements<GROUP * HEAD_K * HEAD_V, THREADS>(dinitial_state, dinitial_state, factor, {head, 1, 0, 1}, thread);
    return;
  }
  const int64_t slot = blockIdx.x / H;
  const Chunk chunk = find_chunk<CHUNK>(cu_seqlens, slot, N, T);
  if (chunk.tokens <= 0) return;
  const int n = find_owner<CHUNK>(cu_seqlens, slot, N, T);
  const float factor = power_of_two(-exponent_of(units[(int64_t)n * H + h]));
  if (factor == 1.0f) return;
  const Rows rows = {chunk.first, chunk.tokens, h, H};
  scale_elements<HEAD_K, THREADS>(dq, dq, factor, rows, thread);
  scale_elements<HEAD_K, THREADS>(dk, dk, factor, rows, thread);
  scale_elements<GROUP * HEAD_V, THREADS>(dv, dv, factor, rows, thread);
  scale_elements<GROUP, THREADS>(dbeta, dbeta, factor, rows, thread);
#if HAS_GATE
  scale_elements<GATES, THREADS>(dg, dg, factor, rows, thread);
#endif
}
