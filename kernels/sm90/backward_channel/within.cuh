// Pairs of tokens i >= j of one block of 16, in backward_channel.cu, and what a block's gradients are made of.
//
// The block is halved again and again. Tokens of a later half of H tokens and of the earlier one before it, whose last
// token is m, meet in products of their own: with x the sums of the block's gates, f_i = 2^(x_i - x_m) and f_j =
// 2^(x_m - x_j), which are at most 1 whatever the gates are,
//
//   dq_i += f_i sum_j dPqk_ij f_j k_j      dk_i += f_i sum_j E_ij f_j k_j
//   dk_j += f_j sum_i (dPqk_ij f_i q_i + E_ij f_i k_i)
//
// and dg_t of a later half needs the sums of their products with what they come to over i >= t, of an earlier half
// those over j < t. These sums are products, too, with matrices of ones and zeros. Nothing is the difference of others.
#pragma once
#include "sm90/backward_channel/blocks.cuh"

// A tile of channels by tokens as left operand, eight tokens deep: k runs as 0 2 4 6 1 3 5 7, here and in the right
// one.
PRIM void multiply(float (&sums)[4], const float (&d)[4], float b0, float b1) {
  const uint32_t a[4] = {__float_as_uint(d[0]), __float_as_uint(d[2]), __float_as_uint(d[1]), __float_as_uint(d[3])};
  mma_m16n8k8_tf32(sums, a, __float_as_uint(b0), __float_as_uint(b1));
}

// A right operand of ones and zeros, by what says whether (k, n) is one.
template <class F>
PRIM float2 ones_where(F is_one, const Warp& warp) {
  const unsigned k = warp.pair(), n = warp.eighth();
  return make_float2(is_one(k, n) ? 1.0f : 0.0f, is_one(k + 1, n) ? 1.0f : 0.0f);
}

// Gradients of a tile, dg without what TF32 leaves out.
struct Levels {
  Tile dq, dk, dg;

  // What has come from states and other blocks, and every token with itself.
  PRIM void begin(const Coming& from, const Rows& rows, const float* pairs, const Warp& warp) {
    const float2 since = ones_where([](unsigned from, unsigned to) { return from >= to; }, warp);
    const float2 until = ones_where([](unsigned from, unsigned to) { return from < to; }, warp);
    clear(dg);
#pragma unroll
    for (int n = 0; n < 2; n++) {
      float reads[4], writes[4];
      const float* diagonal = pairs + n * 256 + warp.pair() * 18;  // dPqk_ii of two tokens
      const float p[2] = {1.0f / KEPT * diagonal[0], 1.0f / KEPT * diagonal[17]};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float x = rows.x[n][i], q = rows.q[n][i], k = rows.k[n][i], f = exp2f(x);
        const float to_q = f * from.q[n][i], to_k = f * from.k[n][i], back = exp2f(rows.z[i / 2] - x) * from.n[n][i];
        dq[n][i] = to_q + p[i % 2] * k, dk[n][i] = to_k + back + p[i % 2] * q;
        reads[i] = q * to_q + k * to_k, writes[i] = k * back;
      }
      multiply(dg[n], reads, since.x, since.y);
      multiply(dg[n], writes, until.x, until.y);
      if (n == 0)
        multiply(dg[1], writes, 1.0f, 1.0f);
      else
        multiply(dg[0], reads, 1.0f, 1.0f);
    }
  }

  // Eight tokens of a level: their decays, and queries and keys times these.
  struct Scaled {
    float f[4], q[4], k[4];
    PRIM Scaled(const Rows& rows, int n, bool later, const float* middle) {
      const float sign = later ? 1.0f : -1.0f, from[2] = {-sign * middle[0], -sign * middle[8]};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        f[i] = exp2f(fmaf(sign, rows.x[n][i], from[i / 2]));
        q[i] = f[i] * rows.q[n][i], k[i] = f[i] * rows.k[n][i];
      }
    }
  };
  // Adds what has come to eight tokens, q to queries and k to keys, and its sums for dg by `ones`.
  PRIM void add(const Scaled& x, int n, const float (&q)[4], const float (&k)[4], float2 ones) {
    float z[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      z[i] = x.q[i] * q[i] + x.k[i] * k[i];
      dq[n][i] += x.f[i] * q[i], dk[n][i] += x.f[i] * k[i];
    }
    multiply(dg[n], z, ones.x, ones.y);
  }
  PRIM void add(const Scaled& x, int n, const float (&k)[4], float2 ones) {
    float z[4];
#pragma unroll
    for (int i = 0; i < 4; i++) z[i] = x.k[i] * k[i], dk[n][i] += x.f[i] * k[i];
    multiply(dg[n], z, ones.x, ones.y);
  }

  // The halves of the block. Operands are (dPqk, dPqk, E, E) for two k of a lane, which are earlier tokens in
  // `to_late`, and later ones in `to_early`.
  PRIM void add_halves(const Rows& rows, const float* sums, const float4* to_late, const float4* to_early,
                       const Warp& warp) {
    const Scaled earlier(rows, 0, false, sums + 7 * X_PITCH), later(rows, 1, true, sums + 7 * X_PITCH);
    const float4 late = to_late[32 + warp.lane], early = to_early[32 + warp.lane];
    float q[4] = {}, k[4] = {}, back[4] = {};
    multiply(q, earlier.k, late.x, late.y);
    multiply(k, earlier.k, late.z, late.w);
    multiply(back, later.q, early.x, early.y);
    multiply(back, later.k, early.z, early.w);
    add(later, 1, q, k, ones_where([](unsigned from, unsigned to) { return from >= to; }, warp));
    add(earlier, 0, back, ones_where([](unsigned from, unsigned to) { return from < to; }, warp));
  }

  // Halves of H tokens, 4 or 2, among the n-th eight. A lane's k are both later or both earlier tokens.
  template <int H>
  PRIM void add_quarters(int n, const Rows& rows, const float* sums, const float4* to_late, const float4* to_early,
                         const Warp& warp) {
    const unsigned k = warp.pair(), r = warp.eighth();
    const Scaled x(rows, n, k / H % 2, sums + (n * 8 + k / (2 * H) * 2 * H + H - 1) * X_PITCH);
    const bool meet = k / (2 * H) == r / (2 * H), early = meet && k / H > r / H, late = meet && k / H < r / H;
    const float4 pairs = early || late ? (late ? to_late : to_early)[n * 64 + warp.lane] : float4{};
    float to_q[4] = {}, to_k[4] = {};
    multiply(to_q, x.k, late ? pairs.x : 0.0f, late ? pairs.y : 0.0f);
    multiply(to_k, x.k, pairs.z, pairs.w);
    multiply(to_k, x.q, early ? pairs.x : 0.0f, early ? pairs.y : 0.0f);
    const float2 ones = ones_where(
        [](unsigned from, unsigned to) { return from / H == to / H && (to / H % 2 ? from >= to : from < to); }, warp);
    add(x, n, to_q, to_k, ones);
  }

  // Neighbours among the n-th eight, both of which a lane has.
  PRIM void add_neighbours(int n, const Rows& rows, const float* pairs, const Warp& warp) {
    const float* pair = pairs + n * 256 + warp.pair() * 18 + 16;  // of the second token with the first one
    const float p = pair[0] * (1.0f / KEPT), e = pair[2] * (1.0f / KEPT);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const float f = exp2f(rows.x[n][i + 1] - rows.x[n][i]), k = f * rows.k[n][i];
      const float back = p * rows.q[n][i + 1] + e * rows.k[n][i + 1];
      dq[n][i + 1] += p * k, dk[n][i + 1] += e * k;
      dk[n][i] += f * back;
      dg[n][i + 1] += back * (1.0f / KEPT * k);
    }
  }
};

// dq and dk of the value heads before, in float, which wait in global memory where a lane finds its own.
struct Earlier {
  float4* waiting;
  bool none, last;  // of the value heads: none before, none to come

  PRIM void add_to(Levels& y, int u) const {
    each(y, u, [](float (&d)[4], float4& x) { d[0] += x.x, d[1] += x.y, d[2] += x.z, d[3] += x.w; });
  }
  PRIM void replace_by(Levels& y, int u) const {
    each(y, u, [](const float (&d)[4], float4& x) { x = make_float4(d[0], d[1], d[2], d[3]); });
  }
  template <class F>
  PRIM void each(Levels& y, int u, F f) const {
    const unsigned thread = (unsigned)opaque(threadIdx.x) % THREADS;
    float4* const at = waiting + ((int64_t)blockIdx.x * TILES + u) * 4 * THREADS + thread;
#pragma unroll
    for (int n = 0; n < 2; n++) f(y.dq[n], at[n * THREADS]), f(y.dk[n], at[(2 + n) * THREADS]);
  }
};

// The gradients of a warp's tokens and channels, in place of what they are of, where no heads are to come.
PRIM void finish_gradients(const Coming (&from)[TILES], const Shared& s, const Earlier& heads, const Warp& warp) {
  const float4 *late = s.to_late + warp.block * OPERANDS, *early = s.to_early + warp.block * OPERANDS;
  sum_passing(s, warp);
  float4* place = (float4*)s.place + (warp.part * COUNT + warp.block) * 32 + warp.lane;
  from[1].store(place);
#pragma unroll
  for (int u = 0; u < TILES; u++) {
    Coming coming = from[0];
    if (u == 1) coming.load(place);
    const Rows rows(s, warp, u);
    const float* sums = s.x + warp.row() * X_PITCH + warp.channel() + u * 16 + warp.eighth();
    Levels y;
    y.begin(coming, rows, (const float*)late, warp);
    y.add_halves(rows, sums, late, early, warp);
#pragma unroll
    for (int n = 0; n < 2; n++) {
      y.add_quarters<4>(n, rows, sums, late, early, warp);
      y.add_quarters<2>(n, rows, sums, late, early, warp);
      y.add_neighbours(n, rows, (const float*)late, warp);
    }
    const float* passing = s.passing + warp.block * KEYS + warp.channel() + u * 16 + warp.eighth();
    if (GROUPED && !heads.none) heads.add_to(y, u);
    __syncwarp();  // everyone has read
    if (GROUPED && !heads.last) {
      heads.replace_by(y, u);
    } else {
      write_tile(s.q, y.dq, warp, u);
      write_tile(s.k, y.dk, warp, u);
    }
    float* dg = s.x + warp.first();
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) dg[warp.place(u, n, i)] = KEPT * y.dg[n][i] + passing[i / 2 * 8];
  }
  __syncwarp();
}

// Where the gradients of a chunk and its channels go, those of keys and of a value head, and how many there are.
struct Gradients {
  DTYPE *dq, *dk;
  float* dg;
  int64_t key, key_stride, gate, gate_stride;
  int tokens, channels;

  PRIM void write_all(const Shared& s, bool keys, const Warp& warp) const {
    if (keys) {
      write<DTYPE, K_PITCH>(dq, key, key_stride, s.q, warp);
      write<DTYPE, K_PITCH>(dk, key, key_stride, s.k, warp);
    }
    write<float, X_PITCH>(dg, gate, gate_stride, s.x, warp);
  }
  // A warp's tile, 16 bytes of a lane.
  template <class T, int PITCH>
  PRIM void write(T* out, int64_t first, int64_t stride, const T* tile, const Warp& warp) const {
    constexpr int EACH = 16 / sizeof(T), ACROSS = PART / EACH, DOWN = 32 / ACROSS;
    const int row = warp.row() + (unsigned)warp.lane / ACROSS;
    const int column = warp.channel() + (unsigned)warp.lane % ACROSS * EACH;
    T* to = out + first + row * stride;
    if (column >= channels) return;
#pragma unroll
    for (int i = 0; i < BLOCK; i += DOWN, to += DOWN * stride)
      if (row + i < tokens) ((uint4*)to)[column / EACH] = *(const uint4*)&tile[(row + i) * PITCH + column];
  }
};
