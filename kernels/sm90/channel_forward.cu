// The walk over the chunks of 64 tokens of whole sequences with a gate per key channel, factors included, on compute
// capability 9.0. What sm90/channel_factors.cu and sm90/training.cu compute in two kernels is one here, for calls whose
// sequences, or segments, and heads fill the multiprocessors: nothing but inputs and results touches global memory. Per
// chunk, with G the running sum of g, S the state, b = beta, tokens as rows, and <x_i, k_j>_D = sum of x_i e^(G_i -
// G_j) k_j:
//
//   M = <K, K>_D below its diagonal     core = -M (I + diag(b) M)^-1     Pqk = <Q, K>_D     K~ = e^G K     Q~ = e^G Q
//   R = V - K~ S     N^ = R + core (b R)     N = b N^     O = scale (Q~ S + Pqk N)
//   S' = e^(G_C) S + (e^(G_C - G) K)^T N
//
// A block has a sequence and value head, or with CUT a segment of one that begins from zero, where gates and keys
// forget what came before (sm90/channel_forward/lead.cuh). Two warps sum gates. Two warpgroups walk, with 64 value
// channels of S^T each in accumulators; before a chunk they scale the rows of the next one, in the place of K, Q and
// sums, half of the key channels each. Of what they leave four warps make M, Pqk, K~ and Q~; one of them brings V to
// where O has just left, and sends O. With CUT these four scale rows, and walkers bring V for themselves. Two load K
// and Q and solve the core in the place of M. mbarriers hand stages over. Roles: sm90/channel_forward/.
//
// Of ragged sequences the last chunk's rows past the end are another's: those who read them first make zeros of K and V
// there, and O leaves row by row. A call with a sequence of more than `most` chunks, whose block would be walking
// when all others are done, is declined: every block sees that, one says it to the kernels launched for that, and all
// leave.
//
// What leads from block to block and from chunk to chunk are powers of two (sm90/channel_forward/gates.cuh), the state
// in units of its own, so that rows are rounded once.
//
// Numbers: S in float, never rounded between chunks; operands of products are rounded to DTYPE, those of pairs within
// blocks of 16 tokens included, sums are float; the inverse as in tiles/unit_inverse.cuh, its merges in one term of
// bf16, in three of f16.
//
// Macros: DTYPE (bf16 or f16), GATE (float or DTYPE), HEAD_K and HEAD_V (65 to 128, multiples of 8), CHUNK (64),
// HAS_GATE (2), VARLEN, STATE_VK; CUT, of sequences of one length and bf16; IF_DECLINED (leaves at once if segments
// were walked). Grid: N * HV blocks of 512 threads, with CUT B * segments * HV. Shared memory: two stages of K and Q,
// three of the sums of gates, of Pqk and of powers of two; V and O; pairs of blocks with themselves; see
// cupy_delta/cuda/sm90/channel_whole.py.
#include "sm90/channel_forward/factors.cuh"
#include "sm90/channel_forward/solve.cuh"
#include "sm90/channel_forward/ragged.cuh"
#if CUT
#include "sm90/channel_forward/lead.cuh"
#else
#include "sm90/channel_forward/walk.cuh"
template <class Role>
PRIM void in_parts(const Shared&, const Work& work, const Role& role) {
  role(work);
}
#endif

// From the state that enters to the one that leaves, 64 value channels of it.
PRIM void walk(const Shared& s, const Work& work, const Rows& o, const TensorMap* v, const float* initial, float* final,
               float scale) {
  more_registers<MATH_REGISTERS>();
  const int warpgroup = uniform(threadIdx.x / 128), thread = threadIdx.x % 128;
  const Part part = {warpgroup * 64, work.hv, work.HV, warpgroup, thread};
  const int value = part.column + part.warp() * 16, lane = part.lane();
  const int64_t state = ((int64_t)work.n * work.HV + work.hv) * HEAD_K * HEAD_V;
  float S[K_TILES][4];
  clear(S);
  if (initial != nullptr && work.begins) {
#pragma unroll
    for (int j = 0; j < K_TILES; j++) load_state(S[j], initial + state, value, j * 8, lane);
  }
  in_parts(s, work, [&](const Work& work) {
    Walker walker = {s, work, o, v, part, scale, S};
#if CUT
    if (part.thread == 0) walker.ask_values(0);
    Place place;
    if (work.lead > 0 && !LeadWalker{walker, s, work, part}.walk(place) && lane == 0) atomicAdd(work.declined, 1);
    walker.walk(place);
#else
    walker.walk_and_scale();
#endif
    scale_columns(S, s.units, lane);
  });
  if (!work.ends) return;
#pragma unroll
  for (int j = 0; j < K_TILES; j++) store_state(final + state, S[j], value, j * 8, lane);
}

// The last warpgroup.
PRIM void supply(const Shared& s, const Work& work, const TensorMap* q, const TensorMap* k, const GATE* g,
                 const float* beta) {
  fewer_registers<OTHER_REGISTERS>();
  const int warp = uniform(threadIdx.x / 32) % 4, lane = threadIdx.x % 32;
  in_parts(s, work, [&](const Work& work) {
    const int64_t first = work.sequence.first * work.HV + work.hv;
    if (warp < 2)
      GateWarp{s, work, g + first * HEAD_K, beta + first, warp, lane}.run();
    else
      solve_chunks(s, work, q, k, warp - 2, lane);
  });
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    channel_forward_hopper(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                           const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap o_map,
                           const float* beta, const GATE* g, const float* initial_state, float* final_state,
#if IF_DECLINED
                           const int* declined,
#endif
#if CUT
                           const int* leads, DTYPE* lead_p, int* declined, int segments, int first, int length,
#endif
#if VARLEN
                           const int64_t* cu_seqlens, DTYPE* o, int* declined, int N, int most,
#endif
                           float scale, int T, int H, int HV) {
#if CUT
  const int longest = longest_lead(leads, gridDim.x / segments * (segments - 1));
  if (longest < 0) {
    if (blockIdx.x == 0 && threadIdx.x == 0) atomicAdd(declined, 1);  // one says it for all
    return;
  }
#elif IF_DECLINED
  if (*declined == 0) return;
#endif
#if VARLEN
  const bool declines = longest_sequence(cu_seqlens, N, T) > most * CHUNK;
  if (blockIdx.x == 0 && threadIdx.x == 0) *declined = declines;
  if (declines) return;
#else
  const int64_t* const cu_seqlens = nullptr;
  DTYPE* const o = nullptr;
#endif
  const int warpgroup = uniform(threadIdx.x / 128);
  DynSmem smem;
  const Shared s = take_shared(smem);
  smem.all_taken(SHARED_BYTES);
#if CUT
  Work work = find_work(T, H, HV, {segments, first, length}, leads, longest, s);
  work.declined = declined, work.p = (uint4*)lead_p + blockIdx.x * K_STEPS * 128 * MATH;
#else
  const Work work = find_work(cu_seqlens, T, H, HV);
#endif
  if (VARLEN && work.chunks == 0) return keep_state(initial_state, final_state);
  if (threadIdx.x == 0) init_barriers(s);
  // Zeros of Pqk above its blocks, which stay.
  for (int i = threadIdx.x; i < STAGES * TILE / 8; i += THREADS) *(uint4*)&s.p[i * 8] = {};
  async_proxy_fence();
  __syncthreads();
  if (warpgroup < MATH) {
    walk(s, work, {&o_map, o}, &v_map, initial_state, final_state, scale);
  } else if (warpgroup == MATH) {
    fewer_registers<FACTOR_REGISTERS>();
    in_parts(s, work, [&](const Work& work) {
      make_factors(s, work, {s, work, &v_map, &o_map}, uniform(threadIdx.x / 32) % 4, threadIdx.x % 32);
    });
  } else {
    supply(s, work, &q_map, &k_map, g, beta);
  }
}
