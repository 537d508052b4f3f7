// Host twins of kernels/primitives/device.cuh: the same names, with the semantics in C++.
#pragma once

PRIM float widen(float x) { return x; }
PRIM double widen(double x) { return x; }
PRIM float widen(bf16 x) { return __uint_as_float((uint32_t)x.bits << 16); }
PRIM float widen(f16 x) {
  uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | fraction << 13);
  float magnitude =
      exponent ? std::ldexp((float)(1024 + fraction), (int)exponent - 25) : std::ldexp((float)fraction, -24);
  return sign ? -magnitude : magnitude;
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
  uint32_t u = __float_as_uint(x);
  if ((u & 0x7fffffff) > 0x7f800000) return {0x7fff};
  return {(uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <>
PRIM f16 narrow<f16>(float x) {
  uint32_t u = __float_as_uint(x);
  uint16_t sign = u >> 16 & 0x8000;
  u &= 0x7fffffff;
  if (u > 0x7f800000) return {0x7fff};
  if (u >= 0x47800000) return {(uint16_t)(sign | 0x7c00)};
  if (u < 0x38800000) {  // subnormal: round the value in units of 2^-24
    return {(uint16_t)(sign | (uint16_t)std::nearbyint(std::ldexp(__uint_as_float(u), 24)))};
  }
  uint32_t rounded = u + 0xfff + (u >> 13 & 1) - 0x38000000;
  return {(uint16_t)(sign | rounded >> 13)};
}
template <class T>
PRIM uint32_t pack2(float low, float high) {
  return narrow<T>(low).bits | (uint32_t)narrow<T>(high).bits << 16;
}
template <class T>
PRIM float2 unpack2(uint32_t x) {
  T low = {(uint16_t)x}, high = {(uint16_t)(x >> 16)};
  return make_float2(widen(low), widen(high));
}
PRIM uint32_t to_tf32(float x) {
  uint32_t u = __float_as_uint(x);
  const uint32_t half = KSM == 900 ? 0xfff + (u >> 13 & 1) : 0x1000;
  return (u & 0x7f800000) == 0x7f800000 ? u : (u + half) & ~0x1fffu;
}

struct DynSmem {
  template <class T>
  T* take(int count, const char* name, int align = 16, SITE) {
    return (T*)emulator::shared_take(count * sizeof(T), align, name, HERE);
  }
  void all_taken(size_t given, SITE) const { emulator::shared_all_taken(given, HERE); }
};

template <int BYTES>
PRIM void cp_async(void* to, const void* from, int valid, SITE) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
  emulator::cp_async(to, from, BYTES, valid, HERE);
}
PRIM void cp_async_commit(SITE) { emulator::cp_async_commit(HERE); }
template <int PENDING>
PRIM void cp_async_wait(SITE) {
  emulator::cp_async_wait(PENDING, HERE);
}

PRIM void ldmatrix_x4(uint32_t (&r)[4], const void* row, SITE) { emulator::ldmatrix(r, row, false, HERE); }
PRIM void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, SITE) { emulator::ldmatrix(r, row, true, HERE); }
PRIM uint32_t movmatrix_trans(uint32_t x, SITE) { return emulator::movmatrix(x, HERE); }

template <class T>
PRIM void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SITE) {
  static_assert(std::is_same<T, bf16>::value || std::is_same<T, f16>::value, "16-bit operands");
  uint32_t b[2] = {b0, b1};
  emulator::mma(d, a, b, std::is_same<T, bf16>::value ? emulator::MMA_BF16 : emulator::MMA_F16, HERE);
}
PRIM void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SITE) {
  uint32_t b[2] = {b0, b1};
  emulator::mma(d, a, b, emulator::MMA_TF32, HERE);
}

PRIM void named_barrier(int id, int threads, SITE) { emulator::block_barrier(id, threads, HERE); }

// Inline PTX belongs in kernels/primitives/device.cuh.
#pragma GCC poison asm __asm__
