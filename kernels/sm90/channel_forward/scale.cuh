// What the walkers of sm90/channel_forward.cu do with a chunk before it is walked, each of their eight warps with 16
// tokens and half of the key channels, or, beside leads, the four warps that make factors. X and the powers are those
// of sm90/channel_forward/gates.cuh. In place of K, Q and the sums of a chunk they leave
//
//   2^X K, 2^X Q                       read by pairs with earlier blocks, then times READS: by the state that enters;
//                                      in the first block times READS at once, where those that walk scale
//   2^-X K times UNTIL                 pairs with later blocks
//   2^-X K times WRITES                written into the state that leaves
//
// and the sums over their channels of a block's own pairs of M and Pqk: products of 2^X and 2^-X in TF32. What is out
// of its range is formed pair by pair. Of 2^-X K bf16, which has the exponents of a float, is kept, to be multiplied by
// powers; f16 is kept of the products.
#pragma once
#include "sm90/channel_forward/gates.cuh"
#include "sm90/gate_powers.cuh"
#include "sm90/pair_by_pair.cuh"

// Pairs of 16 bits times powers of two.
template <class T>
PRIM uint32_t times(uint32_t x, uint32_t power) {
  if constexpr (IsHalf<T>::value) {
    const float2 a = unpack2<T>(x), f = unpack2<Power>(power);
    return pack2<T>(f.x * a.x, f.y * a.y);
  } else {
    return multiply2<T>(x, power);
  }
}
PRIM uint4 times(const uint4& x, const uint4& y) {
  return make_uint4(times<DTYPE>(x.x, y.x), times<DTYPE>(x.y, y.y), times<DTYPE>(x.z, y.z), times<DTYPE>(x.w, y.w));
}

// The same of numbers that were not rounded before.
PRIM uint4 times(const float (&x)[8], const uint4& powers) {
  const uint32_t pairs[4] = {powers.x, powers.y, powers.z, powers.w};
  uint32_t y[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 f = unpack2<Power>(pairs[i]);
    y[i] = pack2<DTYPE>(f.x * x[2 * i], f.y * x[2 * i + 1]);
  }
  return make_uint4(y[0], y[1], y[2], y[3]);
}

// Eight channels of a row, read and written by one lane.
PRIM uint4& eight(DTYPE* tile, int place) { return *(uint4*)&tile[place]; }
// Whether keys for other blocks and for the state are their own rounded rows times powers of two.
constexpr bool SHARES_ROWS = !IsHalf<DTYPE>::value;

// 16 x 16 of M and of Pqk, as accumulators of a warp.
struct Pairs {
  float m[2][4], p[2][4];

  PRIM void write_p(DTYPE* box, int later, int earlier, int lane) const {
    write_box(box, p[0], p[1], later * BLOCK, earlier * BLOCK, lane);
  }

  // Larger by what TF32 has left out.
  PRIM void make_up() {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int i = 0; i < 4; i++) m[h][i] *= KEPT * KEPT, p[h][i] *= KEPT * KEPT;
  }
  // Rows from `within` on are those of `other`.
  PRIM void replace(const Pairs& other, int within, int lane) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (sum_row(lane, i) >= within) m[h][i] = other.m[h][i], p[h][i] = other.p[h][i];
  }
  // Zeros above the diagonal, and of M on it.
  PRIM void clear_later(int lane) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = sum_row(lane, i), column = sum_column(lane, h, i);
        if (column >= row) m[h][i] = 0.0f;
        if (column > row) p[h][i] = 0.0f;
      }
  }

  // To OWN_PAIRS floats from `to` on, without the quarter above the diagonal; and what lies there added.
  PRIM void store(float* to, int lane) const {
#pragma unroll
    for (int n = 0; n < 3; n++) {
      const int h = n / 2, i = n == 0 ? 0 : 2;
      store_two(to + n * 64 + lane * 2, {m[h][i], m[h][i + 1]});
      store_two(to + OWN_PAIRS / 2 + n * 64 + lane * 2, {p[h][i], p[h][i + 1]});
    }
  }
  PRIM void add(const float* from, int lane) {
#pragma unroll
    for (int n = 0; n < 3; n++) {
      const int h = n / 2, i = n == 0 ? 0 : 2;
      Two x, y;
      load_two(x, from + n * 64 + lane * 2), load_two(y, from + OWN_PAIRS / 2 + n * 64 + lane * 2);
      m[h][i] += x[0], m[h][i + 1] += x[1], p[h][i] += y[0], p[h][i + 1] += y[1];
    }
  }
};

// TURNS of the four with which a block's 128 key channels are done, 32 each, two in a box, from `first_turn` on.
template <int TURNS>
struct ScaleWarp {
  const Stage& at;
  int block, first_turn, lane;

  // Of two rows and eight channels: sums, K and Q, which become 2^X K and 2^X Q, and 2^-X K.
  struct Rows {
    Four x[2][2];
    uint32_t k[2][4], q[2][4], early[2][4];
    float unrounded[2][8];  // 2^-X K, where rows are not shared

    PRIM void load(const Stage& at, int h, int place) {
      load_four(x[h][0], at.sums(0, place)), load_four(x[h][1], at.sums(1, place));
      take(k[h], eight(at.k, place)), take(q[h], eight(at.q, place));
    }
    static PRIM void take(uint32_t (&to)[4], const uint4& x) { to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w; }

    // And their products, two channels of a lane at a time: which make a step is free, so they are neighbours in
    // memory.
    PRIM void scale(Pairs& own) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        uint32_t keys[4], queries[4], earlier[4];
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const float x0 = x[h][i / 2][i % 2 * 2], x1 = x[h][i / 2][i % 2 * 2 + 1];
          const float since0 = exp2f(x0), since1 = exp2f(x1);
          const float2 a = unpack2<DTYPE>(k[h][i]), b = unpack2<DTYPE>(q[h][i]);
          k[h][i] = scaled(keys, h, since0 * a.x, since1 * a.y);
          q[h][i] = scaled(queries, h, since0 * b.x, since1 * b.y);
          const float before0 = exp2f(-x0) * a.x, before1 = exp2f(-x1) * a.y;
          early[h][i] = scaled(earlier, h, before0, before1);
          unrounded[h][2 * i] = before0, unrounded[h][2 * i + 1] = before1;
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
          mma_m16n8k8_tf32(own.m[h], keys, earlier[h], earlier[2 + h]);
          mma_m16n8k8_tf32(own.p[h], queries, earlier[h], earlier[2 + h]);
        }
      }
    }
    // From the block's start to the chunk's, where they are one.
    PRIM void bring() {
      constexpr uint32_t POWER = (127 - (int)HALF_RANGE) << 7, BOTH = POWER << 16 | POWER;
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int i = 0; i < 4; i++) k[h][i] = times<DTYPE>(k[h][i], BOTH), q[h][i] = times<DTYPE>(q[h][i], BOTH);
    }
    static PRIM uint32_t scaled(uint32_t (&step)[4], int h, float x, float y) {
      step[h] = __float_as_uint(x), step[2 + h] = __float_as_uint(y);
      return pack2<DTYPE>(x, y);
    }
  };
  static PRIM uint4 packed(const uint32_t (&x)[4]) { return make_uint4(x[0], x[1], x[2], x[3]); }

  // All of a block's rows, and its own pairs. A lane has two tokens, and eight of every 32 channels. WITHIN: all
  // tokens are within range, and what goes to other blocks is 2^-X K times powers.
  template <bool WITHIN>
  PRIM void scale_rows(Pairs& own) const {
    const int start = piece_place(block * BLOCK + lane / 4, lane % 4 * 2);
#pragma unroll 1
    for (int i = 0; i < TURNS; i++) {
      const int turn = first_turn + i, odd = turn & 1, box = turn >> 1;
      const int piece = box * 8 + lane % 4 * 2 + odd, first = (start ^ odd * 8) + box * TILE;
      const uint4 until = at.eight_powers(UNTIL + block % (COUNT - 1), piece),
                  writes = at.eight_powers(WRITES + block, piece);
      Rows rows;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int place = first + h * 8 * BOX;
        rows.load(at, h, place);
        if constexpr (!WITHIN) {
          *(uint4*)at.sums(0, place) =
              scale_alone(rows.x[h], rows.k[h], exponents(COUNT, piece), exponents(block, piece), HALF_RANGE);
          *(uint4*)at.sums(1, place) =
              scale_alone(rows.x[h], rows.k[h], exponents(block + 1, piece), exponents(block, piece), 0.0f);
        }
      }
      rows.scale(own);
      if (WALKERS_SCALE && HALF_RANGE > 0.0f && block == 0) rows.bring();
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int place = first + h * 8 * BOX;
        eight(at.k, place) = packed(rows.k[h]), eight(at.q, place) = packed(rows.q[h]);
        if constexpr (WITHIN && SHARES_ROWS) {
          *(uint4*)at.sums(0, place) = times(packed(rows.early[h]), writes);
          *(uint4*)at.sums(1, place) = times(packed(rows.early[h]), until);
        } else if constexpr (WITHIN) {
          *(uint4*)at.sums(0, place) = times(rows.unrounded[h], writes);
          *(uint4*)at.sums(1, place) = times(rows.unrounded[h], until);
        }
      }
    }
  }
  PRIM const float* exponents(int b, int piece) const {
    return b == 0 ? nullptr : at.exponents + (b - 1) * KP + piece * 8;
  }

  // 2^(to - from + by - X) K; no `from`: zero.
  static PRIM uint4 scale_alone(const Four (&x)[2], const uint32_t (&k)[4], const float* to, const float* from,
                                float by) {
    uint32_t y[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 a = unpack2<DTYPE>(k[i]);
      float power[2];
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int c = 2 * i + j;
        power[j] = exp2f(to[c] - (from ? from[c] : 0.0f) + by - x[c / 4][c % 4]);
      }
      y[i] = pack2<DTYPE>(power[0] * a.x, power[1] * a.y);
    }
    return packed(y);
  }

  // The same M and p for rows from `within` on, pair by pair: a lane has a channel of every turn.
  PRIM void multiply_one_by_one(Pairs& own, int within) const {
    typedef float Channels[TURNS];
    auto place = [&](int row, int turn) {
      return piece_place(block * BLOCK + row, turn / 2 * 8 + lane / 8 * 2 + turn % 2);
    };
    auto load = [&](Channels& y, const DTYPE* tile, int row) {
#pragma unroll
      for (int t = 0; t < TURNS; t++) y[t] = widen(tile[place(row, first_turn + t) + lane % 8]);
    };
    auto load_sums = [&](Channels& y, int row) {
#pragma unroll
      for (int t = 0; t < TURNS; t++) y[t] = at.sums(lane / 4 % 2, place(row, first_turn + t))[lane % 4];
    };
#pragma unroll 1
    for (int i = within; i < BLOCK; i++) {
      Channels k, q, x;
      load(k, at.k, i), load(q, at.q, i), load_sums(x, i);
#pragma unroll 1
      for (int j = 0; j <= i; j++) {
        Channels earlier, before;
        load(earlier, at.k, j), load_sums(before, j);
        float sums[2] = {};
#pragma unroll
        for (int t = 0; t < TURNS; t++) {
          const float decayed = exp2f(x[t] - before[t]) * earlier[t];
          sums[0] += k[t] * decayed, sums[1] += q[t] * decayed;
        }
        put_pair(own, sums, i, j, lane);
      }
    }
    __syncwarp();  // the rows are about to be overwritten
  }

  // K is zero in rows from `tokens` on, which are another sequence's; those of Q make rows of O that nobody stores.
  PRIM void clear_past(int tokens) const {
#pragma unroll 1
    for (int row = max(tokens, block * BLOCK) + lane / 8; row < (block + 1) * BLOCK; row += 4)
#pragma unroll
      for (int n = 0; n < TURNS / 2; n++) eight(at.k, piece_place(row, (first_turn / 2 + n) * 8 + lane % 8)) = {};
    __syncwarp();
  }

  // All of it. Own pairs of rows that are not within range are formed one by one.
  PRIM void run(Pairs& own, int within) const {
    if (within == BLOCK) {
      scale_rows<true>(own);
      own.make_up();
    } else {
      Pairs beyond = {};
      multiply_one_by_one(beyond, within);
      scale_rows<false>(own);
      own.make_up();
      own.replace(beyond, within, lane);
    }
  }
};
