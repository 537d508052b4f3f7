// Tokens of tokens/decode_products.cu whose rows are fragments as they lie in memory: there is no gate, or one per
// head.
#pragma once
#include "tokens/decode/products_tokens.cuh"

// To a smaller unit.
PRIM void shrink(Pairs<8>& some) {
#pragma unroll
  for (auto& pair : some.element) {
    const float2 x = unpack2<DTYPE>(pair);
    pair = pack2<DTYPE>(x.x * small_unit(x.x), x.y * small_unit(x.y));
  }
}

// Rows 2 t and 2 t + 1 are k and q of token t: lane 4 across + part has its keys of row `across`, in so many groups.
template <int COUNT>
struct Rows {
  Pairs<8> keys[COUNT] = {};

  PRIM void load(const Inputs& x, int64_t first, uint32_t key, const Place& p) {
    if (p.across >= 2 * TOKENS) return;
    const DTYPE* row = (p.across % 2 ? x.q : x.k) + x.key_row(first + p.across / 2) + key;
#pragma unroll
    for (int m = 0; m < COUNT; m++) keys[m] = ask_pairs<8>(row + 32 * m);
  }
  PRIM void to_small_unit(uint32_t small, const Place& p) {
    if (small >> p.across & 1)
#pragma unroll
      for (auto& some : keys) shrink(some);
  }
  // += products of all rows: of row `across` with rows 2 part and the next one.
  PRIM void multiply(float (&x)[4]) const {
#pragma unroll
    for (int m = 0; m < COUNT; m++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const uint32_t low = keys[m].element[2 * j], high = keys[m].element[2 * j + 1];
        mma_m16n8k16<DTYPE>(x, {low, 0, high, 0}, low, high);
      }
  }
  // += products with a tile of the state: S^T k and S^T q of token `part`, for either value channel.
  PRIM void multiply(float (&x)[4], int tile, const State& S) const {
#pragma unroll
    for (int m = 0; m < COUNT; m++)
#pragma unroll
      for (int j = 0; j < 2; j++)
        mma_m16n8k16<DTYPE>(x, S.fragments[m][tile][j], keys[m].element[2 * j], keys[m].element[2 * j + 1]);
  }
};

// Products of the rows with each other: of row `across` with rows 2 part and the next one.
struct RowProducts {
  float x[4] = {};
  uint32_t small = 0;  // a bit for every row that is taken in a smaller unit

  PRIM RowProducts(Rows<HEAD_K / 32>& rows, const Place& p) {
    rows.multiply(x);
    if constexpr (L2NORM) {
      small = too_large(p);
      if (!small) return;  // the same for all that have these tokens
      rows.to_small_unit(small, p);
      for (auto& e : x) e = 0;
      rows.multiply(x);
    }
  }
  // The rows whose squares overflow.
  PRIM uint32_t too_large(const Place& p) const {
    const real squares = p.across % 2 ? x[1] : x[0];  // where part is across / 2
    uint32_t rows = p.part == p.across / 2 && overflowed<DTYPE>(squares) ? 1u << p.across : 0;
#pragma unroll
    for (int bits = 1; bits < 32; bits *= 2) rows |= __shfl_xor_sync(~0u, rows, bits);
    return rows;
  }
};

// The tokens of a sequence. Rows are read twice where warps share keys: all of them for their products with each other.
struct NewTokens {
  Rows<HEAD_K / 32> rows;
  Rows<GROUPS> own_keys;
  uint32_t small = 0;
  real products[2];

  PRIM explicit NewTokens(DynSmem&) {}
  PRIM void ask(const Inputs& x, const Work& work, const Place& p) {
    rows.load(x, work.first, 8 * p.part, p);
    if constexpr (SHARERS > 1) own_keys.load(x, work.first, p.key, p);
  }
  PRIM void meet(const Inputs&, const Work&, const Place& p) {
    const RowProducts all(rows, p);
    products[0] = all.x[0], products[1] = all.x[1], small = all.small;
    if constexpr (SHARERS > 1)
      own_keys.to_small_unit(small, p);
    else
#pragma unroll
      for (int m = 0; m < GROUPS; m++) own_keys.keys[m] = rows.keys[m];
  }
  PRIM void multiply(Sums (&sums)[TILES], const State& S, const Place&) const {
#pragma unroll
    for (int i = 0; i < TILES; i++) own_keys.multiply(sums[i].element, i, S);
  }
  PRIM Relations relations(const OwnToken& own, const Inputs& x, const Place& p) const {
    Relations r(p);
    const uint32_t lane = 8 * p.part;  // the first with row 2 part
    if constexpr (L2NORM)
      r.normalise(__shfl_sync(~0u, products[0], lane + p.part), __shfl_sync(~0u, products[1], lane + 4 + p.part),
                  small);
    const real decay = own.numbers.decay(x);
#pragma unroll
    for (int s = 0; s < TOKENS; s++) {
      r.decays[s] = __shfl_sync(~0u, decay, s, 4);
      r.k[s] = __shfl_sync(~0u, products[0], lane + s), r.q[s] = __shfl_sync(~0u, products[0], lane + 4 + s);
    }
    r.since_start = r.until(r.own + 1, [&](int s, real since) { r.k[s] *= since, r.q[s] *= since; });
    return r;
  }

  // What is written takes half of the columns.
  PRIM static uint32_t second_half(uint32_t, const Place&) { return 0; }
  // Of the group's keys those of k of tokens 2 (part % 2) and the next one, from the lanes that have them, zeros if
  // they are not accepted.
  PRIM GroupKeys group(int m, const Relations& r, const Inputs&, const Work& work, const Place& p) const {
    GroupKeys to = {};
    Pairs<8> k[2] = {};
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (i >= TOKENS) continue;
      const int t = p.part % 2 * 2 + i;
      const bool kept = t < TOKENS && t < work.kept;
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const uint32_t pair = __shfl_sync(~0u, own_keys.keys[m].element[e], 8 * t + p.across / 2);
        k[i].element[e] = kept ? pair : 0;
      }
    }
    interleave(to.first, k, p);
    const real decay = r.until(work.kept, [](int, real) {});
#pragma unroll
    for (auto& d : to.decays) d = decay;
    return to;
  }
};
