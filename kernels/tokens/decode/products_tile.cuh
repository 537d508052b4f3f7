// The part of a state that a warp of tokens/decode_products.cu has, as fragments of products on the tensor cores.
#pragma once
#include "tokens/decode/inputs.cuh"

static_assert(sizeof(STATE_DTYPE) == 2 && sizeof(DTYPE) == 2, "fragments of 16 bits");
constexpr int THREADS = 32 * WARPS;
constexpr int CHANNELS = STATE_VK ? 16 * TILES * WARPS : 16 * TILES, SLICES = HEAD_V / CHANNELS;
constexpr int SHARERS = STATE_VK ? 1 : WARPS;  // warps that share the keys of a value channel
constexpr int GROUPS = HEAD_K / (32 * SHARERS), VECTOR = STATE_VK ? 8 : 2 * TILES;
static_assert(SLICES * CHANNELS == HEAD_V && GROUPS * 32 * SHARERS == HEAD_K, "no tile reaches beyond the state");

// 16-bit numbers that lie side by side, two in a register.
template <int SIZE>
using Pairs = Neighbours<uint32_t, SIZE / 2>;
template <int SIZE, class T>
PRIM Pairs<SIZE> load_pairs(const T* x) {
  return *(const Pairs<SIZE>*)x;
}
template <int SIZE, class T>
PRIM Pairs<SIZE> ask_pairs(const T* x) {
  return asked((const Pairs<SIZE>*)x);
}
// By the types that CUDA has for vectors: the compiler may cut others into words.
PRIM void store_pairs(void* to, const Pairs<2>& x) { *(uint32_t*)to = x.element[0]; }
PRIM void store_pairs(void* to, const Pairs<4>& x) { *(uint2*)to = make_uint2(x.element[0], x.element[1]); }
PRIM void store_pairs(void* to, const Pairs<8>& x) {
  *(uint4*)to = make_uint4(x.element[0], x.element[1], x.element[2], x.element[3]);
}
PRIM uint32_t both_halves(uint16_t x, uint16_t y) {
  const uint16_t halves[2] = {x, y};
  uint32_t both;
  memcpy(&both, halves, 4);
  return both;
}
PRIM uint16_t half_of(uint32_t x, int half) {
  uint16_t halves[2];
  memcpy(halves, &x, 4);
  return halves[half];
}
PRIM uint32_t low_halves(uint32_t x, uint32_t y) { return both_halves(half_of(x, 0), half_of(y, 0)); }
PRIM uint32_t high_halves(uint32_t x, uint32_t y) { return both_halves(half_of(x, 1), half_of(y, 1)); }

// Lane 4 across + part has the keys 8 part to 8 part + 7 of every group of 32, in a state and in the rows of tokens
// alike: the order in which a product adds its terms is free. Of every tile of 16 value channels it has two neighbours.
struct Place {
  uint32_t lane, warp, across, part, key, channel;  // key: the first of the lane; channel: of the warp
  PRIM Place(uint32_t thread, uint32_t slice) : lane(thread % 32), warp(thread / 32), across(lane / 4), part(lane % 4) {
    key = (STATE_VK ? 0 : warp * (32 * GROUPS)) + 8 * part;
    channel = slice * CHANNELS + (STATE_VK ? 16 * TILES * warp : 0);
  }
  PRIM uint32_t first_element() const { return STATE_VK ? pair(0) * HEAD_K + key : key * HEAD_V + pair(0); }
  PRIM uint32_t pair(int tile) const {
    return channel + (STATE_VK ? 16 * tile + 2 * across : VECTOR * across + 2 * tile);
  }
};

// A lane's accesses to a group of keys, and how far an access is from its first element.
constexpr int ACCESSES = STATE_VK ? 2 * TILES : 8;
PRIM constexpr int offset(int group, int access) {
  return STATE_VK ? (access / 2 * 16 + access % 2) * HEAD_K + 32 * group : (32 * group + access) * HEAD_V;
}

// What is on its way from memory: a lane's accesses from its first element on.
struct Loaded {
  Pairs<VECTOR> x[GROUPS][ACCESSES];
  PRIM void load(const STATE_DTYPE* first) {
#pragma unroll
    for (int m = 0; m < GROUPS; m++)
#pragma unroll
      for (int i = 0; i < ACCESSES; i++) x[m][i] = load_part((const Pairs<VECTOR>*)(first + offset(m, i)));
  }
};

// The fragments: at [group][tile][step][2 r + h] the keys 4 step + 2 r and the next one, of value channel h of the two.
struct State {
  uint32_t fragments[GROUPS][TILES][2][4];

  // Keys 2 p and 2 p + 1 of the lane's in a group, of value channel h.
  PRIM uint32_t& at(int group, int tile, int p, int h) { return fragments[group][tile][p / 2][p % 2 * 2 + h]; }

  PRIM explicit State(const Loaded& from) {
#pragma unroll
    for (int m = 0; m < GROUPS; m++)
#pragma unroll
      for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const auto& x = from.x[m];
          if constexpr (STATE_VK) {
            at(m, i, e, 0) = x[2 * i].element[e], at(m, i, e, 1) = x[2 * i + 1].element[e];
          } else {
            at(m, i, e, 0) = low_halves(x[2 * e].element[i], x[2 * e + 1].element[i]);
            at(m, i, e, 1) = high_halves(x[2 * e].element[i], x[2 * e + 1].element[i]);
          }
        }
  }

  // Stores a group: f(tile, p) gives the new values, of the first channel and of the second, of a pair of keys.
  template <class F>
  PRIM static void store_group(STATE_DTYPE* first, int m, F f) {
    Pairs<VECTOR> x[ACCESSES];
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const Neighbours<float, 4> c = f(i, e);
        if constexpr (STATE_VK) {
          x[2 * i].element[e] = pack2<STATE_DTYPE>(c.element[0], c.element[1]);
          x[2 * i + 1].element[e] = pack2<STATE_DTYPE>(c.element[2], c.element[3]);
        } else {
          x[2 * e].element[i] = pack2<STATE_DTYPE>(c.element[0], c.element[2]);
          x[2 * e + 1].element[i] = pack2<STATE_DTYPE>(c.element[1], c.element[3]);
        }
      }
#pragma unroll
    for (int i = 0; i < ACCESSES; i++) {
      if constexpr (STREAMED && VECTOR > 2)
        store_once((Pairs<VECTOR>*)(first + offset(m, i)), x[i]);
      else
        store_pairs(first + offset(m, i), x[i]);
    }
  }
};
