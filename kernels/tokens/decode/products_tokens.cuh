// The few new tokens of tokens/decode_products.cu: what they read, write and make of each other. Their rows are in
// products_rows.cuh, or with a gate per key channel in products_channels.cuh.
#pragma once
#include "tokens/decode/products_tile.cuh"

// The tiles whose tokens a warp solves for: all of its own, or of those that it shares as many as every other.
constexpr int OWN = (TILES + SHARERS - 1) / SHARERS;
PRIM int own_tile(int o, const Place& p) { return SHARERS == 1 ? o : (int)p.warp * OWN + o; }
PRIM bool is_tile(int tile) { return OWN * SHARERS == TILES || tile < TILES; }

// The lane's own token, `part`: its numbers, and its values of the two channels in the tiles that its warp solves for.
struct OwnToken {
  bool there;
  int64_t row;  // of v and o
  FetchedNumbers numbers = {};
  uint32_t values[OWN] = {};

  PRIM OwnToken(const Inputs& x, int64_t first, const Place& p) : there(p.part < TOKENS) {
    row = ((first + p.part) * x.HV + x.hv) * HEAD_V;
    if (!there) return;
    numbers.load(x, first + p.part);
#pragma unroll
    for (int i = 0; i < OWN; i++)
      if (is_tile(own_tile(i, p))) values[i] = ask_pairs<2>(&x.v[row + p.pair(own_tile(i, p))]).element[0];
  }
  PRIM void store(DTYPE* o, int i, uint32_t pair, const Place& p) const {
    if (there && is_tile(own_tile(i, p))) store_pairs(&o[row + p.pair(own_tile(i, p))], Pairs<2>{pair});
  }
};

// S^T k and S^T q of a token, of the first channel of a tile's two, then of the second.
typedef Neighbours<float, 4> Sums;
// What tokens write of these, in two pieces of 16 bits.
typedef Neighbours<uint32_t, 2> Pieces;

// What the tokens of a sequence have to do with each other and with the state, for the lane's own one, `part`.
struct Relations {
  int own;                      // token
  real decays[TOKENS];          // of all tokens, 1 where those of key channels are in their rows
  real k_norm = 1, q_norm = 1;  // of its own rows, 1 / norm where they are to be normalised
  real k[TOKENS], q[TOKENS];    // what the n of token s adds to what it reads
  real since_start;             // what is left of the state when it is read

  PRIM explicit Relations(const Place& p) : own(p.part) {}
  // From sums over the rows, of which those that are `small` were taken in a smaller unit.
  PRIM void normalise(real k_k, real q_q, uint32_t small) {
    k_norm = root(k_k + (small >> 2 * own & 1 ? 0 : eps(k_k)));
    q_norm = root(q_q + (small >> (2 * own + 1) & 1 ? 0 : eps(q_q)));
  }
  // Calls f(s, product of the decays after s) for the tokens before `end`; returns that of all of theirs.
  template <class F>
  PRIM real until(int end, F f) const {
    real since = 1;
#pragma unroll
    for (int s = TOKENS - 1; s >= 0; s--) {
      if (s >= end) continue;
      f(s, since);
      since *= decays[s];
    }
    return since;
  }
};

// What tokens write of two value channels, and the own token's outputs of them.
struct Solution {
  real n[2][TOKENS], o[2];

  PRIM Solution(const Relations& r, const Sums& sums, const OwnToken& own, int i, const Inputs& x) {
    const float2 v = unpack2<DTYPE>(own.values[i]);
    const real values[2] = {v.x, v.y}, beta = own.numbers.strength(x);
    real k_S[2], q_S[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      k_S[h] = r.since_start * sums.element[2 * h], q_S[h] = r.since_start * sums.element[2 * h + 1];
    }
#pragma unroll
    for (int s = 0; s < TOKENS; s++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const real n_own = beta * r.k_norm * fused(-r.k_norm, k_S[h], values[h]);
        n[h][s] = __shfl_sync(~0u, n_own, s, 4);
        if (s < r.own) k_S[h] = fused(r.k[s], n[h][s], k_S[h]);
        if (s <= r.own) q_S[h] = fused(r.q[s], n[h][s], q_S[h]);
      }
#pragma unroll
    for (int h = 0; h < 2; h++) o[h] = x.scale * r.q_norm * q_S[h];
  }
  // What the accepted tokens have written when all of them have passed, in two pieces of 16 bits: columns of a product
  // are the first pieces of four tokens, then the second ones.
  PRIM Pieces pieces(const Relations& r, int kept, const Place& p) const {
    real written[2][4] = {};
    r.until(kept, [&](int s, real since) { written[0][s] = since * n[0][s], written[1][s] = since * n[1][s]; });
    Pieces x;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const real first = written[h][0], second = written[h][1];
      const real low = p.part % 2 ? written[h][2] : first, high = p.part % 2 ? written[h][3] : second;
      x.element[h] = pack2<DTYPE>(low, high);
      if (p.part >= 2) {
        const float2 rounded = unpack2<DTYPE>(x.element[h]);
        x.element[h] = pack2<DTYPE>(low - rounded.x, high - rounded.y);
      }
    }
    return x;
  }
};

// What a group of keys is multiplied by when a state is stored: decays, and fragments of the keys that are written,
// times the first and the second half of the columns of what is written.
struct GroupKeys {
  real decays[8];
  uint32_t first[4], second[4];
};
// Of two rows, a lane's keys as such fragments.
PRIM void interleave(uint32_t (&to)[4], const Pairs<8> (&rows)[2], const Place& p) {
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const uint32_t x = rows[0].element[e], y = rows[1].element[e];
    to[e] = p.across % 2 ? high_halves(x, y) : low_halves(x, y);
  }
}
