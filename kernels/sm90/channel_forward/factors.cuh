// What the four warps that make factors do in sm90/channel_forward.cu, each with a block of 16 tokens. X and the powers
// are those of sm90/channel_forward/gates.cuh. In place of K, Q and the sums of a chunk they leave
//
//   2^X K, 2^X Q                       read by pairs with earlier blocks, then times READS: by the state that enters
//   2^-X K times UNTIL                 pairs with later blocks
//   2^-X K times WRITES                written into the state that leaves
//
// and M and Pqk, of which a block's own are products of 2^X and 2^-X in TF32. What is out of its range is formed pair
// by pair. Of these, 16 bits that have the exponents of a float are kept.
#pragma once
#include "sm90/channel_forward/gates.cuh"
#include "sm90/core.cuh"
#include "sm90/gate_powers.cuh"

// x times y, both of it pairs of 16 bits.
PRIM uint4 times(const uint4& x, const uint4& y) {
  return make_uint4(multiply2<DTYPE>(x.x, y.x), multiply2<DTYPE>(x.y, y.y), multiply2<DTYPE>(x.z, y.z),
                    multiply2<DTYPE>(x.w, y.w));
}

// 16 x 16 of M and of Pqk, as accumulators of a warp.
struct Pairs {
  float m[2][4], p[2][4];

  PRIM void write_p(DTYPE* box, int later, int earlier, int lane) const {
    write_box(box, p[0], p[1], later * BLOCK, earlier * BLOCK, lane);
  }

  // A block's own pairs, larger by what TF32 has left out; rows from `within` on are those of `beyond`.
  PRIM void finish(const Pairs& beyond, int within, int lane) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = sum_row(lane, i), column = sum_column(lane, h, i);
        m[h][i] *= KEPT * KEPT, p[h][i] *= KEPT * KEPT;
        if (row >= within) m[h][i] = beyond.m[h][i], p[h][i] = beyond.p[h][i];
        if (column >= row) m[h][i] = 0.0f;
        if (column > row) p[h][i] = 0.0f;
      }
  }
};

// Of the six pairs of blocks that meet a warp has M or Pqk of three: of those without a block in between, or with.
struct Meeting {
  int warp;
  PRIM bool queries() const { return warp % 2 == 1; }
  PRIM bool apart() const { return warp / 2 == 1; }
  template <bool APART>
  static PRIM constexpr int later(int n) {
    return APART ? (n == 0 ? 2 : 3) : n + 1;
  }
  template <bool APART>
  static PRIM constexpr int earlier(int n) {
    return APART ? n % 2 : n;
  }
};

struct FactorWarp {
  const Stage& at;
  int block, lane;

  // Eight channels of a row, read and written by one lane.
  static PRIM uint4& eight(DTYPE* tile, int place) { return *(uint4*)&tile[place]; }

  // Of two rows and eight channels: sums, K and Q, which become 2^X K and 2^X Q, and 2^-X K.
  struct Rows {
    Four x[2][2];
    uint32_t k[2][4], q[2][4], early[2][4];

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
          early[h][i] = scaled(earlier, h, exp2f(-x0) * a.x, exp2f(-x1) * a.y);
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
          mma_m16n8k8_tf32(own.m[h], keys, earlier[h], earlier[2 + h]);
          mma_m16n8k8_tf32(own.p[h], queries, earlier[h], earlier[2 + h]);
        }
      }
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
    for (int i = 0; i < 4; i++) {
      const int piece = i / 2 * 8 + lane % 4 * 2 + i % 2, first = (start ^ i % 2 * 8) + i / 2 * TILE;
      const uint4 until = eight_powers(UNTIL + block % (COUNT - 1), piece),
                  writes = eight_powers(WRITES + block, piece);
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
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int place = first + h * 8 * BOX;
        eight(at.k, place) = packed(rows.k[h]), eight(at.q, place) = packed(rows.q[h]);
        if constexpr (WITHIN) {
          *(uint4*)at.sums(0, place) = times(packed(rows.early[h]), writes);
          *(uint4*)at.sums(1, place) = times(packed(rows.early[h]), until);
        }
      }
    }
  }
  PRIM uint4 eight_powers(int row, int piece) const { return *(const uint4*)&at.powers[row * KP + piece * 8]; }
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

  // The same M and p for rows from `within` on, pair by pair: a lane has four channels side by side.
  PRIM void multiply_one_by_one(Pairs& own, int within) const {
    auto place = [&](int i) { return piece_place(block * BLOCK + i, lane / 2); };
    auto load = [&](Four& y, const DTYPE* tile, int i) {
      const DTYPE* from = &tile[place(i) + lane % 2 * 4];
      const float2 a = load_pair(from), b = load_pair(from + 2);
      y[0] = a.x, y[1] = a.y, y[2] = b.x, y[3] = b.y;
    };
#pragma unroll 1
    for (int i = within; i < BLOCK; i++) {
      Four k, q, x;
      load(k, at.k, i), load(q, at.q, i), load_four(x, at.sums(lane % 2, place(i)));
#pragma unroll 1
      for (int j = 0; j <= i; j++) {
        Four earlier, before;
        load(earlier, at.k, j), load_four(before, at.sums(lane % 2, place(j)));
        float sums[2] = {};
#pragma unroll
        for (int n = 0; n < 4; n++) {
          const float decayed = exp2f(x[n] - before[n]) * earlier[n];
          sums[0] += k[n] * decayed, sums[1] += q[n] * decayed;
        }
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) {
          sums[0] += __shfl_xor_sync(~0u, sums[0], distance);
          sums[1] += __shfl_xor_sync(~0u, sums[1], distance);
        }
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int e = 0; e < 4; e++)
            if (sum_row(lane, e) == i && sum_column(lane, h, e) == j) own.m[h][e] = sums[0], own.p[h][e] = sums[1];
      }
    }
    __syncwarp();  // the rows are about to be overwritten
  }

  // Later blocks' rows by keys of earlier ones, three pairs at once. APART: keys of block 0 and rows of block 3 are
  // brought to where block 2 begins, where keys of block 1 and rows of block 2 are.
  template <bool APART>
  PRIM void meet(float (&sums)[3][2][4], const DTYPE* tile) const {
    const int late = piece_place(lane % 16, lane / 16),
              soon = piece_place(lane % 8 + lane / 16 * 8, lane / 8 % 2) ^ OTHER;
    constexpr int FIRST = Meeting::later<APART>(0), BLOCKS = APART ? 2 : 3;
#pragma unroll
    for (int n = 0; n < 3; n++) clear(sums[n]);
#pragma unroll
    for (int step = 0; step < K_STEPS; step++) {
      const int turn = step % 4 * 16, box = step / 4 * TILE;
      uint32_t rows[BLOCKS][4], early[BLOCKS][4];
#pragma unroll
      for (int n = 0; n < BLOCKS; n++) {
        ldmatrix_x4(rows[n], tile + (late ^ turn) + box + (FIRST + n) * BLOCK * BOX);
        ldmatrix_x4(early[n], at.others + (soon ^ turn) + box + n * BLOCK * BOX);
      }
      if constexpr (APART) {
        const DTYPE* f = at.powers + step * 16 + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          early[0][i] = multiply2<DTYPE>(early[0][i], *(const uint32_t*)(f + (UNTIL + 1) * KP + i % 2 * 8));
          rows[1][i] = multiply2<DTYPE>(rows[1][i], *(const uint32_t*)(f + (UNTIL + 2) * KP + i / 2 * 8));
        }
      }
#pragma unroll
      for (int n = 0; n < 3; n++) {
        const int later = Meeting::later<APART>(n) - FIRST, earlier = Meeting::earlier<APART>(n);
#pragma unroll
        for (int h = 0; h < 2; h++)
          mma_m16n8k16<DTYPE>(sums[n][h], rows[later], early[earlier][2 * h], early[earlier][2 * h + 1]);
      }
    }
  }

  // The warp's pairs of blocks that meet, and M of all its pairs in the place of keys for other blocks.
  template <bool APART>
  PRIM void meet_all(const Pairs& own) const {
    const bool queries = Meeting{block}.queries();
    float sums[3][2][4];
    meet<APART>(sums, queries ? at.q : at.k);
    named_barrier(FACTOR_BARRIER, 128);  // everyone is done with these keys, and with rows as of blocks
    float* m = (float*)at.others;
    store_block_of_m(m, own.m, block * BLOCK, block * BLOCK, lane);
#pragma unroll
    for (int n = 0; n < 3; n++) {
      const int later = Meeting::later<APART>(n) * BLOCK, earlier = Meeting::earlier<APART>(n) * BLOCK;
      if (queries)
        write_box(at.p, sums[n][0], sums[n][1], later, earlier, lane);
      else
        store_block_of_m(m, sums[n], later, earlier, lane);
    }
  }

  // The block's K and Q as of the chunk's start: four pieces of each at a time, so that loads do not wait for stores.
  PRIM void bring_to_chunk() const {
    const int first = piece_place(block * BLOCK + lane % 16, lane / 16);
#pragma unroll
    for (int box = 0; box < K_BOXES; box++) {
      uint4 k[4], q[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int place = (first ^ i * 16) + box * TILE;
        const uint4 power = eight_powers(READS + block, box * 8 + i * 2 + lane / 16);
        k[i] = times(eight(at.k, place), power), q[i] = times(eight(at.q, place), power);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int place = (first ^ i * 16) + box * TILE;
        eight(at.k, place) = k[i], eight(at.q, place) = q[i];
      }
    }
  }

  // From sums, K and Q to all that the solvers and walkers need, which these barriers say is there.
  PRIM void run(uint64_t* pairs_full, uint64_t* factors_full) const {
    const int within = min(at.within[block], at.within[COUNT + block]);
    Pairs own = {}, beyond = {};
    if (within == BLOCK) {
      scale_rows<true>(own);
    } else {
      multiply_one_by_one(beyond, within);
      scale_rows<false>(own);
    }
    own.finish(beyond, within, lane);
    own.write_p(at.p, block, block, lane);
    named_barrier(FACTOR_BARRIER, 128);
    if (Meeting{block}.apart())
      meet_all<true>(own);
    else
      meet_all<false>(own);
    __syncwarp();
    if (lane == 0) mbarrier_arrive(pairs_full);
    bring_to_chunk();
    async_proxy_fence();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(factors_full);
  }
};

PRIM void make_factors(const Shared& s, const Work& work, int warp, int lane) {
  Place place;
  for (int c = 0; c < work.chunks; c++, place.advance()) {
    const int stage = place.stage.stage;
    const Stage at(s, place.key.stage, stage);
    mbarrier_wait(s.keys_full + place.key.stage, place.key.parity);
    mbarrier_wait(s.sums_full + stage, place.stage.parity);
    // Said to be in range, so that nothing is divided with a sign.
    FactorWarp{at, warp & 3, opaque(lane) & 31}.run(s.pairs_full + stage, s.factors_full + stage);
  }
}
