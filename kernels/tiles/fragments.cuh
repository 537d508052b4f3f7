// Products of 16-row fragments on the tensor cores, the same for every dtype: Mma<bf16>, Mma<f16>, Mma<float>.
//
// 16-bit types multiply in one m16n8k16 step. float multiplies in three m16n8k8 steps of tf32 with
// x = high + low: high high + high low + low high, about 1e-6. A fragment A is 16 x DEPTH, B is DEPTH x 16;
// accumulators are pairs of m16n8 tiles: lane l holds (l / 4 + 8 h, 8 j + 2 (l % 4) + i) in d[j][2 h + i].
#pragma once
#include "primitives/primitives.cuh"

template <class T>
struct Mma {
  static constexpr int DEPTH = 16;
  struct A {
    uint32_t r[4];
  };
  struct B {
    uint32_t r[4];
  };

  // A[i][k] = tile[i * pitch + k]
  static PRIM void load_a(A& a, const T* tile, int pitch, int lane) {
    ldmatrix_x4(a.r, &tile[lane % 16 * pitch + lane / 16 * 8]);
  }
  // A[i][k] = tile[k * pitch + i]
  static PRIM void load_a_transposed(A& a, const T* tile, int pitch, int lane) {
    ldmatrix_x4_trans(a.r, &tile[(lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8]);
  }
  // B[k][n] = tile[n * pitch + k]
  static PRIM void load_b(B& b, const T* tile, int pitch, int lane) {
    ldmatrix_x4(b.r, &tile[(lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8]);
  }
  // B[k][n] = tile[k * pitch + n]
  static PRIM void load_b_transposed(B& b, const T* tile, int pitch, int lane) {
    ldmatrix_x4_trans(b.r, &tile[lane % 16 * pitch + lane / 16 * 8]);
  }
  // A from the accumulators of columns 16 step to 16 step + 15
  template <int TILES>
  static PRIM void from_sums(A& a, const float (&d)[TILES][4], int step) {
    a.r[0] = pack2<T>(d[2 * step][0], d[2 * step][1]);
    a.r[1] = pack2<T>(d[2 * step][2], d[2 * step][3]);
    a.r[2] = pack2<T>(d[2 * step + 1][0], d[2 * step + 1][1]);
    a.r[3] = pack2<T>(d[2 * step + 1][2], d[2 * step + 1][3]);
  }
  // A[i][k] *= factor(k)
  template <class F>
  static PRIM void scale_columns(A& a, F factor, int lane) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 x = unpack2<T>(a.r[i]);
      const int k = lane % 4 * 2 + i / 2 * 8;
      a.r[i] = pack2<T>(factor(k) * x.x, factor(k + 1) * x.y);
    }
  }
  // At the start of a step: ldmatrix stays where it is.
  static PRIM void order_loads() {}
  // d[0], d[1] += A B
  static PRIM void multiply(float (&d0)[4], float (&d1)[4], const A& a, const B& b) {
    mma_m16n8k16<T>(d0, a.r, b.r[0], b.r[1]);
    mma_m16n8k16<T>(d1, a.r, b.r[2], b.r[3]);
  }
  // Two accumulator tiles (i, n) from tile[n * pitch + i]: a transposed read.
  static PRIM void read_transposed(float (&d0)[4], float (&d1)[4], const T* tile, int pitch, int lane) {
    uint32_t r[4];
    ldmatrix_x4_trans(r, &tile[(lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8]);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float2 x0 = unpack2<T>(r[h]), x1 = unpack2<T>(r[2 + h]);
      d0[2 * h] = x0.x, d0[2 * h + 1] = x0.y;
      d1[2 * h] = x1.x, d1[2 * h + 1] = x1.y;
    }
  }
};

// k runs as 0 2 4 6 1 3 5 7 through a step of eight, in A and B alike: then the two k of a lane are
// neighbours in memory and in the accumulators.
template <>
struct Mma<float> {
  static constexpr int DEPTH = 8;
  struct A {
    uint32_t high[4], low[4];
  };
  struct B {
    uint32_t high[4], low[4];
  };

  static PRIM void split(uint32_t& high, uint32_t& low, float x) {
    high = to_tf32(x);
    low = to_tf32(x - __uint_as_float(high));
  }
  static PRIM void load_a(A& a, const float* tile, int pitch, int lane) {
#pragma unroll
    for (int i = 0; i < 4; i++) split(a.high[i], a.low[i], tile[(lane / 4 + i % 2 * 8) * pitch + lane % 4 * 2 + i / 2]);
  }
  static PRIM void load_a_transposed(A& a, const float* tile, int pitch, int lane) {
#pragma unroll
    for (int i = 0; i < 4; i++) split(a.high[i], a.low[i], tile[(lane % 4 * 2 + i / 2) * pitch + lane / 4 + i % 2 * 8]);
  }
  static PRIM void load_b(B& b, const float* tile, int pitch, int lane) {
#pragma unroll
    for (int i = 0; i < 4; i++) split(b.high[i], b.low[i], tile[(lane / 4 + i / 2 * 8) * pitch + lane % 4 * 2 + i % 2]);
  }
  static PRIM void load_b_transposed(B& b, const float* tile, int pitch, int lane) {
#pragma unroll
    for (int i = 0; i < 4; i++) split(b.high[i], b.low[i], tile[(lane % 4 * 2 + i % 2) * pitch + lane / 4 + i / 2 * 8]);
  }
  template <int TILES>
  static PRIM void from_sums(A& a, const float (&d)[TILES][4], int step) {
#pragma unroll
    for (int i = 0; i < 4; i++) split(a.high[i], a.low[i], d[step][i % 2 * 2 + i / 2]);
  }
  template <class F>
  static PRIM void scale_columns(A& a, F factor, int lane) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      split(a.high[i], a.low[i],
            factor(lane % 4 * 2 + i / 2) * (__uint_as_float(a.high[i]) + __uint_as_float(a.low[i])));
  }
  // Keeps the compiler from loading many steps ahead, for which the registers do not suffice.
  static PRIM void order_loads() { __syncwarp(); }
  static PRIM void multiply(float (&d0)[4], float (&d1)[4], const A& a, const B& b) {
    // Tensor cores truncate when they add: so three terms at a time, and d in ordinary float sums.
    float t0[4] = {}, t1[4] = {};
    mma_m16n8k8_tf32(t0, a.low, b.high[0], b.high[1]);
    mma_m16n8k8_tf32(t1, a.low, b.high[2], b.high[3]);
    mma_m16n8k8_tf32(t0, a.high, b.low[0], b.low[1]);
    mma_m16n8k8_tf32(t1, a.high, b.low[2], b.low[3]);
    mma_m16n8k8_tf32(t0, a.high, b.high[0], b.high[1]);
    mma_m16n8k8_tf32(t1, a.high, b.high[2], b.high[3]);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      d0[i] += t0[i];
      d1[i] += t1[i];
    }
  }
  static PRIM void read_transposed(float (&d0)[4], float (&d1)[4], const float* tile, int pitch, int lane) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float* x = &tile[(lane % 4 * 2 + i % 2) * pitch + lane / 4 + i / 2 * 8];
      d0[i] = x[0];
      d1[i] = x[8 * pitch];
    }
  }
};

// Row and column of element i of accumulator tile j.
PRIM int sum_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
PRIM int sum_column(int lane, int j, int i) { return j * 8 + lane % 4 * 2 + i % 2; }

// Two neighbours of a row.
template <class T>
PRIM float2 load_pair(const T* at) {
  return unpack2<T>(*(const uint32_t*)at);
}
template <>
PRIM float2 load_pair(const float* at) {
  return *(const float2*)at;
}

// d (16 x 8 TILES) += A B over DEPTH_TOTAL, with A[i][k] = a[i * a_pitch + k] and B[k][n] = b[n * b_pitch + k], rows
// times rows, or (B_COLUMNS) B[k][n] = b[k * b_pitch + n], rows times columns.
template <class T, int TILES, int DEPTH_TOTAL, bool B_COLUMNS>
PRIM void multiply_tiles(float (&d)[TILES][4], const T* a, int a_pitch, const T* b, int b_pitch, int lane) {
#pragma unroll
  for (int k = 0; k < DEPTH_TOTAL; k += Mma<T>::DEPTH) {
    Mma<T>::order_loads();
    typename Mma<T>::A fa;
    Mma<T>::load_a(fa, a + k, a_pitch, lane);
#pragma unroll
    for (int j = 0; j < TILES; j += 2) {
      typename Mma<T>::B fb;
      if constexpr (B_COLUMNS)
        Mma<T>::load_b_transposed(fb, b + k * b_pitch + j * 8, b_pitch, lane);
      else
        Mma<T>::load_b(fb, b + j * 8 * b_pitch + k, b_pitch, lane);
      Mma<T>::multiply(d[j], d[j + 1], fa, fb);
    }
  }
}

template <int TILES>
PRIM void clear(float (&d)[TILES][4]) {
#pragma unroll
  for (int j = 0; j < TILES; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) d[j][i] = 0.0f;
}
