// The walkers of sm90/forward.cu: a warpgroup holds 64 value channels of S^T in accumulators and takes them from chunk
// to chunk. correct: R = V - K S, what the state got wrong. write: N = X (b R). update: S += K^T N, and O = Q S + P N.
// Rows of tokens are in units of 2^(G - F), see tokens.cuh, so a chunk that is not paired has no decay in its products.
// A block with a paired chunk takes all of its chunks as if they were: others have the same bits so.
#pragma once
#include "sm90/forward/tokens.cuh"
#include "sm90/sums.cuh"
#include "tiles/store.cuh"

// Columns of two tiles, times factors of their tokens.
PRIM void scale_tiles(float (&d0)[4], float (&d1)[4], float4 f) {
  d0[0] *= f.x, d0[1] *= f.y, d0[2] *= f.x, d0[3] *= f.y;
  d1[0] *= f.z, d1[1] *= f.w, d1[2] *= f.z, d1[3] *= f.w;
}
PRIM float4 times(float4 f, float x) { return make_float4(f.x * x, f.y * x, f.z * x, f.w * x); }
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
// d += x L^T, or with REST d -= x (L + rest)^T, for 32 tokens, x rounded to a0 and a1, L by descriptors of swizzled
// tiles, rest REST bytes from L. `meanwhile` may send more products after it, of which PENDING groups are not waited
// for.
template <int PENDING, int REST, class F>
PRIM void multiply_half(float (&d)[4][4], const float (&x)[4][4], uint64_t L, uint32_t (&a0)[4], uint32_t (&a1)[4],
                        F meanwhile) {
  round_half(a0, x, 0);
  round_half(a1, x, 1);
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

// In bytes, from X11 to M21 and to what rounding left out of that; to the second half of a chunk's keys, too.
constexpr int BELOW = 32 * BOX * sizeof(DTYPE), BESIDE = 32 * sizeof(DTYPE);

// PAIRS: it may meet paired chunks, and takes every chunk with units of tokens.
template <bool PAIRS>
struct Walker {
  // Registers do not suffice for all of V with its factors beside units of tokens. Within the range whole sequences of
  // two slices take 1 % less by halves, joins up to 2 % more.
  static constexpr bool BY_HALVES = PAIRS || (HAS_GATE && MATH == 2 && !TRANSFER && !JOINS);
  // Where registers suffice, Q S is under way while R is formed.
  static constexpr bool EARLY_OUTPUT = WITH_OUTPUT && MATH == 1;

  const Shared& s;
  const Work& work;
  float (&S)[K_TILES][4];
  const int warpgroup, warp, lane;
  const float scale;
  // Where this thread finds its part: of factors, and of a box of V or O. All else is constants.
  const int at_factors = factor_row(lane % 4);
  const int at_values = swizzled(lane % 8 + lane / 16 * 8, warp * 16 + lane / 8 % 2 * 8);
  Ring<KEY_STAGES> keys;
  Ring<VALUE_STAGES> values;
  Ring<FACTOR_STAGES> factors;
  // Left operands: S, N, N in units of S; and what leaves of the chunk before, or of this one.
  uint32_t state[K_STEPS][4], a[4][4], written[4][4], out[4][4];
  float R[8][4], O[8][4];
  // S is in the units of the chunk before, so are products that read it: `carry` takes them into true ones, `enter`
  // into those of this chunk, or with PAIRS into true ones. decay: over all chunks.
  float carry, enter, decay;
  float4 beta[4], up[4], down[4];  // of the tokens in whose columns this thread has sums
  uint32_t V[4][4];

  // Over all chunks; returns what gates leave of the state.
  PRIM float walk() {
    const int chunks = uniform(work.chunks);
    decay = carry = 1.0f;
    round_sums<DTYPE>(state, S);
    if constexpr (HAS_GATE) {
      for (int c = 0; c < chunks; c++) step(c);
    } else {
      // The loop around the loop is for the compiler, which makes the code of it that was timed.
      for (int c = 0; c < chunks;)
        for (; c < chunks; c++) step(c);
    }
    if constexpr (CHECKPOINTS)
      if (has_gap(work.sequence, work.every))
        store_checkpoint(work.sequence.tokens / work.every, [](int, int) { return 0.0f; });
    if constexpr (WITH_OUTPUT) {
      if (chunks > 0) {
        mbarrier_wait(s.output_free, chunks % 2);
        hand_over(chunks - 1);
      }
    }
    if constexpr (HAS_GATE) scale_all(S, carry);
    return decay;
  }
  // The state that chunk c leaves, if it is a checkpoint. Every chunk leaves it in true units, from which a walk that
  // starts there goes on with the same bits.
  PRIM void keep(int c) {
    if constexpr (HAS_GATE) {
      scale_all(S, carry);
      carry = 1.0f;
      round_sums<DTYPE>(state, S);
    }
    const int tokens = (c + 1) * CHUNK;
    if (tokens > work.sequence.tokens || tokens % work.every != 0) return;
    store_checkpoint(tokens / work.every - 1, [&](int j, int i) { return S[j][i]; });
  }
  template <class F>
  PRIM void store_checkpoint(int index, F element) {
    float* state = work.checkpoints + (int64_t)index * work.HV * HEAD_K * HEAD_V;
    const int thread = opaque(lane);  // else addresses are computed before, and take registers
#pragma unroll
    for (int j = 0; j < K_TILES; j++) {
      const float d[4] = {element(j, 0), element(j, 1), element(j, 2), element(j, 3)};
      store_state(state, d, work.channel + warpgroup * 64 + warp * 16, j * 8, thread);
    }
  }
  PRIM void step(int c) {
    correct(c);
    write();
    if constexpr (PAIRS)
      update_by_tokens();
    else
      update(c);
    round_output();
    keys.advance(), values.advance(), factors.advance();
    if constexpr (CHECKPOINTS) keep(c);
  }

  // S into units of this chunk, of which products read it in 16 bits: what gates leave of it afterwards besides `carry`
  // may be less.
  PRIM void enter_chunk() {
    if constexpr (HAS_GATE) {
      const float* gates = tokens() + GATES_AT;
      const float4 x = *(const float4*)gates;
      enter = carry * gates[4];
      scale_all(S, enter * x.y);
      if constexpr (PAIRS) enter = carry;
      carry = x.z;
      if constexpr (TRANSFER) decay *= x.w;
    }
  }
  // What takes products that read S into units of the tokens of tiles 2 i and 2 i + 1.
  PRIM float4 units(int i) const {
    if constexpr (PAIRS) return times(factor_quad(tokens() + READS_AT, opaque(at_factors), i), enter);
    return make_float4(enter, enter, enter, enter);
  }

  PRIM const float* tokens() const { return tokens_of(s, keys.stage); }
  PRIM const DTYPE* k() const { return s.k + keys.stage * KEYS; }
  PRIM const DTYPE* v() const { return s.v + (values.stage * MATH + warpgroup) * TILE; }

  // R = V - K S.
  PRIM void correct(int c) {
    // Nothing is waited for while products are under way that would be there anyway: a loop there costs them time.
    mbarrier_wait(s.keys_full + keys.stage, keys.parity);
    if (WITH_OUTPUT && c > 0) mbarrier_wait(s.output_free, c % 2);
    if constexpr (LATE_VALUES) {
      if (work.values) mbarrier_wait(s.values_full + values.stage, values.parity);
      mbarrier_wait(s.factors_full + factors.stage, factors.parity);
    } else {
      start_from_values();
    }
    pin(state);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < K_STEPS; step++)
      wgmma<DTYPE, false, true>(R, state[step], step_along_rows<KEY_PITCH>(k(), step), !LATE_VALUES || step > 0);
    wgmma_commit();
    read_ahead(0);
    enter_chunk();
    // The output of the chunk before, while the tensor cores are at this one.
    if (WITH_OUTPUT && SEND_FIRST && c > 0) hand_over(c - 1);
    if constexpr (!LATE_VALUES) mbarrier_wait(s.factors_full + factors.stage, factors.parity);
    if constexpr (LATE_VALUES) {
      ask_for_values(0);
      if constexpr (!BY_HALVES) ask_for_values(1);
    } else {
      load_beta(0), load_beta(1);
    }
    wgmma_wait<EARLY_OUTPUT>();
    pin(R);
    if constexpr (LATE_VALUES) {
      load_beta(0);
      if constexpr (!BY_HALVES) load_beta(1);
      take_into_units(0);
      if constexpr (!BY_HALVES) take_into_units(1);
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
  PRIM void load_beta(int half) {
#pragma unroll
    for (int i = 2 * half; i < 2 * half + 2; i++) beta[i] = factor_quad(tokens() + BETA_AT, at_factors, i);
  }
  // V of 32 tokens, as it lies in shared memory, and factors that it takes.
  PRIM void ask_for_values(int half) {
    if (!work.values) return;
#pragma unroll
    for (int j = 2 * half; j < 2 * half + 2; j++) {
      ldmatrix_x4_trans(V[j], v() + at_values + j * 16 * BOX);
      down[j] = factor_quad(tokens() + DOWN_AT, at_factors, j);
    }
  }
  PRIM void take_into_units(int half) {
#pragma unroll
    for (int j = 2 * half; j < 2 * half + 2; j++)
      if (work.values)
        add_values(R[2 * j], R[2 * j + 1], V[j], down[j], units(j));
      else
        scale_tiles(R[2 * j], R[2 * j + 1], units(j));
  }
  // Two tiles, read of S, into units of their tokens, and V there, times factors of rows.
  PRIM void add_values(float (&d0)[4], float (&d1)[4], const uint32_t (&V)[4], float4 f, float4 u) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float2 v0 = unpack2<DTYPE>(V[h]), v1 = unpack2<DTYPE>(V[2 + h]);
      d0[2 * h] = fmaf(f.x, v0.x, u.x * d0[2 * h]), d0[2 * h + 1] = fmaf(f.y, v0.y, u.y * d0[2 * h + 1]);
      d1[2 * h] = fmaf(f.z, v1.x, u.z * d1[2 * h]), d1[2 * h + 1] = fmaf(f.w, v1.y, u.w * d1[2 * h + 1]);
    }
  }
  PRIM void scale_units(float (&d)[8][4]) {
    if constexpr (PAIRS) {
#pragma unroll
      for (int j = 0; j < 8; j += 2) scale_tiles(d[j], d[j + 1], units(j / 2));
    } else {
      scale_all(d, enter);
    }
  }
  // N of 32 tokens, in units of their own, in those of S.
  PRIM void take_into_state(int half) {
#pragma unroll
    for (int j = 2 * half; j < 2 * half + 2; j++) {
      const float4 f = factor_quad(tokens() + WRITES_AT, opaque(at_factors), j);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float2 n = unpack2<DTYPE>(a[j][i]);
        written[j][i] = i < 2 ? pack2<DTYPE>(f.x * n.x, f.y * n.y) : pack2<DTYPE>(f.z * n.x, f.w * n.y);
      }
    }
  }

  // N = X Y, by halves; X's diagonal in float. A sum of its own for R2, whose registers are otherwise R's.
  PRIM void write() {
    const uint64_t X = tile_descriptor(s.x + factors.stage * TILE, 16, 1024);
    float N1[4][4], N2[4][4], R2[4][4];
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) N1[j][i] = R[j][i];
    if constexpr (!HAS_GATE) copy_half(R2);
#pragma unroll
    for (int j = 0; j < 4; j += 2) scale_tiles(N1[j], N1[j + 1], beta[j / 2]);
    multiply_half<EARLY_OUTPUT, 0>(N1, N1, X, a[0], a[1], [&] {
      read_ahead(1);
      if constexpr (BY_HALVES) {
        load_beta(1);
        ask_for_values(1);
        take_into_units(1);
      }
    });
    if constexpr (HAS_GATE) copy_half(R2);
    __syncwarp();  // V is read
    if (lane == 0 && work.values) mbarrier_arrive(s.values_free + values.stage);
    multiply_half<EARLY_OUTPUT, BESIDE - BELOW>(R2, N1, further(X, BELOW), a[0], a[1], [&] { read_ahead(2); });
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) N2[j][i] = R2[j][i];
#pragma unroll
    for (int j = 0; j < 4; j += 2) scale_tiles(N2[j], N2[j + 1], beta[2 + j / 2]);
    multiply_half<EARLY_OUTPUT, 0>(N2, N2, further(X, BELOW + BESIDE), a[2], a[3], [&] {
      read_ahead(3);
      if constexpr (PAIRS) take_into_state(0);
    });
#pragma unroll
    for (int h = 0; h < 2; h++) round_half(a[2 + h], N2, h);
  }
  PRIM void copy_half(float (&R2)[4][4]) {
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) R2[j][i] = R[j + 4][i] + 0.0f;
  }

  // S += K^T N, and O = Q S + P N.
  PRIM void update(int c) {
    constexpr bool READ_FIRST = WITH_OUTPUT && HAS_GATE, ROUND_EARLY = EARLY_OUTPUT || READ_FIRST;
    pin(a);
    pin(S);
    wgmma_fence();
    if constexpr (READ_FIRST && !EARLY_OUTPUT) {
      read_state(0, K_STEPS);
      wgmma_commit();
    }
    add_to_state(a);
    if constexpr (ROUND_EARLY) wgmma_commit();
    if constexpr (READ_FIRST) {
      wgmma_wait<1>();
      pin(O);
      scale_units(O);
      pin(O);
      wgmma_fence();
    }
    if constexpr (WITH_OUTPUT) {
      if constexpr (!EARLY_OUTPUT && !READ_FIRST) read_state(0, K_STEPS);
      add_within_chunk();
    }
    wgmma_commit();
    if (WITH_OUTPUT && !SEND_FIRST && c > 0) hand_over(c - 1);
    if constexpr (ROUND_EARLY) {
      wgmma_wait<1>();
      pin(S);
      round_sums<DTYPE>(state, S);
    }
    wgmma_wait<0>();
    load_up();
    release();
    if constexpr (!ROUND_EARLY) {
      pin(S);
      round_sums<DTYPE>(state, S);
    }
  }
  // The same with units of tokens: O = Q S is taken into them, and N into those of S, before products add to these.
  PRIM void update_by_tokens() {
    pin(a);
    pin(S);
    wgmma_fence();
    if constexpr (WITH_OUTPUT) {
      if constexpr (!EARLY_OUTPUT) {
        read_state(0, K_STEPS);
        wgmma_commit();
      }
      wgmma_wait<0>();
      pin(O);
    }
    take_into_state(1);
    pin(written);
    pin(S);
    wgmma_fence();
    add_to_state(written);
    wgmma_commit();
    if constexpr (WITH_OUTPUT) {
      scale_units(O);
      pin(O);
      wgmma_fence();
      add_within_chunk();
      wgmma_commit();
    }
    wgmma_wait<WITH_OUTPUT>();
    pin(S);
    round_sums<DTYPE>(state, S);
    wgmma_wait<0>();
    load_up();
    release();
  }

  // S += K^T N.
  PRIM void add_to_state(const uint32_t (&x)[4][4]) {
#pragma unroll
    for (int step = 0; step < 4; step++) wgmma<DTYPE, true>(S, x[step], step_of_rows<KEY_PITCH>(k(), step), true);
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

  // `out` of chunk c, for who sends it.
  PRIM void hand_over(int c) {
    DTYPE* box = s.o + warpgroup * TILE + at_values;
#pragma unroll
    for (int j = 0; j < 4; j++) stmatrix_x4_trans(box + j * 16 * BOX, out[j]);
    __syncwarp();
    if (lane == 0) mbarrier_arrive(s.output_full);
  }
};
