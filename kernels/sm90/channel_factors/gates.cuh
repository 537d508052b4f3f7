// The sums of a chunk's gates in channel_factors.cu, and where everything lies.
#pragma once
#include "tiles/load.cuh"

static_assert(CHUNK == 64, "a warp for each of four blocks");
constexpr int THREADS = 128, RESIDENT = 3, BLOCK = 16, COUNT = CHUNK / BLOCK;
constexpr int KP = HEAD_K <= 64 ? 64 : 128, K_PITCH = pitch_of<DTYPE>(KP);
constexpr float HALF_RANGE = 58.0f, RANGE = 2 * HALF_RANGE, LOWEST = 150.0f;

struct Shared {
  float* x;                             // by x_place; then keys for later blocks, eight in the place of four sums
  DTYPE *k, *q;                         // then for earlier blocks
  float *sums, *over, *before, *after;  // per block and channel: z; 2^z; over all blocks before, and after
  float* beta;
  int* within;  // per warp and block, of its channels
};

PRIM Shared take_shared(DynSmem& smem) {
  Shared s;
  s.x = smem.take<float>(CHUNK * KP, "sums of gates, keys, m");
  s.k = smem.take<DTYPE>(CHUNK * K_PITCH, "k");
  s.q = smem.take<DTYPE>(CHUNK * K_PITCH, "q");
  s.sums = smem.take<float>(COUNT * KP, "sums over blocks");
  s.over = smem.take<float>(COUNT * KP, "decays over blocks");
  s.before = smem.take<float>(COUNT * KP, "decays before blocks");
  s.after = smem.take<float>(COUNT * KP, "decays after blocks");
  s.beta = smem.take<float>(CHUNK, "beta");
  s.within = smem.take<int>(THREADS / 32 * COUNT, "tokens within the range");
  return s;
}

// Quads of channels lie together, those of eight rows in other banks.
PRIM int x_place(int row, int channel) { return row * KP + ((channel / 4 ^ row % 8) * 4 + channel % 4); }
// Where eight channels of keys begin, as 16-bit elements.
PRIM DTYPE* early_keys(const Shared& s, int row, int channel) { return (DTYPE*)&s.x[x_place(row, channel)]; }

// A thread has a channel, all of whose gates it asks for at once.
PRIM void load_gates(float (&gates)[CHUNK], const float* g, int64_t stride, int tokens) {
  if (tokens == CHUNK) {
#pragma unroll
    for (int t = 0; t < CHUNK; t++, g += stride) gates[t] = *g;
  } else {
#pragma unroll
    for (int t = 0; t < CHUNK; t++, g += stride) gates[t] = t < tokens ? *g : 0.0f;
  }
}

// The first token of a block whose sum is beyond the range in a thread's channel.
PRIM int first_beyond(const Shared& s, int block, int channel) {
#pragma unroll 1
  for (int i = 0; i < BLOCK; i++)
    if (!(s.x[x_place(block * BLOCK + i, channel)] >= -RANGE)) return i;
  return BLOCK;
}

PRIM void sum_gates(const Shared& s, const float* g, int64_t stride, int tokens, float* channel_decays, int channel) {
  float gates[CHUNK] = {}, over[COUNT];
  if (channel < HEAD_K) load_gates(gates, g + channel, stride, tokens);
#pragma unroll
  for (int block = 0; block < COUNT; block++) {
    float x = 0.0f;
#pragma unroll
    for (int i = 0; i < BLOCK; i++) {
      const float gate = 1.44269504f * gates[block * BLOCK + i];
      x += gate < -LOWEST ? -LOWEST : gate;  // NaN stays
      if (channel < KP) s.x[x_place(block * BLOCK + i, channel)] = x;
    }
    over[block] = exp2f(x);
    if (channel < KP) s.sums[block * KP + channel] = x, s.over[block * KP + channel] = over[block];
    int within = channel < KP && !(x >= -RANGE) ? first_beyond(s, block, channel) : BLOCK;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) within = min(within, __shfl_xor_sync(~0u, within, distance));
    if (channel % 32 == 0) s.within[channel / 32 * COUNT + block] = within;
  }
  float before = 1.0f, after = 1.0f;
#pragma unroll
  for (int block = 0; block < COUNT; block++) {
    const int last = COUNT - 1 - block;
    if (channel < KP) s.before[block * KP + channel] = before, s.after[last * KP + channel] = after;
    before *= over[block], after *= over[last];
  }
  if (channel < HEAD_K) channel_decays[channel] = before;
}

// The first token of a block whose sum is beyond the range in any channel.
PRIM int tokens_within(const Shared& s, int block) {
  int within = BLOCK;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; warp++) within = min(within, s.within[warp * COUNT + block]);
  return within;
}
