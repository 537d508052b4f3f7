// What gates do in a chunk, for the walks of sm90/forward.cu: the records of sm90/tokens.cuh, one per chunk and value
// head, (chunk slots, HV, RECORD_WORDS) in float. A slot that no chunk has is left alone.
//
// Numbers: see sm90/tokens.cuh. The whole part of an exponent of 2 is exact, so that another F changes no digit. g and
// beta are formed here, see tiles/raw.cuh, where their logits are given.
//
// Macros: DTYPE, which decides RANGE; CHUNK (64), HAS_GATE (1), VARLEN; G_DTYPE and RAW_GATE, BIAS of g, BETA_DTYPE and
// RAW_BETA of beta. Grid: chunk slots * ceil(HV / HEADS) blocks of 32 HEADS threads: a warp per record, a lane per two
// tokens. Shared memory: beta and g.
#include "sm90/tokens.cuh"
#include "tiles/raw.cuh"
#include "tiles/sequence.cuh"

constexpr int HEADS = 8, PITCH = CHUNK + 4;  // of a row, so that writes to all rows are to other banks

// x in parts, so that 2^(x + n) has the same digits for every whole n.
struct Exponent {
  int whole;
  float fraction;
};
PRIM Exponent split(float x) {
  const float whole = floorf(x);
  return {(int)fminf(fmaxf(whole, -9999.0f), 9999.0f), x - whole};  // NaN stays in the fraction
}
// x 2^n, zero for n below -126, Inf for n above 127, where gates above zero alone lead.
PRIM float scaled(float x, int n) { return x * __uint_as_float((uint32_t)(max(min(n, 128), -127) + 127) << 23); }

template <class Combine>
PRIM float over_lanes(float x, Combine combine) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x = combine(x, __shfl_xor_sync(~0u, x, distance));
  return x;
}

// Running sums of a chunk's gates; a lane has two tokens.
struct Sums {
  float G[2], end, lost;  // lost: what the true sum of all lies below `end`
  int F;
  bool paired;
};

PRIM Sums sum_gates(float2 g, int lane) {
  constexpr float LOG2_E = 1.44269504f;
  const float x[2] = {LOG2_E * g.x, LOG2_E * g.y};
  float within[2], lost = 0.0f, lowest = 0.0f, beyond = 0.0f;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    within[i] = x[i] < -FLOOR ? -FLOOR : x[i];  // NaN stays
    if (x[i] < -FLOOR) lost += x[i] + FLOOR;
  }
  float sum = within[0] + within[1];
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const float below = __shfl_sync(~0u, sum, max(lane - distance, 0));
    if (lane >= distance) sum += below;
  }
  // Nothing of the later of two tokens is in the sum of the earlier one.
  const float below = __shfl_sync(~0u, sum, max(lane - 1, 0));
  Sums s = {{(lane > 0 ? below : 0.0f) + within[0], sum}, __shfl_sync(~0u, sum, 31)};
#pragma unroll
  for (int i = 0; i < 2; i++)
    if (fabsf(s.G[i]) <= RANGE)
      lowest = fminf(lowest, s.G[i]);
    else
      beyond = 1.0f;  // NaN, too
  s.lost = over_lanes(lost, [](float a, float b) { return a + b; });
  s.F = (int)rintf(0.5f * over_lanes(lowest, [](float a, float b) { return fminf(a, b); }));
  // Not by `end` alone: lanes sum in other orders, so that a G before it may lie lower by a rounding.
  s.paired = over_lanes(beyond, [](float a, float b) { return fmaxf(a, b); }) != 0.0f;
  return s;
}

PRIM void write_gates(float* record, const Sums& s, float scale, int lane) {
  const int at = factor_place(2 * lane);
  int F[2];
  float down[2], up[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const Exponent G = split(s.G[i]);
    F[i] = fabsf(s.G[i]) <= RANGE ? s.F : G.whole;  // NaN stays in the factors
    down[i] = scaled(exp2f(-G.fraction), F[i] - G.whole);
    up[i] = scale * scaled(exp2f(G.fraction), G.whole - F[i]);
  }
  const int last = __shfl_sync(~0u, F[1], 31);  // in whose units the state is
  *(float2*)&record[DOWN_AT + at] = make_float2(down[0], down[1]);
  *(float2*)&record[UP_AT + at] = make_float2(up[0], up[1]);
  if (s.paired) {
    *(float2*)&record[READS_AT + at] = make_float2(scaled(1.0f, F[0]), scaled(1.0f, F[1]));
    *(float2*)&record[WRITES_AT + at] = make_float2(scaled(1.0f, last - F[0]), scaled(1.0f, last - F[1]));
    *(float2*)&record[REFERENCE_AT + 2 * lane] = make_float2(F[0], F[1]);
  }
  if (lane > 0) return;
  const Exponent end = split(s.end);
  ChunkGates gates = {};
  gates.paired = s.paired, gates.forget = exp2f(s.lost), gates.decay = exp2f(s.end + s.lost);
  gates.carry = scaled(exp2f(end.fraction), end.whole - last);
  gates.enter = scaled(1.0f, last);
  *(ChunkGates*)&record[GATES_AT] = gates;
}

// Entries of the chunk's tokens and the block's value heads, which lie side by side, to a row per head.
template <class T>
PRIM void bring(float* rows, const T* entries, int tokens, int heads, int HV) {
#pragma unroll
  for (int i = threadIdx.x; i < CHUNK * HEADS; i += 32 * HEADS) {
    const int token = i / HEADS, head = i % HEADS;
    if (token < tokens && head < heads) rows[head * PITCH + token] = widen(entries[(int64_t)token * HV + head]);
  }
}
// What is formed of a value head's entries of two tokens, 0 past the chunk's end.
template <class F>
PRIM float2 read_two(const float* row, int t, int tokens, F formed) {
  return make_float2(t < tokens ? formed(row[t]) : 0.0f, t + 1 < tokens ? formed(row[t + 1]) : 0.0f);
}

extern "C" __global__ void __launch_bounds__(32 * HEADS)
    token_factors(const BETA_DTYPE* beta, const G_DTYPE* g, const float* A_log, const float* dt_bias,
                  const int64_t* cu_seqlens, float* token_factors, float scale, float bound, float factor, int N, int T,
                  int HV) {
  const int groups = (HV + HEADS - 1) / HEADS, lane = threadIdx.x % 32;
  const int64_t slot = blockIdx.x / groups;
  const int warp = threadIdx.x / 32, first_hv = blockIdx.x % groups * HEADS, hv = first_hv + warp;
  const Chunk chunk = find_chunk<CHUNK>(cu_seqlens, slot, N, T);
  if (chunk.tokens <= 0) return;
  DynSmem smem;
  float *beta_rows = smem.take<float>(HEADS * PITCH, "beta"), *g_rows = smem.take<float>(HEADS * PITCH, "g");
  smem.all_taken(SHARED_BYTES);
  const int64_t first = chunk.first * HV + first_hv;
  bring(beta_rows, beta + first, chunk.tokens, HV - first_hv, HV);
  bring(g_rows, g + first, chunk.tokens, HV - first_hv, HV);
  __syncthreads();
  if (hv >= HV) return;
  RawGate<float, RAW_GATE> raw = {};
  if constexpr (RAW_GATE > 0) raw = raw_gate_of<float, RAW_GATE, BIAS, 1>(A_log, dt_bias, bound, hv, 0);
  auto gate_of = [&](float x) { return RAW_GATE > 0 ? raw.gate(x) : x; };
  auto beta_of = [&](float x) { return RAW_BETA ? factor * sigmoid(x) : x; };
  const float2 betas = read_two(beta_rows + warp * PITCH, 2 * lane, chunk.tokens, beta_of);
  const float2 gates = read_two(g_rows + warp * PITCH, 2 * lane, chunk.tokens, gate_of);
  float* record = token_factors + (slot * HV + hv) * RECORD_WORDS;
  // What lies between rows of factors is brought with them.
  const int gaps[] = {BETA_AT, DOWN_AT, UP_AT, READS_AT, WRITES_AT};
#pragma unroll
  for (int i = 0; i < 5; i++)
    if (lane == i) *(float4*)&record[gaps[i] + 2 * 16] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  *(float2*)&record[BETA_AT + factor_place(2 * lane)] = betas;
  write_gates(record, sum_gates(gates, lane), scale, lane);
}
