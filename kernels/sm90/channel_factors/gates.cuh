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
  return s;
}

// Quads of channels lie together, those of eight rows in other banks.
PRIM int x_place(int row, int channel) { return row * KP + ((channel / 4 ^ row % 8) * 4 + channel % 4); }
// Where eight channels of keys begin, as 16-bit elements.
PRIM DTYPE* early_keys(const Shared& s, int row, int channel) { return (DTYPE*)&s.x[x_place(row, channel)]; }

// A warp has a block, and a lane WIDTH of its channels, side by side.
constexpr int WIDTH = KP / 32;
typedef float Wide[WIDTH];
PRIM void load_wide(Wide& y, const float* at) {
  if constexpr (WIDTH == 4) {
    const float4 x = *(const float4*)at;
    y[0] = x.x, y[1] = x.y, y[2] = x.z, y[3] = x.w;
  } else {
    const float2 x = *(const float2*)at;
    y[0] = x.x, y[1] = x.y;
  }
}
PRIM void load_wide(Wide& y, const DTYPE* at) {  // of 16 bits
  uint32_t pairs[WIDTH / 2];
  if constexpr (WIDTH == 4) {
    const uint2 x = *(const uint2*)at;
    pairs[0] = x.x, pairs[1] = x.y;
  } else {
    pairs[0] = *(const uint32_t*)at;
  }
#pragma unroll
  for (int i = 0; i < WIDTH / 2; i++) {
    const float2 x = unpack2<DTYPE>(pairs[i]);
    y[2 * i] = x.x, y[2 * i + 1] = x.y;
  }
}
PRIM void store_wide(float* at, const Wide& x) {
  if constexpr (WIDTH == 4)
    *(float4*)at = make_float4(x[0], x[1], x[2], x[3]);
  else
    *(float2*)at = make_float2(x[0], x[1]);
}

// The first token of a block whose sum is beyond the range in a channel.
PRIM int first_beyond(const Shared& s, int block, int channel) {
#pragma unroll 1
  for (int i = 0; i < BLOCK; i++)
    if (!(s.x[x_place(block * BLOCK + i, channel)] >= -RANGE)) return i;
  return BLOCK;
}

// The sums of a block's gates, from its first row on, of which `tokens` there are: x, z and 2^z. Returns the first
// token whose sum is beyond the range in any channel.
PRIM int sum_gates(const Shared& s, const GATE* g, int64_t stride, int tokens, int block, int lane) {
  const int channel = lane * WIDTH;
  Wide gates[BLOCK] = {}, x = {};
  if (channel < HEAD_K) {  // all are asked for at once
    g += block * BLOCK * stride + channel;
#pragma unroll
    for (int i = 0; i < BLOCK; i++, g += stride)
      if (i < tokens) load_wide(gates[i], g);
  }
#pragma unroll
  for (int i = 0; i < BLOCK; i++) {
#pragma unroll
    for (int c = 0; c < WIDTH; c++) {
      const float gate = 1.44269504f * gates[i][c];
      x[c] += gate < -LOWEST ? -LOWEST : gate;  // NaN stays
    }
    store_wide(&s.x[x_place(block * BLOCK + i, channel)], x);
  }
  Wide over;
  int within = BLOCK;
#pragma unroll
  for (int c = 0; c < WIDTH; c++) {
    over[c] = exp2f(x[c]);
    if (!(x[c] >= -RANGE)) within = min(within, first_beyond(s, block, channel + c));
  }
  store_wide(&s.sums[block * KP + channel], x), store_wide(&s.over[block * KP + channel], over);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) within = min(within, __shfl_xor_sync(~0u, within, distance));
  return within;
}

// The decays over all blocks before each and after it, and over the chunk. A thread has a channel.
PRIM void multiply_decays(const Shared& s, float* channel_decays, int channel) {
  if (channel >= KP) return;
  float before = 1.0f, after = 1.0f;
#pragma unroll
  for (int block = 0; block < COUNT; block++) {
    const int last = COUNT - 1 - block;
    s.before[block * KP + channel] = before, s.after[last * KP + channel] = after;
    before *= s.over[block * KP + channel], after *= s.over[last * KP + channel];
  }
  if (channel < HEAD_K) channel_decays[channel] = before;
}
