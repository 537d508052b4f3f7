// The running sum of g in every chunk, all chunks in parallel: G_i = g_1 + .. + g_i of the tokens of the chunk.
//
// Numbers: sums in double, since small differences of large ones count; g below -1000 counts as -1000.
// Macros: CHUNK, VARLEN. Grid: ceil(slots * HV / 128) blocks of 128 threads; a thread serves a chunk of one value head,
// neighbours neighbouring heads. Shared memory: none.
#include "tiles/gate.cuh"
#include "tiles/sequence.cuh"

constexpr int THREADS = 128;

extern "C" __global__ void __launch_bounds__(THREADS)
    gate_sums(const float* g, const int64_t* cu_seqlens, double* G, int64_t slots, int N, int T, int HV) {
  const int64_t job = (int64_t)blockIdx.x * THREADS + threadIdx.x, slot = job / HV;
  if (slot >= slots) return;
  const Chunk chunk = find_chunk<CHUNK>(cu_seqlens, slot, N, T);
  const int64_t first = chunk.first * HV + job % HV;
  double sum = 0;
  for (int i = 0; i < chunk.tokens; i++) {
    sum += no_less_than_lowest(g[first + (int64_t)i * HV]);
    G[first + (int64_t)i * HV] = sum;
  }
}
