// The delta rule token by token, in the order of the definition:
//
//   S <- e^g S,   r = v - S^T k,   S <- S + k (beta r)^T,   o = scale S^T q
//
// Steps of decoding (STEP = 1) and whole sequences (STEP = 0) are the same walk; they differ in where states are.
//
// Numbers: float (double for DTYPE double) throughout, sums over a thread's key channels in ascending order and then
// over PARTS threads in a fixed tree; the state is rounded to STATE_DTYPE once, at the end. q and k are normalised in
// the same precision with L2NORM.
//
// Macros: DTYPE, STATE_DTYPE, HEAD_K, HEAD_V, HAS_GATE, VARLEN, STATE_VK, L2NORM, BETA_PER_VALUE, STEP, PARTS (threads
// that share a value channel's keys, a power of two up to 32), VALUES (neighbouring value channels per thread, a power
// of two up to PARTS which divides HEAD_V; 1 with STATE_VK), CHANNELS (value channels per block, a multiple of VALUES;
// CHANNELS * PARTS / VALUES is a multiple of 32).
// Grid: N * HV * ceil(HEAD_V / CHANNELS) blocks of CHANNELS * PARTS / VALUES threads.
// Shared memory: q and k of a token, HEAD_K values each, twice (one set is read while the other is written).
#include "tiles/sequence.cuh"

typedef Sum<DTYPE>::type real;
constexpr int THREADS = CHANNELS / VALUES * PARTS;
constexpr int SLICES = (HEAD_V + CHANNELS - 1) / CHANNELS;
// States move in vectors along the axis that is contiguous: VALUES value channels, or with (V, K) states as many key
// channels as 16 bytes hold, where rows are multiples of that.
constexpr int WIDEST = 16 / (int)sizeof(STATE_DTYPE), KEY_VECTOR = STATE_VK && HEAD_K % WIDEST == 0 ? WIDEST : 1;
constexpr int KEYS = (HEAD_K + PARTS * KEY_VECTOR - 1) / (PARTS * KEY_VECTOR) * KEY_VECTOR;
template <int SIZE>
struct alignas(SIZE * sizeof(STATE_DTYPE)) Vector {
  STATE_DTYPE element[SIZE];
};

PRIM float root(float x) { return rsqrtf(x); }
PRIM double root(double x) { return rsqrt(x); }
PRIM float power(float x) { return expf(x); }
PRIM double power(double x) { return exp(x); }

PRIM real sum_over_parts(real x) {
#pragma unroll
  for (int bits = PARTS / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(~0u, x, bits);
  return x;
}
// The sum over all parts of x[part % VALUES]: at every level a thread gives away the half that it does not keep.
PRIM real sum_of_own_value(real* x, int part) {
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

extern "C" __global__ void __launch_bounds__(THREADS)
    recurrent(const DTYPE* q, const DTYPE* k, const DTYPE* v, const real* beta, const real* g,
              const STATE_DTYPE* initial_state, const int64_t* cu_seqlens, const int64_t* indices, DTYPE* o,
              STATE_DTYPE* final_state, real scale, int T, int H, int HV, int slots) {
  const int thread = threadIdx.x, part = thread % PARTS, slice = blockIdx.x % SLICES;
  // The first value channel of this thread's state, and the one whose v and o are its own.
  const int channel = slice * CHANNELS + thread / PARTS * VALUES, own = channel + part % VALUES;
  const int hv = blockIdx.x / SLICES % HV;
  const int n = blockIdx.x / (SLICES * HV), h = hv / (HV / H);
  const bool live = channel < HEAD_V;
  DynSmem smem;
  real* rows = smem.take<real>(4 * HEAD_K, "q and k");  // two sets of q and k

  const Sequence sequence = find_sequence<1>(cu_seqlens, n, T);
  int64_t slot = n;
#if STEP
  if (indices != nullptr) slot = indices[n];
#endif
  const bool padding = slot < 0 || slot >= slots;
  const int64_t state_at = (slot * HV + hv) * HEAD_K * HEAD_V;
  // The key channels of this thread, KEY_VECTOR neighbours at a time: the i-th is key(i).
  auto key = [&](int i) { return i / KEY_VECTOR * KEY_VECTOR * PARTS + part * KEY_VECTOR + i % KEY_VECTOR; };
  const bool reads = live && !padding && initial_state != nullptr, writes = live && !padding;

  real S[KEYS][VALUES];
#if STATE_VK
  const int64_t state_row = state_at + (int64_t)channel * HEAD_K;
#pragma unroll
  for (int i = 0; i < KEYS; i += KEY_VECTOR) {
    Vector<KEY_VECTOR> x = {};
    if (reads && key(i) < HEAD_K) x = *(const Vector<KEY_VECTOR>*)&initial_state[state_row + key(i)];
#pragma unroll
    for (int j = 0; j < KEY_VECTOR; j++) S[i + j][0] = widen(x.element[j]);
  }
#else
  const int64_t state_column = state_at + channel;
#pragma unroll
  for (int i = 0; i < KEYS; i++) {
    Vector<VALUES> x = {};
    if (reads && key(i) < HEAD_K) x = *(const Vector<VALUES>*)&initial_state[state_column + (int64_t)key(i) * HEAD_V];
#pragma unroll
    for (int j = 0; j < VALUES; j++) S[i][j] = widen(x.element[j]);
  }
#endif

  for (int t = 0; t < sequence.tokens; t++) {
    const int64_t token = sequence.first + t, key_row = (token * H + h) * HEAD_K, row = token * HV + hv;
    const bool writes_o = live && part < VALUES;
    if (padding) {
      if (writes_o) o[row * HEAD_V + own] = narrow<DTYPE>(0);
      continue;
    }
    const real value = live ? widen(v[row * HEAD_V + own]) : (real)0;
#if BETA_PER_VALUE
    const real strength = live ? beta[row * HEAD_V + own] : (real)0;
#else
    const real strength = beta[row];
#endif
#if HAS_GATE
    const real decay = power(g[row]);
#else
    const real decay = 1;
#endif
    real *token_q = rows + t % 2 * 2 * HEAD_K, *token_k = token_q + HEAD_K;
    for (int c = thread; c < HEAD_K; c += THREADS) {
      token_q[c] = widen(q[key_row + c]);
      token_k[c] = widen(k[key_row + c]);
    }
    __syncthreads();

    real recalled[VALUES] = {}, q_squares = 0, k_squares = 0;
#pragma unroll
    for (int i = 0; i < KEYS; i++) {
      const int c = key(i);
      const real q_c = c < HEAD_K ? token_q[c] : (real)0, k_c = c < HEAD_K ? token_k[c] : (real)0;
      q_squares += q_c * q_c;
      k_squares += k_c * k_c;
#pragma unroll
      for (int j = 0; j < VALUES; j++) {
        S[i][j] *= decay;
        recalled[j] += S[i][j] * k_c;
      }
    }
    real q_factor = scale, k_factor = 1;
#if L2NORM
    q_factor = scale * root(sum_over_parts(q_squares) + (real)1e-6);
    k_factor = root(sum_over_parts(k_squares) + (real)1e-6);
#endif
    const real own_written = strength * (value - k_factor * sum_of_own_value(recalled, part)) * k_factor;
    real written[VALUES], out[VALUES] = {};
#pragma unroll
    for (int j = 0; j < VALUES; j++) written[j] = __shfl_sync(~0u, own_written, j, PARTS);
#pragma unroll
    for (int i = 0; i < KEYS; i++) {
      const int c = key(i);
      if (c >= HEAD_K) continue;
#pragma unroll
      for (int j = 0; j < VALUES; j++) {
        S[i][j] += token_k[c] * written[j];
        out[j] += S[i][j] * token_q[c];
      }
    }
    const real own_out = sum_of_own_value(out, part) * q_factor;
    if (writes_o) o[row * HEAD_V + own] = narrow<DTYPE>(own_out);
  }

#if STATE_VK
#pragma unroll
  for (int i = 0; i < KEYS; i += KEY_VECTOR) {
    Vector<KEY_VECTOR> x;
#pragma unroll
    for (int j = 0; j < KEY_VECTOR; j++) x.element[j] = narrow<STATE_DTYPE>(S[i + j][0]);
    if (writes && key(i) < HEAD_K) *(Vector<KEY_VECTOR>*)&final_state[state_row + key(i)] = x;
  }
#else
#pragma unroll
  for (int i = 0; i < KEYS; i++) {
    Vector<VALUES> x;
#pragma unroll
    for (int j = 0; j < VALUES; j++) x.element[j] = narrow<STATE_DTYPE>(S[i][j]);
    if (writes && key(i) < HEAD_K) *(Vector<VALUES>*)&final_state[state_column + (int64_t)key(i) * HEAD_V] = x;
  }
#endif
}
