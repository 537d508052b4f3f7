// What gates do in a chunk, for the walks of sm90/forward.cu: the records of sm90/tokens.cuh, one per chunk and value
// head, (chunk slots, HV, RECORD_WORDS) in float, and which of these are paired, (chunk slots, ceil(HV / HEADS)), a bit
// per head. A slot that no chunk has is left alone.
//
// A warp makes the records of HEADS value heads that lie side by side, a few lanes each: what it takes is instructions
// and the time that each waits for the one before, so chains of several tokens and heads are under way at once.
//
// Numbers: see sm90/tokens.cuh. The whole part of an exponent of 2 is exact, so that another F changes no digit. g and
// beta are formed here, see tiles/raw.cuh, where their logits are given.
//
// Macros: DTYPE, which decides RANGE; CHUNK (64), HAS_GATE (1), VARLEN; G_DTYPE and RAW_GATE, BIAS of g, BETA_DTYPE and
// RAW_BETA of beta. Grid: chunk slots * ceil(HV / HEADS) / WARPS blocks of 32 WARPS threads. No shared memory.
#include "sm90/tokens.cuh"
#include "tiles/raw.cuh"
#include "tiles/sequence.cuh"

constexpr int WARPS = 4, LANES = 32 / HEADS;               // of a head
constexpr int TOKENS = CHUNK / LANES, PAIRS = TOKENS / 2;  // of a lane, one after the other
static_assert(TOKENS == 16, "a lane has sixteen bytes of every row of factors");

// x in parts, so that 2^(x + n) has the same digits for every whole n.
struct Exponent {
  int whole;
  float fraction;
};
template <bool ANY = true>  // or within RANGE
PRIM Exponent split(float x) {
  const float whole = floorf(x);
  return {(int)(ANY ? fminf(fmaxf(whole, -9999.0f), 9999.0f) : whole), x - whole};  // NaN stays in the fraction
}
// x 2^n, zero for n below -126, Inf for n above 127, where gates above zero alone lead.
template <bool ANY = true>
PRIM float scaled(float x, int n) {
  return x * __uint_as_float((uint32_t)((ANY ? max(min(n, 128), -127) : n) + 127) << 23);
}

template <class Combine>
PRIM float over_lanes(float x, Combine combine) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) x = combine(x, __shfl_xor_sync(~0u, x, distance));
  return x;
}

// Running sums of a chunk's gates.
struct Sums {
  float G[TOKENS], end, lost;  // of a lane's tokens; of all; what the true sum of all lies below `end`
  int F;
  bool paired;

  // Whole, of a token whose sum is x.
  PRIM int reference(float x, int whole) const { return fabsf(x) <= RANGE ? F : whole; }  // NaN stays in the factors
};

// Sums over pairs of tokens up to each, in the order of a scan over 32 of them.
PRIM void add_up(float (&sum)[PAIRS], int part, int lane) {
#pragma unroll
  for (int distance = 1; distance < CHUNK / 2; distance *= 2) {
    float below[PAIRS];
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
      const int lanes = i >= distance ? 0 : (distance - i + PAIRS - 1) / PAIRS, from = i - distance + lanes * PAIRS;
      below[i] = lanes == 0 ? sum[from] : __shfl_sync(~0u, sum[from], max(lane - lanes, 0));
    }
#pragma unroll
    for (int i = 0; i < PAIRS; i++)
      if (i >= distance || part * PAIRS + i >= distance) sum[i] += below[i];
  }
}
PRIM Sums sum_gates(const float (&g)[TOKENS], int part, int lane) {
  constexpr float LOG2_E = 1.44269504f;
  float within[TOKENS], sum[PAIRS], lost = 0.0f, lowest = 0.0f, beyond = 0.0f;
#pragma unroll
  for (int i = 0; i < PAIRS; i++) {
#pragma unroll
    for (int j = 2 * i; j < 2 * i + 2; j++) {
      const float x = LOG2_E * g[j];
      within[j] = x < -FLOOR ? -FLOOR : x;  // NaN stays
      if (x < -FLOOR) lost += x + FLOOR;
    }
    sum[i] = within[2 * i] + within[2 * i + 1];
  }
  add_up(sum, part, lane);
  Sums s;
  const float before = __shfl_sync(~0u, sum[PAIRS - 1], max(lane - 1, 0));
#pragma unroll
  for (int i = 0; i < PAIRS; i++) {
    // Nothing of the later of two tokens is in the sum of the earlier one.
    s.G[2 * i] = (i > 0 ? sum[i > 0 ? i - 1 : 0] : part > 0 ? before : 0.0f) + within[2 * i];
    s.G[2 * i + 1] = sum[i];
  }
#pragma unroll
  for (int i = 0; i < TOKENS; i++)
    if (fabsf(s.G[i]) <= RANGE)
      lowest = fminf(lowest, s.G[i]);
    else
      beyond = 1.0f;  // NaN, too
  s.end = __shfl_sync(~0u, sum[PAIRS - 1], lane | (LANES - 1));
  s.lost = over_lanes(lost, [](float a, float b) { return a + b; });
  s.F = (int)rintf(0.5f * over_lanes(lowest, [](float a, float b) { return fminf(a, b); }));
  // Not by `end` alone: pairs are summed in other orders, so that a G before it may lie lower by a rounding.
  s.paired = over_lanes(beyond, [](float a, float b) { return fmaxf(a, b); }) != 0.0f;
  return s;
}

// A lane's 16 bytes of one of the four rows of factors: of the tokens by token_of.
PRIM int token_of(int row, int i) { return 2 * row + i / 2 * 8 + i % 2; }
PRIM void write_row(float* factors, const float (&x)[4], int row, int part) {
  *(float4*)&factors[row * 16 + part * 4] = make_float4(x[0], x[1], x[2], x[3]);
}

// PAIRED: with what only a paired chunk has. Within RANGE no exponent is beyond a float's.
template <bool PAIRED>
PRIM void write_factors(float* record, const Sums& s, int last, float scale, int part) {
#pragma unroll
  for (int row = 0; row < 4; row++) {
    float down[4], up[4], reads[4], writes[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float x = s.G[token_of(row, i)];
      const Exponent G = split<PAIRED>(x);
      const int F = PAIRED ? s.reference(x, G.whole) : s.F;
      down[i] = scaled<PAIRED>(exp2f(-G.fraction), F - G.whole);
      up[i] = scale * scaled<PAIRED>(exp2f(G.fraction), G.whole - F);
      if constexpr (PAIRED) reads[i] = scaled(1.0f, F), writes[i] = scaled(1.0f, last - F);
    }
    write_row(record + RECORD_DOWN, down, row, part);
    write_row(record + RECORD_UP, up, row, part);
    if constexpr (PAIRED) {
      write_row(record + RECORD_READS, reads, row, part);
      write_row(record + RECORD_WRITES, writes, row, part);
    }
  }
  if constexpr (PAIRED) {
#pragma unroll
    for (int i = 0; i < TOKENS; i += 4) {
      float F[4];
#pragma unroll
      for (int j = 0; j < 4; j++) F[j] = s.reference(s.G[i + j], split(s.G[i + j]).whole);
      *(float4*)&record[RECORD_REFERENCE + part * TOKENS + i] = make_float4(F[0], F[1], F[2], F[3]);
    }
  }
}

PRIM void write_gates(float* record, const Sums& s, float scale, int part) {
  const Exponent end = split(s.end);
  const int last = s.reference(s.end, end.whole);  // in whose units the state is
  if (s.paired)
    write_factors<true>(record, s, last, scale, part);
  else
    write_factors<false>(record, s, last, scale, part);
  if (part > 0) return;
  ChunkGates gates = {};
  gates.paired = s.paired, gates.forget = exp2f(s.lost), gates.decay = exp2f(s.end + s.lost);
  gates.carry = scaled(exp2f(end.fraction), end.whole - last);
  gates.enter = scaled(1.0f, last);
  *(ChunkGates*)&record[RECORD_GATES] = gates;
}

// A bit of each of a warp's value heads.
PRIM int bit_per_head(bool x, int lane) {
  int bits = x << lane / LANES;
#pragma unroll
  for (int distance = LANES; distance < 32; distance *= 2) bits |= __shfl_xor_sync(~0u, bits, distance);
  return bits;
}

// What is formed of a value head's entries, of which those of two tokens lie HV apart, 0 past the chunk's end: all
// are on their way before the first formula, which has branches.
template <class T, class F>
PRIM void bring(float (&x)[TOKENS], const T* entries, int tokens, int HV, F formed) {
#pragma unroll
  for (int i = 0; i < TOKENS; i++, entries += HV) x[i] = i < tokens ? widen(*entries) : 0.0f;
#pragma unroll
  for (int i = 0; i < TOKENS; i++) x[i] = i < tokens ? formed(x[i]) : 0.0f;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    token_factors(const BETA_DTYPE* beta, const G_DTYPE* g, const float* A_log, const float* dt_bias,
                  const int64_t* cu_seqlens, float* token_factors, int* paired_heads, float scale, float bound,
                  float factor, int slots, int N, int T, int HV) {
  const int lane = threadIdx.x % 32, part = lane % LANES, groups = (HV + HEADS - 1) / HEADS;
  const int unit = blockIdx.x * WARPS + threadIdx.x / 32, slot = unit / groups;
  if (slot >= slots) return;
  const int hv = unit % groups * HEADS + lane / LANES;
  const Chunk chunk = find_chunk<CHUNK>(cu_seqlens, slot, N, T);
  if (chunk.tokens <= 0) return;
  const int tokens = hv < HV ? chunk.tokens - part * TOKENS : 0;
  const int64_t first = (chunk.first + part * TOKENS) * HV + hv;
  RawGate<float, RAW_GATE> raw = {};
  if constexpr (RAW_GATE > 0) raw = raw_gate_of<float, RAW_GATE, BIAS, 1>(A_log, dt_bias, bound, min(hv, HV - 1), 0);
  float gates[TOKENS], betas[TOKENS];
  bring(betas, beta + first, tokens, HV, [&](float x) { return RAW_BETA ? factor * sigmoid(x) : x; });
  bring(gates, g + first, tokens, HV, [&](float x) { return RAW_GATE > 0 ? raw.gate(x) : x; });
  float* record = token_factors + ((int64_t)slot * HV + hv) * RECORD_WORDS;
#pragma unroll
  for (int row = 0; row < 4; row++) {
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = betas[token_of(row, i)];
    if (hv < HV) write_row(record, x, row, part);
  }
  const Sums sums = sum_gates(gates, part, lane);
  if (hv < HV) write_gates(record, sums, scale, part);
  const int paired = bit_per_head(sums.paired, lane);
  if (lane == 0) paired_heads[unit] = paired;
}
