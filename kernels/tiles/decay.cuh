// What a gate does inside a chunk. With G_i the sum of its gates up to token i and C the last token, the product of
// tokens i >= j gains e^(G_i - G_j), a read of the entering state e^(G_i), a write to the leaving state e^(G_C - G_j),
// and the state itself e^(G_C). All are at most 1. e^(-G_j), which overflows, is never formed.
//
// Kernels that have a chunk to themselves form all of these from the gates (Decay). Walks need no pairs of tokens and
// read the other factors (DecayFactors): per token, as factors.cu or decays.cu leaves them, or per key channel, where
// rows hold all but the state's (portable/channel_factors.cu).
//
// Numbers: small differences of large sums count, so G is two floats, of which the second holds what rounding took from
// the first. Gates below -1000 count as -1000, whose exponential is 0 like that of anything below: -inf too, of which
// no difference is. NaN stays, and spoils its own token and later ones only.
//
// Macros: CHUNK, HAS_GATE.
#pragma once
#include "tiles/load.cuh"

// No gate: every factor is 1, and nothing is read or kept.
struct NoDecay {
  static constexpr bool GATED = false;
  static PRIM NoDecay take(DynSmem&) { return {}; }
  PRIM void sum(const float*, int64_t, int, int) const {}
  template <int THREADS>
  PRIM void store(float2*, int64_t, int, int) const {}
  PRIM float pair(int, int) const { return 1.0f; }
  PRIM float read(int) const { return 1.0f; }
  PRIM float write(int) const { return 1.0f; }
  PRIM float carry() const { return 1.0f; }
};

// The factors of a chunk and value head in memory: of its tokens, and of the key channels of its state.
struct ChunkFactors {
  const float2* tokens;
  const float* channels;
};

struct NoFactors {
  static constexpr bool PER_CHANNEL = false;
  static PRIM NoFactors take(DynSmem&) { return {}; }
  template <int THREADS>
  PRIM void load(const ChunkFactors&, int64_t, int, int) const {}
  PRIM float read(int) const { return 1.0f; }
  PRIM float write(int) const { return 1.0f; }
  PRIM float carry(int, int) const { return 1.0f; }
};

// x + y of two floats each; x.x and x.y do not overlap.
PRIM float2 add_pairs(float2 x, float2 y) {
  const float sum = x.x + y.x, part = sum - x.x;
  const float lost = (x.x - (sum - part)) + (y.x - part) + (x.y + y.y);
  const float high = sum + lost;
  return make_float2(high, lost - (high - sum));
}

// e^(x + y) of two floats: the exponential of a rounded -50 would be wrong by 2e-6.
PRIM float exp_pair(float2 x) {
  const float high = expf(x.x);
  return high + high * x.y;
}

// One gate per token and value head.
struct ScalarDecay {
  static constexpr bool GATED = true;
  float2* G;  // of CHUNK tokens, in shared memory

  static PRIM ScalarDecay take(DynSmem& smem) { return {smem.take<float2>(CHUNK, "G")}; }

  // Sums the gates of a chunk's tokens, `stride` apart, by one warp. Past the end G stays what it was, so the last
  // entry is always G_C.
  PRIM void sum(const float* g, int64_t stride, int tokens, int lane) const {
    float2 before = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int first = 0; first < CHUNK; first += 32) {
      const int t = first + lane;
      const float gate = t < tokens ? g[t * stride] : 0.0f;
      float2 x = make_float2(gate < -1000.0f ? -1000.0f : gate, 0.0f);
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const float high = __shfl_sync(~0u, x.x, lane - step), low = __shfl_sync(~0u, x.y, lane - step);
        const bool inside = lane >= step;
        x = add_pairs(x, make_float2(inside ? high : 0.0f, inside ? low : 0.0f));
      }
      x = add_pairs(x, before);
      if (t < CHUNK) G[t] = x;
      before = make_float2(__shfl_sync(~0u, x.x, 31), __shfl_sync(~0u, x.y, 31));
    }
  }

  // For tokens i >= j.
  PRIM float pair(int i, int j) const { return exp_pair(add_pairs(G[i], make_float2(-G[j].x, -G[j].y))); }
  PRIM float read(int i) const { return exp_pair(G[i]); }
  PRIM float write(int j) const { return pair(CHUNK - 1, j); }
  PRIM float carry() const { return read(CHUNK - 1); }

  // Leaves (read, write) of every token for walks, by THREADS threads.
  template <int THREADS>
  PRIM void store(float2* factors, int64_t stride, int tokens, int thread) const {
    for (int t = thread; t < tokens; t += THREADS) factors[t * stride] = make_float2(read(t), write(t));
  }
};

struct ScalarFactors {
  static constexpr bool PER_CHANNEL = false;
  float2* token;  // (e^(G_i), e^(G_C - G_i)) of CHUNK tokens in shared memory; zero past the end

  static PRIM ScalarFactors take(DynSmem& smem) { return {smem.take<float2>(CHUNK, "decays")}; }

  // The caller commits and waits.
  template <int THREADS>
  PRIM void load(const ChunkFactors& from, int64_t stride, int tokens, int thread) const {
    load_column<CHUNK, THREADS>(token, from.tokens, stride, tokens, thread);
  }

  PRIM float read(int i) const { return token[i].x; }
  PRIM float write(int j) const { return token[j].y; }
  PRIM float carry(int tokens, int) const { return token[tokens - 1].x; }
};

// One gate per key channel: rows come with their decays, and what is left is that of each channel of the state.
template <int CHANNELS>
struct ChannelFactors {
  static constexpr bool PER_CHANNEL = true;
  float* channel;  // e^(G_C) in shared memory; zero past the head

  static PRIM ChannelFactors take(DynSmem& smem) { return {smem.take<float>(padded(CHANNELS), "channel decays")}; }

  template <int THREADS>
  PRIM void load(const ChunkFactors& from, int64_t, int, int thread) const {
    load_column<padded(CHANNELS), THREADS>(channel, from.channels, 1, CHANNELS, thread);
  }

  PRIM float read(int) const { return 1.0f; }
  PRIM float write(int) const { return 1.0f; }
  PRIM float carry(int, int key) const { return channel[key]; }
};

// The decays of the gate that a kernel is compiled for. Per key channel, kernels that have a chunk to themselves get
// rows with all of them inside, as without a gate.
#if HAS_GATE == 1
typedef ScalarDecay Decay;
typedef ScalarFactors DecayFactors;
#elif HAS_GATE == 2
typedef NoDecay Decay;
typedef ChannelFactors<HEAD_K> DecayFactors;
#else
typedef NoDecay Decay;
typedef NoFactors DecayFactors;
#endif
constexpr bool PER_CHANNEL = DecayFactors::PER_CHANNEL;
