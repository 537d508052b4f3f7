// What comes to the tokens of a block of 16 from other blocks and from states, in backward_channel.cu, and where
// everything lies.
#pragma once
#include "portable/channel_gradient.cuh"
#include "portable/value_rows.cuh"

static_assert(CHUNK == 64 && WARPS == 8, "a warp has 16 tokens and half of the channels");
constexpr int HALVES = 2, HALF_THREADS = 128, COUNT = CHUNK / BLOCK, TILES = KEYS / 8;
constexpr int PARTS = UNITS / HALF_THREADS;  // units of a thread
constexpr int TILE = CHUNK * K_PITCH, STATES = SLICE * K_PITCH, P_PITCH = pitch_of<DTYPE>(CHUNK), OWN_PITCH = BLOCK + 2;
// Bytes of the place that is used three times.
constexpr int VALUE_BYTES = (2 * HALVES * STATES + 3 * CHUNK * V_PITCH) * sizeof(DTYPE);
constexpr int COMING_BYTES = 3 * HALVES * CHUNK * X_PITCH * sizeof(float);
constexpr int PLACE = VALUE_BYTES > COMING_BYTES ? VALUE_BYTES : COMING_BYTES;

struct Values {
  DTYPE *o, *n, *r;  // dO, N^ then N, dY then -dR
};

// Where the gradients of a half go, and how many tokens and channels there are.
struct Gradients {
  DTYPE *dq, *dk;
  float* dg;
  int64_t stride;
  int tokens, keys;
};

// Half of the key channels, of which a thread has one.
struct Half {
  Channels channels;
  DTYPE *s, *d;                      // slices of S, dS'
  DTYPE *late_k, *late_q, *early_k;  // Kl, Ql, Kc
  int thread, c;

  // The blocks of a thread's units.
  PRIM int block(int part) const { return thread / KEYS + HALF_THREADS / KEYS * part; }
  PRIM void scale_tiles(const float (&states_dot)[PARTS]) const;
  PRIM void decay_sums() const;
  PRIM void write_gradients(const Gradients& out, const float2* own) const;
};

struct Tiles {
  DTYPE *q, *k;
  float* e;
  float2* sums;
  float *decays, *through, *written, *states;
  DTYPE *dPqk, *E;
  float2* own;  // (scale dPqk, E) within blocks, [j][i]
  float *b, *b_sums, *place;
  Values values;

  PRIM Half half(int n, int thread) const {
    Half x = {};
    x.thread = thread, x.c = thread % KEYS;
    Channels& y = x.channels;
    y.q = q + n * TILE, y.k = k + n * TILE, y.e = e + n * CHUNK * X_PITCH;
    y.sums = sums + n * UNITS, y.decays = decays + n * UNITS, y.through = through + n * COUNT * (COUNT - 1) / 2 * KEYS;
    y.written = written + n * UNITS, y.states = states + n * UNITS;
    y.from_q = place + n * 3 * CHUNK * X_PITCH, y.from_k = y.from_q + CHUNK * X_PITCH;
    y.from_n = y.from_k + CHUNK * X_PITCH;
    DTYPE* tiles = (DTYPE*)place;
    x.s = tiles + n * 2 * STATES, x.d = x.s + STATES;
    x.late_k = tiles + n * 3 * TILE, x.late_q = x.late_k + TILE, x.early_k = x.late_q + TILE;
    return x;
  }
};

PRIM Tiles take_tiles(DynSmem& smem) {
  Tiles s = {};
  s.q = smem.take<DTYPE>(HALVES * TILE, "q");
  s.k = smem.take<DTYPE>(HALVES * TILE, "k");
  s.e = smem.take<float>(HALVES * CHUNK * X_PITCH, "decays");
  s.sums = smem.take<float2>(HALVES * UNITS, "sums of gates");
  s.decays = smem.take<float>(HALVES * UNITS, "decays of blocks");
  s.through = smem.take<float>(HALVES * COUNT * (COUNT - 1) / 2 * KEYS, "products of blocks");
  s.written = smem.take<float>(HALVES * UNITS, "products with the leaving state");
  s.states = smem.take<float>(HALVES * UNITS, "products of states");
  s.dPqk = smem.take<DTYPE>(CHUNK * P_PITCH, "scale dp");
  s.E = smem.take<DTYPE>(CHUNK * P_PITCH, "e");
  s.own = smem.take<float2>(CHUNK * OWN_PITCH, "pairs within blocks");
  s.b = smem.take<float>(CHUNK, "beta");
  s.b_sums = smem.take<float>(CHUNK, "dbeta");
  s.place = smem.take<float>(PLACE / 4, "values, then scaled tiles, then what comes to tokens");
  s.values.o = (DTYPE*)s.place + 2 * HALVES * STATES, s.values.n = s.values.o + CHUNK * V_PITCH;
  s.values.r = s.values.n + CHUNK * V_PITCH;
  return s;
}

// A thread's units: Kl, Ql and Kc, and what states are to gates.
PRIM void Half::scale_tiles(const float (&states_dot)[PARTS]) const {
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    const int a = block(part), at = a * KEYS + c;
    float f = 1.0f;
#pragma unroll 4
    for (int t = a * BLOCK; t < (a + 1) * BLOCK; t++) {
      f *= channels.e_of(t, c);
      late_k[t * K_PITCH + c] = narrow<DTYPE>(f * channels.k_of(t, c));
      late_q[t * K_PITCH + c] = narrow<DTYPE>(f * channels.q_of(t, c));
    }
    f = 1.0f;
#pragma unroll 4
    for (int t = (a + 1) * BLOCK - 1; t >= a * BLOCK; t--) {
      early_k[t * K_PITCH + c] = narrow<DTYPE>(f * channels.k_of(t, c));
      f *= channels.e_of(t, c);
    }
    channels.states[at] = states_dot[part] * decay_of_blocks(channels.sums + c, KEYS, 0, COUNT);
  }
}

// The sums over products of whole blocks, times the decays over what lies between: those that pass a thread's units,
// and theirs with the leaving state.
PRIM void Half::decay_sums() const {
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    const int a = block(part);
    float passed = channels.decays[a * KEYS + c], later = 1.0f;
    for (int b = a + 1; b < COUNT; b++) {
      channels.through_of(b, a, c) *= passed;
      passed *= channels.decays[b * KEYS + c], later *= channels.decays[b * KEYS + c];
    }
    channels.written[a * KEYS + c] *= later;
  }
}

// d times the decays of its columns.
PRIM void decay_columns(float (&d)[TILES][4], const float* decays, int lane) {
#pragma unroll
  for (int j = 0; j < TILES; j++) {
    const float2 f = *(const float2*)&decays[sum_column(lane, j, 0)];
    d[j][0] *= f.x, d[j][1] *= f.y, d[j][2] *= f.x, d[j][3] *= f.y;
  }
}
// d += A B, A the pairs of a warp's block with another one, or (TRANSPOSED) the other one's with it; B 16 scaled rows.
template <bool TRANSPOSED>
PRIM void multiply_block(float (&d)[TILES][4], const DTYPE* pairs, const DTYPE* rows, int lane) {
  typename Product::A a;
  if constexpr (TRANSPOSED)
    Product::load_a_transposed(a, pairs, P_PITCH, lane);
  else
    Product::load_a(a, pairs, P_PITCH, lane);
#pragma unroll
  for (int j = 0; j < TILES; j += 2) {
    typename Product::B b;
    Product::load_b_transposed(b, rows + j * 8, K_PITCH, lane);
    Product::multiply(d[j], d[j + 1], a, b);
  }
}
// sums += rows . d, for the columns that a thread has.
PRIM void add_products(float (&sums)[TILES][2], const DTYPE* rows, const float (&d)[TILES][4], int lane) {
#pragma unroll
  for (int j = 0; j < TILES; j++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float2 x = load_pair(&rows[(h * 8 + lane / 4) * K_PITCH + sum_column(lane, j, 0)]);
      sums[j][0] += x.x * d[j][2 * h], sums[j][1] += x.y * d[j][2 * h + 1];
    }
}
// out = the sums over a warp's rows: of a lane's columns the four rows of lanes share the work, each for a quarter.
PRIM void store_sums(float* out, float (&sums)[TILES][2], int lane) {
  const int row = lane / 4;
#pragma unroll
  for (int bit = 0; bit < 2; bit++) {
    // Halves of the columns that are left go to lanes with this bit.
    const int left = TILES >> bit;
    const bool upper = row >> bit & 1;
#pragma unroll
    for (int j = 0; j < left / 2; j++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float other = __shfl_xor_sync(~0u, upper ? sums[j][i] : sums[j + left / 2][i], 4 << bit);
        sums[j][i] = (upper ? sums[j + left / 2][i] : sums[j][i]) + other;
      }
  }
  const int first = (row & 1) * (TILES / 2) + (row >> 1 & 1) * (TILES / 4);
#pragma unroll
  for (int j = 0; j < TILES / 4; j++) {
#pragma unroll
    for (int i = 0; i < 2; i++) sums[j][i] += __shfl_xor_sync(~0u, sums[j][i], 16);
    if (row < 4) *(float2*)&out[sum_column(lane, first + j, 0)] = make_float2(sums[j][0], sums[j][1]);
  }
}

// The products of a value head, as accumulators of a warp: with states, then with other blocks, too.
struct Products {
  float from_q[TILES][4], from_k[TILES][4], from_n[TILES][4];
  float pairs[8][4];  // dPqk in the first half, E in the second

  PRIM void clear_all() { clear(from_q), clear(from_k), clear(from_n), clear(pairs); }

  // Pairs of the warp's block with earlier ones, and within it.
  PRIM void store_pairs(const Tiles& s, float scale, int block, int warp, int lane) const {
    const bool queries = warp < COUNT;
    DTYPE* tile = queries ? s.dPqk : s.E;
    const float factor = queries ? scale : 1.0f;
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = sum_row(lane, i), column = sum_column(lane, j, i) - block * BLOCK;
        const float x = factor * pairs[j][i];
        if (column < 0) tile[(block * BLOCK + row) * P_PITCH + block * BLOCK + column] = narrow<DTYPE>(x);
        if (column < 0 || column >= BLOCK) continue;
        float* own = (float*)&s.own[(block * BLOCK + column) * OWN_PITCH + row];
        own[!queries] = column < row + queries ? x : 0.0f;
      }
  }

  PRIM void gather_before(const Half& half, const Tiles& s, float scale, int block, int lane) {
    const Channels& x = half.channels;
    const int row = block * BLOCK;
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) from_q[j][i] *= scale;
#pragma unroll 1
    for (int b = 0; b < block; b++) {
      float sums[TILES][2] = {};
      add_products(sums, half.late_q + row * K_PITCH, from_q, lane);
      add_products(sums, half.late_k + row * K_PITCH, from_k, lane);
      store_sums(&x.through_of(block, b, 0), sums, lane);
      decay_columns(from_q, x.decays + b * KEYS, lane);
      decay_columns(from_k, x.decays + b * KEYS, lane);
      const DTYPE* keys = half.early_k + b * BLOCK * K_PITCH;
      multiply_block<false>(from_q, s.dPqk + row * P_PITCH + b * BLOCK, keys, lane);
      multiply_block<false>(from_k, s.E + row * P_PITCH + b * BLOCK, keys, lane);
    }
  }

  PRIM void gather_behind(const Half& half, const Tiles& s, int block, int lane) {
    const Channels& x = half.channels;
    const int row = block * BLOCK;
    float sums[TILES][2] = {};
    add_products(sums, half.early_k + row * K_PITCH, from_n, lane);
    store_sums(x.written + block * KEYS, sums, lane);
#pragma unroll 1
    for (int b = COUNT - 1; b > block; b--) {
      decay_columns(from_n, x.decays + b * KEYS, lane);
      const int pairs = b * BLOCK * P_PITCH + row;
      multiply_block<true>(from_n, s.dPqk + pairs, half.late_q + b * BLOCK * K_PITCH, lane);
      multiply_block<true>(from_n, s.E + pairs, half.late_k + b * BLOCK * K_PITCH, lane);
    }
  }

  PRIM void store(const Half& half, int block, int lane) const {
    auto write = [&](float* to, const float (&d)[TILES][4]) {
#pragma unroll
      for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int h = 0; h < 2; h++)
          *(float2*)&to[(block * BLOCK + h * 8 + lane / 4) * X_PITCH + sum_column(lane, j, 0)] =
              make_float2(d[j][2 * h], d[j][2 * h + 1]);
    };
    write(half.channels.from_q, from_q);
    write(half.channels.from_k, from_k);
    write(half.channels.from_n, from_n);
  }
};

// Of a thread's units: all that comes to their tokens, and dg.
PRIM void Half::write_gradients(const Gradients& out, const float2* own) const {
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    Unit unit;
    unit.a = block(part), unit.c = c;
    unit.load(channels);
    Rows dq = {}, dk = {}, to_q, to_k;
    auto read = [&](Rows& to, const float* from) {
#pragma unroll
      for (int i = 0; i < BLOCK; i++) to[i] = from[(unit.a * BLOCK + i) * X_PITCH + c];
    };
    read(to_q, channels.from_q), read(to_k, channels.from_k);
    unit.add_before(to_q, to_k, dq, dk);
    read(to_k, channels.from_n);
    unit.add_behind(to_k, dk);
    unit.within(own + unit.a * BLOCK * OWN_PITCH, OWN_PITCH, dq, dk);
    unit.add_through(channels);
#pragma unroll
    for (int i = 0; i < BLOCK; i++) {
      const int token = unit.a * BLOCK + i;
      if (token >= out.tokens || c >= out.keys) continue;
      const int64_t at = token * out.stride + c;
      out.dq[at] = narrow<DTYPE>(dq[i]), out.dk[at] = narrow<DTYPE>(dk[i]), out.dg[at] = unit.dg[i];
    }
  }
}
