// Tiles of rows from global to shared memory. Rows past the valid ones and columns past HEAD become
// zeros without being read: what lies there belongs to another sequence, and its NaN stays there.
#pragma once
#include "primitives/primitives.cuh"

PRIM constexpr int padded(int head) { return (head + 15) / 16 * 16; }
// Rows of 16-byte multiples plus 16 bytes: eight rows then start in different bank groups.
template <class T>
PRIM constexpr int pitch_of(int columns) {
  return columns + 16 / (int)sizeof(T);
}

// Loads tile[r][c], r < ROWS, c < COLUMNS, from rows[r * stride + c]: `valid` rows, `width` columns (HEAD, or less
// in the last slice of one), by THREADS threads. The caller commits and waits.
template <class T, int ROWS, int COLUMNS, int HEAD, int THREADS, int PITCH = pitch_of<T>(COLUMNS)>
PRIM void load_tile(T* tile, const T* rows, int64_t stride, int valid, int width, int thread) {
  constexpr int bytes = HEAD * (int)sizeof(T);
  constexpr int access = bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : bytes % 4 == 0 ? 4 : 0;
  if constexpr (access > 0) {
    constexpr int elements = access / (int)sizeof(T), per_row = COLUMNS / elements;
    if constexpr (THREADS % per_row == 0) {
      // A thread keeps its column and walks down the rows.
      constexpr int step = THREADS / per_row;
      const int first = thread / per_row, c = thread % per_row * elements;
      const T* from = rows + first * stride + c;
      T* to = tile + first * PITCH + c;
#pragma unroll
      for (int r = 0; r < ROWS; r += step, from += step * stride, to += step * PITCH) {
        if (ROWS % step && r + first >= ROWS) break;
        bool inside = r + first < valid && c < width;
        cp_async<access>(to, inside ? from : rows, inside ? access : 0);
      }
    } else {
#pragma unroll
      for (int i = thread; i < ROWS * per_row; i += THREADS) {
        int r = i / per_row, c = i % per_row * elements;
        bool inside = r < valid && c < width;
        cp_async<access>(&tile[r * PITCH + c], inside ? &rows[r * stride + c] : rows, inside ? access : 0);
      }
    }
  } else {
    for (int i = thread; i < ROWS * COLUMNS; i += THREADS) {
      int r = i / COLUMNS, c = i % COLUMNS;
      tile[r * PITCH + c] = r < valid && c < width ? rows[r * stride + c] : narrow<T>(0);
    }
  }
}

// Loads one number per token of a chunk, (B, T, HV): beta or G. Past the end: zero.
template <int ROWS, int THREADS, class T>
PRIM void load_column(T* column, const T* values, int64_t stride, int valid, int thread) {
  constexpr int BYTES = sizeof(T);
  for (int r = thread; r < ROWS; r += THREADS) {
    bool inside = r < valid;
    cp_async<BYTES>(&column[r], inside ? &values[r * stride] : values, inside ? BYTES : 0);
  }
}
