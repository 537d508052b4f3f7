// The walk over the chunks of 64 tokens of a sequence, factors included, on compute capability 9.0. Per chunk, with S
// the state, b = beta, G the running sum of g in the chunk and D_ij = e^(G_i - G_j) for i >= j (all 1 without a gate),
// tokens as rows:
//
//   A = diag(b) tril(K K^T . D, -1)     T = (I + A)^-1 diag(b)     P = tril(Q K^T . D)
//   R = V - e^G K S                     N = T R                    O = scale (e^G Q S + P N)
//   S' = e^(G_C) S + (e^(G_C - G) K)^T N
//
// N in two halves, so that only 32 x 32 inverses are needed: N1 = T11 R1, N2 = T22 (R2 - M21 N1), where M21 is
// A21 without b. M21 counts to twice the digits of DTYPE, so that R2 sees what N1 does to the state.
//
// What portable/factors.cu and portable/forward.cu compute in two kernels is one here: nothing but inputs and results
// touches global memory.
//
// A long sequence of few heads is cut into segments, of which a launch walks `walked` from `first` on. One with
// TRANSFER leaves what each does to a state: H, from zero, and in slices of its own P, from the identity and without V.
// With JOINS each of several starts from the state that sm90/join.cuh makes of those before it; the last one's is
// left. With KEPT a transfer leaves T of its chunks, too, so that the walk need not solve them a second time.
//
// Warpgroup 0 loads K, Q and V with TMA, some chunks ahead. The next MATH warpgroups hold 64 value channels of S^T each
// in accumulators, from which S^T, R^T and N^T are left operands of wgmma: the chain from state to state passes nothing
// through shared memory. The last SOLVERS warpgroups take turns to make T11, M21, T22 and P, a chunk or more ahead.
// mbarriers hand tiles over; every warp says for itself that it is done with one.
// With CLUSTER > 1 the blocks of a cluster, slices of one head, solve the chunks in turn and send each other the
// factors.
//
// Numbers: S in float, never rounded between chunks; operands of products are rounded to DTYPE (S, R, N, P and what T
// has below its diagonal included), sums are float; the inverse as in tiles/unit_inverse.cuh; G in double, kept as two
// floats.
//
// Macros: DTYPE (bf16 or f16), HEAD_K (up to 128) and HEAD_V, multiples of 8; CHUNK (64), HAS_GATE, VARLEN, STATE_VK,
// TRANSFER, JOINS (several segments, not with TRANSFER), KEPT (of transfers in clusters, and of the walk that joins
// them), MATH (1 or 2), SOLVERS, CLUSTER (blocks; 1 without TRANSFER), PLACED (blocks that are neighbours, else
// strangers), KEY_STAGES, VALUE_STAGES, FACTOR_STAGES. Grid: N * walked * HV * slices blocks of 128 (1 + MATH +
// SOLVERS) threads; a slice is 64 MATH value channels. Shared memory: rings of K and Q, of V, of T and P, and of A; O
// on its way out, where before, with a gate and two slices, N waits for Q S; sums of gates and decays; see
// cupy_delta/cuda/sm90/forward.py and, for the roles, sm90/forward/.
#include "sm90/forward/factors.cuh"
#include "sm90/join.cuh"
#include "sm90/forward/load.cuh"
#include "sm90/sums.cuh"
#include "tiles/store.cuh"

// The factors of the columns in which this thread has sums.
template <int TILES>
PRIM void load_factors(float2 (&f)[TILES], const float* factor, int lane) {
#pragma unroll
  for (int j = 0; j < TILES; j++) f[j] = *(const float2*)&factor[sum_column(lane, j, 0)];
}
// Column t of d, times factor t.
template <int TILES>
PRIM void scale_columns(float (&d)[TILES][4], const float2 (&f)[TILES]) {
#pragma unroll
  for (int j = 0; j < TILES; j++) d[j][0] *= f[j].x, d[j][1] *= f[j].y, d[j][2] *= f[j].x, d[j][3] *= f[j].y;
}
template <int TILES>
PRIM void scale_columns(float (&d)[TILES][4], const float* factor, int lane) {
  float2 f[TILES];
  load_factors(f, factor, lane);
  scale_columns(d, f);
}

// Half of `a`, from four column tiles.
PRIM void round_half(uint32_t (&a)[4], const float (&d)[4][4], int half) {
#pragma unroll
  for (int i = 0; i < 4; i++) a[i] = pack2<DTYPE>(d[2 * half + i / 2][i % 2 * 2], d[2 * half + i / 2][i % 2 * 2 + 1]);
}
// d += x L^T, or with a second part of L d -= x (L + rest)^T, for 32 tokens, L and rest in swizzled tiles; x is left
// rounded in a0 and a1. `meanwhile` may send more products after it, of which PENDING groups are not waited for.
template <int PENDING, class F>
PRIM void multiply_half(float (&d)[4][4], const float (&x)[4][4], const DTYPE* L, const DTYPE* rest, uint32_t (&a0)[4],
                        uint32_t (&a1)[4], F meanwhile) {
  round_half(a0, x, 0);
  round_half(a1, x, 1);
  pin(a0);
  pin(a1);
  pin(d);
  wgmma_fence();
  if (rest == nullptr) {
    wgmma<DTYPE, false>(d, a0, tile_descriptor(L, 16, 1024), true);
    wgmma<DTYPE, false>(d, a1, tile_descriptor(L + 16, 16, 1024), true);
  } else {
    wgmma<DTYPE, false, true>(d, a0, tile_descriptor(L, 16, 1024), true);
    wgmma<DTYPE, false, true>(d, a1, tile_descriptor(L + 16, 16, 1024), true);
    wgmma<DTYPE, false, true>(d, a0, tile_descriptor(rest, 16, 1024), true);
    wgmma<DTYPE, false, true>(d, a1, tile_descriptor(rest + 16, 16, 1024), true);
  }
  wgmma_commit();
  meanwhile();
  wgmma_wait<PENDING>();
  pin(d);
}

// The 16 value channels of a warp for the tokens of a chunk, in a box of its own: rows of 32 bytes, swizzled.
PRIM DTYPE* staged(DTYPE* box, int token, int half) { return box + token * 16 + (half ^ token / 4 % 2) * 8; }
// To rows of (token, value head) through the box: by TMA, or one by one where what follows in memory is another
// sequence's.
PRIM void send_channels(const Rows& out, const uint32_t (&a)[4][4], DTYPE* box, const Work& work, int c, int value,
                        int HV, int lane) {
#pragma unroll
  for (int j = 0; j < 4; j++) stmatrix_x4_trans(staged(box, j * 16 + lane % 8 + lane / 16 * 8, lane / 8 % 2), a[j]);
  async_proxy_fence();
  __syncwarp();
  const int tokens = work.tokens(c);
  if (!VARLEN || tokens == CHUNK) {
    if (lane == 0) {
      tma_store(out.map, box, value, work.hv, work.start + c * CHUNK, work.batch);
      tma_store_commit();
    }
    return;
  }
  DTYPE* rows = out.rows + ((work.sequence.first + (int64_t)c * CHUNK) * HV + work.hv) * HEAD_V + value;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int token = i * 16 + lane / 2, half = lane % 2;
    if (token < tokens && value + half * 8 < HEAD_V)
      *(uint4*)&rows[token * (int64_t)HV * HEAD_V + half * 8] = *(const uint4*)staged(box, token, half);
  }
}

// Registers of a warp that wait in its box.
PRIM void park(uint4* box, const uint32_t (&a)[4][4], int lane) {
#pragma unroll
  for (int i = 0; i < 4; i++) box[i * 32 + lane] = make_uint4(a[i][0], a[i][1], a[i][2], a[i][3]);
}
PRIM void take_back(uint32_t (&a)[4][4], const uint4* box, int lane) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint4 x = box[i * 32 + lane];
    a[i][0] = x.x, a[i][1] = x.y, a[i][2] = x.z, a[i][3] = x.w;
  }
}

// Where a part of Q S begins, of four; with a gate of three, so that O is decayed while N2 is under way.
PRIM constexpr int output_step(int part) {
  return !HAS_GATE ? part * K_STEPS / 4 : part < 3 ? part * ((K_STEPS + 2) / 3) : K_STEPS;
}

// Returns the decay over all chunks, of a transfer.
PRIM float walk(const Shared& s, const Work& work, float (&S)[K_TILES][4], const Rows& o, float scale, int warpgroup,
                int HV, int thread) {
  const int warp = thread / 32, lane = thread % 32;
#if WITH_OUTPUT
  const int value = work.channel + warpgroup * 64 + warp * 16;  // first value channel of this warp
  uint32_t out[4][4];                                           // of the chunk before, or of this one
  auto box = [&] { return s.o + (warpgroup * 4 + warp) * CHUNK * 16; };
  auto box_is_free = [&] {
    if (lane == 0) tma_store_wait_read<0>();
    __syncwarp();
  };
  auto send = [&](int c) {
    // Warps send for themselves: a barrier among them would cost more here than wider boxes gain.
    box_is_free();
    send_channels(o, out, box(), work, c, value, HV, lane);
  };
#endif
  Ring<KEY_STAGES> keys;
  Ring<VALUE_STAGES> values;
  Ring<FACTOR_STAGES> factors;
  uint32_t state[K_STEPS][4], a[4][4];
  round_sums<DTYPE>(state, S);
  const int chunks = uniform(work.chunks);
  float decay = 1.0f;
  for (int c = 0; c < chunks; c++) {
    const DTYPE* k = s.k + keys.stage * KEYS;
    const DTYPE* t = s.t + factors.stage * TILE;
    // R = V - e^G K S; without a gate V is where the sums start.
    float R[8][4];
    mbarrier_wait(s.keys_full + keys.stage, keys.parity);
    const DTYPE* v = s.v + (values.stage * MATH + warpgroup) * TILE;
    if (work.values) mbarrier_wait(s.values_full + values.stage, values.parity);
#if !HAS_GATE
    clear(R);
    if (work.values) {
#pragma unroll
      for (int j = 0; j < 8; j += 2) read_box_transposed(R[j], R[j + 1], v, j * 8, warp * 16, lane);
    }
    pin(R);
#endif
    pin(state);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < K_STEPS; step++)
      wgmma<DTYPE, false, true>(R, state[step], step_along_rows<KEY_PITCH>(k, step), !HAS_GATE || step > 0);
    wgmma_commit();
#if WITH_OUTPUT
    const DTYPE *q = s.q + keys.stage * KEYS, *p = s.p + factors.stage * TILE;
    float O[8][4];
#endif
    // A part of Q S.
    auto meanwhile = [&](int part) {
#if EARLY_OUTPUT
#pragma unroll
      for (int step = output_step(part); step < output_step(part + 1); step++)
        wgmma<DTYPE, false>(O, state[step], step_along_rows<KEY_PITCH>(q, step), step > 0);
      wgmma_commit();
#endif
    };
    meanwhile(0);
    mbarrier_wait(s.factors_full + factors.stage, factors.parity);
    float2 b1[4], b2[4];
    load_factors(b1, s.beta + factors.stage * CHUNK, lane);
    load_factors(b2, s.beta + factors.stage * CHUNK + 32, lane);
#if HAS_GATE
    const float carry = s.decay[factors.stage * CHUNK + CHUNK - 1];
#if TRANSFER
    decay *= carry;
#endif
    // Products in flight have S in 16 bits.
#pragma unroll
    for (int j = 0; j < K_TILES; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) S[j][i] *= carry;
#endif
    wgmma_wait<EARLY_OUTPUT>();
    pin(R);
#if HAS_GATE
    scale_columns(R, s.decay + factors.stage * CHUNK, lane);
    if (work.values) {
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        float u[2][4];
        read_box_transposed(u[0], u[1], v, j * 8, warp * 16, lane);
#pragma unroll
        for (int i = 0; i < 4; i++) R[j][i] += u[0][i], R[j + 1][i] += u[1][i];
      }
    }
#endif
    // N = T R, by halves; T's diagonal in float. A sum of its own for R2, whose registers are otherwise R's.
    float N1[4][4], N2[4][4], R1[4][4], R2[4][4];
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) N1[j][i] = R1[j][i] = R[j][i], R2[j][i] = R[j + 4][i] + 0.0f;
    scale_columns(N1, b1);
    multiply_half<EARLY_OUTPUT>(N1, R1, t, nullptr, a[0], a[1], [&] { meanwhile(1); });
    __syncwarp();  // V is read
    if (lane == 0 && work.values) mbarrier_arrive(s.values_free + values.stage);
    multiply_half<EARLY_OUTPUT>(R2, N1, t + 32 * BOX, t + 32, a[0], a[1], [&] { meanwhile(2); });
#if HAS_GATE
    // S' = e^(G_C) S + (e^(G_C - G) N)^T K, with the decays at the tokens of N.
    uint32_t carried[4][4];
    auto carry_half = [&](int half, float (&N)[4][4]) {
      scale_columns(N, s.rest + factors.stage * CHUNK + half * 32, lane);
#pragma unroll
      for (int h = 0; h < 2; h++) round_half(carried[2 * half + h], N, h);
    };
#else
    uint32_t (&carried)[4][4] = a;
#endif
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) N2[j][i] = R2[j][i];
    scale_columns(N2, b2);
    multiply_half<EARLY_OUTPUT && !HAS_GATE>(N2, R2, t + 32 * BOX + 32, nullptr, a[2], a[3], [&] {
#if HAS_GATE
      carry_half(0, N1);
#if EARLY_OUTPUT
      wgmma_wait<1>();
      pin(O);
      scale_columns(O, s.decay + factors.stage * CHUNK, lane);
#endif
#else
      meanwhile(3);
#endif
    });
#pragma unroll
    for (int h = 0; h < 2; h++) round_half(a[2 + h], N2, h);
#if PARKED_N
    box_is_free();
    park((uint4*)box(), a, lane);
#endif
#if HAS_GATE
    carry_half(1, N2);
    pin(carried);
#endif
    pin(a);
    pin(S);
#if WITH_OUTPUT
    if (HAS_GATE && EARLY_OUTPUT) pin(O);
#endif
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++) wgmma<DTYPE, true>(S, carried[step], step_of_rows<KEY_PITCH>(k, step), true);
#if WITH_OUTPUT
#if EARLY_OUTPUT
    wgmma_commit();
#else
#pragma unroll
    for (int step = 0; step < K_STEPS; step++)
      wgmma<DTYPE, false>(O, state[step], step_along_rows<KEY_PITCH>(q, step), step > 0);
#endif
#if PARKED_N
    wgmma_commit();
    wgmma_wait<0>();
    pin(S);
    pin(O);
    round_sums<DTYPE>(state, S);
    scale_columns(O, s.decay + factors.stage * CHUNK, lane);
    take_back(a, (const uint4*)box(), lane);
    pin(a);
    pin(O);
    wgmma_fence();
#endif
#pragma unroll
    for (int step = 0; step < 4; step++) wgmma<DTYPE, false>(O, a[step], step_along_rows(p, step), true);
#endif
    wgmma_commit();
#if WITH_OUTPUT && !PARKED_N
    // The output of the chunk before, while the tensor cores are at this one.
    if (c > 0) send(c - 1);
#endif
#if EARLY_OUTPUT
    wgmma_wait<1>();
    pin(S);
    round_sums<DTYPE>(state, S);
#endif
    wgmma_wait<0>();
#if !EARLY_OUTPUT && !PARKED_N
    pin(S);
#endif
    __syncwarp();
    if (lane == 0) {
      mbarrier_arrive(s.keys_free + keys.stage);
#if CLUSTER > 1
      mbarrier_arrive_remote(s.factors_free + factors.stage, c % CLUSTER);
#else
      mbarrier_arrive(s.factors_free + factors.stage);
#endif
    }
#if !EARLY_OUTPUT && !PARKED_N
    round_sums<DTYPE>(state, S);
#endif
#if WITH_OUTPUT
    pin(O);
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) O[j][i] *= scale;
    round_sums<DTYPE>(out, O);
    if (PARKED_N) send(c);
#endif
    keys.advance(), values.advance(), factors.advance();
  }
#if WITH_OUTPUT
  if (!PARKED_N && chunks > 0) send(chunks - 1);
  if (lane == 0) tma_store_wait_read<0>();
#endif
  return decay;
}

extern "C" __global__ void CLUSTERED __launch_bounds__(THREADS, 1)
    forward_hopper(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                   const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap o_map,
#if TRANSFER || JOINS
                   const __grid_constant__ TensorMap p_map, float* h, float* decays,
#endif
#if KEPT
                   const __grid_constant__ TensorMap t_map,
#endif
                   const float* beta, const float* g, const float* initial_state, const int64_t* cu_seqlens, DTYPE* o,
                   float* final_state, float scale, int T, int H, int HV, int segments, int first_percent,
                   int last_percent, int first, int walked) {
  const int warpgroup = uniform(threadIdx.x / 128), thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const int slice = blockIdx.x % SLICES, hv = blockIdx.x / SLICES % HV, part = blockIdx.x / (SLICES * HV);
  const int n = part / walked, step = part % walked, batch = VARLEN ? 0 : n;
  const bool values = slice < VALUE_SLICES;
  const Sequence sequence =
      find_segment<CHUNK>(cu_seqlens, n, {segments, first_percent, last_percent}, first + step, T);
  Work work;
  work.sequence = sequence;
  work.chunks = (sequence.tokens + CHUNK - 1) / CHUNK;
  work.channel = (values ? slice : slice - VALUE_SLICES) * SLICE;
  work.h = hv / (HV / H), work.hv = hv, work.batch = batch;
  work.values = !TRANSFER || values;
  work.keeps = TRANSFER && KEPT && slice < CLUSTER;
  work.given = WITH_GIVEN && step < walked - 1;
  work.start = (int)(sequence.first - (int64_t)batch * T);
  work.rank = slice % CLUSTER;

  DynSmem smem;
  const Shared s = take_shared(smem);
#if JOINS
  DTYPE* buffers = s.k + JOIN_STAGE * KEYS;
  const Joins joins = take_joins(smem, p_map, h, decays, buffers, buffers + KEYS);
  uint64_t* joined = joins.joined;
#else
  uint64_t* joined = nullptr;
#endif
#if KEPT
  const TensorMap* kept = &t_map;
#else
  const TensorMap* kept = nullptr;
#endif
  if (threadIdx.x == 0) {
#if JOINS
    joins.init();
#endif
    auto solves = [&](int stage) { return stage % CLUSTER == work.rank; };
    for (int i = 0; i < KEY_STAGES; i++)
      mbarrier_init(s.keys_full + i, 1), mbarrier_init(s.keys_free + i, 4 * MATH + 4 * solves(i));
    for (int i = 0; i < VALUE_STAGES; i++)
      mbarrier_init(s.values_full + i, 1), mbarrier_init(s.values_free + i, 4 * MATH);
    for (int i = 0; i < FACTOR_STAGES; i++) {
      mbarrier_init(s.factors_full + i, !solves(i) ? 1 : work.given ? 4 + 1 : WITH_INVERTERS ? 4 + 2 : 4);
      mbarrier_init(s.factors_free + i, 4 * MATH * CLUSTER + work.keeps);
    }
    for (int i = 0; i < A_STAGES; i++) mbarrier_init(s.a_full + i, 4), mbarrier_init(s.a_free + i, 2);
    for (int i = 0; i < 2; i++) mbarrier_init(s.landed + i, 1);
    mbarrier_init_fence();
  }
  clear_factors(s, threadIdx.x);
#if CLUSTER > 1
  cluster_sync();
#else
  __syncthreads();
#endif

  if (warpgroup == 0) {
    fewer_registers<LOADER_REGISTERS>();
    if (warp == 0) load(s, {&q_map, &k_map, &v_map}, work, joined, lane);
#if WITH_GIVEN
    else if (work.given) {
      if (warp == 1 && lane == 0) load_kept(s, kept, work);
    }
#endif
#if WITH_INVERTERS
    else if (warp <= INVERTERS)
      invert(s, work, warp - 1, lane);
#endif
#if CLUSTER > 1
    else if (lane == 0 && warp == 3)
      send(s, kept, work);
    __syncwarp();
#endif
  } else if (warpgroup <= MATH) {
    more_registers<MATH_REGISTERS>();
    const int half = MATH == 1 ? 0 : warpgroup - 1;
    const int column = work.channel + half * 64, value = column + warp * 16;
    float S[K_TILES][4];
    clear(S);
#if TRANSFER
    if (!values) add_identity(S, 1.0f, value, lane);
#else
    if (initial_state != nullptr) {
      const float* initial = initial_state + ((int64_t)n * HV + hv) * HEAD_K * HEAD_V;
#pragma unroll
      for (int j = 0; j < K_TILES; j++) load_state(S[j], initial, value, j * 8, lane);
    }
#endif
#if JOINS
    join(S, joins, n * (int64_t)(walked - 1), step, column, hv, HV, half, thread);
#endif
    const float decay = walk(s, work, S, {&o_map, o}, scale, half, HV, thread);
#if TRANSFER
    // The buffers of V are free: P has none.
    DTYPE* boxes = s.v + half * K_BOXES * TILE;
    if (values)
      keep_transfer(h, S, part, hv, HV, column, thread);
    else
      send_transfer(&p_map, boxes, S, decay, column, part, hv, TRANSFER_BARRIER + half, thread);
#if HAS_GATE
    if (!values && column == 0 && thread == 0) decays[(int64_t)part * HV + hv] = decay;
#endif
#else
    (void)decay;
    // One per sequence, that of the last segment walked.
    if (step == walked - 1) {
      float* final = final_state + ((int64_t)n * HV + hv) * HEAD_K * HEAD_V;
#pragma unroll
      for (int j = 0; j < K_TILES; j++) store_state(final, S[j], value, j * 8, lane);
    }
#endif
  } else {
    fewer_registers<SOLVER_REGISTERS>();
    const int solver = SOLVERS == 1 ? 0 : warpgroup - 1 - MATH;
#if WITH_GIVEN
    if (work.given)
      solve<true>(s, work, solver, beta, g, HV, thread);
    else
#endif
      solve<false>(s, work, solver, beta, g, HV, thread);
  }
#if CLUSTER > 1
  // No block leaves while others still read what it sends or say that they are done.
  cluster_sync();
#endif
}
