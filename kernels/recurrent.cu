// The delta rule token by token, in the order of the definition. One thread per value channel:
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
// per value channel, a power of two up to 32; which share its key channels), CHANNELS (value channels
// per block, a multiple of 32 / PARTS).
// Grid: N * HV * ceil(HEAD_V / CHANNELS) blocks of CHANNELS * PARTS threads.
// Shared memory: q and k of a token, HEAD_K values each, twice (one set is read while the other is written).
#include "tiles/sequence.cuh"

typedef Sum<DTYPE>::type real;
constexpr int THREADS = CHANNELS * PARTS;
// With (V, K) states a thread's key channels come in vectors of 16 bytes, where rows are multiples of that.
constexpr int WIDEST = 16 / (int)sizeof(STATE_DTYPE), VECTOR = STATE_VK && HEAD_K % WIDEST == 0 ? WIDEST : 1;
constexpr int KEYS = (HEAD_K + PARTS * VECTOR - 1) / (PARTS * VECTOR) * VECTOR;
struct alignas(VECTOR * sizeof(STATE_DTYPE)) Vector {
  STATE_DTYPE element[VECTOR];
};
constexpr int SLICES = (HEAD_V + CHANNELS - 1) / CHANNELS;

PRIM float root(float x) { return rsqrtf(x); }
PRIM double root(double x) { return rsqrt(x); }
PRIM float power(float x) { return expf(x); }
PRIM double power(double x) { return exp(x); }

PRIM real sum_over_parts(real x) {
#pragma unroll
  for (int bits = PARTS / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(~0u, x, bits);
  return x;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    recurrent(const DTYPE* q, const DTYPE* k, const DTYPE* v, const real* beta, const real* g,
              const STATE_DTYPE* initial_state, const int64_t* cu_seqlens, const int64_t* indices, DTYPE* o,
              STATE_DTYPE* final_state, real scale, int T, int H, int HV, int slots) {
  const int thread = threadIdx.x, part = thread % PARTS, slice = blockIdx.x % SLICES;
  const int channel = slice * CHANNELS + thread / PARTS, hv = blockIdx.x / SLICES % HV;
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
  // The key channels of this thread, VECTOR neighbours at a time: the i-th is key(i).
  auto key = [&](int i) { return i / VECTOR * VECTOR * PARTS + part * VECTOR + i % VECTOR; };
  const bool reads = live && !padding && initial_state != nullptr, writes = live && !padding;

  real S[KEYS];
#if STATE_VK
  const int64_t state_row = state_at + (int64_t)channel * HEAD_K;
#pragma unroll
  for (int i = 0; i < KEYS; i += VECTOR) {
    Vector x = {};
    if (reads && key(i) < HEAD_K) x = *(const Vector*)&initial_state[state_row + key(i)];
#pragma unroll
    for (int j = 0; j < VECTOR; j++) S[i + j] = widen(x.element[j]);
  }
#else
  const int64_t state_column = state_at + channel;
#pragma unroll
  for (int i = 0; i < KEYS; i++)
    S[i] = reads && key(i) < HEAD_K ? widen(initial_state[state_column + (int64_t)key(i) * HEAD_V]) : (real)0;
#endif

  for (int t = 0; t < sequence.tokens; t++) {
    const int64_t token = sequence.first + t, key_row = (token * H + h) * HEAD_K, row = token * HV + hv;
    if (padding) {
      if (live && part == 0) o[row * HEAD_V + channel] = narrow<DTYPE>(0);
      continue;
    }
    real *token_q = rows + t % 2 * 2 * HEAD_K, *token_k = token_q + HEAD_K;
    for (int c = thread; c < HEAD_K; c += THREADS) {
      token_q[c] = widen(q[key_row + c]);
      token_k[c] = widen(k[key_row + c]);
    }
    __syncthreads();
    real q_factor = scale, k_factor = 1;
#if L2NORM
    real q_squares = 0, k_squares = 0;
    for (int c = 0; c < HEAD_K; c++) {
      q_squares += token_q[c] * token_q[c];
      k_squares += token_k[c] * token_k[c];
    }
    q_factor = scale * root(q_squares + (real)1e-6);
    k_factor = root(k_squares + (real)1e-6);
#endif
#if HAS_GATE
    const real decay = power(g[row]);
#else
    const real decay = 1;
#endif
    real recalled = 0;
#pragma unroll
    for (int i = 0; i < KEYS; i++) {
      const int c = key(i);
      S[i] *= decay;
      if (c < HEAD_K) recalled += S[i] * (k_factor * token_k[c]);
    }
    recalled = sum_over_parts(recalled);
    real value = live ? widen(v[row * HEAD_V + channel]) : (real)0;
#if BETA_PER_VALUE
    real strength = live ? beta[row * HEAD_V + channel] : (real)0;
#else
    real strength = beta[row];
#endif
    const real written = strength * (value - recalled);
    real out = 0;
#pragma unroll
    for (int i = 0; i < KEYS; i++) {
      const int c = key(i);
      if (c >= HEAD_K) continue;
      S[i] += k_factor * token_k[c] * written;
      out += S[i] * token_q[c];
    }
    out = sum_over_parts(out) * q_factor;
    if (live && part == 0) o[row * HEAD_V + channel] = narrow<DTYPE>(out);
  }

#if STATE_VK
#pragma unroll
  for (int i = 0; i < KEYS; i += VECTOR) {
    Vector x;
#pragma unroll
    for (int j = 0; j < VECTOR; j++) x.element[j] = narrow<STATE_DTYPE>(S[i + j]);
    if (writes && key(i) < HEAD_K) *(Vector*)&final_state[state_row + key(i)] = x;
  }
#else
#pragma unroll
  for (int i = 0; i < KEYS; i++) {
    if (writes && key(i) < HEAD_K) final_state[state_column + (int64_t)key(i) * HEAD_V] = narrow<STATE_DTYPE>(S[i]);
  }
#endif
}
