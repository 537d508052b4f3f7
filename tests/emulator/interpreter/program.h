// Programs that were made from PTX (ptx.py), and how an instruction of theirs is written: as a function of values, or
// as one of a step and the thread's registers.
#pragma once
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "primitives/primitives.cuh"

namespace emulator {

// Registers lie in units of four bytes. One of fewer bytes is extended to four, by the sign of what is put there.
typedef uint32_t Registers;

struct Step;
typedef const Step* (*Instruction)(const Step*, Registers*);  // returns what comes next, or null at the end
struct Step {
  Instruction run;
  const char* file;
  int line, jump;     // to the step so many after this one
  const uint16_t* x;  // where in the registers its operands are, constants among them
  Site site() const { return {file, line}; }
};
typedef std::map<std::string, Instruction> Instructions;

template <class T>
T get(const Registers* r, int at) {
  T x;
  memcpy(&x, r + at, sizeof x);
  return x;
}
template <>
inline bool get<bool>(const Registers* r, int at) {
  return r[at] != 0;
}
template <class T>
void put(Registers* r, int at, T x) {
  if constexpr (sizeof(T) < 4) {
    r[at] = (uint32_t)x;
  } else {
    memcpy(r + at, &x, sizeof x);
  }
}
template <class T, int N>
void get_all(T (&values)[N], const Registers* r, const uint16_t* at) {
  for (int i = 0; i < N; i++) values[i] = get<T>(r, at[i]);
}
template <class T, int N>
void put_all(Registers* r, const uint16_t* at, const T (&values)[N]) {
  for (int i = 0; i < N; i++) put<T>(r, at[i], values[i]);
}

// An instruction that is a function of its operands: the first is where the result goes.
template <auto F, class R, class... A, size_t... I>
void apply(R (*)(A...), const Step* s, Registers* r, std::index_sequence<I...>) {
  put<R>(r, s->x[0], F(get<A>(r, s->x[1 + I])...));
}
template <class R, class... A>
constexpr auto operands_of(R (*)(A...)) {
  return std::index_sequence_for<A...>{};
}
template <auto F>
const Step* pure(const Step* s, Registers* r) {
  apply<F>(F, s, r, operands_of(F));
  return s + 1;
}

void arithmetic(Instructions&);
void conversions(Instructions&);
void movement(Instructions&);
void hopper(Instructions&);
}  // namespace emulator
