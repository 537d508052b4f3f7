// The delta rule token by token, in the order of the definition, with e^g of the head or of each key channel:
//
//   S <- e^g S,   r = v - S^T k,   S <- S + k (beta r)^T,   o = scale S^T q
//
// Numbers: float (double for DTYPE double) throughout, states too; sums over a thread's key channels in ascending order
// and then over PARTS threads in a fixed tree. q and k are normalised in the same precision with L2NORM, rows whose
// squares overflow in a smaller unit.
//
// Macros: DTYPE, HEAD_K, HEAD_V, HAS_GATE (1 per head, 2 per key channel), VARLEN, STATE_VK, L2NORM, BETA_PER_VALUE,
// PARTS (threads that share a value channel's keys, a power of two up to 32), CHANNELS (value channels per block;
// CHANNELS * PARTS is a multiple of 32). Grid: N * HV * ceil(HEAD_V / CHANNELS) blocks of CHANNELS * PARTS threads, one
// value channel each. Shared memory: q, k and decays per channel of a token, HEAD_K values each, twice (one set is read
// while the other is written).
#include "tiles/sequence.cuh"
#include "tiles/token.cuh"

typedef Sum<DTYPE>::type real;
constexpr int THREADS = CHANNELS * PARTS;
constexpr int SLICES = (HEAD_V + CHANNELS - 1) / CHANNELS;
constexpr int KEYS = (HEAD_K + PARTS - 1) / PARTS;
constexpr bool PER_CHANNEL = HAS_GATE == 2;
constexpr int ROWS = PER_CHANNEL ? 3 : 2;  // of a token in shared memory

PRIM real sum_over_parts(real x) {
#pragma unroll
  for (int bits = PARTS / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(~0u, x, bits);
  return x;
}

// Of q or k of a token, of which this thread has every PARTS-th element from `part` on.
PRIM Norm<real> norm_of_row(const real* row, int part) {
  return norm_of<DTYPE, real>([&](real unit) {
    real squares = 0;
#pragma unroll
    for (int i = 0; i < KEYS; i++) {
      const int c = i * PARTS + part;
      const real x = c < HEAD_K ? row[c] * unit : (real)0;
      squares += x * x;
    }
    return sum_over_parts(squares);
  });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    recurrent(const DTYPE* q, const DTYPE* k, const DTYPE* v, const real* beta, const real* g,
              const real* initial_state, const int64_t* cu_seqlens, DTYPE* o, real* final_state, real scale, int T,
              int H, int HV) {
  const int thread = threadIdx.x, part = thread % PARTS, slice = blockIdx.x % SLICES;
  const int channel = slice * CHANNELS + thread / PARTS;
  const int hv = blockIdx.x / SLICES % HV;
  const int n = blockIdx.x / (SLICES * HV), h = hv / (HV / H);
  const bool live = channel < HEAD_V, writes_o = live && part == 0;
  DynSmem smem;
  real* rows = smem.take<real>(2 * ROWS * HEAD_K, "rows");
  smem.all_taken(SHARED_BYTES);

  const Sequence sequence = find_sequence<1>(cu_seqlens, n, T);
  // The i-th key channel of this thread, and where the state has it.
  auto key = [&](int i) { return i * PARTS + part; };
  auto state_at = [&](int i) {
    const int64_t state = ((int64_t)n * HV + hv) * HEAD_K * HEAD_V;
    return state + (STATE_VK ? channel * HEAD_K + key(i) : key(i) * HEAD_V + channel);
  };

  real S[KEYS] = {};
#pragma unroll
  for (int i = 0; i < KEYS; i++)
    if (live && key(i) < HEAD_K && initial_state != nullptr) S[i] = initial_state[state_at(i)];

  for (int t = 0; t < sequence.tokens; t++) {
    const int64_t token = sequence.first + t, key_row = (token * H + h) * HEAD_K, row = token * HV + hv;
    const real value = live ? widen(v[row * HEAD_V + channel]) : (real)0;
#if BETA_PER_VALUE
    const real strength = live ? beta[row * HEAD_V + channel] : (real)0;
#else
    const real strength = beta[row];
#endif
    const real decay = HAS_GATE == 1 ? power(g[row]) : (real)1;
    real *token_q = rows + t % 2 * ROWS * HEAD_K, *token_k = token_q + HEAD_K, *token_decay = token_k + HEAD_K;
    for (int c = thread; c < HEAD_K; c += THREADS) {
      token_q[c] = widen(q[key_row + c]);
      token_k[c] = widen(k[key_row + c]);
      if (PER_CHANNEL) token_decay[c] = power(g[row * HEAD_K + c]);
    }
    __syncthreads();

    Norm<real> q_norm = {1, 1}, k_norm = {1, 1};
    if constexpr (L2NORM) q_norm = norm_of_row(token_q, part), k_norm = norm_of_row(token_k, part);
    real recalled = 0;
#pragma unroll
    for (int i = 0; i < KEYS; i++) {
      const int c = key(i);
      if (c >= HEAD_K) continue;
      S[i] *= PER_CHANNEL ? token_decay[c] : decay;
      recalled += S[i] * (token_k[c] * k_norm.unit);
    }
    const real written = strength * (value - k_norm.r * sum_over_parts(recalled)) * k_norm.r;
    real out = 0;
#pragma unroll
    for (int i = 0; i < KEYS; i++) {
      const int c = key(i);
      if (c >= HEAD_K) continue;
      S[i] += token_k[c] * k_norm.unit * written;
      out += S[i] * (token_q[c] * q_norm.unit);
    }
    out = sum_over_parts(out) * (scale * q_norm.r);
    if (writes_o) o[row * HEAD_V + channel] = narrow<DTYPE>(out);
  }

#pragma unroll
  for (int i = 0; i < KEYS; i++)
    if (live && key(i) < HEAD_K) final_state[state_at(i)] = S[i];
}
