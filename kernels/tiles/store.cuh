// Accumulators to global memory.
#pragma once
#include "tiles/fragments.cuh"

// out[column * stride + row] = d(row, column): an accumulator tile written transposed, so that the eight rows
// that neighbouring lanes hold lie side by side. Rows from `rows` on and columns from `columns` on are left out.
template <class T, int HEAD>
PRIM void store_transposed(T* out, int64_t stride, const float (&d)[4], int rows, int columns, int lane) {
  if constexpr (sizeof(T) == 2 && HEAD % 2 == 0) {
    // Transposed in registers, a lane holds two neighbouring rows: half as many stores.
#pragma unroll
    for (int h = 0; h < 2; h++) {
      uint32_t pair = movmatrix_trans(pack2<T>(d[2 * h], d[2 * h + 1]));
      int row = h * 8 + lane % 4 * 2, column = lane / 4;
      if (row < rows && column < columns) *(uint32_t*)&out[column * stride + row] = pair;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int row = sum_row(lane, i), column = sum_column(lane, 0, i);
      if (row < rows && column < columns) out[column * stride + row] = narrow<T>(d[i]);
    }
  }
}

// out[row * stride + column] = d(row, column) for an accumulator tile as it lies, two columns at a time.
template <class T, int STRIDE>
PRIM void store_rows(T* out, const float (&d)[4], int rows, int columns, int lane) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    int row = sum_row(lane, 2 * h), column = sum_column(lane, 0, 0);
    T* at = &out[row * STRIDE + column];
    if (row >= rows || column >= columns) continue;
    if constexpr (STRIDE % 2 == 0 && sizeof(T) == 2) {
      *(uint32_t*)at = pack2<T>(d[2 * h], d[2 * h + 1]);
    } else {
      at[0] = narrow<T>(d[2 * h]);
      if (column + 1 < columns) at[1] = narrow<T>(d[2 * h + 1]);
    }
  }
}

// Eight elements of 16 bits at once, from `column` on, which is a multiple of 8. The index counts vectors: where it
// counts elements, NVRTC loses sight of the alignment of some addresses and stores one word after the other.
template <class T>
PRIM void store_eight(T* row, int column, uint4 x) {
  static_assert(sizeof(T) == 2, "elements of 16 bits");
  ((uint4*)row)[column / 8] = x;
}

// r[i] of lane j of every four lanes becomes r[j] of lane i: packed pairs of a row of four accumulator tiles become
// eight neighbouring elements per lane.
PRIM void transpose_quads(uint32_t (&r)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & bit) continue;
      const bool upper = lane & bit;
      const uint32_t other = __shfl_xor_sync(~0u, upper ? r[i] : r[i | bit], bit);
      if (upper)
        r[i] = other;
      else
        r[i | bit] = other;
    }
}

// out[row * stride + column] = factor d(row, column) for 16 rows, 16 bytes of a row per lane: at once, which takes four
// neighbouring registers, or with SINGLY word after word. TILES is a multiple of 4, and `columns`, how many there are,
// one of 8.
template <class T, bool SINGLY = false, int TILES>
PRIM void store_wide(T* out, int64_t stride, const float (&d)[TILES][4], float factor, int rows, int columns,
                     int lane) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = half * 8 + lane / 4;
#pragma unroll
    for (int j = 0; j < TILES; j += 4) {
      uint32_t r[4];
#pragma unroll
      for (int i = 0; i < 4; i++) r[i] = pack2<T>(factor * d[j + i][2 * half], factor * d[j + i][2 * half + 1]);
      transpose_quads(r, lane);
      const int column = (j + lane % 4) * 8;
      const uint4 eight = make_uint4(r[0], r[1], r[2], r[3]);
      if (row < rows && column < columns) {
        if constexpr (SINGLY)
          *(uint4*)&out[row * stride + column] = eight;
        else
          store_eight(out + row * stride, column, eight);
      }
    }
  }
}

// A state's accumulator tile (rows: value channels, columns: key channels) and its place in memory: layout
// (K, V), or (V, K) with STATE_VK.
PRIM int64_t state_offset(int value, int key) {
#if STATE_VK
  return (int64_t)value * HEAD_K + key;
#else
  return (int64_t)key * HEAD_V + value;
#endif
}
template <class T>
PRIM void store_state(T* state, const float (&d)[4], int value, int key, int lane) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int row = value + sum_row(lane, i), column = key + sum_column(lane, 0, i);
    if (row < HEAD_V && column < HEAD_K) state[state_offset(row, column)] = narrow<T>(d[i]);
  }
}
template <class T>
PRIM void load_state(float (&d)[4], const T* state, int value, int key, int lane) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int row = value + sum_row(lane, i), column = key + sum_column(lane, 0, i);
    d[i] = row < HEAD_V && column < HEAD_K ? widen(state[state_offset(row, column)]) : 0.0f;
  }
}
