// Where everything lies in backward_channel.cu, and how its warps share the work.
#pragma once
#include "primitives/hopper.cuh"
#include "sm90/gate_powers.cuh"
#include "tiles/fragments.cuh"
#include "tiles/load.cuh"

typedef Mma<DTYPE> Product;
static_assert(CHUNK == 64 && KEYS == 64, "a warp has 16 tokens and 32 channels");
constexpr int THREADS = 256, BLOCK = 16, COUNT = CHUNK / BLOCK, KEY_SLICES = (HEAD_K + KEYS - 1) / KEYS;
constexpr int PART = 32, TILES = PART / 16;  // channels of a warp, in tiles of 16
constexpr int K_PITCH = pitch_of<DTYPE>(KEYS), V_PITCH = pitch_of<DTYPE>(SLICE), X_PITCH = pitch_of<float>(KEYS);
constexpr int P_PITCH = pitch_of<DTYPE>(CHUNK), OPERANDS = 3 * 32;
constexpr int K_TILE = CHUNK * K_PITCH, V_TILE = CHUNK * V_PITCH, S_TILE = SLICE * K_PITCH, X_TILE = CHUNK * X_PITCH;
// Bytes of the place that is used twice.
PRIM constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int VALUE_BYTES = (2 * S_TILE + 3 * V_TILE) * (int)sizeof(DTYPE);
constexpr int SCALED_BYTES = (3 * K_TILE + 2 * CHUNK * P_PITCH) * (int)sizeof(DTYPE);
constexpr int PLACE = larger(VALUE_BYTES, SCALED_BYTES);

// Tiles of 16 channels by 16 tokens, as two accumulators of 8 tokens each.
typedef float Tile[2][4];

// A slice of value channels.
struct Values {
  DTYPE *s, *d, *o, *n, *r;  // S, dS', dO, N^, dY
};

struct Shared {
  DTYPE *q, *k;                       // then their gradients
  float* x;                           // g, then its sums within blocks, then its gradient
  float* over;                        // per block and channel: the decay over all of it
  float *through, *written, *states;  // per block and channel: sums over products,
  float* passing;                     // and what those that pass a whole block are to its gates
  float4 *to_late, *to_early;         // dPqk and E within blocks: operands of every lane, see slices.cuh
  float* b;
  uint8_t* place;
  // In the place, after the values:
  DTYPE *late_k, *late_q, *early_k, *dPqk, *E;  // Kl, Ql, Kc; pairs of different blocks

  PRIM Values values() const {
    Values x;
    x.s = (DTYPE*)place, x.d = x.s + S_TILE, x.o = x.d + S_TILE, x.n = x.o + V_TILE, x.r = x.n + V_TILE;
    return x;
  }
  // Where the sums of block a's products go that have their other token, or the state, before block b < a.
  PRIM float* through_of(int a, int b) const { return through + (a * (a - 1) / 2 + b) * KEYS; }
};

PRIM Shared take_shared(DynSmem& smem) {
  Shared s;
  s.q = smem.take<DTYPE>(K_TILE, "q");
  s.k = smem.take<DTYPE>(K_TILE, "k");
  s.x = smem.take<float>(X_TILE, "sums of gates");
  s.over = smem.take<float>(COUNT * KEYS, "decays over blocks");
  s.through = smem.take<float>(COUNT * (COUNT - 1) / 2 * KEYS, "products of blocks");
  s.written = smem.take<float>(COUNT * KEYS, "products with the leaving state");
  s.states = smem.take<float>(COUNT * KEYS, "products of states");
  s.passing = smem.take<float>(COUNT * KEYS, "products that pass blocks");
  s.to_late = smem.take<float4>(COUNT * OPERANDS, "pairs within blocks, by rows");
  s.to_early = smem.take<float4>(COUNT * OPERANDS, "pairs within blocks, by columns");
  s.b = smem.take<float>(CHUNK, "beta");
  s.place = smem.take<uint8_t>(PLACE, "values, then scaled tiles and pairs");
  s.late_k = (DTYPE*)s.place, s.late_q = s.late_k + K_TILE, s.early_k = s.late_q + K_TILE;
  s.dPqk = s.early_k + K_TILE, s.E = s.dPqk + CHUNK * P_PITCH;
  return s;
}

// A warp's share: the tokens of a block, and PART of the channels. Warps that meet on a scheduler have the first and
// the last block, or the two in between, whose work adds up to the same.
struct Warp {
  int block, part, lane;

  PRIM explicit Warp(unsigned thread)
      : block((thread / 32 ^ (thread / 128 ? COUNT - 1 : 0)) % COUNT), part(thread / 128), lane(thread % 32) {}
  PRIM int row() const { return block * BLOCK; }
  PRIM int channel() const { return part * PART; }
  PRIM int pair() const { return (unsigned)lane % 4 * 2; }  // the first of a lane's columns,
  PRIM int eighth() const { return (unsigned)lane / 4; }    // and its row
  // Of element i of accumulator n of a tile of floats, X_PITCH apart: where a lane's are, and from there that one.
  PRIM int first() const { return (row() + pair()) * X_PITCH + channel() + eighth(); }
  static PRIM constexpr int place(int tile, int n, int i) { return (n * 8 + i % 2) * X_PITCH + tile * 16 + i / 2 * 8; }
};
