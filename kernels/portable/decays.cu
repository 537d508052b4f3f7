// The decays of every token that a walk needs, where no factors have left them, all chunks in parallel: (e^(G_i),
// e^(G_C - G_i)) with G the running sum of g in the chunk and C its last token, see tiles/decay.cuh.
//
// Macros: CHUNK, HAS_GATE (1), VARLEN. Grid: slots * HV blocks of 32 threads. Shared memory: G.
#include "tiles/decay.cuh"
#include "tiles/sequence.cuh"

constexpr int THREADS = 32;

extern "C" __global__ void __launch_bounds__(THREADS)
    decays(const float* g, const int64_t* cu_seqlens, float2* decays, int N, int T, int HV) {
  const int lane = threadIdx.x, hv = blockIdx.x % HV;
  const Chunk chunk = find_chunk<CHUNK>(cu_seqlens, blockIdx.x / HV, N, T);
  if (chunk.tokens <= 0) return;
  DynSmem smem;
  const Decay decay = Decay::take(smem);
  smem.all_taken(SHARED_BYTES);
  const int64_t row = chunk.first * HV + hv;
  decay.sum(g + row, HV, chunk.tokens, lane);
  __syncwarp();
  decay.store<THREADS>(decays + row, HV, chunk.tokens, lane);
}
