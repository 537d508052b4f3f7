// Host twin of kernels/primitives/prefetch.cuh; runtime/memory.cpp has its semantics.
#pragma once
#include "cuda_on_cpu.h"

namespace emulator {
void prefetch_line(const void* p, Site);
}  // namespace emulator

inline void prefetch_line(const void* p, SITE) { emulator::prefetch_line(p, HERE); }

template <bool ONCE = false, class T>
inline T ask(const T* p) {
  return *p;
}
template <class T>
inline void store_once(T* p, const T& x) {
  *p = x;
}
template <class T>
inline T made(T x) {
  return x;
}
