// Tokens as the threads of a block of tokens/decode.cu read them from shared memory, and what comes of one.
#pragma once
#include "tiles/raw.cuh"
#include "tokens/decode/tile.cuh"

constexpr bool PER_CHANNEL = HAS_GATE == 2;
// A row of q or k as it lies in shared memory: PIECE keys of one part after the other, so that neighbouring threads
// read neighbouring pieces; those beyond HEAD_K are zeros.
constexpr int ROW = KEYS * SHARERS;
PRIM constexpr int largest_piece(int size) { return KEYS % size == 0 ? size : largest_piece(size / 2); }
constexpr int PIECE = largest_piece(16 / (int)sizeof(real));
PRIM int place_in_row(int key) {
  const int part = key / RUN % SHARERS, i = key / (RUN * SHARERS) * RUN + key % RUN;
  return (i / PIECE * SHARERS + part) * PIECE + i % PIECE;
}

// The new tokens that a block takes at a time. q and k are normalised. With a gate per channel, what reads the state
// is decayed, q and k_read.
struct Tokens {
  static constexpr int ROWS = PER_CHANNEL ? 4 : 2;
  struct alignas(4 * sizeof(real)) {
    real beta, decay, k_q, nothing;  // in one access
  } numbers[BATCH];
  real rows[ROWS][BATCH][ROW], values[BATCH][CHANNELS];
  PRIM real* k(int b) { return rows[0][b]; }
  PRIM real* q(int b) { return rows[1][b]; }
  PRIM real* k_read(int b) { return rows[PER_CHANNEL ? 2 : 0][b]; }
  PRIM real* decays(int b) { return rows[ROWS - 1][b]; }
};
// What warps that share keys pass to each other: sums over the keys of each, and n, to be times k.
struct Passed {
  real k_S[WARPS][CHANNELS], q_S[WARPS][CHANNELS], written[CHANNELS];
};

// A thread's keys of a row.
struct Keys {
  struct alignas(PIECE * sizeof(real)) Piece {
    real element[PIECE];
  };
  Piece pieces[KEYS / PIECE];
  PRIM Keys(const real* row, const Place& p) {
#pragma unroll
    for (int i = 0; i < KEYS / PIECE; i++) pieces[i] = *(const Piece*)&row[(i * SHARERS + p.part) * PIECE];
  }
  PRIM real operator[](int i) const { return pieces[i / PIECE].element[i % PIECE]; }
};

PRIM real sum_over_warp(real x) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(~0u, x, bits);
  return x;
}

// The arrays of all tokens, and the heads that are asked for. beta and g may be logits of what parameters make of them.
struct Inputs {
  const DTYPE *q, *k, *v;
  const BETA_DTYPE* beta;
  const GATE_DTYPE* g;
  const real *A_log, *dt_bias;
  real bound, factor;
  uint32_t h, hv, H, HV;
};

// e^g, g of parameters where it is raw.
PRIM real decay_of(const Inputs& x, GATE_DTYPE g, real A_log, real bias) {
  if constexpr (RAW_GATE == 0) return power(widen(g));
  return power(RawGate<real, RAW_GATE>{power(A_log), bias, x.bound}.gate(widen(g)));
}

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
    const int64_t value_row = row * x.HV + x.hv, key_row = (row * x.H + x.h) * HEAD_K;
#pragma unroll
    for (int m = 0; m < COUNT; m++) {
      const int c = key(m, lane);
      if (c >= HEAD_K) continue;
      q[m] = load_neighbours<SIZE>(x.q, key_row + c);
      k[m] = load_neighbours<SIZE>(x.k, key_row + c);
      if constexpr (PER_CHANNEL) g[m % GATES] = load_neighbours<SIZE>(x.g, value_row * HEAD_K + c);
      if constexpr (BIASES) bias[m] = load_neighbours<SIZE>(x.dt_bias, (int64_t)x.hv * HEAD_K + c);
    }
    if constexpr (PER_CHANNEL && RAW_GATE > 0) A_log = x.A_log[x.hv];
    if constexpr (PER_CHANNEL && BIAS == 1) bias[0].element[0] = x.dt_bias[x.hv];
  }
  PRIM real decay(const Inputs& x, int m, int e) const {
    if constexpr (!PER_CHANNEL) return 1;
    return decay_of(x, g[m % GATES].element[e], A_log, bias[BIASES ? m : 0].element[BIASES ? e : 0]);
  }
  PRIM void store(Tokens& tokens, int b, const Inputs& x, uint32_t lane) const;
};
// Then beta and the gate per head, by another warp if there is one.
struct FetchedNumbers {
  BETA_DTYPE beta;
  GATE_DTYPE g = {};
  real A_log = 0, bias = 0;

  PRIM void load(const Inputs& x, int64_t row) {
    const int64_t value_row = row * x.HV + x.hv;
    beta = x.beta[value_row];
    if constexpr (HAS_GATE == 1) {
      g = x.g[value_row];
      if constexpr (RAW_GATE > 0) A_log = x.A_log[x.hv];
      if constexpr (BIAS > 0) bias = x.dt_bias[x.hv];
    }
  }
  PRIM void store(Tokens& tokens, int b, const Inputs& x, uint32_t lane) const {
    const real strength = RAW_BETA ? x.factor * sigmoid((real)widen(beta)) : (real)widen(beta);
    const real decay = HAS_GATE == 1 ? decay_of(x, g, A_log, bias) : (real)1;
    auto& numbers = tokens.numbers[b];
    if (lane == 0) numbers.beta = strength, numbers.decay = decay, numbers.nothing = 0;
  }
};

// Sums over the rows of a token, its k in units of k_unit, and q.
struct RowSums {
  real k_k = 0, q_q = 0, k_q = 0;
  PRIM RowSums(const FetchedRows& token, real k_unit, real q_unit) {
#pragma unroll
    for (int m = 0; m < FetchedRows::COUNT; m++)
#pragma unroll
      for (int e = 0; e < FetchedRows::SIZE; e++) {
        const real k = widen(token.k[m].element[e]) * k_unit, q = widen(token.q[m].element[e]) * q_unit;
        k_k = fused(k, k, k_k), q_q = fused(q, q, q_q), k_q = fused(k, q, k_q);
      }
    k_k = sum_over_warp(k_k), q_q = sum_over_warp(q_q), k_q = sum_over_warp(k_q);
  }
};

// To place b, by the whole warp.
PRIM void FetchedRows::store(Tokens& tokens, int b, const Inputs& x, uint32_t lane) const {
  real k_scale = 1, q_scale = 1;
  RowSums sums(*this, 1, 1);
  if constexpr (L2NORM) {
    const bool k_large = overflowed<DTYPE>(sums.k_k), q_large = overflowed<DTYPE>(sums.q_q);
    if (k_large) k_scale = small_unit(k_scale);
    if (q_large) q_scale = small_unit(q_scale);
    if (k_large || q_large) sums = RowSums(*this, k_scale, q_scale);
    const real k_r = root(sums.k_k + (k_large ? 0 : eps(k_scale))), q_r = root(sums.q_q + (q_large ? 0 : eps(q_scale)));
    sums.k_q *= k_r * q_r;
    k_scale *= k_r, q_scale *= q_r;
  }
#pragma unroll
  for (int m = 0; m < COUNT; m++)
#pragma unroll
    for (int e = 0; e < SIZE; e++) {
      const int c = key(m, lane) + e;
      if (ROW % (32 * SIZE) != 0 && c >= ROW) continue;
      const int place = place_in_row(c);
      const real decay_c = decay(x, m, e);
      const real k_c = widen(k[m].element[e]) * k_scale;
      tokens.k(b)[place] = k_c;
      tokens.q(b)[place] = decay_c * (widen(q[m].element[e]) * q_scale);
      if constexpr (PER_CHANNEL) tokens.k_read(b)[place] = decay_c * k_c, tokens.decays(b)[place] = decay_c;
    }
  if (lane == 0) tokens.numbers[b].k_q = sums.k_q;
}

// Tokens `first` on, up to BATCH of them, on their way to shared memory, all threads taking part.
struct Batch {
  static constexpr int EACH = (BATCH * CHANNELS + THREADS - 1) / THREADS, ALL_WARPS = THREADS / 32;
  FetchedRows rows;
  FetchedNumbers numbers;
  DTYPE values[EACH];

  // The first token whose numbers are a warp's: those of warps without rows, as far as there are any.
  PRIM static int first_numbers(int warp, int count) { return (warp + ALL_WARPS - count % ALL_WARPS) % ALL_WARPS; }
  PRIM static bool has(int i, int count, uint32_t slice) {
    return i < count * CHANNELS && (WHOLE_VALUES || slice * CHANNELS + i % CHANNELS < HEAD_V);
  }
  PRIM void load(const Inputs& x, int64_t first, int count, const Place& p, uint32_t slice) {
    const int warp = p.thread / 32, other = first_numbers(warp, count);
    if (warp < count) rows.load(x, first + warp, p.thread % 32);
    if (other < count) numbers.load(x, first + other);
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      const int i = e * THREADS + p.thread;
      if (has(i, count, slice))
        values[e] = x.v[((first + i / CHANNELS) * x.HV + x.hv) * HEAD_V + slice * CHANNELS + i % CHANNELS];
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
      numbers.store(tokens, b, x, lane);
    }
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      const int i = e * THREADS + p.thread;
      if (has(i, count, slice)) tokens.values[i / CHANNELS][i % CHANNELS] = widen(values[e]);
    }
  }
};

// S^T k and S^T q of the own value channel, q and k as they read.
struct Read {
  real k, q;
};
template <class Tile>
PRIM Read read(const Tile& S, Tokens& tokens, int b, const Place& p, Passed* passed) {
  const Keys k(tokens.k_read(b), p), q(tokens.q(b), p);
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
  const uint32_t warp = p.thread / 32, first = p.column * VALUES + p.part % SCATTERED * KEPT;
  if (p.thread % 32 < SCATTERED * BESIDE) {
#pragma unroll
    for (int j = 0; j < KEPT; j++) passed->k_S[warp][first + j] = k_sums[j], passed->q_S[warp][first + j] = q_sums[j];
  }
  __syncthreads();
  Read sums = {};
  if (p.thread < CHANNELS) {
#pragma unroll
    for (int w = 0; w < WARPS; w++) sums.k += passed->k_S[w][p.thread], sums.q += passed->q_S[w][p.thread];
  }
  return sums;
}

// n of all value channels of the tile, from that of the own one.
PRIM void share(real n, real (&all)[VALUES], const Place& p, Passed* passed) {
  if constexpr (WARPS > 1) {
    if (p.thread < CHANNELS) passed->written[p.thread] = n;
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < VALUES; j++) {
    if constexpr (WARPS > 1)
      all[j] = passed->written[p.column * VALUES + j];
    else
      all[j] = STATE_VK ? __shfl_sync(~0u, n, j, PARTS) : __shfl_sync(~0u, n, j * BESIDE + p.thread % BESIDE);
  }
}

// What comes of a token: o of the own value channel, and how the tile changes.
struct Update {
  Keys k, decays;
  real decay, o, n[VALUES];
  template <class Tile>
  PRIM real operator()(const Tile& S, int i, int j) const {
    return fused(k[i], n[j], (PER_CHANNEL ? decays[i] : decay) * S(i, j));
  }
};
template <class Tile>
PRIM Update advance(const Tile& S, Tokens& tokens, int b, real scale, const Place& p, Passed* passed) {
  const Read sums = read(S, tokens, b, p, passed);
  const auto [beta, decay, k_q, nothing] = tokens.numbers[b];
  const real v = p.has_own ? tokens.values[b][p.own_in_block] : (real)0;
  const real n = beta * fused(-decay, sums.k, v);
  Update update = {Keys(tokens.k(b), p), Keys(tokens.decays(b), p), decay};
  update.o = scale * fused(k_q, n, decay * sums.q);
  share(n, update.n, p, passed);
  return update;
}
