// The largest finite |dO| of every chunk and key head, over the value heads of the key head.
//
// Numbers: exact. Macros: DTYPE (bf16 or f16), HEAD_V, GROUP (value heads per key head), CHUNK, VARLEN. Grid: slots * H
// blocks of 256 threads. Shared memory: a float per warp.
#include "tiles/sequence.cuh"
#include "tokens/units.cuh"

constexpr int THREADS = 256, COLUMNS = GROUP * HEAD_V, STEP = COLUMNS % 2 == 0 ? 2 : 1;

extern "C" __global__ void __launch_bounds__(THREADS)
    gradient_sizes(const DTYPE* d_o, const int64_t* cu_seqlens, float* sizes, int N, int T, int H) {
  const int thread = threadIdx.x, h = blockIdx.x % H;
  const int64_t slot = blockIdx.x / H;
  DynSmem smem;
  float* warps = smem.take<float>(THREADS / 32, "warps");
  const Chunk chunk = find_chunk<CHUNK>(cu_seqlens, slot, N, T);
  if (chunk.tokens <= 0) return;
  float size = 0.0f;
  for_elements<COLUMNS, STEP, THREADS>({chunk.first, chunk.tokens, h, H}, thread, [&](int64_t at) {
    if constexpr (STEP == 2) {
      const float2 both = unpack2<DTYPE>(*(const uint32_t*)&d_o[at]);
      size = larger(larger(size, both.x), both.y);
    } else {
      size = larger(size, widen(d_o[at]));
    }
  });
  size = largest_of_block<THREADS>(size, warps, thread);
  if (thread == 0) sizes[slot * H + h] = size;
}
