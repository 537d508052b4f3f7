// Sixteen bytes that two threads, which nothing orders but a barrier, use as one or in parts of two bytes and more:
// what was done to a part may neither be lost nor spread. All but the last of the cases are races.
//
// Macros: none. Grid: one block of 64 threads, of which thread 0 and thread 32 do something. Shared memory: 16 bytes.
#include "primitives/primitives.cuh"

enum Case { READ_OF_PARTS, WRITE_OVER_READ_PART, READ_KEEPS_READ_PART, PART_OF_READ, PART_OF_WRITTEN, NO_RACE };

extern "C" __global__ void __launch_bounds__(64) histories(uint32_t* y, int which) {
  DynSmem smem;
  uint16_t* line = smem.take<uint16_t>(8, "line");
  const bool first = threadIdx.x == 0, second = threadIdx.x == 32;
  auto read = [&] {
    const uint4 x = *(const uint4*)line;
    y[threadIdx.x / 32] = x.x + x.y + x.z + x.w;
  };
  auto read_part = [&] { y[threadIdx.x / 32] = line[5]; };
  auto write = [&](uint32_t x) { *(uint4*)line = make_uint4(x, x, x, x); };
  if (first) write(1);
  __syncthreads();
  if (which == READ_OF_PARTS) {
    if (second) line[5] = 2;
    if (first) line[0] = 2;
    if (first) read();
  } else if (which == WRITE_OVER_READ_PART) {
    if (second) read_part();
    if (first) write(2);
  } else if (which == READ_KEEPS_READ_PART) {
    if (second) read_part();
    if (first) read();
    if (first) line[5] = 2;
  } else if (which == PART_OF_READ) {
    if (second) read();
    if (first) line[5] = 2;
  } else if (which == PART_OF_WRITTEN) {
    if (second) write(2);
    if (first) read_part();
  } else {
    if (second) line[5] = 2;
    if (first) line[4] = 2;
    if (first) line[6] = line[4];
  }
  __syncthreads();
  if (second) read();
  if (second) write(3);
  if (second) line[0] = line[5];
}
