// Host twin of kernels/primitives/prefetch.cuh; runtime/memory.cpp has its semantics.
#pragma once
#include "cuda_on_cpu.h"

namespace emulator {
void prefetch_line(const void* p, Site);
}  // namespace emulator

inline void prefetch_line(const void* p, SITE) { emulator::prefetch_line(p, HERE); }
