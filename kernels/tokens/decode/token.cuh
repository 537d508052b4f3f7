// What comes of a token of tokens/decode.cu, whatever brings its rows to the threads: a thread's own registers
// (own_rows.cuh) or shared memory (shared_rows.cuh). Both sum in the same order, so that a token has the same bits in
// tiles of the same shape.
#pragma once
#include "tokens/decode/inputs.cuh"
#include "tokens/decode/tile.cuh"

// x, which is made where this stands if what needs no state is to be made early.
template <class T>
PRIM T early(T x) {
  if constexpr (EARLY) return made(x);
  return x;
}

// What warps that share keys pass to each other: sums over the keys of each, and n, to be times k.
struct Passed {
  real k_S[WARPS][CHANNELS], q_S[WARPS][CHANNELS], written[CHANNELS];
};

// Sums over all keys: S^T d k and S^T d q of the own value channel, without the d of a whole state, and k . q.
struct Sums {
  real k_S, q_S, k_q;
};
// To all warps, what this one has summed up over its keys.
PRIM void pass_sums(const real (&k_sums)[VALUES], const real (&q_sums)[VALUES], const Place& p, uint32_t warp,
                    uint32_t lane, Passed& passed) {
  const uint32_t first = p.column * VALUES + p.part % SCATTERED * KEPT;
  if (lane < SCATTERED * BESIDE) {
#pragma unroll
    for (int j = 0; j < KEPT; j++) passed.k_S[warp][first + j] = k_sums[j], passed.q_S[warp][first + j] = q_sums[j];
  }
}

// What a token has beside its rows: the norms are 1 / norm of these where they are to be normalised, v is of the own
// value channel.
template <class T>
struct Numbers {
  real beta, decay, k_norm, q_norm;
  T v;

  PRIM real written(const Sums& s) const {  // n, with the norm of k that it is times
    const real wrong = fused(-(decay * k_norm), s.k_S, widen(v));
    return beta * wrong * k_norm;
  }
  PRIM real output(const Sums& s, real n, real scale) const { return scale * q_norm * fused(s.k_q, n, decay * s.q_S); }
};

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
