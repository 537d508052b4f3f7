// The tile of a state that a thread of tokens/decode.cu has, and sums over the threads that share its value channels.
#pragma once
#include "tokens/decode/inputs.cuh"

PRIM constexpr bool is_power_of_two(int x) { return x > 0 && (x & (x - 1)) == 0; }
static_assert(is_power_of_two(VECTOR) && is_power_of_two(VALUES) && is_power_of_two(PARTS) && is_power_of_two(BESIDE) &&
                  is_power_of_two(WARPS),
              "sums are halved");
static_assert(STATE_VK ? WARPS == 1 && BESIDE == 1 : BESIDE * PARTS == 32 && VALUES == VECTOR, "who shares what");
constexpr int SHARERS = PARTS * WARPS;  // threads that share a value channel's keys
constexpr int THREADS = CHANNELS / VALUES * SHARERS, SLICES = (HEAD_V + CHANNELS - 1) / CHANNELS;
constexpr int KEY_VECTOR = STATE_VK ? VECTOR : 1, VALUE_VECTOR = STATE_VK ? 1 : VECTOR;
static_assert(WARPS == 1 ? VALUES <= PARTS : CHANNELS == BESIDE * VALUES && THREADS >= CHANNELS,
              "a thread sums a channel up");
static_assert(CHANNELS % VALUES == 0 && THREADS % 32 == 0, "whole warps");
// A thread's keys: KEYS of them, in runs of neighbours.
constexpr int KEYS = (HEAD_K + SHARERS * KEY_VECTOR - 1) / (SHARERS * KEY_VECTOR) * KEY_VECTOR;
constexpr int RUN = STATE_VK ? VECTOR : KEYS;
// Whether no tile reaches beyond the state.
constexpr bool WHOLE_KEYS = KEYS * SHARERS == HEAD_K, WHOLE_VALUES = CHANNELS * SLICES == HEAD_V;

// How far a thread's i-th key is from its first.
PRIM constexpr int key_step(int i) { return i / RUN * SHARERS * RUN + i % RUN; }

// Neighbours in memory, in one access. Those of 16 bits are held and converted in pairs, a register each.
template <class T, int SIZE, bool PAIRS = sizeof(T) == 2 && SIZE % 2 == 0>
struct alignas(SIZE * sizeof(T)) Vector {
  T element[SIZE];
  PRIM real operator[](int i) const { return widen(element[i]); }
  template <class F>
  PRIM void fill(F f) {
#pragma unroll
    for (int i = 0; i < SIZE; i++) element[i] = narrow<T>(f(i));
  }
  PRIM void stay_packed() {}
};
template <class T, int SIZE>
struct alignas(SIZE * sizeof(T)) Vector<T, SIZE, true> {
  uint32_t pair[SIZE / 2];
  PRIM real operator[](int i) const {
    const float2 both = unpack2<T>(pair[i / 2]);
    return i % 2 ? both.y : both.x;
  }
  template <class F>
  PRIM void fill(F f) {
#pragma unroll
    for (int i = 0; i < SIZE; i += 2) pair[i / 2] = pack2<T>(f(i), f(i + 1));
  }
  PRIM void stay_packed() {
#pragma unroll
    for (auto& x : pair) x = made(x);
  }
};

// Which part of a state a thread has, and the value channel whose v and o are its own.
struct Place {
  uint32_t thread, part, key, column, channel;  // key, channel: the first of the tile
  uint32_t own, own_in_block;                   // among HEAD_V, and among CHANNELS
  bool has_own, writes_o;
};
PRIM Place find_place(uint32_t thread, uint32_t slice) {
  Place p;
  p.thread = thread;
  p.part = STATE_VK ? thread % PARTS : thread / BESIDE % SHARERS;
  p.key = p.part * RUN;
  p.column = STATE_VK ? thread / PARTS : thread / (32 * WARPS) * BESIDE + thread % BESIDE;
  p.channel = slice * CHANNELS + p.column * VALUES;
  p.own_in_block = WARPS == 1 ? p.column * VALUES + p.part % VALUES : thread;
  p.own = slice * CHANNELS + p.own_in_block;
  p.has_own = (WARPS == 1 || thread < CHANNELS) && (WHOLE_VALUES || p.own < HEAD_V);
  p.writes_o = p.has_own && (WARPS > 1 || p.part < VALUES);
  return p;
}
// Where a tile begins in its state.
PRIM int first_element(const Place& p) { return STATE_VK ? p.channel * HEAD_K + p.key : p.key * HEAD_V + p.channel; }

// Calls f(i, j, offset) for every vector of a tile: S[i][j] is its first element, `offset` places after S[0][0].
template <class F>
PRIM void for_vectors(const Place& p, F f) {
#pragma unroll
  for (int i = 0; i < KEYS; i += KEY_VECTOR)
#pragma unroll
    for (int j = 0; j < VALUES; j += VALUE_VECTOR)
      if ((WHOLE_KEYS || p.key + key_step(i) < HEAD_K) && (WHOLE_VALUES || p.channel + j < HEAD_V))
        f(i, j, STATE_VK ? j * HEAD_K + key_step(i) : key_step(i) * HEAD_V + j);
}

// The tile as it came: in fewer registers, where it is of 16 bits, than in the type of sums.
struct Loaded {
  typedef Vector<STATE_DTYPE, VECTOR> Access;
  Access vectors[KEYS / KEY_VECTOR][VALUES / VALUE_VECTOR] = {};
  PRIM void load(const STATE_DTYPE* tile, const Place& p) {
    for_vectors(p, [&](int i, int j, int offset) {
      vectors[i / KEY_VECTOR][j / VALUE_VECTOR] = load_part((const Access*)&tile[offset]);
    });
  }
  PRIM real operator()(int i, int j) const {
    return vectors[i / KEY_VECTOR][j / VALUE_VECTOR][i % KEY_VECTOR + j % VALUE_VECTOR];
  }
  // What was unpacked of it before this is not kept in registers: it is unpacked again.
  PRIM void stay_packed() {
#pragma unroll
    for (auto& row : vectors)
#pragma unroll
      for (auto& x : row) x.stay_packed();
  }
};
// The tile in the type of sums.
struct Held {
  real S[KEYS][VALUES];
  template <class F>
  PRIM void become(F f) {
#pragma unroll
    for (int i = 0; i < KEYS; i++)
#pragma unroll
      for (int j = 0; j < VALUES; j++) S[i][j] = f(i, j);
  }
  PRIM real operator()(int i, int j) const { return S[i][j]; }
};
// A tile of S, rounded, to memory.
template <class F>
PRIM void store(STATE_DTYPE* tile, const Place& p, F S) {
  for_vectors(p, [&](int i, int j, int offset) {
    Loaded::Access x = {};
    x.fill([&](int e) { return STATE_VK ? S(i + e, j) : S(i, j + e); });
    store_part((Loaded::Access*)&tile[offset], x);
  });
}

constexpr int NEXT = STATE_VK ? 1 : BESIDE;  // lanes from one part to the next
PRIM real sum_over_parts(real x) {
#pragma unroll
  for (int bits = PARTS / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(~0u, x, bits * NEXT);
  return x;
}
// Sums over all parts of x, scattered: x[0] to x[KEPT - 1] become those of the value channels from KEPT (part %
// SCATTERED) on. At every level a thread gives away the half that it does not keep.
constexpr int SCATTERED = VALUES < PARTS ? VALUES : PARTS, KEPT = VALUES / SCATTERED;
PRIM void scatter_sums(real (&x)[VALUES], uint32_t part) {
#pragma unroll
  for (int bits = SCATTERED / 2; bits > 0; bits /= 2) {
    const bool upper = part & bits;
    const int half = bits * KEPT;
#pragma unroll
    for (int j = 0; j < half; j++) {
      const real given = upper ? x[j] : x[j + half], kept = upper ? x[j + half] : x[j];
      x[j] = kept + __shfl_xor_sync(~0u, given, bits * NEXT);
    }
  }
#pragma unroll
  for (int bits = SCATTERED; bits < PARTS; bits *= 2) x[0] += __shfl_xor_sync(~0u, x[0], bits * NEXT);
}
