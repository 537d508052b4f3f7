// What comes to the tokens of a block from other blocks and from states, in backward_channel.cu.
#pragma once
#include "sm90/backward_channel/slices.cuh"

// Queries, keys and sums of gates of a tile, and of a lane's two channels the sums of all gates.
struct Rows {
  Tile q, k, x;
  float z[2];

  PRIM Rows(const Shared& s, const Warp& warp, int tile) {
    const int at = warp.row() * K_PITCH + warp.channel() + tile * 16;
    Product::read_transposed(q[0], q[1], s.q + at, K_PITCH, warp.lane);
    Product::read_transposed(k[0], k[1], s.k + at, K_PITCH, warp.lane);
    const float* sums = s.x + warp.first();
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) x[n][i] = sums[warp.place(tile, n, i)];
    const float* last = s.x + (warp.row() + BLOCK - 1) * X_PITCH + warp.channel() + warp.eighth() + tile * 16;
    z[0] = last[0], z[1] = last[8];
  }
};

// Asks for gates: those of 16 bits where the sums of their warp's channels will be.
PRIM void load_gates(float* x, const GATE* g, int64_t stride, int tokens, int keys, int thread) {
  if constexpr (sizeof(GATE) == sizeof(float)) {
    load_tile<GATE, CHUNK, KEYS, HEAD_K, THREADS>((GATE*)x, g, stride, tokens, keys, thread);
  } else {
    constexpr int PITCH = X_PITCH * sizeof(float) / sizeof(GATE);
#pragma unroll
    for (int c = 0; c < KEYS; c += PART)
      load_tile<GATE, CHUNK, PART, HEAD_K, THREADS, PITCH>((GATE*)(x + c), g + c, stride, tokens, keys - c, thread);
  }
}

// That of token i of the warp's block and of the lane's channel.
PRIM float own_gate(const Shared& s, const Warp& warp, int i) {
  const float* row = s.x + (warp.row() + i) * X_PITCH;
  if constexpr (sizeof(GATE) == sizeof(float)) return row[warp.channel() + warp.lane];
  return widen(((const GATE*)(row + warp.channel()))[warp.lane]);
}

// Sums of gates in place of gates, and the decays over whole blocks.
PRIM void sum_gates(const Shared& s, const Warp& warp) {
  const int c = warp.channel() + warp.lane;
  float x = 0.0f, gates[BLOCK];
#pragma unroll
  for (int i = 0; i < BLOCK; i++) gates[i] = gate_power(own_gate(s, warp, i));
  if (sizeof(GATE) < sizeof(float)) __syncwarp();
#pragma unroll
  for (int i = 0; i < BLOCK; i++) s.x[(warp.row() + i) * X_PITCH + c] = x += gates[i];
  s.over[warp.block * KEYS + c] = exp2f(x);
}

// tile[token][channel] = d(channel, token).
PRIM void write_tile(DTYPE* tile, const Tile& d, const Warp& warp, int u) {
  const uint32_t r[4] = {pack2<DTYPE>(d[0][0], d[0][1]), pack2<DTYPE>(d[0][2], d[0][3]), pack2<DTYPE>(d[1][0], d[1][1]),
                         pack2<DTYPE>(d[1][2], d[1][3])};
  const int row = warp.row() + warp.lane % 8 + warp.lane / 16 * 8, column = warp.channel() + u * 16;
  stmatrix_x4_trans(tile + row * K_PITCH + column + warp.lane / 8 % 2 * 8, r);
}

// Kl, Ql and Kc.
PRIM void scale_tiles(const Shared& s, const Warp& warp) {
#pragma unroll
  for (int u = 0; u < TILES; u++) {
    const Rows rows(s, warp, u);
    Tile late_k, late_q, early_k;
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float x = rows.x[n][i], f = exp2f(x);
        late_k[n][i] = f * rows.k[n][i], late_q[n][i] = f * rows.q[n][i];
        early_k[n][i] = exp2f(rows.z[i / 2] - x) * rows.k[n][i];
      }
    write_tile(s.late_k, late_k, warp, u);
    write_tile(s.late_q, late_q, warp, u);
    write_tile(s.early_k, early_k, warp, u);
  }
}

// Sums of a lane's channels over tokens.
typedef float TokenSums[TILES][2];
// sums += rows . d over a lane's tokens.
PRIM void add_products(float (&sums)[2], const DTYPE* rows, const Tile& d, const Warp& warp, int u) {
  Tile x;
  const int at = warp.row() * K_PITCH + warp.channel() + u * 16;
  Product::read_transposed(x[0], x[1], rows + at, K_PITCH, warp.lane);
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) sums[i / 2] += x[n][i] * d[n][i];
}
// out[channel] = the sums over a warp's tokens, of which a lane ends with one channel.
PRIM void store_sums(float* out, const TokenSums& sums, const Warp& warp) {
  static_assert(TILES == 2, "four lanes share four channels");
  const bool other_tile = warp.lane & 1, other_half = warp.lane & 2;
  float kept[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float sent = other_tile ? sums[0][h] : sums[1][h];
    kept[h] = (other_tile ? sums[1][h] : sums[0][h]) + __shfl_xor_sync(~0u, sent, 1);
  }
  const float sent = other_half ? kept[0] : kept[1];
  const float sum = (other_half ? kept[1] : kept[0]) + __shfl_xor_sync(~0u, sent, 2);
  out[warp.channel() + other_tile * 16 + other_half * 8 + warp.eighth()] = sum;
}

// d times the decays over a block.
PRIM void decay(Tile& d, const float* over, const Warp& warp, int u) {
  const float* at = over + warp.channel() + warp.eighth() + u * 16;
  const float f[2] = {at[0], at[8]};
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) d[n][i] *= f[i / 2];
}

// d += scaled rows of another block, by pairs with the warp's tokens.
PRIM void multiply_rows(Tile& d, const DTYPE* rows, const typename Product::B& pairs, const Warp& warp, int u) {
  typename Product::A a;
  Product::load_a_transposed(a, rows + warp.channel() + u * 16, K_PITCH, warp.lane);
  Product::multiply(d[0], d[1], a, pairs);
}

// What comes from earlier blocks and the state that enters.
PRIM void gather_before(Coming (&from)[TILES], const Shared& s, const Warp& warp) {
#pragma unroll 1
  for (int b = 0; b < warp.block; b++) {
    TokenSums sums = {};
    typename Product::B dPqk, E;
    const int pairs = warp.row() * P_PITCH + b * BLOCK;
    Product::load_b(dPqk, s.dPqk + pairs, P_PITCH, warp.lane);
    Product::load_b(E, s.E + pairs, P_PITCH, warp.lane);
#pragma unroll
    for (int u = 0; u < TILES; u++) {
      add_products(sums[u], s.late_q, from[u].q, warp, u);
      add_products(sums[u], s.late_k, from[u].k, warp, u);
      decay(from[u].q, s.over + b * KEYS, warp, u);
      decay(from[u].k, s.over + b * KEYS, warp, u);
      multiply_rows(from[u].q, s.early_k + b * BLOCK * K_PITCH, dPqk, warp, u);
      multiply_rows(from[u].k, s.early_k + b * BLOCK * K_PITCH, E, warp, u);
    }
    store_sums(s.through_of(warp.block, b), sums, warp);
  }
}

// What comes from later blocks and the gradient of the state that leaves.
PRIM void gather_behind(Coming (&from)[TILES], const Shared& s, const Warp& warp) {
  TokenSums sums = {};
#pragma unroll
  for (int u = 0; u < TILES; u++) add_products(sums[u], s.early_k, from[u].n, warp, u);
  store_sums(s.written + warp.block * KEYS, sums, warp);
#pragma unroll 1
  for (int b = COUNT - 1; b > warp.block; b--) {
    typename Product::B dPqk, E;
    const int pairs = b * BLOCK * P_PITCH + warp.row();
    Product::load_b_transposed(dPqk, s.dPqk + pairs, P_PITCH, warp.lane);
    Product::load_b_transposed(E, s.E + pairs, P_PITCH, warp.lane);
#pragma unroll
    for (int u = 0; u < TILES; u++) {
      decay(from[u].n, s.over + b * KEYS, warp, u);
      multiply_rows(from[u].n, s.late_q + b * BLOCK * K_PITCH, dPqk, warp, u);
      multiply_rows(from[u].n, s.late_k + b * BLOCK * K_PITCH, E, warp, u);
    }
  }
}

// What products of whole blocks and of states are to every gate of the warp's block; a lane has a channel.
PRIM void sum_passing(const Shared& s, const Warp& warp) {
  const int c = warp.channel() + warp.lane, a = warp.block;
  float states = 0.0f, all = 1.0f, sum = 0.0f, passed = 1.0f;
#pragma unroll
  for (int b = 0; b < COUNT; b++) states += s.states[b * KEYS + c], all *= s.over[b * KEYS + c];
#pragma unroll 1
  for (int b = a; b < COUNT; b++) {
    if (b > a) sum += passed * s.through_of(b, a)[c];
    passed *= s.over[b * KEYS + c];
  }
#pragma unroll 1
  for (int b = a - 1; b >= 0; b--) {
    // `passed` is the decay over the blocks from b + 1 on.
    sum += passed * s.written[b * KEYS + c];
    passed *= s.over[b * KEYS + c];
  }
  s.passing[a * KEYS + c] = sum + all * states;
  __syncwarp();
}
