// New tokens of tokens/decode.cu as its threads read them from shared memory, BATCH of them at a time. What is the same
// for all value channels is made once per block and token, by one warp: k . q, norms, decays and beta.
#pragma once
#include "tokens/decode/token.cuh"

// A row of q or k as it lies in shared memory: PIECE keys of one part after the other, so that neighbouring threads
// read neighbouring pieces; those beyond HEAD_K are zeros.
constexpr int ROW = KEYS * SHARERS;
PRIM constexpr int largest_piece(int size) { return KEYS % size == 0 ? size : largest_piece(size / 2); }
constexpr int PIECE = largest_piece(16 / (int)sizeof(real));
PRIM int place_in_row(int key) {
  const int part = key / RUN % SHARERS, i = key / (RUN * SHARERS) * RUN + key % RUN;
  return (i / PIECE * SHARERS + part) * PIECE + i % PIECE;
}

// The new tokens that a block takes at a time. With a gate per channel, what reads the state is decayed, q and k_read.
struct Tokens {
  static constexpr int ROWS = PER_CHANNEL ? 4 : 2;
  struct alignas(4 * sizeof(real)) {
    real beta, decay, k_q, k_norm;  // in one access
  } numbers[BATCH];
  real rows[ROWS][BATCH][ROW], values[BATCH][CHANNELS], q_norms[BATCH];
  PRIM real* k(int b) { return rows[0][b]; }
  PRIM real* q(int b) { return rows[1][b]; }
  PRIM real* k_read(int b) { return rows[PER_CHANNEL ? 2 : 0][b]; }
  PRIM real* decays(int b) { return rows[ROWS - 1][b]; }
};

// A thread's keys of a row.
struct alignas(PIECE * sizeof(real)) Piece {
  real element[PIECE];
};
struct Keys {
  Piece pieces[KEYS / PIECE];
  PRIM Keys(const real* row, uint32_t part) {
#pragma unroll
    for (int i = 0; i < KEYS / PIECE; i++) pieces[i] = piece(row, i, part);
  }
  PRIM static Piece piece(const real* row, int i, uint32_t part) {
    return *(const Piece*)&row[(i * SHARERS + part) * PIECE];
  }
  PRIM real operator[](int i) const { return pieces[i / PIECE].element[i % PIECE]; }
};

// What one token has on its way to shared memory. To load asks for all of it, so that it is on its way together;
// nothing is looked at before `store`. First the rows: a lane's elements of q, k and the gates per channel.
struct FetchedRows {
  static constexpr int SIZE = HEAD_K % 4 == 0 && sizeof(real) == 4 ? 4 : HEAD_K % 2 == 0 ? 2 : 1;
  static constexpr int COUNT = (ROW + 32 * SIZE - 1) / (32 * SIZE), GATES = PER_CHANNEL ? COUNT : 1;
  static constexpr bool BIASES = PER_CHANNEL && BIAS == 2;
  Neighbours<DTYPE, SIZE> q[COUNT] = {}, k[COUNT] = {};
  Neighbours<GATE_DTYPE, SIZE> g[GATES] = {};
  Neighbours<real, SIZE> bias[BIASES ? COUNT : 1] = {};
  real A_log = 0;

  PRIM static int key(int m, uint32_t lane) { return (m * 32 + lane) * SIZE; }
  PRIM void load(const Inputs& x, int64_t row, uint32_t lane) {
    const int64_t value_row = row * x.HV + x.hv, key_row = x.key_row(row);
#pragma unroll
    for (int m = 0; m < COUNT; m++) {
      const int c = key(m, lane);
      if (c >= HEAD_K) continue;
      q[m] = ask_neighbours<SIZE>(x.q, key_row + c);
      k[m] = ask_neighbours<SIZE>(x.k, key_row + c);
      if constexpr (PER_CHANNEL) g[m % GATES] = ask_neighbours<SIZE>(x.g, value_row * HEAD_K + c);
      if constexpr (BIASES) bias[m] = ask_neighbours<SIZE>(x.dt_bias, (int64_t)x.hv * HEAD_K + c);
    }
    if constexpr (PER_CHANNEL && RAW_GATE > 0) A_log = asked(&x.A_log[x.hv]);
    if constexpr (PER_CHANNEL && BIAS == 1) bias[0].element[0] = asked(&x.dt_bias[x.hv]);
  }
  PRIM real decay(const Inputs& x, int m, int e) const {
    if constexpr (!PER_CHANNEL) return 1;
    return decay_of(x, g[m % GATES].element[e], A_log, bias[BIASES ? m : 0].element[BIASES ? e : 0]);
  }
  template <class F>
  PRIM static void for_elements(uint32_t lane, F f);
  PRIM void store(Tokens& tokens, int b, const Inputs& x, uint32_t lane) const;
  PRIM void store_raw(Tokens& tokens, int b, real k_unit, real q_unit, uint32_t lane) const;
  PRIM void store_decayed(Tokens& tokens, int b, const Inputs& x, real k_unit, real q_unit, uint32_t lane) const;
};
// Over the rows of a token in shared memory, in the order of the tile: by the warp that has brought them there.
struct RowSums {
  real k_k = 0, q_q = 0, k_q = 0;
  PRIM RowSums(Tokens& tokens, int b, uint32_t lane) {
    constexpr int AT_ONCE = SHARERS < 32 ? SHARERS : 32;
#pragma unroll
    for (int first = 0; first < SHARERS; first += AT_ONCE) {
      const uint32_t part = first + lane % AT_ONCE;
      real kk = 0, qq = 0, kq = 0;
#pragma unroll 1  // a piece at a time, in few registers
      for (int i = 0; i < KEYS / PIECE; i++) {
        const Piece k = Keys::piece(tokens.k(b), i, part), q = Keys::piece(tokens.q(b), i, part);
#pragma unroll
        for (int e = 0; e < PIECE; e++) {
          kk = fused(k.element[e], k.element[e], kk);
          qq = fused(q.element[e], q.element[e], qq);
          kq = fused(k.element[e], q.element[e], kq);
        }
      }
      add(k_k, kk), add(q_q, qq), add(k_q, kq);
    }
  }
  // PARTS lanes are those of a warp that shares keys.
  PRIM static void add(real& total, real x) {
#pragma unroll
    for (int bits = PARTS / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(~0u, x, bits);
    if constexpr (WARPS == 1) total = x;
    if constexpr (WARPS > 1)
#pragma unroll
      for (int w = 0; w < WARPS && w < 32 / PARTS; w++) total += __shfl_sync(~0u, x, w * PARTS);
  }
};

// To place b, by the whole warp.
PRIM void FetchedRows::store(Tokens& tokens, int b, const Inputs& x, uint32_t lane) const {
  real k_unit = 1, q_unit = 1, k_norm = 1, q_norm = 1;
  store_raw(tokens, b, k_unit, q_unit, lane);
  RowSums sums(tokens, b, lane);
  if constexpr (L2NORM) {
    const bool k_large = overflowed<DTYPE>(sums.k_k), q_large = overflowed<DTYPE>(sums.q_q);
    if (k_large || q_large) {
      if (k_large) k_unit = small_unit(k_unit);
      if (q_large) q_unit = small_unit(q_unit);
      __syncwarp();
      store_raw(tokens, b, k_unit, q_unit, lane);
      sums = RowSums(tokens, b, lane);
    }
    k_norm = root(sums.k_k + (k_large ? 0 : eps(k_norm))), q_norm = root(sums.q_q + (q_large ? 0 : eps(q_norm)));
  }
  if constexpr (PER_CHANNEL) store_decayed(tokens, b, x, k_unit, q_unit, lane);
  auto& numbers = tokens.numbers[b];
  if (lane == 0) numbers.k_q = sums.k_q, numbers.k_norm = k_norm, tokens.q_norms[b] = q_norm;
}
template <class F>
PRIM void FetchedRows::for_elements(uint32_t lane, F f) {
#pragma unroll
  for (int m = 0; m < COUNT; m++)
#pragma unroll
    for (int e = 0; e < SIZE; e++) {
      const int c = key(m, lane) + e;
      if (ROW % (32 * SIZE) == 0 || c < ROW) f(m, e, place_in_row(c));
    }
}
PRIM void FetchedRows::store_raw(Tokens& tokens, int b, real k_unit, real q_unit, uint32_t lane) const {
  for_elements(lane, [&](int m, int e, int place) {
    tokens.k(b)[place] = widen(k[m].element[e]) * k_unit;
    tokens.q(b)[place] = widen(q[m].element[e]) * q_unit;
  });
  __syncwarp();
}
PRIM void FetchedRows::store_decayed(Tokens& tokens, int b, const Inputs& x, real k_unit, real q_unit,
                                     uint32_t lane) const {
  __syncwarp();
  for_elements(lane, [&](int m, int e, int place) {
    const real decay_c = decay(x, m, e);
    tokens.q(b)[place] = decay_c * (widen(q[m].element[e]) * q_unit);
    tokens.k_read(b)[place] = decay_c * (widen(k[m].element[e]) * k_unit);
    tokens.decays(b)[place] = decay_c;
  });
}

// Tokens `first` on, up to BATCH of them, on their way to shared memory, all threads taking part.
struct Batch {
  static constexpr int EACH = (BATCH * CHANNELS + THREADS - 1) / THREADS, ALL_WARPS = THREADS / 32;
  FetchedRows rows;
  FetchedNumbers numbers;  // by another warp than the rows if there is one
  DTYPE values[EACH];

  // The first token whose numbers are a warp's: those of warps without rows, as far as there are any.
  PRIM static int first_numbers(int warp, int count) { return (warp + ALL_WARPS - count % ALL_WARPS) % ALL_WARPS; }
  PRIM static bool has(int i, int count, uint32_t slice) {
    return i < count * CHANNELS && (WHOLE_VALUES || slice * CHANNELS + i % CHANNELS < HEAD_V);
  }
  PRIM void load(const Inputs& x, int64_t first, int count, const Place& p, uint32_t slice) {
    // Of one token every warp asks for rows and numbers: a branch would wait for them, to convert them.
    constexpr bool ALL = ONE_TOKEN && ORDERED;
    const int warp = ALL ? 0 : p.thread / 32, other = ALL ? 0 : first_numbers(warp, count);
    if (ALL || warp < count) rows.load(x, first + warp, p.thread % 32);
    if (ALL || other < count) numbers.load(x, first + other);
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      const int i = e * THREADS + p.thread;
      if (has(i, count, slice))
        values[e] = asked(&x.v[((first + i / CHANNELS) * x.HV + x.hv) * HEAD_V + slice * CHANNELS + i % CHANNELS]);
    }
  }
  PRIM void store(Tokens& tokens, const Inputs& x, int64_t first, int count, const Place& p, uint32_t slice) {
    const uint32_t lane = p.thread % 32;
    for (int b = p.thread / 32; b < count; b += ALL_WARPS) {
      if (b >= ALL_WARPS) rows.load(x, first + b, lane);
      rows.store(tokens, b, x, lane);
    }
    for (int b = first_numbers(p.thread / 32, count); b < count; b += ALL_WARPS) {
      if (b >= ALL_WARPS) numbers.load(x, first + b);
      const real strength = numbers.strength(x), decay = numbers.decay(x);
      auto& to = tokens.numbers[b];
      if (lane == 0) to.beta = strength, to.decay = decay;
    }
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      const int i = e * THREADS + p.thread;
      if (has(i, count, slice)) tokens.values[i / CHANNELS][i % CHANNELS] = widen(values[e]);
    }
  }
};

template <class Tile>
PRIM Sums sums_over_keys(const Tile& S, Tokens& tokens, int b, const Place& p, Passed* passed) {
  const Keys k(tokens.k_read(b), p.part), q(tokens.q(b), p.part);
  real k_sums[VALUES] = {}, q_sums[VALUES] = {};
#pragma unroll
  for (int i = 0; i < KEYS; i++)
#pragma unroll
    for (int j = 0; j < VALUES; j++) {
      k_sums[j] = fused(S(i, j), k[i], k_sums[j]);
      q_sums[j] = fused(S(i, j), q[i], q_sums[j]);
    }
  scatter_sums(k_sums, p.part);
  scatter_sums(q_sums, p.part);
  if constexpr (WARPS == 1) return {k_sums[0], q_sums[0]};
  pass_sums(k_sums, q_sums, p, p.thread / 32, p.thread % 32, *passed);
  __syncthreads();
  Sums s = {};
  if (p.thread < CHANNELS) {
#pragma unroll
    for (int w = 0; w < WARPS; w++) s.k_S += passed->k_S[w][p.thread], s.q_S += passed->q_S[w][p.thread];
  }
  return s;
}

// The new tokens of a sequence, up to BATCH of them at a time.
struct NewTokens {
  Tokens& tokens;
  Passed* passed = nullptr;
  Batch batch;

  PRIM explicit NewTokens(DynSmem& smem) : tokens(*smem.take<Tokens>(1, "tokens")) {
    if constexpr (WARPS > 1) passed = smem.take<Passed>(1, "passed");
    smem.all_taken(SHARED_BYTES);
  }
  PRIM void ask(const Inputs& x, int64_t first, int count, const Place& p, uint32_t slice) {
    batch.load(x, first, count, p, slice);
  }
  // In the place of those that every thread is done with.
  PRIM void take(const Inputs& x, int64_t first, int count, const Place& p, uint32_t slice) {
    batch.store(tokens, x, first, count, p, slice);
    __syncthreads();
  }

  struct Update {
    Keys k, decays;
    real decay, o, n[VALUES];
    template <class Tile>
    PRIM real operator()(const Tile& S, int i, int j) const {
      return fused(k[i], n[j], (PER_CHANNEL ? decays[i] : decay) * S(i, j));
    }
  };
  template <class Tile>
  PRIM Update advance(const Tile& S, int b, const Inputs& x, const Place& p) {
    Sums s = sums_over_keys(S, tokens, b, p, passed);
    const auto [beta, decay, k_q, k_norm] = tokens.numbers[b];
    s.k_q = k_q;
    const real v = p.has_own ? tokens.values[b][p.own_in_block] : (real)0;
    const Numbers<real> numbers = {beta, decay, L2NORM ? k_norm : (real)1, L2NORM ? tokens.q_norms[b] : (real)1, v};
    const real n = numbers.written(s);
    Update update = {Keys(tokens.k(b), p.part), Keys(tokens.decays(b), p.part), decay};
    update.o = numbers.output(s, n, x.scale);
    share(n, update.n, p, passed);
    return update;
  }
};
