// Where a sequence is cut into segments that sm90/channel_forward.cu walks at once, each from zero: its lead, how many
// chunks before its own a segment's walk begins. By gates alone it is the fewest, from FEWEST on, over which every key
// channel loses LOST binary orders, or -1 where that takes more than MOST. Since keys carry what a state has from
// channel to channel, the walk looks at what these chunks really leave (sm90/channel_forward/walk.cuh).
//
// A block has the chunks before one segment, of a value head, and reads them one after the other from the last on, as
// long as no channel lags behind its share of LOST; of a chunk each thread sums 16 gates of one channel. NaN forgets
// nothing.
//
// Macros: GATE (the type of g), HEAD_K (a multiple of 32), CHUNK (64). Grid: N * (segments - 1) * HV blocks of 4 HEAD_K
// threads. Shared memory: sums of gates; the largest.
#include "primitives/primitives.cuh"

constexpr int PARTS = 4, THREADS = PARTS * HEAD_K, TOKENS = CHUNK / PARTS, WARPS = HEAD_K / 32;
// Keys let what is in a state change to channels that lose less: of gates of mean -1 that are drawn for every token and
// channel the slowest channel loses LOST where some 2^-105 is left of all, and of stronger ones within one chunk where
// 2^-60 is.
constexpr int FEWEST = 2, MOST = 8;
constexpr float LOST = 170.0f;

// What the thread has of a chunk, on its way.
typedef float Gates[TOKENS];
PRIM void load_gates(Gates& y, const GATE* g, int64_t stride) {
#pragma unroll
  for (int i = 0; i < TOKENS; i++) y[i] = widen(g[i * stride]);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    channel_leads_hopper(const GATE* g, int* leads, int* declined, int T, int HV, int segments, int first, int length) {
  DynSmem smem;
  float* const sums = smem.take<float>(THREADS, "sums of gates");
  float* const largest = smem.take<float>(WARPS, "the largest sums");
  smem.all_taken(SHARED_BYTES);
  const int hv = blockIdx.x % HV, cut = blockIdx.x / HV, n = cut / (segments - 1);
  const int border = first + cut % (segments - 1) * length;  // the segment's first chunk
  const int channel = threadIdx.x % HEAD_K, part = threadIdx.x / HEAD_K, lane = threadIdx.x % 32;
  const int64_t stride = (int64_t)HV * HEAD_K;
  const int64_t token = (int64_t)n * T + (border - 1) * CHUNK + part * TOKENS;
  g += token * stride + hv * HEAD_K + channel;
  if (blockIdx.x == 0 && threadIdx.x == 0) *declined = 0;

  Gates gates;
  load_gates(gates, g, stride);
  float lost = 0.0f;
  int lead = -1;
  for (int chunks = 1; chunks <= MOST; chunks++) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < TOKENS; i++) sum += gates[i];
    sums[threadIdx.x] = sum;
    if (chunks < MOST) load_gates(gates, g - chunks * CHUNK * stride, stride);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < PARTS; i++) lost += 1.44269504f * sums[i * HEAD_K + channel];
    float most = lost <= 0.0f ? lost : 1.0f;  // of NaN, too
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, distance));
    if (part == 0 && lane == 0) largest[channel / 32] = most;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < WARPS; i++) most = fmaxf(most, largest[i]);
    if (chunks >= FEWEST && most <= -LOST) lead = chunks;
    if (lead > 0 || most > -LOST / MOST * (float)chunks) break;
  }
  if (threadIdx.x == 0) leads[blockIdx.x] = lead;
}
