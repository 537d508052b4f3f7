// Device side of the primitives: each function is one PTX instruction or one tiny idiom.
#pragma once

// ---- conversions: widen(x) to the type of sums, narrow<T>(x) to nearest even -------------------

PRIM float widen(float x) { return x; }
PRIM double widen(double x) { return x; }
PRIM float widen(bf16 x) { return __uint_as_float((uint32_t)x.bits << 16); }
PRIM float widen(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

template <class T>
PRIM T narrow(typename Sum<T>::type x);
template <>
PRIM float narrow<float>(float x) {
  return x;
}
template <>
PRIM double narrow<double>(double x) {
  return x;
}
template <>
PRIM bf16 narrow<bf16>(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
PRIM f16 narrow<f16>(float x) {
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

// Two 16-bit floats in one register, the first in the low half.
template <class T>
PRIM uint32_t pack2(float low, float high);
template <>
PRIM uint32_t pack2<bf16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
PRIM uint32_t pack2<f16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <class T>
PRIM float2 unpack2(uint32_t x) {
  T low = {(uint16_t)x}, high = {(uint16_t)(x >> 16)};
  return make_float2(widen(low), widen(high));
}

// float to tf32, the low 13 bits of which are zero: the nearest one, of two the one further from zero, which takes
// three instructions, or on compute capability 9.0 the even one, which takes one. Newer ones have it too, but there
// kernels of float spill with it.
PRIM uint32_t to_tf32(float x) {
  uint32_t y;
#if KSM == 900
  asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
#else
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
#endif
  return y;
}

// ---- shared memory ---------------------------------------------------------------------------------

extern __shared__ __align__(1024) uint8_t dynamic_shared[];

// Nothing defines it: a call that the compiler cannot leave out does not link.
extern "C" __device__ void shared_memory_is_not_what_the_launch_gives();

// Carves arrays out of dynamic shared memory; every thread must carve the same ones in one order.
struct DynSmem {
  uint32_t used = 0;
  template <class T>
  __device__ __forceinline__ T* take(int count, const char* name, int align = 16) {
    used = (used + align - 1) & ~(uint32_t)(align - 1);
    T* array = (T*)(dynamic_shared + used);
    used += count * (uint32_t)sizeof(T);
    return array;
  }
  // Says that nothing more is taken, and all that the launch gives. Else the kernel does not compile.
  __device__ __forceinline__ void all_taken(uint32_t given) const {
    if (used != given) shared_memory_is_not_what_the_launch_gives();
  }
};

PRIM uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// ---- cp.async: BYTES of 4, 8 or 16 from global to shared memory; past `valid` bytes come zeros ---

template <int BYTES>
PRIM void cp_async(void* to, const void* from, int valid) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(BYTES),
                 "r"(valid)
                 : "memory");
}
PRIM void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
PRIM void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- matrix fragments ------------------------------------------------------------------------------

// ldmatrix: four 8x8 tiles of 16-bit elements; lane l gives the address of row l % 8 of tile l / 8.
PRIM void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
PRIM void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// movmatrix: transpose of an 8x8 tile of 16-bit elements held across the warp.
PRIM uint32_t movmatrix_trans(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// mma.sync: d += a b, with a 16 x k by rows, b k x 8 by columns, float sums.
template <class T>
PRIM void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
PRIM void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
PRIM void mma_m16n8k16<f16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
PRIM void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- barriers --------------------------------------------------------------------------------------

// bar.sync: `threads` threads (a multiple of 32) meet at barrier `id` (1 to 15).
PRIM void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
