// What a gate per key channel does to the tokens of a chunk, by two warps of sm90/channel_forward.cu, and what it makes
// of the state between chunks.
//
// In powers of two and per key channel, with G the sum of gates since the chunk's start, and blocks of 16 tokens: F_b
// is a whole number, G_b - F_b in [0, 1), for the start of block b, and F_4 and G_4 for the chunk's end. The state is
// kept in units of 2^u, u what is left of G at the end of the chunk before; G starts from u, F from 0. So whatever
// leads from one block or chunk to another is a power of two, which changes no rounding:
//
//   sums        X_i = G_i - F_b + HALF_RANGE of the token's own block b
//   UNTIL b     2^(F_(b+1) - F_b), from a block to the next one
//   WRITES b    2^(F_4 - F_b + HALF_RANGE), from a block to the state that leaves
//   READS b     2^(F_b - HALF_RANGE), from a block to the state that enters
//   carried     2^(F_4)
//
// Numbers: sums of a block from zero, in float, a gate below 2^-150 as that. NaN stays, and spoils its own token and
// later ones.
#pragma once
#include "primitives/prefetch.cuh"
#include "sm90/channel_forward/shared.cuh"

// Rows with 2^X are in the middle of the exponents of a float, but for float16, which has not so many. From LEAST on X
// is in range: 2^-X K is a float, and nothing in float16 times a power that float does not have.
constexpr float HALF_RANGE = IsHalf<DTYPE>::value ? 0.0f : 58.0f, LEAST = IsHalf<DTYPE>::value ? -100.0f : -HALF_RANGE;
constexpr float LOWEST = -104.0f;  // of a gate, of which float has no exponential

// Four neighbouring channels, and two.
typedef float Four[4];
PRIM void load_four(Four& y, const float* at) {
  const float4 x = *(const float4*)at;
  y[0] = x.x, y[1] = x.y, y[2] = x.z, y[3] = x.w;
}
PRIM void store_four(float* at, const Four& x) { *(float4*)at = make_float4(x[0], x[1], x[2], x[3]); }
typedef float Two[2];
PRIM void load_two(Two& y, const float* at) {
  const float2 x = *(const float2*)at;
  y[0] = x.x, y[1] = x.y;
}
PRIM void load_two(Two& y, const DTYPE* at) {
  const float2 x = load_pair(at);
  y[0] = x.x, y[1] = x.y;
}
PRIM void store_two(float* at, const Two& x) { *(float2*)at = make_float2(x[0], x[1]); }

// A warp has half of the channels, and a lane two of them side by side.
struct GateWarp {
  const Shared& s;
  const Work& work;
  const GATE* g;  // of the block's first token
  const float* beta;
  int half, lane;

  // Where the sums of the warp's channels lie, four by four, in bytes: from the first of eight rows on, which begin at
  // a multiple of eight, and from there to row i.
  PRIM char* fours(const Stage& at, int first, int four) const {
    return (char*)((four % 2 == 0 ? at.writes : at.others) + half * TILE + first * BOX);
  }
  static PRIM int offset(int i, int four) { return (piece_place(i, four / 2) ^ four % 2 * OTHER) * (int)sizeof(DTYPE); }
  PRIM int own_offset(int i) const { return offset(i, lane / 2) + lane % 2 * (int)sizeof(Two); }
  // Its gates: four by four where their sums will be.
  PRIM int own_gates(int i) const { return offset(i, lane / 2) + lane % 2 * 2 * (int)sizeof(GATE); }
  PRIM int channel() const { return half * BOX + 2 * lane; }

  // Gates and beta of a chunk on their way, zero past the end: gates to where their sums will be.
  PRIM void ask(const Stage& at, int c) const {
    const int tokens = work.tokens(c), i = half * 32 + lane;
    const int64_t row = (int64_t)c * CHUNK * work.HV;
    if (tokens == CHUNK && HEAD_K == KP)
      ask_gates<true>(at, g + row * HEAD_K, tokens);
    else
      ask_gates<false>(at, g + row * HEAD_K, tokens);
    cp_async<4>(at.beta + i, i < tokens ? beta + row + (int64_t)i * work.HV : beta, i < tokens ? 4 : 0);
    cp_async_commit();
  }
  // Two rows at a time. ALL: every row is there, and every channel.
  template <bool ALL>
  PRIM void ask_gates(const Stage& at, const GATE* from, int tokens) const {
    const int64_t stride = (int64_t)work.HV * HEAD_K;
    constexpr int BYTES = 4 * sizeof(GATE);
    const int four = lane % 16, row = lane / 16, from_channel = half * BOX + 4 * four;
    from += row * stride + from_channel;
    char* to = fours(at, 0, four);
    const int start = offset(row, four);
#pragma unroll 1
    for (int first = 0; first < CHUNK; first += 8, to += 8 * BOX * sizeof(DTYPE)) {
#pragma unroll
      for (int i = 0; i < 8; i += 2, from += 2 * stride) {
        const bool inside = ALL || (first + i + row < tokens && from_channel < HEAD_K);
        const int place = (start ^ i * 8 * (int)sizeof(DTYPE)) + i * BOX * (int)sizeof(DTYPE);  // of row i further on
        cp_async<BYTES>(to + place, inside ? from : g, inside ? BYTES : 0);
      }
    }
  }

  // Gates of a whole chunk, so that they are in the second-level cache when they are asked for.
  PRIM void expect(int c) const {
    constexpr int LINE = 128 / sizeof(GATE);
    if (HEAD_K != KP || work.tokens(c) < CHUNK) return;
    const GATE* row = g + ((int64_t)c * CHUNK + lane) * work.HV * HEAD_K + half * BOX;
#pragma unroll
    for (int i = 0; i < CHUNK; i += 32, row += (int64_t)32 * work.HV * HEAD_K)
#pragma unroll
      for (int channel = 0; channel < BOX; channel += LINE) prefetch_line(row + channel);
  }

  // Block b: from what its start is of F and u to what its end is.
  PRIM void sum_block(const Stage& at, int b, Two& F, Two& u) const {
    Two x = {};
    const Two base = {u[0] + HALF_RANGE, u[1] + HALF_RANGE};
#pragma unroll
    for (int first = b * BLOCK; first < (b + 1) * BLOCK; first += 8) {
      char* const rows = fours(at, first, lane / 2);
      Two gates[8];
#pragma unroll
      for (int i = 0; i < 8; i++) load_two(gates[i], (GATE*)(rows + own_gates(i)));
      if (sizeof(GATE) < sizeof(float)) __syncwarp();  // sums take the place of others' gates
#pragma unroll
      for (int i = 0; i < 8; i++) {
        Two sum;
#pragma unroll
        for (int c = 0; c < 2; c++) {
          x[c] = fmaf(1.44269504f, gates[i][c] < LOWEST ? LOWEST : gates[i][c], x[c]);  // NaN stays
          sum[c] = x[c] + base[c];
        }
        store_two((float*)(rows + own_offset(i)), sum);
      }
    }
    bool beyond = false;
#pragma unroll
    for (int c = 0; c < 2; c++) {
      beyond |= !(x[c] + base[c] >= LEAST);
      const float end = x[c] + u[c], whole = floorf(end);
      F[c] += whole, u[c] = end - whole;
    }
    int within = BLOCK;
    if (beyond) within = first_beyond(at, b);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) within = min(within, __shfl_xor_sync(~0u, within, distance));
    if (lane == 0) at.within[half * COUNT + b] = within;
  }
  PRIM int first_beyond(const Stage& at, int b) const {
#pragma unroll 1
    for (int i = 0; i < BLOCK; i++) {
      Two sum;
      load_two(sum, (float*)(fours(at, b * BLOCK, lane / 2) + own_offset(i)));
      if (!(sum[0] >= LEAST) || !(sum[1] >= LEAST)) return i;
    }
    return BLOCK;
  }

  // 2^(to - from + by) per channel.
  PRIM void store_power(const Stage& at, int row, const Two& to, const Two& from, float by) const {
    const float low = exp2f(to[0] - from[0] + by), high = exp2f(to[1] - from[1] + by);
    *(uint32_t*)&at.powers[row * KP + channel()] = pack2<Power>(low, high);
  }

  PRIM void sum_chunk(const Stage& at, Two& u) const {
    Two F[COUNT + 1] = {};
    Two sum = {};
#pragma unroll 1  // instructions of all roles have little room in their cache
    for (int b = 0; b < COUNT; b++) {
      sum_block(at, b, sum, u);
      store_two(at.exponents + b * KP + channel(), sum);
    }
#pragma unroll
    for (int b = 0; b < COUNT; b++) load_two(F[b + 1], at.exponents + b * KP + channel());
#pragma unroll
    for (int b = 0; b < COUNT; b++) {
      if (b < COUNT - 1) store_power(at, UNTIL + b, F[b + 1], F[b], 0.0f);
      store_power(at, WRITES + b, F[COUNT], F[b], HALF_RANGE);
      if (!WALKERS_SCALE || b > 0) store_power(at, READS + b, F[b], F[0], -HALF_RANGE);
    }
    const Two carried = {exp2f(F[COUNT][0]), exp2f(F[COUNT][1])};
    store_two(at.carried + channel(), carried);
  }

  PRIM void run() {
    Ring<STAGES> ring;
    Two u = {};
    for (int c = 0; c < work.chunks; c++, ring.advance()) {
      lane = opaque(lane);  // no address is kept from chunk to chunk
      const Stage at(s, 0, ring.stage);
      mbarrier_wait(s.stage_free + ring.stage, ring.parity ^ 1);
      ask(at, c);
      if constexpr (WALKERS_SCALE) expect(c + 1);
      cp_async_wait<0>();
      __syncwarp();
      sum_chunk(at, u);
      if (c + 1 == work.chunks) {
        const Two units = {exp2f(u[0]), exp2f(u[1])};
        store_two(s.units + channel(), units);
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(s.sums_full + ring.stage);
    }
  }
};

// K and Q of chunk c by TMA, by one thread, when the walkers have read those before.
PRIM void load_keys(const Shared& s, const Work& work, const TensorMap* q, const TensorMap* k, int c) {
  const int stage = c % KEY_STAGES;
  uint64_t* full = s.keys_full + stage;
  mbarrier_wait(s.keys_free + stage, (c / KEY_STAGES & 1) ^ 1);
  mbarrier_arrive_expect(full, 2 * K_BOXES * TILE * 2);
#pragma unroll
  for (int box = 0; box < K_BOXES; box++) {
    const int place = (stage * K_BOXES + box) * TILE;
    tma_load(s.k + place, k, full, box * BOX, work.h, work.start + c * CHUNK, work.batch);
    tma_load(s.q + place, q, full, box * BOX, work.h, work.start + c * CHUNK, work.batch);
  }
}
