// What is asked for before it is needed, from memory to the L2 cache.
#pragma once
#include "primitives/primitives.cuh"

#ifdef CUEMU
#include "prefetch_on_cpu.h"
#else
// The line that has `p`, in global memory. Nobody waits for it, and nothing but time depends on it.
PRIM void prefetch_line(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
#endif
