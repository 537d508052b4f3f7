// What is asked for before it is needed, and what nobody needs again.
#pragma once
#include "primitives/primitives.cuh"

#ifdef CUEMU
#include "prefetch_on_cpu.h"
#else
// The line that has `p`, in global memory. Nobody waits for it, and nothing but time depends on it.
PRIM void prefetch_line(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// *p in global memory, loaded where this stands: other loads the compiler may move down to where they are used, behind
// a wait for something else. ONCE: caches keep something else rather than it.
template <bool ONCE = false, class T>
PRIM T ask(const T* p) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "one access");
  uint32_t x[4];
  if constexpr (sizeof(T) == 2) {
    uint16_t half;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(half) : "l"(p));
    memcpy(x, &half, 2);
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(x[0]) : "l"(p));
  } else if constexpr (sizeof(T) == 8 && ONCE) {
    asm volatile("ld.global.cs.v2.u32 {%0, %1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "l"(p));
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "l"(p));
  } else if constexpr (ONCE) {
    asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "l"(p));
  } else {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "l"(p));
  }
  T y;
  memcpy(&y, x, sizeof(T));
  return y;
}

// x, which is made where this stands: else the compiler may make it where it is used, behind a wait for something else.
PRIM float made(float x) {
  asm volatile("" : "+f"(x));
  return x;
}
PRIM double made(double x) {
  asm volatile("" : "+d"(x));
  return x;
}
PRIM int64_t made(int64_t x) {
  asm volatile("" : "+l"(x));
  return x;
}
PRIM uint32_t made(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}
// *p = x in global memory, which caches keep something else rather than.
template <class T>
PRIM void store_once(T* p, const T& y) {
  static_assert(sizeof(T) == 8 || sizeof(T) == 16, "one access");
  uint32_t x[4];
  memcpy(x, &y, sizeof(T));
  if constexpr (sizeof(T) == 8)
    asm volatile("st.global.cs.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(x[0]), "r"(x[1]) : "memory");
  else
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
}
#endif
