// What a slice of value channels adds, in backward_channel.cu: dO S^T, dY S^T, N^ dS'^T, transposed, and dO N^T, dY
// N^T; and of the values themselves dV and dbeta.
#pragma once
#include "sm90/backward_channel/shared.cuh"

// Asks for a slice, from value channel `first` on; rows are those of the chunk's first token.
struct Sources {
  const DTYPE *o, *n, *r, *s, *d;
  int64_t stride;
  int tokens, keys;

  PRIM void load(const Values& x, int first, int thread) const {
    const int width = min(SLICE, HEAD_V - first);
    const int64_t at = (int64_t)first * HEAD_K;
    load_tile<DTYPE, SLICE, KEYS, HEAD_K, THREADS>(x.s, s + at, HEAD_K, width, keys, thread);
    load_tile<DTYPE, SLICE, KEYS, HEAD_K, THREADS>(x.d, d + at, HEAD_K, width, keys, thread);
    load_tile<DTYPE, CHUNK, SLICE, HEAD_V, THREADS>(x.o, o + first, stride, tokens, width, thread);
    load_tile<DTYPE, CHUNK, SLICE, HEAD_V, THREADS>(x.n, n + first, stride, tokens, width, thread);
    load_tile<DTYPE, CHUNK, SLICE, HEAD_V, THREADS>(x.r, r + first, stride, tokens, width, thread);
  }
};

// What has come to a tile from states and other blocks.
struct Coming {
  Tile q, k, n;

  // Leaves it in the lane's own place, for want of registers, and takes it back.
  PRIM void store(float4* place) const {
    each(*this, [&](const float (&x)[4], int n) { place[n * THREADS] = make_float4(x[0], x[1], x[2], x[3]); });
  }
  PRIM void load(const float4* place) {
    each(*this, [&](float (&x)[4], int n) {
      const float4 y = place[n * THREADS];
      x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
    });
  }
  template <class C, class F>
  static PRIM void each(C& coming, F f) {
#pragma unroll
    for (int n = 0; n < 2; n++) f(coming.q[n], n), f(coming.k[n], 2 + n), f(coming.n[n], 4 + n);
  }
};

// Blocks of tokens whose pairs a warp multiplies: those of its own with all up to it; but the last block with itself
// is left to the first warp, so that none has more than three.
struct Meeting {
  int later, earlier;

  static PRIM int count(int block) { return block == 0 ? 2 : min(block + 1, COUNT - 1); }
  PRIM Meeting(int block, int n)
      : later(block == 0 && n == 1 ? COUNT - 1 : block), earlier(block == 0 && n == 1 ? COUNT - 1 : n) {}
};

// The sums of a warp: per tile of channels what comes to its tokens; and of pairs of blocks dO N^ in the first half of
// warps, dY N^ in the second.
struct Products {
  Coming from[TILES];
  Tile pairs[COUNT - 1];   // of 16 rows and columns, see Meeting
  float states[TILES][2];  // <S, dS'> over a quarter of the values

  PRIM void clear_all() {
#pragma unroll
    for (int u = 0; u < TILES; u++) {
      clear(from[u].q), clear(from[u].k), clear(from[u].n);
      states[u][0] = states[u][1] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < COUNT - 1; n++) clear(pairs[n]);
  }

  PRIM void add_slice(const Values& x, const Warp& warp, int first_step) {
    const int lane = warp.lane, row = warp.row() * V_PITCH;
#pragma unroll
    for (int v = 0; v < SLICE; v += 16) {
      typename Product::B o, n, r;
      Product::load_b(o, x.o + row + v, V_PITCH, lane);
      Product::load_b(n, x.n + row + v, V_PITCH, lane);
      Product::load_b(r, x.r + row + v, V_PITCH, lane);
#pragma unroll
      for (int u = 0; u < TILES; u++) {
        typename Product::A s, d;
        const int at = v * K_PITCH + warp.channel() + u * 16;
        Product::load_a_transposed(s, x.s + at, K_PITCH, lane);
        Product::load_a_transposed(d, x.d + at, K_PITCH, lane);
        Product::multiply(from[u].q[0], from[u].q[1], s, o);
        Product::multiply(from[u].k[0], from[u].k[1], s, r);
        Product::multiply(from[u].n[0], from[u].n[1], d, n);
        if ((first_step + v / 16) % COUNT == warp.block) add_states(states[u], s, d);
      }
      typename Product::A rows;  // those that are columns above
#pragma unroll
      for (int i = 0; i < 4; i++) rows.r[i] = warp.part ? r.r[i / 2 + i % 2 * 2] : o.r[i / 2 + i % 2 * 2];
#pragma unroll
      for (int m = 0; m < COUNT - 1; m++) {
        if (m >= Meeting::count(warp.block)) continue;  // the whole warp
        const Meeting blocks(warp.block, m);
        if (m == 1 && blocks.later != warp.block)
          Product::load_a(rows, (warp.part ? x.r : x.o) + blocks.later * BLOCK * V_PITCH + v, V_PITCH, lane);
        typename Product::B columns;
        Product::load_b(columns, x.n + blocks.earlier * BLOCK * V_PITCH + v, V_PITCH, lane);
        Product::multiply(pairs[m][0], pairs[m][1], rows, columns);
      }
    }
  }
  static PRIM void add_states(float (&sums)[2], const typename Product::A& s, const typename Product::A& d) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 x = unpack2<DTYPE>(s.r[i]), y = unpack2<DTYPE>(d.r[i]);
      sums[i % 2] += x.x * y.x + x.y * y.y;
    }
  }

  // N = b N^, -dR = -b dY.
  PRIM void weigh(const Shared& s, float scale, const Warp& warp) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const float2 b = *(const float2*)&s.b[warp.row() + warp.pair() + n * 8];
#pragma unroll
      for (int u = 0; u < TILES; u++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float weight = i % 2 ? b.y : b.x;
          from[u].q[n][i] *= scale, from[u].k[n][i] *= -weight, from[u].n[n][i] *= weight;
        }
    }
  }

  // dPqk and E: of different blocks, and within blocks.
  PRIM void store_pairs(const Shared& s, float scale, const Warp& warp) const {
    DTYPE* tile = warp.part ? s.E : s.dPqk;
#pragma unroll
    for (int m = 0; m < COUNT - 1; m++) {
      if (m >= Meeting::count(warp.block)) continue;
      const Meeting blocks(warp.block, m);
      const int row = blocks.later * BLOCK + warp.eighth(), column = blocks.earlier * BLOCK + warp.pair();
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float factor = warp.part ? -s.b[row + h * 8] : scale;
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const float2 b = *(const float2*)&s.b[column + j * 8];
          const float x = factor * b.x * pairs[m][j][2 * h], y = factor * b.y * pairs[m][j][2 * h + 1];
          if (blocks.earlier < blocks.later)
            *(uint32_t*)&tile[(row + h * 8) * P_PITCH + column + j * 8] = pack2<DTYPE>(x, y);
          else
            store_own(s, blocks.later, h, j, x, y, warp);
        }
      }
    }
  }
  // Two columns of a row of tile (h, j), 8 x 8, of a block's own pairs: as right operands of within.cuh, which make up
  // for what TF32 leaves out of the left ones.
  static PRIM void store_own(const Shared& s, int block, int h, int j, float x, float y, const Warp& warp) {
    if (h < j) return;
    x = __uint_as_float(to_tf32(KEPT * x)), y = __uint_as_float(to_tf32(KEPT * y));
    const int r = warp.eighth(), k = warp.pair(), at = block * OPERANDS + (h + j) * 32;
    *(float2*)((float*)&s.to_late[at + warp.lane] + 2 * warp.part) = make_float2(x, y);
    float* columns = (float*)&s.to_early[at + k * 4 + r / 2] + 2 * warp.part + r % 2;
    columns[0] = x, columns[16] = y;
  }
};

// dV = b dY and dbeta = rowsum(dY N^), which the blocks of a chunk and head share by tokens: four channels of a thread.
struct ValueGradients {
  static constexpr int TOKENS = CHUNK / KEY_SLICES, ACROSS = SLICE / 4, DOWN = THREADS / ACROSS, JOBS = TOKENS / DOWN;
  int first, column;  // token and channel
  float sums[JOBS];

  PRIM ValueGradients(int key_slice, int thread)
      : first(key_slice * TOKENS + thread / ACROSS), column(thread % ACROSS * 4), sums() {}

  PRIM void add_slice(const Values& x, const float* b, DTYPE* dv, int64_t stride, int tokens, int width) {
#pragma unroll
    for (int job = 0; job < JOBS; job++) {
      const int token = first + job * DOWN, at = token * V_PITCH + column;
      const uint2 n = *(const uint2*)&x.n[at], r = *(const uint2*)&x.r[at];
      const float2 n0 = unpack2<DTYPE>(n.x), n1 = unpack2<DTYPE>(n.y), r0 = unpack2<DTYPE>(r.x),
                   r1 = unpack2<DTYPE>(r.y);
      sums[job] += n0.x * r0.x + n0.y * r0.y + n1.x * r1.x + n1.y * r1.y;
      if (token >= tokens || column >= width) continue;
      const float weight = b[token];
      *(uint2*)&dv[token * stride + column] =
          make_uint2(pack2<DTYPE>(weight * r0.x, weight * r0.y), pack2<DTYPE>(weight * r1.x, weight * r1.y));
    }
  }
  PRIM void write_dbeta(float* dbeta, int stride, int tokens) const {
#pragma unroll
    for (int job = 0; job < JOBS; job++) {
      const int token = first + job * DOWN;
      float sum = sums[job];
#pragma unroll
      for (int distance = ACROSS / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
      if (column == 0 && token < tokens) dbeta[(int64_t)token * stride] = sum;
    }
  }
};
