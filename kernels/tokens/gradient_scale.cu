// dO into the units of tokens/gradient_units.cu: do_scaled = unit dO.
//
// Numbers: multiplied by a power of two, rounded to nearest where that leaves the normal range. Macros: DTYPE (bf16 or
// f16), HEAD_V, GROUP (value heads per key head), CHUNK, VARLEN. Grid: slots * H blocks of 256 threads. Shared memory:
// none.
#include "tiles/sequence.cuh"
#include "tokens/units.cuh"

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
    gradient_scale(const float* units, const int64_t* cu_seqlens, const DTYPE* d_o, DTYPE* do_scaled, int N, int T,
                   int H) {
  const int thread = threadIdx.x, h = blockIdx.x % H;
  const int64_t slot = blockIdx.x / H;
  const Chunk chunk = find_chunk<CHUNK>(cu_seqlens, slot, N, T);
  if (chunk.tokens <= 0) return;
  const int n = find_owner<CHUNK>(cu_seqlens, slot, N, T);
  const float unit = units[(int64_t)n * H + h];
  scale_elements<GROUP * HEAD_V, THREADS>(d_o, do_scaled, unit, {chunk.first, chunk.tokens, h, H}, thread);
}
