// The walk over the chunks of a sequence: state pass and, fused with it, the output. Per chunk, with S the state,
// core, Pqk and decays from factors.cu, G the running sum of g (all decays 1 without a gate), tokens as rows:
//
//   R = V - e^G K S       N^ = R + core (b R)       N = b N^       O = scale (e^G Q S + Pqk N)
//   S' = e^(G_C) S + (e^(G_C - G) K)^T N
//   FROM_FACTORS:  N = U - W S,  S' as above        the building block: W holds e^G, no output
//
// A long sequence of few heads is cut into SEGMENTS. TRANSFER walks all but the last from zero and, with ZERO_V, from
// the identity: what is left is H and P of S -> P S + H. segment_states.cu joins them to the states that enter the
// segments, from which the walk with SEGMENTS goes through all of them at once.
//
// Numbers: the state lives in float accumulators and is never rounded between chunks; operands of products are
// rounded to DTYPE (S, b R and N included), sums are float (float: 3xTF32). Everything is held transposed, rows =
// value channels: then S^T, R^T and N^T are left operands straight from their accumulators.
//
// Macros: DTYPE, HEAD_K, HEAD_V, CHUNK, HAS_GATE, VARLEN, STATE_VK (layout of initial and final state),
// FROM_FACTORS, ZERO_V (no values, from the identity: a transfer's P), SEGMENTS, TRANSFER, WRITE_STATES (the state
// entering each chunk, in STATES_DTYPE, and per token N^: states (V, K) for backward_chunk.cu; FROM_FACTORS: N, and
// states (K, V)), WARPS, ROW_TILES (16-row tiles of value channels per warp). Grid: N * segments walked * HV * slices
// blocks of 32 WARPS threads; a slice is 16 ROW_TILES WARPS value channels. Shared memory: two stages of K, Q (or W)
// and V tiles, core, Pqk, beta and decays of a chunk; see cupy_delta/cuda/portable/forward.py.
#include "tiles/decay.cuh"
#include "tiles/fragments.cuh"
#include "tiles/load.cuh"
#include "tiles/sequence.cuh"
#include "tiles/store.cuh"

#define WITH_OUTPUT (!FROM_FACTORS && !TRANSFER)

typedef Mma<DTYPE> Product;
constexpr int THREADS = 32 * WARPS, SLICE = 16 * ROW_TILES * WARPS;
// Blocks per multiprocessor: all registers for two tiles, where shared memory holds no second block, and where the
// compiler would rather spill; else as it sees fit.
constexpr bool SPILLS = sizeof(DTYPE) == 4 && (HEAD_K <= 64 || (KSM >= 1200 && FROM_FACTORS));
constexpr int BLOCKS = ROW_TILES == 2 || (KSM >= 1200 && sizeof(DTYPE) == 2) || SPILLS ? 1 : 0;
constexpr int KP = padded(HEAD_K), SLICES = (padded(HEAD_V) + SLICE - 1) / SLICE;
constexpr int K_PITCH = pitch_of<DTYPE>(KP), V_PITCH = pitch_of<DTYPE>(SLICE), C_PITCH = pitch_of<DTYPE>(CHUNK);
constexpr int C_TILES = CHUNK / 8, K_TILES = KP / 8;
constexpr int WALKED = TRANSFER ? SEGMENTS - 1 : SEGMENTS;  // of each sequence's segments

struct Stage {
  DTYPE *k, *q_or_w, *v, *core, *p;
  float* beta;
  DecayFactors decays;
};

PRIM Stage take_stage(DynSmem& smem) {
  Stage s = {};
  s.k = smem.take<DTYPE>(CHUNK * K_PITCH, "k");
#if !TRANSFER
  s.q_or_w = smem.take<DTYPE>(CHUNK * K_PITCH, "q or w");
#endif
  s.v = smem.take<DTYPE>(CHUNK * V_PITCH, "v");
#if !FROM_FACTORS
  s.core = smem.take<DTYPE>(CHUNK * C_PITCH, "core");
#if WITH_OUTPUT
  s.p = smem.take<DTYPE>(CHUNK * C_PITCH, "p");
#endif
  s.beta = smem.take<float>(CHUNK, "beta");
#endif
  s.decays = DecayFactors::take(smem);
  return s;
}

// R[m] = S[m] rows^T and, in the same pass over S, O[m] = S[m] queries^T, for CHUNK x K tiles; 16 x CHUNK each.
PRIM void multiply_state(float (&R)[ROW_TILES][C_TILES][4], float (&O)[ROW_TILES][C_TILES][4],
                         const float (&S)[ROW_TILES][K_TILES][4], const DTYPE* rows, const DTYPE* queries, int lane) {
#pragma unroll
  for (int m = 0; m < ROW_TILES; m++) {
    clear(R[m]);
    clear(O[m]);
  }
#pragma unroll
  for (int step = 0; step < KP / Product::DEPTH; step++) {
    Product::order_loads();
    typename Product::A a[ROW_TILES];
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) Product::from_sums(a[m], S[m], step);
#pragma unroll
    for (int j = 0; j < CHUNK / 16; j++) {
      const int at = j * 16 * K_PITCH + step * Product::DEPTH;
      typename Product::B b;
      Product::load_b(b, rows + at, K_PITCH, lane);
#pragma unroll
      for (int m = 0; m < ROW_TILES; m++) Product::multiply(R[m][2 * j], R[m][2 * j + 1], a[m], b);
      if (queries == nullptr) continue;
      Product::load_b(b, queries + at, K_PITCH, lane);
#pragma unroll
      for (int m = 0; m < ROW_TILES; m++) Product::multiply(O[m][2 * j], O[m][2 * j + 1], a[m], b);
    }
  }
}

// d[m] (16 x CHUNK each) += rows[m] L^T for lower triangular L: column tiles before the step's are zero.
PRIM void multiply_lower(float (&d)[ROW_TILES][C_TILES][4], const float (&rows)[ROW_TILES][C_TILES][4], const DTYPE* L,
                         int lane) {
#pragma unroll
  for (int k = 0; k < CHUNK / Product::DEPTH; k++) {
    Product::order_loads();
    typename Product::A a[ROW_TILES];
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) Product::from_sums(a[m], rows[m], k);
#pragma unroll
    for (int n = k * Product::DEPTH / 16; n < CHUNK / 16; n++) {
      typename Product::B b;
      Product::load_b(b, L + n * 16 * C_PITCH + k * Product::DEPTH, C_PITCH, lane);
#pragma unroll
      for (int m = 0; m < ROW_TILES; m++) Product::multiply(d[m][2 * n], d[m][2 * n + 1], a[m], b);
    }
  }
}

// out[token][channel] for the channels of this warp.
PRIM void write_rows(DTYPE* out, int64_t stride, const float (&d)[ROW_TILES][C_TILES][4], int value, int tokens,
                     int lane) {
#pragma unroll
  for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
    for (int j = 0; j < C_TILES; j++)
      store_transposed<DTYPE, HEAD_V>(out + m * 16 + j * 8 * stride, stride, d[m][j], HEAD_V - value - m * 16,
                                      tokens - j * 8, lane);
}

// S = 1 on the diagonal of the rows from `value` on.
PRIM void set_identity(float (&S)[K_TILES][4], int value, int lane) {
#pragma unroll
  for (int j = 0; j < K_TILES; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) S[j][i] = value + sum_row(lane, i) == sum_column(lane, j, i) ? 1.0f : 0.0f;
}

// What all blocks of a launch share.
struct Inputs {
  const DTYPE *q_or_w, *k, *v, *core, *p;
  const float* beta;
  const float2* decays;
};

PRIM void load_chunk(const Stage& s, const Inputs& in, int64_t first, int tokens, int h, int hv, int slice, int H,
                     int HV, int thread) {
  const int64_t key = first * H + h, value = first * HV + hv;
  const int width = min(SLICE, HEAD_V - slice * SLICE);
  load_tile<DTYPE, CHUNK, KP, HEAD_K, THREADS>(s.k, in.k + key * HEAD_K, (int64_t)H * HEAD_K, tokens, HEAD_K, thread);
#if FROM_FACTORS
  load_tile<DTYPE, CHUNK, KP, HEAD_K, THREADS>(s.q_or_w, in.q_or_w + value * HEAD_K, (int64_t)HV * HEAD_K, tokens,
                                               HEAD_K, thread);
#elif WITH_OUTPUT
  load_tile<DTYPE, CHUNK, KP, HEAD_K, THREADS>(s.q_or_w, in.q_or_w + key * HEAD_K, (int64_t)H * HEAD_K, tokens, HEAD_K,
                                               thread);
  load_tile<DTYPE, CHUNK, CHUNK, CHUNK, THREADS>(s.p, in.p + value * CHUNK, (int64_t)HV * CHUNK, tokens, CHUNK, thread);
#endif
#if !FROM_FACTORS
  load_tile<DTYPE, CHUNK, CHUNK, CHUNK, THREADS>(s.core, in.core + value * CHUNK, (int64_t)HV * CHUNK, tokens, CHUNK,
                                                 thread);
  load_column<CHUNK, THREADS>(s.beta, in.beta + value, HV, tokens, thread);
#endif
  s.decays.load<THREADS>(in.decays + value, HV, tokens, thread);
#if !ZERO_V
  load_tile<DTYPE, CHUNK, SLICE, HEAD_V, THREADS>(s.v, in.v + value * HEAD_V + slice * SLICE, (int64_t)HV * HEAD_V,
                                                  tokens, width, thread);
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    forward(const DTYPE* q_or_w, const DTYPE* k, const DTYPE* v, const DTYPE* core, const DTYPE* p, const float* beta,
            const float2* decays, const float* initial_state, const int64_t* cu_seqlens, DTYPE* o, float* final_state,
            STATES_DTYPE* states, DTYPE* corrections, float scale, int T, int H, int HV) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int slice = blockIdx.x % SLICES, hv = blockIdx.x / SLICES % HV, part = blockIdx.x / (SLICES * HV);
  const int n = part / WALKED, segment = part % WALKED, h = hv / (HV / H);
  const int row = warp * ROW_TILES * 16, value = slice * SLICE + row;  // first value channel of this warp
  const Sequence sequence = find_segment<CHUNK>(cu_seqlens, n, Cut{SEGMENTS}, segment, T);
  const int chunks = (sequence.tokens + CHUNK - 1) / CHUNK;
  const int64_t entering_at = ((int64_t)part * HV + hv) * HEAD_K * HEAD_V;
  const Inputs inputs = {q_or_w, k, v, core, p, beta, decays};

  DynSmem smem;
  Stage first_stage = take_stage(smem), second_stage = take_stage(smem);
  smem.all_taken(SHARED_BYTES);

  float S[ROW_TILES][K_TILES][4];
#pragma unroll
  for (int m = 0; m < ROW_TILES; m++) {
    clear(S[m]);
#if ZERO_V
    set_identity(S[m], value + m * 16, lane);
#else
    if (initial_state != nullptr) {
#pragma unroll
      for (int j = 0; j < K_TILES; j++) load_state(S[m][j], initial_state + entering_at, value + m * 16, j * 8, lane);
    }
#endif
  }

  if (chunks > 0)
    load_chunk(first_stage, inputs, sequence.first, min(sequence.tokens, CHUNK), h, hv, slice, H, HV, thread);
  cp_async_commit();
  for (int c = 0; c < chunks; c++) {
    const Stage stage = c % 2 ? second_stage : first_stage, next = c % 2 ? first_stage : second_stage;
    const int64_t token = sequence.first + (int64_t)c * CHUNK;
    const int tokens = min(sequence.tokens - c * CHUNK, CHUNK);
    // This stage has arrived, and everyone is done with the other.
    cp_async_wait<0>();
    __syncthreads();
    if (c + 1 < chunks)
      load_chunk(next, inputs, token + CHUNK, min(sequence.tokens - (c + 1) * CHUNK, CHUNK), h, hv, slice, H, HV,
                 thread);
    cp_async_commit();

#if WRITE_STATES
    STATES_DTYPE* state = states + ((sequence.slot + c) * HV + hv) * HEAD_K * HEAD_V;
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
      for (int j = 0; j < K_TILES; j++) {
        const int channel = value + m * 16, key = j * 8;
#if FROM_FACTORS
        store_transposed<STATES_DTYPE, HEAD_V>(state + key * HEAD_V + channel, HEAD_V, S[m][j], HEAD_V - channel,
                                               HEAD_K - key, lane);
#else
        store_rows<STATES_DTYPE, HEAD_K>(state + channel * HEAD_K + key, S[m][j], HEAD_V - channel, HEAD_K - key, lane);
#endif
      }
#endif

    float R[ROW_TILES][C_TILES][4], N[ROW_TILES][C_TILES][4], O[ROW_TILES][C_TILES][4];
#if FROM_FACTORS
    multiply_state(R, O, S, stage.q_or_w, nullptr, lane);
#else
    multiply_state(R, O, S, stage.k, WITH_OUTPUT ? stage.q_or_w : nullptr, lane);
#endif

    // N^ starts as R = V - e^G K S, and R becomes b R; or N = U - W S.
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
      for (int j = 0; j < C_TILES; j += 2) {
        float u[2][4];
#if ZERO_V
        clear(u);
#else
        Product::read_transposed(u[0], u[1], stage.v + j * 8 * V_PITCH + row + m * 16, V_PITCH, lane);
#endif
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            float& r = R[m][j + half][i];
#if FROM_FACTORS
            N[m][j + half][i] = u[half][i] - r;
#else
            const int t = sum_column(lane, j + half, i);
            r *= stage.decays.read(t);
            O[m][j + half][i] *= stage.decays.read(t);
            N[m][j + half][i] = u[half][i] - r;
            r = stage.beta[t] * (u[half][i] - r);
#endif
          }
      }
#if WITH_OUTPUT || WRITE_STATES
    const int64_t out = (token * HV + hv) * HEAD_V + value, stride = (int64_t)HV * HEAD_V;
#endif
#if !FROM_FACTORS
    multiply_lower(N, R, stage.core, lane);
#endif
#if WRITE_STATES
    write_rows(corrections + out, stride, N, value, tokens, lane);
#endif
#if !FROM_FACTORS
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
      for (int j = 0; j < C_TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) N[m][j][i] *= stage.beta[sum_column(lane, j, i)];
#if WITH_OUTPUT
    multiply_lower(O, N, stage.p, lane);
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
      for (int j = 0; j < C_TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) O[m][j][i] *= scale;
    write_rows(o + out, stride, O, value, tokens, lane);
#endif
#endif

    // S' = e^(G_C) S + (e^(G_C - G) K)^T N
    const float carry = stage.decays.carry(tokens);
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
      for (int j = 0; j < K_TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) S[m][j][i] *= carry;
#pragma unroll
      for (int j = 0; j < C_TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) N[m][j][i] *= stage.decays.write(sum_column(lane, j, i));
    }
#pragma unroll
    for (int step = 0; step < CHUNK / Product::DEPTH; step++) {
      Product::order_loads();
      typename Product::A a[ROW_TILES];
#pragma unroll
      for (int m = 0; m < ROW_TILES; m++) Product::from_sums(a[m], N[m], step);
#pragma unroll
      for (int j = 0; j < KP / 16; j++) {
        typename Product::B b;
        Product::load_b_transposed(b, stage.k + step * Product::DEPTH * K_PITCH + j * 16, K_PITCH, lane);
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++) Product::multiply(S[m][2 * j], S[m][2 * j + 1], a[m], b);
      }
    }
  }
  cp_async_wait<0>();

  // A transfer leaves a state per segment, a whole walk one per sequence: the last segment's.
  if (!TRANSFER && segment < SEGMENTS - 1) return;
  const int64_t leaving_at = TRANSFER ? entering_at : ((int64_t)n * HV + hv) * HEAD_K * HEAD_V;
#pragma unroll
  for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
    for (int j = 0; j < K_TILES; j++) store_state(final_state + leaving_at, S[m][j], value + m * 16, j * 8, lane);
}
