// Conversions between types, and moves of bits.
#include <limits>

#include "addresses.h"

namespace emulator {

template <class To, class From>
To convert(From x) {  // float to integer saturates, NaN becomes 0
  if constexpr (std::is_floating_point_v<From> && std::is_integral_v<To>) {
    if (x != x) return 0;
    if (x >= (From)std::numeric_limits<To>::max()) return std::numeric_limits<To>::max();
    if (x <= (From)std::numeric_limits<To>::min()) return std::numeric_limits<To>::min();
  }
  return (To)x;
}
template <class To, class From, From (*ROUND)(From)>
To rounded(From x) {
  return convert<To>(ROUND(x));
}

static uint16_t to_bf16(float x) { return narrow<bf16>(x).bits; }
static uint16_t to_f16(float x) { return narrow<f16>(x).bits; }
static float from_bf16(uint16_t x) { return widen(bf16{x}); }
static float from_f16(uint16_t x) { return widen(f16{x}); }
template <class T>
uint32_t to_pair(float high, float low) {
  return pack2<T>(low, high);
}
template <class T>
uint32_t multiply_pairs(uint32_t x, uint32_t y) {
  const float2 a = unpack2<T>(x), b = unpack2<T>(y);
  return pack2<T>(a.x * b.x, a.y * b.y);
}
template <bool EVEN>
uint32_t rounded_to_tf32(float x) {  // ties to even, or away from zero
  const uint32_t u = __float_as_uint(x), half = EVEN ? 0xfff + (u >> 13 & 1) : 0x1000;
  return (u & 0x7f800000) == 0x7f800000 ? u : (u + half) & ~0x1fffu;
}
static float saturated(float x) { return x > 0 ? min(x, 1.0f) : 0.0f; }

template <class To, class From>
void conversion(Instructions& known, const std::string& types) {
  known["cvt." + types] = pure<convert<To, From>>;
  if constexpr (std::is_floating_point_v<From>) {
    known["cvt.rni." + types] = pure<rounded<To, From, std::nearbyint>>;
    known["cvt.rzi." + types] = pure<rounded<To, From, std::trunc>>;
    known["cvt.rmi." + types] = pure<rounded<To, From, std::floor>>;
    known["cvt.rpi." + types] = pure<rounded<To, From, std::ceil>>;
  }
}
template <class To>
void conversions_to(Instructions& known, const std::string& to) {
  conversion<To, int8_t>(known, to + ".s8");
  conversion<To, uint8_t>(known, to + ".u8");
  conversion<To, int16_t>(known, to + ".s16");
  conversion<To, uint16_t>(known, to + ".u16");
  conversion<To, int32_t>(known, to + ".s32");
  conversion<To, uint32_t>(known, to + ".u32");
  conversion<To, int64_t>(known, to + ".s64");
  conversion<To, uint64_t>(known, to + ".u64");
  conversion<To, float>(known, to + ".f32");
  conversion<To, double>(known, to + ".f64");
}

template <class T>
T same(T x) {
  return x;
}
// mov.b64 of a register and of what it is composed of, {low, ..., high}.
template <class Whole, class Part>
const Step* compose(const Step* s, Registers* r) {
  Part parts[sizeof(Whole) / sizeof(Part)];
  get_all(parts, r, s->x + 1);
  put(r, s->x[0], __builtin_bit_cast(Whole, parts));
  return s + 1;
}
template <class Whole, class Part>
const Step* decompose(const Step* s, Registers* r) {
  Part parts[sizeof(Whole) / sizeof(Part)];
  const Whole whole = get<Whole>(r, s->x[sizeof parts / sizeof(Part)]);
  memcpy(parts, &whole, sizeof parts);
  put_all(r, s->x, parts);
  return s + 1;
}

void conversions(Instructions& known) {
  conversions_to<int8_t>(known, "s8");
  conversions_to<uint8_t>(known, "u8");
  conversions_to<int16_t>(known, "s16");
  conversions_to<uint16_t>(known, "u16");
  conversions_to<int32_t>(known, "s32");
  conversions_to<uint32_t>(known, "u32");
  conversions_to<int64_t>(known, "s64");
  conversions_to<uint64_t>(known, "u64");
  conversions_to<float>(known, "f32");
  conversions_to<double>(known, "f64");
  known["cvt.bf16.f32"] = pure<to_bf16>;
  known["cvt.f16.f32"] = pure<to_f16>;
  known["cvt.bf16x2.f32"] = pure<to_pair<bf16>>;
  known["cvt.f16x2.f32"] = pure<to_pair<f16>>;
  known["cvt.f32.bf16"] = pure<from_bf16>;
  known["cvt.f32.f16"] = pure<from_f16>;
  known["cvt.tf32.f32"] = pure<rounded_to_tf32<true>>;
  known["cvt.rna.tf32.f32"] = pure<rounded_to_tf32<false>>;
  known["mul.bf16x2"] = pure<multiply_pairs<bf16>>;
  known["cvt.sat.f32.f32"] = pure<saturated>;

  known["mov.pred"] = pure<same<bool>>;
  for (const char* type : {"mov.b16", "mov.u16", "mov.s16"}) known[type] = pure<same<uint16_t>>;
  for (const char* type : {"mov.b32", "mov.u32", "mov.s32", "mov.f32"}) known[type] = pure<same<uint32_t>>;
  for (const char* type : {"mov.b64", "mov.u64", "mov.s64", "mov.f64"}) known[type] = pure<same<uint64_t>>;
  known["mov.b32.of2"] = compose<uint32_t, uint16_t>;
  known["mov.b64.of2"] = compose<uint64_t, uint32_t>;
  known["mov.b64.of4"] = compose<uint64_t, uint16_t>;
  known["mov.b32.into2"] = decompose<uint32_t, uint16_t>;
  known["mov.b64.into2"] = decompose<uint64_t, uint32_t>;
  known["mov.b64.into4"] = decompose<uint64_t, uint16_t>;

  for (const char* space : {"global", "param", "local"})
    for (const char* to : {"cvta.", "cvta.to."}) known[std::string(to) + space + ".u64"] = pure<same<uint64_t>>;
  known["cvta.shared.u64"] = pure<shared_to_generic>;
  known["cvta.to.shared.u64"] = pure<generic_to_shared>;
}
}  // namespace emulator
