// The walk of sm90/channel_forward.cu: a math warpgroup holds 64 value channels of S^T in accumulators.
#pragma once
#include "sm90/channel_forward/scale.cuh"
// With the sizes that it has:
#include "sm90/sums.cuh"
#include "tiles/store.cuh"

struct Walker {
  const Shared& s;
  const Work& work;
  const Rows& o;
  const TensorMap* v;
  const Part& part;
  const float scale;
  float (&S)[K_TILES][4];

  PRIM DTYPE* box() const { return s.rows + part.warpgroup * TILE; }
  PRIM void ask_values(int c) const {
    uint64_t* full = s.values_full + part.warpgroup;
    mbarrier_arrive_expect(full, TILE * 2);
    tma_load(box(), v, full, part.column, work.hv, work.start + c * CHUNK, work.batch);
  }
  PRIM void say(uint64_t* barrier) const {
    __syncwarp();
    if (part.lane() == 0) mbarrier_arrive(barrier);
  }

  // From `place`, where the chunks of the lead have left it.
  PRIM void walk(Place place) {
    for (int c = work.lead; c < work.chunks; c++, place.advance()) {
      const int stage = place.stage.stage;
      const Stage at(s, place.key.stage, stage);
      float R[8][4], O[8][4];
      uint32_t state[K_STEPS][4], N[4][4];
      round_sums<DTYPE>(state, S);
      mbarrier_wait(s.factors_full + stage, place.stage.parity);
      read_state(R, state, at);
      mbarrier_wait(s.values_full + part.warpgroup, c % 2);
      add_values(R);
      mbarrier_wait(s.core_full + stage, place.stage.parity);
      correct(R, at);
      round_columns<DTYPE>(N, R, at.beta, part.lane());
      add_chunk(O, state, N, at, s.keys_free + place.key.stage);
#if CUT
      if (c == work.looks && threadIdx.x == 0) *s.declined = atomicAdd(work.declined, 0);
#endif
      say(s.stage_free + stage);
      send(O, c);
    }
    if (part.lane() == 0) tma_store_wait_read<0>();
  }

  // The same where walkers scale rows, a chunk ahead, whose place is `next`; others carry V and O.
  PRIM void walk_and_scale() {
    Place next;
    for (int c = -1; c < work.chunks; c++, next.advance()) {
      if (c + 1 < work.chunks) prepare(next, c + 1);
      if (c < 0) continue;
      Place place = next.before();
      place.stage.stage = uniform(place.stage.stage), place.key.stage = uniform(place.key.stage);  // of descriptors
      const int stage = place.stage.stage;
      const Stage at(s, place.key.stage, stage);
      float R[8][4], O[8][4];
      uint32_t N[4][4];
      mbarrier_wait(s.values_full + part.warpgroup, c & 1);
      if (VARLEN && work.tokens(c) < CHUNK) clear_values(work.tokens(c));
      load_values(R);
      mbarrier_wait(s.factors_full + stage, place.stage.parity);
      read_halves(R, O, at, s.keys_free + place.key.stage);
      mbarrier_wait(s.core_full + stage, place.stage.parity);
      correct(R, at);
      round_columns<DTYPE>(N, R, at.beta, part.lane());
      add_chunk(O, N, at);
      say(s.stage_free + stage);
      hand_over(O, c);
    }
  }

  // Rows of chunk c, half of the channels by each warpgroup. What wgmma reads of them goes through those that make
  // factors, who show it to the async proxy.
  PRIM void prepare(const Place& place, int c) const {
    const int stage = place.stage.stage, lane = opaque(part.lane()) & 31;
    const Stage at(s, place.key.stage, stage);
    const int block = part.warp() & 3, half = part.warpgroup & 1;
    mbarrier_wait(s.keys_full + place.key.stage, place.key.parity);
    mbarrier_wait(s.sums_full + stage, place.stage.parity);
    const ScaleWarp<2> rows = {at, block, 2 * half, lane};
    const int within = min(at.within[block], at.within[COUNT + block]);
    if (VARLEN && work.tokens(c) < CHUNK) rows.clear_past(work.tokens(c));
    Pairs own = {};
    rows.run(own, within);
    mbarrier_wait(s.own_free, (c & 1) ^ 1);
    __syncwarp();  // of the last block, sums are read
    own.store(at.own_pairs(half, block), lane);
    say(s.scaled_full + stage);
  }

  // R = -K S on its way.
  PRIM void read(float (&R)[8][4], uint32_t (&state)[K_STEPS][4], const Stage& at) const {
    pin(state);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < K_STEPS; step++)
      wgmma<DTYPE, false, true>(R, state[step], step_along_rows(at.k, step), step > 0);
    wgmma_commit();
  }
  // R = -K S, and what is left of S.
  PRIM void read_state(float (&R)[8][4], uint32_t (&state)[K_STEPS][4], const Stage& at) const {
    read(R, state, at);
    scale_columns(S, at.carried, part.lane());
    wgmma_wait<0>();
    pin(R);
    pin(state);
  }
  // R = V - K S from R = V, and O = Q S, by halves of the key channels, and what is left of S. `read`: K and Q were.
  PRIM void read_halves(float (&R)[8][4], float (&O)[8][4], const Stage& at, uint64_t* read) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      typedef const float (&Half)[K_TILES / 2][4];
      uint32_t state[K_STEPS / 2][4];
      round_sums<DTYPE>(state, (Half)S[half * K_TILES / 2]);
      pin(state);
      pin(R);
      if (half > 0) pin(O);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < K_STEPS / 2; i++) {
        const int step = half * K_STEPS / 2 + i;
        wgmma<DTYPE, false, true>(R, state[i], step_along_rows(at.k, step), true);
      }
#pragma unroll
      for (int i = 0; i < K_STEPS / 2; i++) {
        const int step = half * K_STEPS / 2 + i;
        wgmma<DTYPE, false>(O, state[i], step_along_rows(at.q, step), step > 0);
      }
      wgmma_commit();
      if (half > 0) scale_columns(S, at.carried, part.lane());
      wgmma_wait<0>();
      pin(R);
      pin(O);
      pin(state);
    }
    say(read);
  }
  // V is zero in rows from `tokens` on, which are another sequence's.
  PRIM void clear_values(int tokens) const {
#pragma unroll 1
    for (int row = tokens + part.lane() / 2; row < CHUNK; row += 16)
      eight(box(), swizzled(row, part.warp() * 16 + part.lane() % 2 * 8)) = {};
    __syncwarp();
  }
  PRIM void load_values(float (&R)[8][4]) const {
    const int lane = opaque(part.lane());  // no address is kept from chunk to chunk
#pragma unroll
    for (int j = 0; j < 8; j += 2) read_box_transposed(R[j], R[j + 1], box(), j * 8, part.warp() * 16, lane);
  }
  PRIM void add_values(float (&R)[8][4]) const {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      float v[2][4];
      read_box_transposed(v[0], v[1], box(), j * 8, part.warp() * 16, part.lane());
#pragma unroll
      for (int i = 0; i < 4; i++) R[j][i] += v[0][i], R[j + 1][i] += v[1][i];
    }
  }
  // N^ = R + core (b R)
  PRIM void correct(float (&R)[8][4], const Stage& at) const {
    uint32_t a[4][4];
    round_columns<DTYPE>(a, R, at.beta, part.lane());
    pin(a);
    pin(R);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++) wgmma<DTYPE, false>(R, a[step], step_along_rows(at.others, step), true);
    wgmma_commit();
    wgmma_wait<0>();
    pin(R);
  }
  // S += K^T N, of some key channels.
  template <int TILES>
  PRIM void write(float (&S)[TILES][4], uint32_t (&N)[4][4], const DTYPE* k) const {
    pin(N);
    pin(S);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++) wgmma<DTYPE, true>(S, N[step], step_of_rows(k, step), true);
    wgmma_commit();
    wgmma_wait<0>();
    pin(S);
  }
  // O = Q S + Pqk N and S += K^T N, O of S as it entered. `read`: K and Q were.
  PRIM void add_chunk(float (&O)[8][4], uint32_t (&state)[K_STEPS][4], uint32_t (&N)[4][4], const Stage& at,
                      uint64_t* read) {
    pin(state);
    pin(N);
    pin(S);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < K_STEPS; step++)
      wgmma<DTYPE, false>(O, state[step], step_along_rows(at.q, step), step > 0);
    wgmma_commit();
#pragma unroll
    for (int step = 0; step < 4; step++) wgmma<DTYPE, false>(O, N[step], step_along_rows(at.p, step), true);
#pragma unroll
    for (int step = 0; step < 4; step++) wgmma<DTYPE, true>(S, N[step], step_of_rows(at.writes, step), true);
    wgmma_commit();
    wgmma_wait<1>();
    say(read);
    wgmma_wait<0>();
    pin(S);
    pin(O);
  }
  // O += Pqk N and S += K^T N.
  PRIM void add_chunk(float (&O)[8][4], uint32_t (&N)[4][4], const Stage& at) {
    pin(N);
    pin(O);
    pin(S);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++) wgmma<DTYPE, false>(O, N[step], step_along_rows(at.p, step), true);
#pragma unroll
    for (int step = 0; step < 4; step++) wgmma<DTYPE, true>(S, N[step], step_of_rows(at.writes, step), true);
    wgmma_commit();
    wgmma_wait<0>();
    pin(S);
    pin(O);
  }
  PRIM void round_outputs(uint32_t (&out)[4][4], float (&O)[8][4]) const {
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) O[j][i] *= scale;
    round_sums<DTYPE>(out, O);
  }
  // O through the place of V, which the next V takes after it.
  PRIM void send(float (&O)[8][4], int c) const {
    uint32_t out[4][4];
    round_outputs(out, O);
    send_rows(o, out, box(), work, c, work.tokens(c), part);
    if (part.thread == 0 && c + 1 < work.chunks) {
      tma_store_wait_read<0>();
      ask_values(c + 1);
    }
  }
  // O in the place of V, for who carries both (sm90/channel_forward/carry.cuh); rows of a chunk after which another
  // sequence begins to where they go.
  PRIM void hand_over(float (&O)[8][4], int c) const {
    uint32_t out[4][4];
    round_outputs(out, O);
    const int warp = part.warp(), lane = opaque(part.lane()), tokens = work.tokens(c);
    stage_rows(box(), out, warp, lane);
    if (VARLEN && tokens < CHUNK) {
      __syncwarp();
      const int value = part.column + warp * 16;
      const int64_t row = (work.sequence.first + (int64_t)c * CHUNK) * part.HV + work.hv;
      write_rows(o.rows + row * HEAD_V + value, (int64_t)part.HV * HEAD_V, box(), tokens, HEAD_V - value, warp, lane);
    }
    async_proxy_fence();
    say(s.rows_done + part.warpgroup);
  }
};
