// Products of pairs of tokens in channel_factors.cu, and the tiles that are scaled on the way.
#pragma once
#include "sm90/channel_factors/gates.cuh"
#include "sm90/gate_powers.cuh"
#include "sm90/pair_by_pair.cuh"
#include "tiles/fragments.cuh"
#include "tiles/store.cuh"

// Where the rows of a chunk and value head go.
struct Rows {
  DTYPE *k_read, *q_read, *k_write;
  int64_t stride;
  int tokens;
};

// Eight neighbours: in DTYPE, and in float.
typedef float Eight[8];
PRIM void load_eight(Eight& y, const DTYPE* at) {
  const uint4 x = *(const uint4*)at;
  const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 two = unpack2<DTYPE>(pairs[i]);
    y[2 * i] = two.x, y[2 * i + 1] = two.y;
  }
}
PRIM void load_eight(Eight& y, const float* low, const float* high) {
  const float4 a = *(const float4*)low, b = *(const float4*)high;
  y[0] = a.x, y[1] = a.y, y[2] = a.z, y[3] = a.w, y[4] = b.x, y[5] = b.y, y[6] = b.z, y[7] = b.w;
}
PRIM uint4 pack_eight(const Eight& a) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; i++) pairs[i] = pack2<DTYPE>(a[2 * i], a[2 * i + 1]);
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}
PRIM uint4 pack_eight(const Eight& a, const Eight& b) {
  Eight x;
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = a[i] * b[i];
  return pack_eight(x);
}

// 2^(-x - HALF_RANGE), larger by what TF32 leaves out. Where it overflows, pairs are not made of it.
PRIM float power_before(float x) {
  constexpr float KEPT_POWER = 0.000498f;  // log2(KEPT)
  return exp2f(KEPT_POWER - HALF_RANGE - x);
}
// Numbers of 16 bits without a decay stay what they are, and those with one make up for what TF32 leaves out.
constexpr float UP = 288230376151711744.0f * KEPT, DOWN = KEPT / 288230376151711744.0f;  // 2^HALF_RANGE

// M and p of a block's own pairs, as accumulators of a warp.
struct Own {
  float m[2][4], p[2][4];

  // Eight steps of a channel each, as TF32 has them in pairs: which channels make a step is free, so a thread's are
  // neighbours in memory.
  PRIM void add(const Eight (&keys)[2], const Eight (&queries)[2], const Eight (&early)[2]) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      uint32_t a[4], b[4], c[4];
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          a[2 * j + h] = __float_as_uint(UP * keys[h][i + j]);
          b[2 * j + h] = __float_as_uint(UP * queries[h][i + j]);
          c[2 * j + h] = __float_as_uint(early[h][i + j]);
        }
#pragma unroll
      for (int h = 0; h < 2; h++) {
        mma_m16n8k8_tf32(m[h], a, c[h], c[2 + h]);
        mma_m16n8k8_tf32(p[h], b, c[h], c[2 + h]);
      }
    }
  }

  // Rows from `within` on are those of `beyond`.
  PRIM void finish(const Own& beyond, int within, int lane) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = sum_row(lane, i), column = sum_column(lane, h, i);
        if (row >= within) m[h][i] = beyond.m[h][i], p[h][i] = beyond.p[h][i];
        if (column >= row) m[h][i] = 0.0f;
        if (column > row) p[h][i] = 0.0f;
      }
  }
};

// What a warp makes of the 16 tokens of its block: rows of tiles; in place of K and Q those times 2^x, in place of x
// keys times 2^(z - x); and pairs of its own. A thread has eight of every 32 channels, of two tokens.
PRIM void scale_block(Own& own, const Rows& out, const Shared& s, int block, int lane) {
#pragma unroll 1
  for (int c = lane % 4 * 8; c < KP; c += 32) {
    Eight z, before, after, late_k[2], late_q[2], early[2];
    load_eight(z, &s.sums[block * KP + c], &s.sums[block * KP + c + 4]);
    load_eight(before, &s.before[block * KP + c], &s.before[block * KP + c + 4]);
    load_eight(after, &s.after[block * KP + c], &s.after[block * KP + c + 4]);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = block * BLOCK + h * 8 + lane / 4;
      const int64_t at = row * out.stride;
      const bool inside = row < out.tokens && c < HEAD_K;
      Eight x, k, q, since, until;
      load_eight(x, &s.x[x_place(row, c)], &s.x[x_place(row, c + 4)]);
      load_eight(k, &s.k[row * K_PITCH + c]);
      load_eight(q, &s.q[row * K_PITCH + c]);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        since[i] = exp2f(x[i]), until[i] = exp2f(z[i] - x[i]) * k[i];
        late_k[h][i] = since[i] * k[i], late_q[h][i] = since[i] * q[i];
        early[h][i] = power_before(x[i]) * k[i];
      }
      *(uint4*)&s.k[row * K_PITCH + c] = pack_eight(late_k[h]);
      *(uint4*)&s.q[row * K_PITCH + c] = pack_eight(late_q[h]);
      *(uint4*)early_keys(s, row, c) = pack_eight(until);
      if (inside) {
        store_eight(out.k_read + at, c, pack_eight(late_k[h], before));
        store_eight(out.q_read + at, c, pack_eight(late_q[h], before));
        store_eight(out.k_write + at, c, pack_eight(until, after));
      }
    }
    own.add(late_k, late_q, early);
  }
}

// The same M and p for rows from `within` on, pair by pair: a lane has KP / 32 channels.
PRIM void multiply_one_by_one(Own& own, const Shared& s, int block, int within, int lane) {
  constexpr int CHANNELS = KP / 32;
  auto load = [&](float (&y)[CHANNELS], const DTYPE* rows, int row) {
#pragma unroll
    for (int n = 0; n < CHANNELS; n++) y[n] = widen(rows[row * K_PITCH + n * 32 + lane]);
  };
  auto load_x = [&](float (&y)[CHANNELS], int row) {
#pragma unroll
    for (int n = 0; n < CHANNELS; n++) y[n] = s.x[x_place(row, n * 32 + lane)];
  };
#pragma unroll 1
  for (int i = within; i < BLOCK; i++) {
    const int row = block * BLOCK + i;
    float k[CHANNELS], q[CHANNELS], x[CHANNELS];
    load(k, s.k, row), load(q, s.q, row), load_x(x, row);
#pragma unroll 1
    for (int j = 0; j <= i; j++) {
      float earlier[CHANNELS], before[CHANNELS], sums[2] = {};
      load(earlier, s.k, block * BLOCK + j), load_x(before, block * BLOCK + j);
#pragma unroll
      for (int n = 0; n < CHANNELS; n++) {
        const float decayed = exp2f(x[n] - before[n]) * earlier[n];
        sums[0] += k[n] * decayed, sums[1] += q[n] * decayed;
      }
      put_pair(own, sums, i, j, lane);
    }
  }
  __syncwarp();  // the rows are about to be overwritten
}

// Two rows of blocks that meet: M and p of later rows and earlier columns.
struct Met {
  float m[2][4], p[2][4];

  // Scaled rows of the later block, times the decays over blocks in between, by scaled keys of the earlier one. APART:
  // there are such blocks.
  template <bool APART>
  PRIM void multiply(const Shared& s, int later, int earlier, int lane) {
    typedef Mma<DTYPE> Product;
    clear(m), clear(p);
    const int row = earlier * BLOCK + lane % 8 + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < KP; k += 16) {
      typename Product::A keys, queries;
      typename Product::B early;
      Product::load_a(keys, s.k + later * BLOCK * K_PITCH + k, K_PITCH, lane);
      Product::load_a(queries, s.q + later * BLOCK * K_PITCH + k, K_PITCH, lane);
      ldmatrix_x4(early.r, early_keys(s, row, k + lane / 8 % 2 * 8));
      if constexpr (APART) {
        float2 f[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int at = k + half * 8 + lane % 4 * 2;
          f[half] = *(const float2*)&s.over[(earlier + 1) * KP + at];
          if (later == earlier + 2) continue;
          const float2 more = *(const float2*)&s.over[(earlier + 2) * KP + at];
          f[half].x *= more.x, f[half].y *= more.y;
        }
        scale(keys.r, f), scale(queries.r, f);
      }
      Product::multiply(m[0], m[1], keys, early);
      Product::multiply(p[0], p[1], queries, early);
    }
  }
  static PRIM void scale(uint32_t (&rows)[4], const float2 (&f)[2]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 x = unpack2<DTYPE>(rows[i]);
      rows[i] = pack2<DTYPE>(f[i / 2].x * x.x, f[i / 2].y * x.y);
    }
  }
};

// The six pairs of blocks that meet, of a warp: three have one with decays over blocks in between, the last one has the
// three others.
struct Meeting {
  int warp;
  PRIM bool apart() const { return warp != 3; }
  PRIM int count() const { return apart() ? 1 : 3; }
  PRIM int later(int n) const { return warp == 3 ? n + 1 : warp == 0 ? 2 : 3; }
  PRIM int earlier(int n) const { return warp == 3 ? n : warp == 1 ? 1 : 0; }
};

// 16 x 16 of p, and zeros to the right of the blocks on the diagonal.
PRIM void write_pairs(DTYPE* p, int64_t stride, const float (&d)[2][4], int rows, int lane) {
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = sum_row(lane, 2 * half);
      if (row < rows)
        *(uint32_t*)&p[row * stride + h * 8 + lane % 4 * 2] = pack2<DTYPE>(d[h][2 * half], d[h][2 * half + 1]);
    }
}
PRIM void write_zeros(DTYPE* p, int64_t stride, int block, int rows, int lane) {
  for (int column = (block + 1) * BLOCK; column < CHUNK; column += BLOCK)
    if (lane / 2 < rows) store_eight(p + lane / 2 * stride, column + lane % 2 * 8, uint4{});
}
