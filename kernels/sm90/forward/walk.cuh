// The walkers of sm90/forward.cu: a warpgroup holds 64 value channels of S^T in accumulators and takes them from chunk
// to chunk. correct: R = V - K S, what the state got wrong. write: N = X (b R). update: S += K^T N, and O = Q S + P N.
// Rows of tokens are in units of 2^(G - F), see tokens.cuh, so a chunk that is not paired has no decay in its products.
#pragma once
#include "sm90/forward/tokens.cuh"
#include "sm90/sums.cuh"

// Columns of two tiles, times factors of their tokens.
PRIM void scale_tiles(float (&d0)[4], float (&d1)[4], float4 f) {
  d0[0] *= f.x, d0[1] *= f.y, d0[2] *= f.x, d0[3] *= f.y;
  d1[0] *= f.z, d1[1] *= f.w, d1[2] *= f.z, d1[3] *= f.w;
}
// Two tiles from what ldmatrix gives of them.
PRIM void widen_tiles(float (&d0)[4], float (&d1)[4], const uint32_t (&a)[4]) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float2 x0 = unpack2<DTYPE>(a[h]), x1 = unpack2<DTYPE>(a[2 + h]);
    d0[2 * h] = x0.x, d0[2 * h + 1] = x0.y;
    d1[2 * h] = x1.x, d1[2 * h + 1] = x1.y;
  }
}
template <int TILES>
PRIM void scale_all(float (&d)[TILES][4], float factor) {
#pragma unroll
  for (int j = 0; j < TILES; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) d[j][i] *= factor;
}

// Half of `a`, from four column tiles.
PRIM void round_half(uint32_t (&a)[4], const float (&d)[4][4], int half) {
#pragma unroll
  for (int i = 0; i < 4; i++) a[i] = pack2<DTYPE>(d[2 * half + i / 2][i % 2 * 2], d[2 * half + i / 2][i % 2 * 2 + 1]);
}
// d += x L^T, or with REST d -= x (L + rest)^T, for 32 tokens, x in a0 and a1, L by descriptors of swizzled tiles, rest
// REST bytes from L. `meanwhile` may send more products after it, of which PENDING groups are not waited for.
template <int PENDING, int REST, class F>
PRIM void multiply_rounded(float (&d)[4][4], uint64_t L, uint32_t (&a0)[4], uint32_t (&a1)[4], F meanwhile) {
  pin(a0);
  pin(a1);
  pin(d);
  wgmma_fence();
#pragma unroll
  for (int part = 0; part < (REST == 0 ? 1 : 2); part++) {
    wgmma<DTYPE, false, REST != 0>(d, a0, further(L, part * REST), true);
    wgmma<DTYPE, false, REST != 0>(d, a1, further(L, part * REST + 32), true);
  }
  wgmma_commit();
  meanwhile();
  wgmma_wait<PENDING>();
  pin(d);
}
// With x to be rounded; it is left so in a0 and a1.
template <int PENDING, int REST, class F>
PRIM void multiply_half(float (&d)[4][4], const float (&x)[4][4], uint64_t L, uint32_t (&a0)[4], uint32_t (&a1)[4],
                        F meanwhile) {
  round_half(a0, x, 0);
  round_half(a1, x, 1);
  multiply_rounded<PENDING, REST>(d, L, a0, a1, meanwhile);
}

// Where a token's half of the 16 value channels of a warp lies in its box: rows of 32 bytes, swizzled.
PRIM int staged(int token, int half) { return token * 16 + (half ^ token / 4 % 2) * 8; }

// In bytes, from X11 to M21 and to what rounding left out of that; to the second half of a chunk's keys, too.
constexpr int BELOW = 32 * BOX * sizeof(DTYPE), BESIDE = 32 * sizeof(DTYPE);

struct Walker {
  const Shared& s;
  const Work& work;
  const Rows& o;
  float (&S)[K_TILES][4];
  const int warpgroup, warp, lane;
  const float scale;
  // Where this thread finds its part: of factors, of a box of V, and of its warp's box of O. All else is constants.
  const int at_factors = factor_row(lane % 4);
  const int at_values = swizzled(lane % 8 + lane / 16 * 8, warp * 16 + lane / 8 % 2 * 8);
  const int at_output = staged(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  Ring<KEY_STAGES> keys;
  Ring<VALUE_STAGES> values;
  Ring<FACTOR_STAGES> factors;
  // Left operands: S, N; and what leaves of the chunk before, or of this one.
  uint32_t state[K_STEPS][4], a[4][4], out[4][4];
  float R[8][4], O[8][4];
  // Of the chunk that comes next: see ChunkGates. carry: of this one; decay: over all of them.
  bool paired;
  float forget, next_carry, enter, carry, decay;
  float4 beta[4], up[4];  // of the tokens in whose columns this thread has sums

  // Over all chunks; returns what gates leave of the state. A branch beside products under way would cost a third of a
  // chunk, so a paired chunk has a walk of its own.
  PRIM float walk() {
    const int chunks = uniform(work.chunks);
    decay = 1.0f;
    look_at(0, keys);
    if constexpr (HAS_GATE) scale_all(S, enter);
    round_sums<DTYPE>(state, S);
    for (int c = 0; c < chunks;) {
      for (; c < chunks && !(WITH_PAIRS && paired); c++) step(c);
      if constexpr (WITH_PAIRS)
        if (c < chunks) step_paired(c++);
    }
    if constexpr (WITH_OUTPUT) {
      if (chunks > 0) send(chunks - 1);
      if (lane == 0) tma_store_wait_read<0>();
    }
    return decay;
  }
  PRIM void step(int c) {
    if constexpr (HAS_GATE) {
      carry = next_carry;
      if (forget != 1.0f) scale_all(S, forget);  // products read S in 16 bits
    }
    correct(c);
    write();
    update(c);
    round_output();
    keys.advance(), values.advance(), factors.advance();
  }
  // What gates do in chunk c, whose K lies at `at`, once it is there.
  PRIM void look_at(int c, const Ring<KEY_STAGES>& at) {
    if constexpr (HAS_GATE) {
      enter = 1.0f;
      if (c >= work.chunks) return;
      mbarrier_wait(s.keys_full + at.stage, at.parity);
      const float* gates = tokens_of(s, at.stage) + GATES_AT;
      const float4 x = *(const float4*)gates;
      paired = x.x != 0.0f, forget = x.y, next_carry = x.z, enter = gates[4];
      if constexpr (TRANSFER) decay *= x.w;
    }
  }
  PRIM void look_ahead(int c) {
    Ring<KEY_STAGES> next = keys;
    next.advance();
    look_at(c + 1, next);
  }

  PRIM const float* tokens() const { return tokens_of(s, keys.stage); }
  PRIM const DTYPE* k() const { return s.k + keys.stage * KEYS; }
  PRIM const DTYPE* v() const { return s.v + (values.stage * MATH + warpgroup) * TILE; }

  // R = V - K S.
  PRIM void correct(int c) {
    mbarrier_wait(s.keys_full + keys.stage, keys.parity);
    if constexpr (!LATE_VALUES) start_from_values();
    pin(state);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < K_STEPS; step++)
      wgmma<DTYPE, false, true>(R, state[step], step_along_rows<KEY_PITCH>(k(), step), !LATE_VALUES || step > 0);
    wgmma_commit();
    read_ahead(0);
    // The output of the chunk before, while the tensor cores are at this one.
    if (WITH_OUTPUT && SEND_FIRST && c > 0) send(c - 1);
    mbarrier_wait(s.factors_full + factors.stage, factors.parity);
    uint32_t V[4][4];
    float4 down[4];
    if (LATE_VALUES && work.values) {
      mbarrier_wait(s.values_full + values.stage, values.parity);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        ldmatrix_x4_trans(V[j], v() + at_values + j * 16 * BOX);
        down[j] = factor_quad(tokens() + DOWN_AT, at_factors, j);
      }
    }
    if constexpr (!LATE_VALUES) load_beta();
    wgmma_wait<EARLY_OUTPUT>();
    pin(R);
    if constexpr (LATE_VALUES) load_beta();
    if (LATE_VALUES && work.values) {
#pragma unroll
      for (int j = 0; j < 8; j += 2) add_values(R[j], R[j + 1], V[j / 2], down[j / 2]);
    }
  }
  PRIM void start_from_values() {
    clear(R);
    if (work.values) {
      mbarrier_wait(s.values_full + values.stage, values.parity);
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        uint32_t V[4];
        ldmatrix_x4_trans(V, v() + at_values + j * 8 * BOX);
        widen_tiles(R[j], R[j + 1], V);
      }
    }
    pin(R);
  }
  PRIM void load_beta() {
#pragma unroll
    for (int i = 0; i < 4; i++) beta[i] = factor_quad(tokens() + BETA_AT, at_factors, i);
  }
  // Two tiles += V, times factors of rows.
  PRIM void add_values(float (&d0)[4], float (&d1)[4], const uint32_t (&V)[4], float4 f) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float2 v0 = unpack2<DTYPE>(V[h]), v1 = unpack2<DTYPE>(V[2 + h]);
      d0[2 * h] = fmaf(f.x, v0.x, d0[2 * h]), d0[2 * h + 1] = fmaf(f.y, v0.y, d0[2 * h + 1]);
      d1[2 * h] = fmaf(f.z, v1.x, d1[2 * h]), d1[2 * h + 1] = fmaf(f.w, v1.y, d1[2 * h + 1]);
    }
  }

  // N = X Y, by halves; X's diagonal in float. A sum of its own for R2, whose registers are otherwise R's.
  PRIM void write() {
    const uint64_t X = tile_descriptor(s.x + factors.stage * TILE, 16, 1024);
    float N1[4][4], N2[4][4], R2[4][4];
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) N1[j][i] = R[j][i], R2[j][i] = R[j + 4][i] + 0.0f;
#pragma unroll
    for (int j = 0; j < 4; j += 2) scale_tiles(N1[j], N1[j + 1], beta[j / 2]);
    multiply_half<EARLY_OUTPUT, 0>(N1, N1, X, a[0], a[1], [&] { read_ahead(1); });
    __syncwarp();  // V is read
    if (lane == 0 && work.values) mbarrier_arrive(s.values_free + values.stage);
    multiply_half<EARLY_OUTPUT, BESIDE - BELOW>(R2, N1, further(X, BELOW), a[0], a[1], [&] { read_ahead(2); });
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) N2[j][i] = R2[j][i];
#pragma unroll
    for (int j = 0; j < 4; j += 2) scale_tiles(N2[j], N2[j + 1], beta[2 + j / 2]);
    multiply_half<EARLY_OUTPUT, 0>(N2, N2, further(X, BELOW + BESIDE), a[2], a[3], [&] { read_ahead(3); });
#pragma unroll
    for (int h = 0; h < 2; h++) round_half(a[2 + h], N2, h);
  }

  // S += K^T N, and O = Q S + P N.
  PRIM void update(int c) {
    pin(a);
    pin(S);
    wgmma_fence();
    add_to_state();
    if constexpr (EARLY_OUTPUT) wgmma_commit();
    if constexpr (WITH_OUTPUT) {
      if constexpr (!EARLY_OUTPUT) read_state(0, K_STEPS);
      add_within_chunk();
    }
    wgmma_commit();
    if (WITH_OUTPUT && !SEND_FIRST && c > 0) send(c - 1);
    look_ahead(c);
    if constexpr (EARLY_OUTPUT) {
      wgmma_wait<1>();
      pin(S);
      round_state();
    }
    wgmma_wait<0>();
    load_up();
    release();
    if constexpr (!EARLY_OUTPUT) {
      pin(S);
      round_state();
    }
  }
  // A paired chunk, one product after the other, with decays in between. Tokens in the chunk's units get the very bits
  // that step() would give them.
  PRIM void step_paired(int c) {
    carry = next_carry;
    if (WITH_OUTPUT && c > 0) send(c - 1);
    mbarrier_wait(s.keys_full + keys.stage, keys.parity);
    if (work.values) mbarrier_wait(s.values_full + values.stage, values.parity);
    mbarrier_wait(s.factors_full + factors.stage, factors.parity);
    write_paired();
    __syncwarp();  // V is read
    if (lane == 0 && work.values) mbarrier_arrive(s.values_free + values.stage);
    if constexpr (WITH_OUTPUT) output_paired();
    scale_all(S, carry);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float4 f = factor_quad(tokens() + WRITES_AT, at_factors, j);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float2 x = unpack2<DTYPE>(a[j][i]);
        a[j][i] = i < 2 ? pack2<DTYPE>(f.x * x.x, f.y * x.y) : pack2<DTYPE>(f.z * x.x, f.w * x.y);
      }
    }
    pin(a);
    pin(S);
    wgmma_fence();
    add_to_state();
    wgmma_commit();
    wgmma_wait<0>();
    pin(S);
    look_ahead(c);
    scale_all(S, enter);
    round_sums<DTYPE>(state, S);
    load_up();
    release();
    round_output();
    keys.advance(), values.advance(), factors.advance();
  }
  PRIM void write_paired() {
    const uint64_t X = tile_descriptor(s.x + factors.stage * TILE, 16, 1024);
    float N1[4][4], N2[4][4], R1[4][4], R2[4][4];
    auto times_beta = [&](float (&N)[4][4], const float (&d)[4][4], int first) {
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) N[j][i] = d[j][i];
#pragma unroll
      for (int j = 0; j < 4; j += 2)
        scale_tiles(N[j], N[j + 1], factor_quad(tokens() + BETA_AT, at_factors, first + j / 2));
    };
    auto nothing = [] {};
    correct_half(R1, 0);
    times_beta(N1, R1, 0);
    multiply_half<0, 0>(N1, N1, X, a[0], a[1], nothing);
    round_half(a[0], N1, 0);
    round_half(a[1], N1, 1);
    correct_half(R2, 1);
    multiply_rounded<0, BESIDE - BELOW>(R2, further(X, BELOW), a[0], a[1], nothing);
    times_beta(N2, R2, 2);
    multiply_half<0, 0>(N2, N2, further(X, BELOW + BESIDE), a[2], a[3], nothing);
#pragma unroll
    for (int h = 0; h < 2; h++) round_half(a[2 + h], N2, h);
  }
  // R of 32 tokens. Those with a reference of their own read S with a decay, and have V whole.
  PRIM void correct_half(float (&d)[4][4], int half) {
    pin(state);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < K_STEPS; step++)
      wgmma<DTYPE, false, true>(d, state[step], further(step_along_rows<KEY_PITCH>(k(), step), half * BELOW), step > 0);
    wgmma_commit();
    wgmma_wait<0>();
    pin(d);
    auto own = [](float x) { return x == 0.0f ? 1.0f : x; };
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const int i = 2 * half + j / 2;
      scale_tiles(d[j], d[j + 1], factor_quad(tokens() + READS_AT, at_factors, i));
      if (!work.values) continue;
      uint32_t V[4];
      ldmatrix_x4_trans(V, v() + at_values + i * 16 * BOX);
      const float4 f = factor_quad(tokens() + DOWN_AT, at_factors, i);
      add_values(d[j], d[j + 1], V, make_float4(own(f.x), own(f.y), own(f.z), own(f.w)));
    }
  }
  PRIM void output_paired() {
    pin(a);
    pin(state);
    wgmma_fence();
    read_state(0, K_STEPS);
    wgmma_commit();
    wgmma_wait<0>();
    pin(O);
#pragma unroll
    for (int j = 0; j < 8; j += 2) scale_tiles(O[j], O[j + 1], factor_quad(tokens() + READS_AT, at_factors, j / 2));
    pin(a);
    pin(O);
    wgmma_fence();
    add_within_chunk();
    wgmma_commit();
    wgmma_wait<0>();
    pin(O);
  }

  // S += K^T N.
  PRIM void add_to_state() {
#pragma unroll
    for (int step = 0; step < 4; step++) wgmma<DTYPE, true>(S, a[step], step_of_rows<KEY_PITCH>(k(), step), true);
  }
  // O = Q S, steps of it.
  PRIM void read_state(int first, int end) {
#pragma unroll
    for (int step = first; step < end; step++)
      wgmma<DTYPE, false>(O, state[step], step_along_rows<KEY_PITCH>(k() + TILE, step), step > 0);
  }
  // O += P N.
  PRIM void add_within_chunk() {
    const DTYPE* p = s.p + factors.stage * TILE;
#pragma unroll
    for (int step = 0; step < 4; step++) wgmma<DTYPE, false>(O, a[step], step_along_rows(p, step), true);
  }
  // A part of Q S, of four, in the shadow of the products before it.
  PRIM void read_ahead(int part) {
    if constexpr (EARLY_OUTPUT) {
      read_state(part * K_STEPS / 4, (part + 1) * K_STEPS / 4);
      wgmma_commit();
    }
  }

  // S into the units of the next chunk, and into operands.
  PRIM void round_state() {
    if constexpr (HAS_GATE) scale_all(S, carry * enter);
    round_sums<DTYPE>(state, S);
  }

  PRIM void load_up() {
    if constexpr (HAS_GATE && WITH_OUTPUT) {
#pragma unroll
      for (int i = 0; i < 4; i++) up[i] = factor_quad(tokens() + UP_AT, at_factors, i);
    }
  }
  // This warp has read what lies in the chunk's buffers.
  PRIM void release() {
    __syncwarp();
    if (lane > 0) return;
    mbarrier_arrive(s.keys_free + keys.stage);
#if CLUSTER > 1
    mbarrier_arrive_remote(s.factors_free + factors.stage, factors.stage % CLUSTER);
#else
    mbarrier_arrive(s.factors_free + factors.stage);
#endif
  }

  // O, done, in 16 bits.
  PRIM void round_output() {
    if constexpr (WITH_OUTPUT) {
      pin(O);
      if constexpr (HAS_GATE) {
#pragma unroll
        for (int j = 0; j < 8; j += 2) scale_tiles(O[j], O[j + 1], up[j / 2]);
      } else {
        scale_all(O, scale);
      }
      round_sums<DTYPE>(out, O);
    }
  }

  // `out` of chunk c to rows of (token, value head), through the warp's box: by TMA, or one by one where what follows
  // in memory is another sequence's. Warps send for themselves: a barrier among them costs more than wider boxes gain.
  PRIM void send(int c) {
    DTYPE* box = s.o + (warpgroup * 4 + warp) * CHUNK * 16;
    if (lane == 0) tma_store_wait_read<0>();
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 4; j++) stmatrix_x4_trans(box + at_output + j * 16 * 16, out[j]);
    async_proxy_fence();
    __syncwarp();
    const int value = work.channel + warpgroup * 64 + warp * 16, tokens = work.tokens(c);
    if (!VARLEN || tokens == CHUNK) {
      if (lane == 0) {
        tma_store(o.map, box, value, work.hv, work.start + c * CHUNK, work.batch);
        tma_store_commit();
      }
      return;
    }
    DTYPE* rows = o.rows + ((work.sequence.first + (int64_t)c * CHUNK) * work.HV + work.hv) * HEAD_V + value;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int token = i * 16 + lane / 2, half = lane % 2;
      if (token < tokens && value + half * 8 < HEAD_V)
        *(uint4*)&rows[token * (int64_t)work.HV * HEAD_V + half * 8] = *(const uint4*)(box + staged(token, half));
    }
  }
};
