// Instructions that compute: integers wrap, shifts beyond a word give zeros or signs, floats round to nearest.
#include "program.h"

namespace emulator {

template <class T>
T add(T a, T b) {
  return (T)(a + b);
}
template <class T>
T subtract(T a, T b) {
  return (T)(a - b);
}
template <class T>
T multiply(T a, T b) {
  if constexpr (sizeof(T) < 4) return (T)((uint32_t)a * b);
  return (T)(a * b);
}
template <class T>
T divide(T a, T b) {
  return (T)(a / b);
}
template <class T>
T remainder(T a, T b) {
  return (T)(a % b);
}
template <class T>
T multiply_add(T a, T b, T c) {
  return add(multiply(a, b), c);
}
template <class T>
T negative(T a) {
  return (T)-a;
}
template <class T>
T smaller(T a, T b) {
  return min(a, b);
}
template <class T>
T larger(T a, T b) {
  return max(a, b);
}
template <class T>
T absolute(T a) {
  return (T)(a < 0 ? -a : a);
}
template <class W, class T>
W multiply_wide(T a, T b) {
  return (W)a * (W)b;
}
template <class W, class T>
W multiply_add_wide(T a, T b, W c) {
  return (W)((std::make_unsigned_t<W>)((W)a * (W)b) + (std::make_unsigned_t<W>)c);
}
template <class W, class T>
T multiply_high(T a, T b) {
  return (T)((W)a * (W)b >> sizeof(T) * 8);
}

template <class T>
T bit_and(T a, T b) {
  return a & b;
}
template <class T>
T bit_or(T a, T b) {
  return a | b;
}
template <class T>
T bit_xor(T a, T b) {
  return a ^ b;
}
template <class T>
T bit_not(T a) {
  return std::is_same_v<T, bool> ? (T)!a : (T) ~(uint64_t)a;
}
template <class T>
T shift_left(T x, uint32_t n) {
  return n < sizeof(T) * 8 ? (T)((std::make_unsigned_t<T>)x << n) : (T)0;
}
template <class T>
T shift_right(T x, uint32_t n) {
  constexpr uint32_t TOP = sizeof(T) * 8 - 1;
  if (n > TOP) return std::is_signed_v<T> ? (T)(x >> TOP) : (T)0;
  return (T)(x >> n);
}
template <class T>
T select(T a, T b, bool p) {
  return p ? a : b;
}

template <class T>
bool equal(T a, T b) {
  return a == b;
}
template <class T>
bool unequal(T a, T b) {
  return a < b || a > b;
}
template <class T>
bool less(T a, T b) {
  return a < b;
}
template <class T>
bool less_or_equal(T a, T b) {
  return a <= b;
}
template <class T>
bool greater(T a, T b) {
  return a > b;
}
template <class T>
bool greater_or_equal(T a, T b) {
  return a >= b;
}
// Unordered: true for NaN.
template <class T, bool (*OPPOSITE)(T, T)>
bool unless(T a, T b) {
  return !OPPOSITE(a, b);
}
template <class T>
bool equal_or_nan(T a, T b) {
  return !(a < b || a > b);
}
template <class T>
bool any_nan(T a, T b) {
  return a != a || b != b;
}

template <class T>
T fused(T a, T b, T c) {
  return std::fma(a, b, c);
}
static float fused_down(float a, float b, float c) {  // rounded towards minus infinity, in expf
  double exact = (double)a * b + c;
  float r = (float)exact;
  return (double)r > exact ? std::nextafter(r, -INFINITY) : r;
}
static float add_to_zero(float a, float b) {  // rounded towards zero; of two floats of like size, as log1pf has
  double exact = (double)a + b;
  float r = (float)exact;
  return std::abs((double)r) > std::abs(exact) ? std::nextafter(r, 0.0f) : r;
}
template <class T>
T root(T x) {
  return std::sqrt(x);
}
template <class T>
T reciprocal(T x) {
  return 1 / x;
}
template <class T>
T reciprocal_root(T x) {
  return 1 / std::sqrt(x);
}
template <class T>
T with_sign(T sign, T x) {
  return std::copysign(x, sign);
}
static float exponential(float x) { return std::exp2(x); }
static float logarithm(float x) { return std::log2(x); }

static uint32_t bit_field_insert(uint32_t a, uint32_t b, uint32_t position, uint32_t length) {
  uint32_t mask = (length >= 32 ? ~0u : (1u << length) - 1) << position;
  return (b & ~mask) | (a << position & mask);
}
static uint32_t bit_field(uint32_t a, uint32_t position, uint32_t length) {
  return a >> position & (length >= 32 ? ~0u : (1u << length) - 1);
}
static uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t bytes = a | (uint64_t)b << 32;
  uint32_t r = 0;
  for (int i = 0; i < 4; i++) {
    uint32_t s = selector >> (4 * i), byte = bytes >> (8 * (s & 7)) & 0xff;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    r |= byte << (8 * i);
  }
  return r;
}
template <bool LEFT>
uint32_t funnel(uint32_t low, uint32_t high, uint32_t n) {
  uint64_t both = low | (uint64_t)high << 32;
  n &= 31;
  return (uint32_t)(LEFT ? both << n >> 32 : both >> n);
}
static uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t r = 0;
  for (int i = 0; i < 8; i++)
    if (table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return r;
}
// dp2a: two halves of a times the two bytes of b that start at a bit.
template <int BIT>
uint32_t dot2(uint32_t a, uint32_t b, uint32_t c) {
  return c + (a & 0xffff) * (b >> BIT & 0xff) + (a >> 16) * (b >> (BIT + 8) & 0xff);
}
static uint32_t population(uint32_t x) { return __builtin_popcount(x); }
static uint32_t leading_zeros(uint32_t x) { return x ? __builtin_clz(x) : 32; }

template <class T>
void comparisons(Instructions& known, const std::string& t) {
  known["setp.eq." + t] = pure<equal<T>>;
  known["setp.ne." + t] = pure<unequal<T>>;
  for (const char* name : {"setp.lt.", "setp.lo."}) known[name + t] = pure<less<T>>;
  for (const char* name : {"setp.le.", "setp.ls."}) known[name + t] = pure<less_or_equal<T>>;
  for (const char* name : {"setp.gt.", "setp.hi."}) known[name + t] = pure<greater<T>>;
  for (const char* name : {"setp.ge.", "setp.hs."}) known[name + t] = pure<greater_or_equal<T>>;
}
// U: the unsigned type of T's size, in which sums wrap.
template <class T, class W, class U = std::make_unsigned_t<T>>
void integer(Instructions& known, const std::string& t) {
  known["add." + t] = pure<add<U>>;
  known["sub." + t] = pure<subtract<U>>;
  known["mul.lo." + t] = pure<multiply<U>>;
  known["mad.lo." + t] = pure<multiply_add<U>>;
  known["mul.hi." + t] = pure<multiply_high<W, T>>;
  known["div." + t] = pure<divide<T>>;
  known["rem." + t] = pure<remainder<T>>;
  known["neg." + t] = pure<negative<U>>;
  known["min." + t] = pure<smaller<T>>;
  known["max." + t] = pure<larger<T>>;
  known["shr." + t] = pure<shift_right<T>>;
  known["selp." + t] = pure<select<U>>;
  if constexpr (std::is_signed_v<T>) known["abs." + t] = pure<absolute<T>>;
  if constexpr (sizeof(T) < 8) {
    known["mul.wide." + t] = pure<multiply_wide<W, T>>;
    known["mad.wide." + t] = pure<multiply_add_wide<W, T>>;
  }
  comparisons<T>(known, t);
}
template <class T>
void bits(Instructions& known, const std::string& t) {
  known["and." + t] = pure<bit_and<T>>;
  known["or." + t] = pure<bit_or<T>>;
  known["xor." + t] = pure<bit_xor<T>>;
  known["not." + t] = pure<bit_not<T>>;
  if constexpr (!std::is_same_v<T, bool>) {
    known["shl." + t] = pure<shift_left<T>>;
    known["shr." + t] = pure<shift_right<T>>;
    known["selp." + t] = pure<select<T>>;
    known["setp.eq." + t] = pure<equal<T>>;
    known["setp.ne." + t] = pure<unequal<T>>;
  }
}
template <class T>
void floating(Instructions& known, const std::string& t) {
  known["add." + t] = pure<add<T>>;
  known["sub." + t] = pure<subtract<T>>;
  known["mul." + t] = pure<multiply<T>>;
  known["div." + t] = pure<divide<T>>;
  known["fma." + t] = pure<fused<T>>;
  known["neg." + t] = pure<negative<T>>;
  known["abs." + t] = pure<(T (*)(T))std::abs>;
  known["min." + t] = pure<smaller<T>>;
  known["max." + t] = pure<larger<T>>;
  known["sqrt." + t] = pure<root<T>>;
  known["rcp." + t] = pure<reciprocal<T>>;
  known["rsqrt." + t] = pure<reciprocal_root<T>>;
  known["copysign." + t] = pure<with_sign<T>>;
  known["selp." + t] = pure<select<T>>;
  comparisons<T>(known, t);
  known["setp.equ." + t] = pure<equal_or_nan<T>>;
  known["setp.neu." + t] = pure<unless<T, equal<T>>>;
  known["setp.ltu." + t] = pure<unless<T, greater_or_equal<T>>>;
  known["setp.leu." + t] = pure<unless<T, greater<T>>>;
  known["setp.gtu." + t] = pure<unless<T, less_or_equal<T>>>;
  known["setp.geu." + t] = pure<unless<T, less<T>>>;
  known["setp.nan." + t] = pure<any_nan<T>>;
  known["setp.num." + t] = pure<unless<T, any_nan<T>>>;
}

void arithmetic(Instructions& known) {
  integer<int16_t, int32_t>(known, "s16");
  integer<uint16_t, uint32_t>(known, "u16");
  integer<int32_t, int64_t>(known, "s32");
  integer<uint32_t, uint64_t>(known, "u32");
  integer<int64_t, __int128>(known, "s64");
  integer<uint64_t, unsigned __int128>(known, "u64");
  bits<bool>(known, "pred");
  bits<uint16_t>(known, "b16");
  bits<uint32_t>(known, "b32");
  bits<uint64_t>(known, "b64");
  floating<float>(known, "f32");
  floating<double>(known, "f64");
  known["fma.rm.f32"] = pure<fused_down>;
  known["add.rz.f32"] = pure<add_to_zero>;
  known["ex2.f32"] = pure<exponential>;
  known["lg2.f32"] = pure<logarithm>;
  known["bfi.b32"] = pure<bit_field_insert>;
  known["bfe.u32"] = pure<bit_field>;
  known["prmt.b32"] = pure<permute>;
  known["shf.l.wrap.b32"] = pure<funnel<true>>;
  known["shf.r.wrap.b32"] = pure<funnel<false>>;
  known["lop3.b32"] = pure<lop3>;
  known["dp2a.lo.u32.u32"] = pure<dot2<0>>;
  known["dp2a.hi.u32.u32"] = pure<dot2<16>>;
  known["popc.b32"] = pure<population>;
  known["clz.b32"] = pure<leading_zeros>;
}
}  // namespace emulator
