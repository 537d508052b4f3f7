// The gradient of a scalar gate, for backward_chunk.cu. A product of tokens i >= j holds g_t exactly when i >= t > j, a
// read of the entering state when i >= t, a write when j < t, and the state itself always. With Z_ij, rho_i and
// omega_j the values of these products, decays included, times what comes back to them,
//
//   dg_t = sum_(i >= t > j) Z_ij + sum_(i >= t) rho_i + sum_(j < t) omega_j + e^(G_C) <S, dS'>
//
// Every term carries e^(g_t) itself, so nothing large is added and taken away again: dg is right where it is small,
// and 0 for g = -inf. For the same reason rectangles i >= t > j are sums of prefixes of rows, and none is made from
// another by taking a row away.
//
// Numbers: float. Macros: those of value_rows.cuh, and HAS_GATE.
#pragma once
#include "portable/value_rows.cuh"
#include "tiles/decay.cuh"
#include "tiles/fragments.cuh"

// Sums in the shared memory of a block of WARPS warps, ACROSS of which share 16 rows.
struct GateGradient {
  float *reads, *writes;  // rho and omega in ACROSS parts of CHUNK tokens
  float* pairs;           // a warp's part of the sums over Z, for tokens 1 to CHUNK
  float* state;           // a warp's part of <S, dS'>

  static PRIM GateGradient take(DynSmem& smem) {
    GateGradient s = {};
    if constexpr (Decay::GATED) {
      s.reads = smem.take<float>(ACROSS * CHUNK, "reads");
      s.writes = smem.take<float>(ACROSS * CHUNK, "writes");
      s.pairs = smem.take<float>(WARPS * CHUNK, "sums of pairs");
      s.state = smem.take<float>(WARPS, "products of states");
    }
    return s;
  }

  // The part that every lane of a warp has of rho and omega, for rows lane / 4 and lane / 4 + 8 of its row tile.
  PRIM void put_rows(const float (&rho)[2], const float (&omega)[2], int row, int across, int lane) const {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float read = rho[h], write = omega[h];
#pragma unroll
      for (int bits = 1; bits <= 2; bits *= 2) {
        read += __shfl_xor_sync(~0u, read, bits);
        write += __shfl_xor_sync(~0u, write, bits);
      }
      const int at = across * CHUNK + row + lane / 4 + h * 8;
      if (lane % 4 == 0) reads[at] = read, writes[at] = write;
    }
  }
  PRIM void put_state(float sum, int warp, int lane) const {
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(~0u, sum, bits);
    if (lane == 0) state[warp] = sum;
  }
  // What rows i = warp, warp + WARPS, .. of Z add to the tokens t = 1 .. i: their sums over j < t.
  PRIM void put_pairs(const float* Z, int pitch, int warp, int lane) const {
    constexpr int PARTS = (CHUNK + 31) / 32;
    float sums[PARTS] = {};
#pragma unroll 1
    for (int i = warp; i < CHUNK; i += WARPS) {
      float before = 0.0f;
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        const int j = part * 32 + lane;
        float x = j < i ? Z[i * pitch + j] : 0.0f;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
          const float left = __shfl_sync(~0u, x, lane - step);
          x += lane >= step ? left : 0.0f;
        }
        x += before;
        if (j < i) sums[part] += x;
        before = __shfl_sync(~0u, x, 31);
      }
    }
#pragma unroll
    for (int part = 0; part < PARTS; part++)
      if (part * 32 + lane < CHUNK) pairs[warp * CHUNK + part * 32 + lane] = sums[part];
  }

  // dg of token t, once all warps have put their parts.
  PRIM float sum(int t, float carry) const {
    float total = 0.0f;
#pragma unroll 1
    for (int across = 0; across < ACROSS; across++)
#pragma unroll 4
      for (int i = 0; i < CHUNK; i++) total += (i >= t ? reads : writes)[across * CHUNK + i];
#pragma unroll 1
    for (int warp = 0; warp < WARPS; warp++) {
      total += carry * state[warp];
      if (t > 0) total += pairs[warp * CHUNK + t - 1];
    }
    return total;
  }
};
