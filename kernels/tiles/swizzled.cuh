// Swizzled tiles in shared memory, as TMA writes and wgmma reads them: boxes of ROWS rows by 64 elements of 16 bits.
// Wider tiles are boxes one after another.
#pragma once
#include "primitives/hopper.cuh"

constexpr int BOX = 64;  // elements of 16 bits in a row of 128 bytes

// Element (row, column) of a box; eight elements from a multiple of eight on lie together.
PRIM int swizzled(int row, int column) { return row * BOX + ((column / 8 ^ row % 8) * 8 + column % 8); }

// The descriptor of what lies `bytes` further, a multiple of 16: addresses of shared memory never carry beyond its low
// half, so that this is one addition.
PRIM uint64_t further(uint64_t descriptor, int bytes) {
  return (descriptor & 0xffffffff00000000ull) | (uint32_t)((uint32_t)descriptor + bytes / 16);
}
// Descriptors of the k-th 16-element step of tiles of 64 rows, PITCH elements from box to box: an operand whose rows
// run along k, and one whose rows are k.
template <int PITCH = 64 * BOX, class T>
PRIM uint64_t step_along_rows(const T* tile, int step) {
  return further(tile_descriptor(tile, 16, 1024), (step / 4 * PITCH + step % 4 * 16) * sizeof(T));
}
template <int PITCH = 64 * BOX, class T>
PRIM uint64_t step_of_rows(const T* tile, int step) {
  return further(tile_descriptor(tile, PITCH * 2, 1024), step * 16 * BOX * sizeof(T));
}

// Two accumulator tiles d(i, n) = box[n][i] for 16 rows n from `row` and 16 columns i from `column`: in pairs of 16
// bits, the first two of one tile; or in float.
template <class T>
PRIM void load_box_transposed(uint32_t (&r)[4], const T* box, int row, int column, int lane) {
  ldmatrix_x4_trans(r, box + swizzled(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8));
}
template <class T>
PRIM void read_box_transposed(float (&d0)[4], float (&d1)[4], const T* box, int row, int column, int lane) {
  uint32_t r[4];
  load_box_transposed(r, box, row, column, lane);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float2 x0 = unpack2<T>(r[h]), x1 = unpack2<T>(r[2 + h]);
    d0[2 * h] = x0.x, d0[2 * h + 1] = x0.y;
    d1[2 * h] = x1.x, d1[2 * h + 1] = x1.y;
  }
}
// box[n][i] = d(i, n) for the same two tiles.
template <class T>
PRIM void write_box_transposed(T* box, const float (&d0)[4], const float (&d1)[4], int row, int column, int lane) {
  uint32_t r[4] = {pack2<T>(d0[0], d0[1]), pack2<T>(d0[2], d0[3]), pack2<T>(d1[0], d1[1]), pack2<T>(d1[2], d1[3])};
  stmatrix_x4_trans(box + swizzled(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8), r);
}
// box[i][n] = d(i, n) for two accumulator tiles of neighbouring columns.
template <class T>
PRIM void write_box(T* box, const float (&d0)[4], const float (&d1)[4], int row, int column, int lane) {
  uint32_t r[4] = {pack2<T>(d0[0], d0[1]), pack2<T>(d0[2], d0[3]), pack2<T>(d1[0], d1[1]), pack2<T>(d1[2], d1[3])};
  stmatrix_x4(box + swizzled(row + lane % 16, column + lane / 16 * 8), r);
}

// Zeros, by a warp, in the rows from `tokens` on of boxes of 64 rows: they are another sequence's.
template <class T>
PRIM void clear_rows(T* tile, int boxes, int tokens, int lane) {
  for (int i = lane; i < boxes * (64 - tokens) * 8; i += 32) {
    const int piece = i % 8, row = tokens + i / 8 % (64 - tokens), box = i / (8 * (64 - tokens));
    *(uint4*)&tile[(box * 64 + row) * BOX + piece * 8] = {};
  }
}

// Which buffer of a ring comes next, and the parity of its phase.
template <int STAGES>
struct Ring {
  int stage = 0, parity = 0;
  PRIM void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};
