// Instructions that only compute capability 9.0 has: TMA, mbarriers, wgmma, registers that move between warps. Kernels
// that include this are compiled for sm_90a.
//
// Tiles that TMA writes and wgmma reads are swizzled: rows of 128 bytes, 1024-byte aligned, whose eight 16-byte pieces
// are permuted by the row, piece ^ (row % 8). swizzled() in tiles/swizzled.cuh is the same for ordinary accesses.
#pragma once
#include "primitives/primitives.cuh"

// What the driver encodes for an array and a box of it, 128 bytes; a kernel takes it as `const __grid_constant__`.
struct alignas(64) TensorMap {
  uint64_t words[16];
};

#ifdef CUEMU
#include "hopper_on_cpu.h"
#else
#include "primitives/hopper_device.cuh"
#endif
