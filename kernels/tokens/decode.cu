// Decoding: the new tokens of every sequence, on states in the slots of a pool, in place. Token by token, with the
// decay d = e^g, the equations of tokens/recurrent.cu in one pass over S:
//
//   n = beta (v - d S^T k),   o = scale (d S^T q + (k . q) n),   S <- d S + k n^T
//
// Memory bounds it: a thread asks for all of its tile of S in vectors before it reads anything else, so that many are
// on their way at once, and holds the tile until it stores it; with one new token as it came, in fewer registers, so
// that more threads are on the way. States of 16 bits are also near the bound of instructions: so a tile has one
// address and constants from there, and bounds are looked at only where it can reach beyond the state. Blocks share
// nothing. Sums pass through shuffles between the lanes that share keys and, where WARPS share those of a (K, V)
// state, through shared memory.
//
// Numbers: float (double for DTYPE double) throughout, sums over a thread's key channels in ascending order, then over
// PARTS threads of a warp in a fixed tree, then over warps in ascending order; the state is rounded to STATE_DTYPE
// once, at the end. q and k are normalised in the same precision with L2NORM, rows whose squares overflow in a smaller
// unit, which their elements have exactly.
//
// Macros: DTYPE, STATE_DTYPE, HEAD_K, HEAD_V, GROUP (value heads per key head), HAS_GATE, STATE_VK, L2NORM, ONE_TOKEN
// (T is 1). VECTOR: elements of S per access, along the contiguous axis, whose size it divides. VALUES: value channels
// per thread; VECTOR unless STATE_VK. PARTS: threads of a warp that share a value channel's keys. ACROSS: neighbouring
// lanes that take neighbouring value channels, and WARPS: warps that share keys; both 1 with STATE_VK, else ACROSS
// PARTS = 32. All of them powers of two. CHANNELS: value channels per block, of whole warps; ACROSS VALUES if WARPS is
// not 1, else PARTS is at least VALUES. Grid: B * HV * ceil(HEAD_V / CHANNELS) blocks of CHANNELS / VALUES * PARTS *
// WARPS threads. Shared memory: sums of each warp and what is written, if WARPS is not 1.
#include "tiles/token.cuh"

typedef Sum<DTYPE>::type real;
PRIM constexpr bool is_power_of_two(int x) { return x > 0 && (x & (x - 1)) == 0; }
static_assert(is_power_of_two(VECTOR) && is_power_of_two(VALUES) && is_power_of_two(PARTS) && is_power_of_two(ACROSS) &&
                  is_power_of_two(WARPS),
              "sums are halved");
static_assert(STATE_VK ? WARPS == 1 && ACROSS == 1 : ACROSS * PARTS == 32 && VALUES == VECTOR, "who shares what");
constexpr int SHARERS = PARTS * WARPS;  // threads that share a value channel's keys
constexpr int THREADS = CHANNELS / VALUES * SHARERS, SLICES = (HEAD_V + CHANNELS - 1) / CHANNELS;
constexpr int KEY_VECTOR = STATE_VK ? VECTOR : 1, VALUE_VECTOR = STATE_VK ? 1 : VECTOR;
static_assert(WARPS == 1 ? VALUES <= PARTS : CHANNELS == ACROSS * VALUES && THREADS >= CHANNELS,
              "a thread sums a channel up");
static_assert(CHANNELS % VALUES == 0 && THREADS % 32 == 0, "whole warps");
// A thread's keys: KEYS of them, in runs of neighbours.
constexpr int KEYS = (HEAD_K + SHARERS * KEY_VECTOR - 1) / (SHARERS * KEY_VECTOR) * KEY_VECTOR;
constexpr int RUN = STATE_VK ? VECTOR : KEYS;
// Whether no tile reaches beyond the state.
constexpr bool WHOLE_KEYS = KEYS * SHARERS == HEAD_K, WHOLE_VALUES = CHANNELS * SLICES == HEAD_V;

PRIM constexpr int largest_vector(int size, int run) {
  return run % size == 0 && HEAD_K % size == 0 ? size : largest_vector(size / 2, run);
}
constexpr int ROW_VECTOR = largest_vector(16 / (int)sizeof(DTYPE), RUN);  // of q and k

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
};
typedef Vector<STATE_DTYPE, VECTOR> Access;
typedef Vector<DTYPE, ROW_VECTOR> RowAccess;

// How far a thread's i-th key is from its first.
PRIM constexpr int key_step(int i) { return i / RUN * SHARERS * RUN + i % RUN; }

// Calls f(i, j, offset) for every vector of a tile: S[i][j] is its first element, `offset` places after S[0][0].
template <class F>
PRIM void for_vectors(uint32_t key, uint32_t channel, F f) {
#pragma unroll
  for (int i = 0; i < KEYS; i += KEY_VECTOR)
#pragma unroll
    for (int j = 0; j < VALUES; j += VALUE_VECTOR)
      if ((WHOLE_KEYS || key + key_step(i) < HEAD_K) && (WHOLE_VALUES || channel + j < HEAD_V))
        f(i, j, STATE_VK ? j * HEAD_K + key_step(i) : key_step(i) * HEAD_V + j);
}
// A thread's tile of S, rounded, to where it came from.
template <class F>
PRIM void store(STATE_DTYPE* tile, uint32_t key, uint32_t channel, F S) {
  for_vectors(key, channel, [&](int i, int j, int offset) {
    Access x;
    x.fill([&](int e) { return STATE_VK ? S(i + e, j) : S(i, j + e); });
    *(Access*)&tile[offset] = x;
  });
}

constexpr int NEXT = STATE_VK ? 1 : ACROSS;  // lanes from one part to the next
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

struct alignas(2 * sizeof(real)) Pair {
  real k, q;
};
#if WARPS > 1
// What warps pass to each other: sums of squares, S^T k, S^T q and k . q over the keys of each, and n, to be times k.
struct Passed {
  real k_S[WARPS][CHANNELS], q_S[WARPS][CHANNELS], written[CHANNELS], k_q[WARPS];
  Pair squares[WARPS];
};
#endif

// What a thread needs of a token: its keys of q and k, and the rest for its own value channel.
struct Token {
  RowAccess q[KEYS / ROW_VECTOR], k[KEYS / ROW_VECTOR];
  DTYPE v;
  real beta, g;
};

// Takes a row in a smaller unit.
PRIM void shrink(RowAccess (&row)[KEYS / ROW_VECTOR]) {
#pragma unroll
  for (auto& part : row) part.fill([&](int e) { return part[e] * small_unit(real()); });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    decode(const DTYPE* q, const DTYPE* k, const DTYPE* v, const real* beta, const real* g,
           const int64_t* state_indices, STATE_DTYPE* state, DTYPE* o, real scale, int T, int HV, int pool_slots) {
  const uint32_t thread = threadIdx.x;
  const uint32_t slice = blockIdx.x % SLICES, head = blockIdx.x / SLICES;
  const uint32_t n = head / HV, hv = head % HV, h = hv / GROUP, H = HV / GROUP;
  const int tokens = ONE_TOKEN ? 1 : T;
  auto row = [&](int t) { return (int64_t)n * tokens + t; };

  // The first key and the first value channel of this thread's tile.
  const uint32_t part = STATE_VK ? thread % PARTS : thread / ACROSS % SHARERS, key = part * RUN;
  const uint32_t column = STATE_VK ? thread / PARTS : thread / (32 * WARPS) * ACROSS + thread % ACROSS;
  const uint32_t channel = slice * CHANNELS + column * VALUES;
  // The value channel whose v and o are its own.
#if WARPS == 1
  const uint32_t own = channel + part % VALUES;
  const bool has_own = WHOLE_VALUES || own < HEAD_V, writes_o = has_own && part < VALUES;
#else
  const uint32_t own = slice * CHANNELS + thread;
  const bool has_own = thread < CHANNELS && (WHOLE_VALUES || own < HEAD_V), writes_o = has_own;
  DynSmem smem;
  Passed& passed = *smem.take<Passed>(1, "passed");
  smem.all_taken(SHARED_BYTES);
#endif

  const int64_t slot = state_indices == nullptr ? n : state_indices[n];
  if (slot < 0 || slot >= pool_slots) {  // padding
#pragma unroll 1
    for (int t = 0; t < tokens; t++)
      if (writes_o) o[(row(t) * HV + hv) * HEAD_V + own] = narrow<DTYPE>(0);
    return;
  }
  STATE_DTYPE* tile =
      state + (slot * HV + hv) * (HEAD_K * HEAD_V) + (STATE_VK ? channel * HEAD_K + key : key * HEAD_V + channel);

  Access loaded[KEYS / KEY_VECTOR][VALUES / VALUE_VECTOR] = {};
  for_vectors(key, channel, [&](int i, int j, int offset) {
    loaded[i / KEY_VECTOR][j / VALUE_VECTOR] = *(const Access*)&tile[offset];
  });

  auto load_token = [&](int t) {
    Token token = {};
    const int64_t value_row = row(t) * HV + hv, keys = (row(t) * H + h) * HEAD_K + key;
#pragma unroll
    for (int i = 0; i < KEYS; i += ROW_VECTOR) {
      if (!WHOLE_KEYS && key + key_step(i) >= HEAD_K) continue;
      token.q[i / ROW_VECTOR] = *(const RowAccess*)&q[keys + key_step(i)];
      token.k[i / ROW_VECTOR] = *(const RowAccess*)&k[keys + key_step(i)];
    }
    if (has_own) {
      token.v = v[value_row * HEAD_V + own];
      token.beta = beta[value_row];
    }
    if (HAS_GATE) token.g = g[value_row];
    return token;
  };
  Token token = load_token(0);
  auto q_at = [&](int i) { return token.q[i / ROW_VECTOR][i % ROW_VECTOR]; };
  auto k_at = [&](int i) { return token.k[i / ROW_VECTOR][i % ROW_VECTOR]; };

  auto given = [&](int i, int j) {
    return loaded[i / KEY_VECTOR][j / VALUE_VECTOR][i % KEY_VECTOR + j % VALUE_VECTOR];
  };
#if ONE_TOKEN
  auto S = given;
#else
  real held[KEYS][VALUES];
#pragma unroll
  for (int i = 0; i < KEYS; i++)
#pragma unroll
    for (int j = 0; j < VALUES; j++) held[i][j] = given(i, j);
  auto S = [&](int i, int j) -> real& { return held[i][j]; };
#endif
  for (int t = 0; t < tokens; t++) {
    real k_r = 1, q_r = 1;
#if L2NORM
    bool k_shrunk = false, q_shrunk = false;
#pragma unroll 1
    for (;;) {
      Pair squares = {};
#pragma unroll
      for (int i = 0; i < KEYS; i++) {
        squares.k += k_at(i) * k_at(i);
        squares.q += q_at(i) * q_at(i);
      }
      squares.k = sum_over_parts(squares.k), squares.q = sum_over_parts(squares.q);
#if WARPS > 1
      if (thread % 32 == 0) passed.squares[thread / 32] = squares;
      __syncthreads();
      squares = {};
#pragma unroll
      for (int w = 0; w < WARPS; w++) squares.k += passed.squares[w].k, squares.q += passed.squares[w].q;
#endif
      // The same for the whole block, which has one row of q and one of k.
      const bool k_large = !k_shrunk && overflowed<DTYPE>(squares.k),
                 q_large = !q_shrunk && overflowed<DTYPE>(squares.q);
      if (!k_large && !q_large) {
        k_r = root(squares.k + (k_shrunk ? 0 : eps(scale))), q_r = root(squares.q + (q_shrunk ? 0 : eps(scale)));
        break;
      }
      if (k_large) shrink(token.k), k_shrunk = true;
      if (q_large) shrink(token.q), q_shrunk = true;
#if WARPS > 1
      __syncthreads();
#endif
    }
#endif
    real k_sums[VALUES] = {}, q_sums[VALUES] = {};
    real k_q = 0;
#pragma unroll
    for (int i = 0; i < KEYS; i++) {
      const real k_i = k_at(i), q_i = q_at(i);
      k_q += k_i * q_i;
#pragma unroll
      for (int j = 0; j < VALUES; j++) {
        k_sums[j] += S(i, j) * k_i;
        q_sums[j] += S(i, j) * q_i;
      }
    }
    k_q = sum_over_parts(k_q);
    scatter_sums(k_sums, part);
    scatter_sums(q_sums, part);
#if WARPS == 1
    const real k_S = k_sums[0], q_S = q_sums[0];
#else
    const uint32_t warp = thread / 32, kept = column * VALUES + part % SCATTERED * KEPT;
    if (thread % 32 < SCATTERED * ACROSS) {
#pragma unroll
      for (int j = 0; j < KEPT; j++) {
        passed.k_S[warp][kept + j] = k_sums[j];
        passed.q_S[warp][kept + j] = q_sums[j];
      }
    }
    if (thread % 32 == 0) passed.k_q[warp] = k_q;
    __syncthreads();
    real k_S = 0, q_S = 0;
    if (thread < CHANNELS) {
      k_q = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        k_S += passed.k_S[w][thread];
        q_S += passed.q_S[w][thread];
        k_q += passed.k_q[w];
      }
    }
#endif
    const real decay = HAS_GATE ? power(token.g) : (real)1;
    const real written = token.beta * (widen(token.v) - decay * k_r * k_S) * k_r;
    const real out = scale * q_r * (decay * q_S + k_q * written);
    if (writes_o) o[(row(t) * HV + hv) * HEAD_V + own] = narrow<DTYPE>(out);

#if WARPS == 1
    auto written_of = [&](int j) {
      return STATE_VK ? __shfl_sync(~0u, written, j, PARTS) : __shfl_sync(~0u, written, j * ACROSS + thread % ACROSS);
    };
#else
    if (thread < CHANNELS) passed.written[thread] = written;
    __syncthreads();
    auto written_of = [&](int j) { return passed.written[column * VALUES + j]; };
#endif
    real all_written[VALUES];
#pragma unroll
    for (int j = 0; j < VALUES; j++) all_written[j] = written_of(j);
    auto updated = [&](int i, int j) { return decay * S(i, j) + k_at(i) * all_written[j]; };
#if ONE_TOKEN
    store(tile, key, channel, updated);
  }
#else
#pragma unroll
    for (int i = 0; i < KEYS; i++)
#pragma unroll
      for (int j = 0; j < VALUES; j++) held[i][j] = updated(i, j);
    if (t + 1 < T) token = load_token(t + 1);
  }
  store(tile, key, channel, S);
#endif
}
