// The gradient of the gates in backward_chunk.cu, as the sum of what holds them: equation (20) of docs/derivation.md.
// With dPqk and E decayed already,
//
//   Z = scale dPqk . Q K^T + E . K K^T  (i > j)                    pairs of tokens
//   rho = rowsum(scale r dO S^T . Q) - rowsum(r dR S^T . K)      reads of S
//   omega = rowsum(w N dS'^T . K)                                 writes into the next state
//
//   dg_t = sum_(i >= t > j) Z_ij + sum_(i >= t) rho_i + sum_(j < t) omega_j + c <S, dS'>
//
// No term is added that another would take away again: so a small dg, of a strong gate, is no rounding of large ones,
// and that of -inf is 0. Sums are float, of products that were never rounded to DTYPE.
#pragma once
#include "sm90/backward_chunk/shared.cuh"
#include "tiles/fragments.cuh"

// A factor for each of the two rows in which a thread has sums, and sums over its columns.
struct DecayedRows {
  float factor[2], sums[2] = {};
};

// x = sums over the four lanes that share these rows.
PRIM void write_rows_of(float* x, const float (&rows)[2], int warp, int lane) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float sum = rows[half];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (lane % 4 == 0) x[warp * 16 + lane / 4 + half * 8] = sum;
  }
}

// Products A B for 64 keys: A is a box of rows, B are 64 rows of a state. Two of them are under way at a time: one is
// added up while the tensor cores make the next.
typedef float Product[8][4];
PRIM void start_product(Product& product, const DTYPE* A, const DTYPE* B) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < STEPS; step++)
    wgmma<DTYPE, false, true>(product, step_along_rows(A, step), step_of_rows(B, step), step > 0);
  wgmma_commit();
}

// d += f A B for the keys of a box, rows times their factors, and sums += rowsum(A B . x): x are the rows of Q or K. In
// float: f never goes through DTYPE.
PRIM void add_decayed(float (&d)[K_TILES][4], DecayedRows& rows, Product& product, const DTYPE* x, int box, int warp,
                      int lane) {
  pin(product);
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    uint32_t r[4];
    ldmatrix_x4(r, x + box * TILE + swizzled(warp * 16 + lane % 16, j * 8 + lane / 16 * 8));
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int tile = j + i / 2, half = i % 2;
      const float2 y = unpack2<DTYPE>(r[i]);
      const float low = product[tile][2 * half], high = product[tile][2 * half + 1];
      d[box * 8 + tile][2 * half] += rows.factor[half] * low;
      d[box * 8 + tile][2 * half + 1] += rows.factor[half] * high;
      // One after the other: terms that wait to be added would take registers.
      rows.sums[half] += y.x * low;
      rows.sums[half] += y.y * high;
    }
  }
}

// d = Z of scale dPqk or of E, with keys as rows of the other factor. What is on the diagonal is in no rectangle.
PRIM void multiply_pairs(float (&d)[8][4], const DTYPE* rows, const DTYPE* k) {
  float product[8][4];
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < KP / 16; step++)
    wgmma<DTYPE, false, false>(product, step_along_rows(rows, step), step_along_rows(k, step), step > 0);
  wgmma_commit();
  wgmma_wait<0>();
  pin(product);
#pragma unroll
  for (int j = 0; j < 8; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) d[j][i] *= product[j][i];
}

// The first REST of twice as many sums, or the others for the upper of two lanes, with those of its neighbour.
template <int REST>
PRIM void share_columns(float (&columns)[16], int lane) {
  const bool upper = lane & (2 * REST);
#pragma unroll
  for (int i = 0; i < REST; i++) {
    const float other = __shfl_xor_sync(~0u, upper ? columns[i] : columns[i + REST], 2 * REST);
    columns[i] = (upper ? columns[i + REST] : columns[i]) + other;
  }
}

// sums[t] = sum_(i >= t > j) Z_ij over the rows i of a warp, for all t: prefixes of rows, then down the columns.
PRIM void sum_rectangles(float* sums, const float (&Z)[8][4], int warp, int lane) {
  // As in weigh_pairs.
  const int below = opaque(warp * 16 + lane / 4 - lane % 4 * 2);
  float columns[16], before[2] = {};
#pragma unroll
  for (int j = 0; j < 8; j++) {
    columns[2 * j] = columns[2 * j + 1] = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      // Of a row's eight columns four lanes have two each: what lies before a lane's own, and all.
      float all = Z[j][2 * half] + Z[j][2 * half + 1];
      const float neighbour = __shfl_xor_sync(~0u, all, 1);
      float prefix = before[half] + (lane & 1 ? neighbour : 0.0f);
      all += neighbour;
      const float others = __shfl_xor_sync(~0u, all, 2);
      if (lane & 2) prefix += others;
      before[half] += all + others;
      if (below >= j * 8 - half * 8) columns[2 * j] += prefix;
      if (below > j * 8 - half * 8) columns[2 * j + 1] += prefix + Z[j][2 * half];
    }
  }
  // Over the eight lanes that share columns, each of which is left with two: those of tokens 2 lane and 2 lane + 1.
  share_columns<8>(columns, lane);
  share_columns<4>(columns, lane);
  share_columns<2>(columns, lane);
  *(float2*)&sums[2 * lane] = make_float2(columns[0], columns[1]);
}

// dg of a chunk, from row (first token, value head) on, by a warp.
PRIM void write_gate_gradient(float* dg, const Sums& sums, int tokens, int64_t stride, int lane) {
  auto two = [&](const float* x) { return *(const float2*)&x[2 * lane]; };
  float states = sums.states[lane % 4];
  states += __shfl_xor_sync(~0u, states, 1);
  states += __shfl_xor_sync(~0u, states, 2);
  float2 result = make_float2(states, states);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float2 x = two(sums.pairs + i * CHUNK);
    result.x += x.x, result.y += x.y;
  }
  const float2 by_queries = two(sums.query_reads), by_keys = two(sums.key_reads), writes = two(sums.writes);
  const float2 reads = make_float2(by_queries.x + by_keys.x, by_queries.y + by_keys.y);
  // Sums from a lane's tokens on, and up to them.
  float from = reads.x + reads.y, to = writes.x + writes.y;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const float later = __shfl_sync(~0u, from, min(lane + distance, 31));
    const float earlier = __shfl_sync(~0u, to, max(lane - distance, 0));
    if (lane + distance < 32) from += later;
    if (lane >= distance) to += earlier;
  }
  const float later = __shfl_sync(~0u, from, min(lane + 1, 31)), earlier = __shfl_sync(~0u, to, max(lane - 1, 0));
  const float before = lane > 0 ? earlier : 0.0f;
  result.x += from + before;
  result.y += (lane < 31 ? later : 0.0f) + reads.y + before + writes.x;
  if (2 * lane < tokens) dg[2 * lane * stride] = result.x;
  if (2 * lane + 1 < tokens) dg[(2 * lane + 1) * stride] = result.y;
}
