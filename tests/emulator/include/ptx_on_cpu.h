// What C++ that was made from PTX needs (ptx.py). A register is an unsigned integer of its size; instructions give
// it a type.
#pragma once
#include <limits>

#include "primitives/primitives.cuh"

namespace emulator {

// Shared addresses count from the window's start, as in the descriptors of wgmma.
inline uint64_t shared_to_generic(uint64_t address) { return (uint64_t)shared_window() + (uint32_t)address; }
inline uint64_t generic_to_shared(uint64_t address) { return address - (uint64_t)shared_window(); }
inline uint64_t dynamic_shared_start() { return shared_start() ? generic_to_shared((uint64_t)shared_start()) : 0; }
inline uint8_t* shared_pointer(uint64_t address) { return (uint8_t*)shared_to_generic(address); }
// Those of other blocks of the cluster too: from this block's window, so that its own addresses stay as they are.
inline uint32_t map_shared(uint32_t address, int rank, Site site) {
  return (uint32_t)generic_to_shared((uint64_t)in_block(shared_pointer(address), rank, site));
}
inline uint8_t* cluster_pointer(uint32_t address) { return shared_window() + (int32_t)address; }
inline uint8_t* generic_pointer(uint64_t address) { return (uint8_t*)address; }

template <class T>
T shift_left(T x, uint32_t n) {
  return n < sizeof(T) * 8 ? (T)((std::make_unsigned_t<T>)x << n) : (T)0;
}
template <class T>
T shift_right(T x, uint32_t n) {
  constexpr uint32_t TOP = sizeof(T) * 8 - 1;
  if (n > TOP) return std::is_signed_v<T> ? x >> TOP : (T)0;
  return x >> n;
}
inline float fma_down(float a, float b, float c) {  // rounded towards minus infinity
  double exact = (double)a * b + c;
  float r = (float)exact;
  return (double)r > exact ? std::nextafter(r, -INFINITY) : r;
}
inline float add_to_zero(float a, float b) {  // rounded towards zero; of two floats of like size, as log1pf has
  double exact = (double)a + b;
  float r = (float)exact;
  return std::abs((double)r) > std::abs(exact) ? std::nextafter(r, 0.0f) : r;
}
inline float saturate(float x) { return x > 0 ? min(x, 1.0f) : 0.0f; }
inline uint32_t bit_field_insert(uint32_t a, uint32_t b, uint32_t position, uint32_t length) {
  uint32_t mask = (length >= 32 ? ~0u : (1u << length) - 1) << position;
  return (b & ~mask) | (a << position & mask);
}
inline uint32_t bit_field(uint32_t a, uint32_t position, uint32_t length) {
  return a >> position & (length >= 32 ? ~0u : (1u << length) - 1);
}
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t bytes = a | (uint64_t)b << 32;
  uint32_t r = 0;
  for (int i = 0; i < 4; i++) {
    uint32_t s = selector >> (4 * i), byte = bytes >> (8 * (s & 7)) & 0xff;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    r |= byte << (8 * i);
  }
  return r;
}
inline uint32_t funnel(uint32_t low, uint32_t high, uint32_t n, bool left) {
  uint64_t both = low | (uint64_t)high << 32;
  n &= 31;
  return (uint32_t)(left ? both << n >> 32 : both >> n);
}
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t r = 0;
  for (int i = 0; i < 8; i++)
    if (table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return r;
}
// dp2a: two halves of a times the two bytes of b that start at a bit.
inline uint32_t dot2(uint32_t a, uint32_t b, uint32_t c, int bit) {
  return c + (a & 0xffff) * (b >> bit & 0xff) + (a >> 16) * (b >> (bit + 8) & 0xff);
}
template <class To, class From>
To convert(From x) {  // float to integer saturates, NaN becomes 0
  if constexpr (std::is_floating_point_v<From> && std::is_integral_v<To>) {
    if (x != x) return 0;
    if (x >= (From)std::numeric_limits<To>::max()) return std::numeric_limits<To>::max();
    if (x <= (From)std::numeric_limits<To>::min()) return std::numeric_limits<To>::min();
  }
  return (To)x;
}

// shfl.sync: b is the lane or offset, c holds the segment mask (bits 8 to 12) and the clamp.
inline uint32_t shuffle_ptx(char mode, uint32_t x, uint32_t b, uint32_t c, uint32_t mask, bool& in_range, Site site) {
  int lane = current->lane, segment = c >> 8 & 31, clamp = c & 31, from = b & 31;
  int top = (lane & segment) | (clamp & ~segment), bottom = lane & segment;
  if (mode == 'u') from = lane - from;
  if (mode == 'd') from = lane + from;
  if (mode == 'b') from = lane ^ from;
  if (mode == 'i') from = bottom | (from & ~segment);
  in_range = mode == 'u' ? from >= top : from <= top;
  return shuffle(mask, x, in_range ? from : lane, site);
}
}  // namespace emulator
