// Decoding: the new tokens of every sequence, on states in the slots of a pool, in place. Token by token, with the
// decay d = e^g, the equations of recurrent.cu in one pass over S:
//
//   n = beta (v - d S^T k),   o = scale (d S^T q + (k . q) n),   S <- d S + k n^T
//
// Memory bounds it: a thread asks for all of its tile of S in vectors before it reads anything else, so that many are
// on their way at once, and holds the tile until it stores it; with one new token as it came, in fewer registers, so
// that more threads are on the way. Blocks share nothing. In a (V, K) state a row of keys lies with neighbouring lanes
// and sums pass through shuffles, in a (K, V) state with WARPS warps, and through shared memory.
//
// Numbers: float (double for DTYPE double) throughout, sums over a thread's key channels in ascending order, then over
// PARTS threads of a warp in a fixed tree, then over warps in ascending order; the state is rounded to STATE_DTYPE
// once, at the end. q and k are normalised in the same precision with L2NORM.
//
// Macros: DTYPE, STATE_DTYPE, HEAD_K, HEAD_V, HAS_GATE, STATE_VK, L2NORM, ONE_TOKEN (T is 1). VECTOR: elements of S per
// access, along the contiguous axis, whose size it divides. VALUES: value channels per thread; VECTOR unless STATE_VK.
// PARTS: threads of a warp that share a value channel's keys; with STATE_VK at least VALUES. ACROSS: neighbouring lanes
// that take neighbouring value channels, and WARPS: warps that share keys; both 1 with STATE_VK, else ACROSS PARTS
// = 32. All of them powers of two. CHANNELS: value channels per block; ACROSS VALUES unless STATE_VK, there such that
// threads are whole warps. Grid: B * HV * ceil(HEAD_V / CHANNELS) blocks of CHANNELS / VALUES * PARTS * WARPS threads.
// Shared memory: sums of each warp and what is written, for (K, V).
#include "tiles/token.cuh"

typedef Sum<DTYPE>::type real;
PRIM constexpr bool is_power_of_two(int x) { return x > 0 && (x & (x - 1)) == 0; }
static_assert(is_power_of_two(VECTOR) && is_power_of_two(VALUES) && is_power_of_two(PARTS) && is_power_of_two(ACROSS) &&
                  is_power_of_two(WARPS),
              "sums are halved");
static_assert(STATE_VK ? VALUES <= PARTS && WARPS == 1 && ACROSS == 1 : ACROSS * PARTS == 32 && VALUES == VECTOR,
              "who shares what");
constexpr int SHARERS = PARTS * WARPS;  // threads that share a value channel's keys
constexpr int THREADS = CHANNELS / VALUES * SHARERS, SLICES = (HEAD_V + CHANNELS - 1) / CHANNELS;
constexpr int KEY_VECTOR = STATE_VK ? VECTOR : 1, VALUE_VECTOR = STATE_VK ? 1 : VECTOR;
static_assert(STATE_VK || (CHANNELS == ACROSS * VALUES && THREADS >= CHANNELS), "a thread sums a channel up");
// A thread's keys: KEYS of them, in runs of neighbours.
constexpr int KEYS = (HEAD_K + SHARERS * KEY_VECTOR - 1) / (SHARERS * KEY_VECTOR) * KEY_VECTOR;
constexpr int RUN = STATE_VK ? VECTOR : KEYS;

PRIM constexpr int largest_vector(int size, int run) {
  return run % size == 0 && HEAD_K % size == 0 ? size : largest_vector(size / 2, run);
}
constexpr int ROW_VECTOR = largest_vector(16 / (int)sizeof(DTYPE), RUN);  // of q and k

template <class T, int SIZE>
struct alignas(SIZE * sizeof(T)) Vector {
  T element[SIZE];
};

PRIM int key_at(int part, int i) { return (i / RUN * SHARERS + part) * RUN + i % RUN; }

// Calls f(i, j, offset) for every vector of a tile: S[i][j] is its first element, `offset` where it is in the state.
template <class F>
PRIM void for_vectors(int part, int channel, F f) {
#pragma unroll
  for (int i = 0; i < KEYS; i += KEY_VECTOR)
#pragma unroll
    for (int j = 0; j < VALUES; j += VALUE_VECTOR) {
      const int key = key_at(part, i), value = channel + j;
      if (key < HEAD_K && value < HEAD_V) f(i, j, STATE_VK ? value * HEAD_K + key : key * HEAD_V + value);
    }
}

PRIM real sum_over_parts(real x) {
#pragma unroll
  for (int bits = PARTS / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(~0u, x, bits * ACROSS);
  return x;
}
#if STATE_VK
// The sum over all parts of x[part % VALUES]: at every level a thread gives away the half that it does not keep.
PRIM real sum_of_own_value(real (&x)[VALUES], int part) {
#pragma unroll
  for (int half = VALUES / 2; half > 0; half /= 2) {
    const bool upper = part & half;
#pragma unroll
    for (int j = 0; j < half; j++) {
      const real given = upper ? x[j] : x[j + half], kept = upper ? x[j + half] : x[j];
      x[j] = kept + __shfl_xor_sync(~0u, given, half);
    }
  }
#pragma unroll
  for (int bits = VALUES; bits < PARTS; bits *= 2) x[0] += __shfl_xor_sync(~0u, x[0], bits);
  return x[0];
}
#endif

// A thread's tile of S, rounded, to where it came from.
typedef Vector<STATE_DTYPE, VECTOR> Access;
template <class F>
PRIM void store(STATE_DTYPE* state, int part, int channel, F S) {
  for_vectors(part, channel, [&](int i, int j, int offset) {
    Access x;
#pragma unroll
    for (int e = 0; e < VECTOR; e++) x.element[e] = narrow<STATE_DTYPE>(STATE_VK ? S(i + e, j) : S(i, j + e));
    *(Access*)&state[offset] = x;
  });
}

// What warps pass to each other: S^T k, S^T q and the products of k and q over the keys of each, and n, to be times k.
struct Products {
  real k_k, q_q, k_q, padding;  // read as a vector
};
struct Passed {
  real k_S[WARPS][CHANNELS], q_S[WARPS][CHANNELS], written[CHANNELS];
  Products products[WARPS];
};

// What a thread needs of a token: its keys of q and k, and the rest for its own value channel.
struct Token {
  Vector<DTYPE, ROW_VECTOR> q[KEYS / ROW_VECTOR], k[KEYS / ROW_VECTOR];
  DTYPE v;
  real beta, g;
};

extern "C" __global__ void __launch_bounds__(THREADS)
    decode(const DTYPE* q, const DTYPE* k, const DTYPE* v, const real* beta, const real* g, const int64_t* indices,
           STATE_DTYPE* pool, DTYPE* o, real scale, int T, int H, int HV, int slots) {
  const int thread = threadIdx.x, slice = blockIdx.x % SLICES, head = blockIdx.x / SLICES;
  const int n = head / HV, hv = head % HV, h = hv / (HV / H);
#if STATE_VK
  const int part = thread % PARTS, group = thread / PARTS;
  // The first value channel of this thread's tile, and the one whose v and o are its own.
  const int channel = slice * CHANNELS + group * VALUES, own = channel + part % VALUES;
  const bool has_own = own < HEAD_V, writes_o = has_own && part < VALUES;
#else
  const int warp = thread / 32, part = thread / ACROSS;
  const int channel = slice * CHANNELS + thread % ACROSS * VALUES, own = slice * CHANNELS + thread;
  const bool has_own = thread < CHANNELS && own < HEAD_V, writes_o = has_own;
  DynSmem smem;
  Passed& passed = *smem.take<Passed>(1, "passed");
#endif

  const int64_t slot = indices == nullptr ? n : indices[n];
  if (slot < 0 || slot >= slots) {  // padding
    for (int t = 0; t < T; t++)
      if (writes_o) o[(((int64_t)n * T + t) * HV + hv) * HEAD_V + own] = narrow<DTYPE>(0);
    return;
  }
  STATE_DTYPE* state = pool + (slot * HV + hv) * (HEAD_K * HEAD_V);

  Access loaded[KEYS / KEY_VECTOR][VALUES / VALUE_VECTOR] = {};
  for_vectors(part, channel, [&](int i, int j, int offset) {
    loaded[i / KEY_VECTOR][j / VALUE_VECTOR] = *(const Access*)&state[offset];
  });

  auto load_token = [&](int t) {
    Token token = {};
    const int64_t row = (int64_t)n * T + t, value_row = row * HV + hv, key_row = (row * H + h) * HEAD_K;
#pragma unroll
    for (int i = 0; i < KEYS; i += ROW_VECTOR) {
      const int key = key_at(part, i);
      if (key >= HEAD_K) continue;
      token.q[i / ROW_VECTOR] = *(const Vector<DTYPE, ROW_VECTOR>*)&q[key_row + key];
      token.k[i / ROW_VECTOR] = *(const Vector<DTYPE, ROW_VECTOR>*)&k[key_row + key];
    }
    if (has_own) {
      token.v = v[value_row * HEAD_V + own];
      token.beta = beta[value_row];
    }
    if (HAS_GATE) token.g = g[value_row];
    return token;
  };
  Token token = load_token(0);

  auto given = [&](int i, int j) {
    return widen(loaded[i / KEY_VECTOR][j / VALUE_VECTOR].element[i % KEY_VECTOR + j % VALUE_VECTOR]);
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
  for (int t = 0; t < (ONE_TOKEN ? 1 : T); t++) {
    real k_sums[VALUES] = {}, q_sums[VALUES] = {};
    Products sums = {};
#pragma unroll
    for (int i = 0; i < KEYS; i++) {
      const real k_i = widen(token.k[i / ROW_VECTOR].element[i % ROW_VECTOR]);
      const real q_i = widen(token.q[i / ROW_VECTOR].element[i % ROW_VECTOR]);
      sums.k_k += k_i * k_i;
      sums.q_q += q_i * q_i;
      sums.k_q += k_i * q_i;
#pragma unroll
      for (int j = 0; j < VALUES; j++) {
        k_sums[j] += S(i, j) * k_i;
        q_sums[j] += S(i, j) * q_i;
      }
    }
    if (L2NORM) sums.k_k = sum_over_parts(sums.k_k), sums.q_q = sum_over_parts(sums.q_q);
    sums.k_q = sum_over_parts(sums.k_q);
#if STATE_VK
    const real k_S = sum_of_own_value(k_sums, part), q_S = sum_of_own_value(q_sums, part);
#else
#pragma unroll
    for (int j = 0; j < VALUES; j++) {
      k_sums[j] = sum_over_parts(k_sums[j]);
      q_sums[j] = sum_over_parts(q_sums[j]);
    }
    if (thread % 32 < ACROSS) {
#pragma unroll
      for (int j = 0; j < VALUES; j++) {
        passed.k_S[warp][thread % ACROSS * VALUES + j] = k_sums[j];
        passed.q_S[warp][thread % ACROSS * VALUES + j] = q_sums[j];
      }
    }
    if (thread % 32 == 0) passed.products[warp] = sums;
    __syncthreads();
    real k_S = 0, q_S = 0;
    if (thread < CHANNELS) {
      sums = {};
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        k_S += passed.k_S[w][thread];
        q_S += passed.q_S[w][thread];
        sums.k_k += passed.products[w].k_k;
        sums.q_q += passed.products[w].q_q;
        sums.k_q += passed.products[w].k_q;
      }
    }
#endif
    const real decay = HAS_GATE ? power(token.g) : (real)1;
    const real k_factor = L2NORM ? root(sums.k_k + (real)1e-6) : (real)1;
    const real q_factor = L2NORM ? scale * root(sums.q_q + (real)1e-6) : scale;
    const real written = token.beta * (widen(token.v) - decay * k_factor * k_S) * k_factor;
    const real out = q_factor * (decay * q_S + sums.k_q * written);
    if (writes_o) o[(((int64_t)n * T + t) * HV + hv) * HEAD_V + own] = narrow<DTYPE>(out);

    real all_written[VALUES];
#if STATE_VK
#pragma unroll
    for (int j = 0; j < VALUES; j++) all_written[j] = __shfl_sync(~0u, written, j, PARTS);
#else
    if (thread < CHANNELS) passed.written[thread] = written;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < VALUES; j++) all_written[j] = passed.written[thread % ACROSS * VALUES + j];
#endif
    auto updated = [&](int i, int j) {
      return decay * S(i, j) + widen(token.k[i / ROW_VECTOR].element[i % ROW_VECTOR]) * all_written[j];
    };
#if ONE_TOKEN
    store(state, part, channel, updated);
  }
#else
#pragma unroll
    for (int i = 0; i < KEYS; i++)
#pragma unroll
      for (int j = 0; j < VALUES; j++) held[i][j] = updated(i, j);
    if (t + 1 < T) token = load_token(t + 1);
  }
  store(state, part, channel, S);
#endif
}
