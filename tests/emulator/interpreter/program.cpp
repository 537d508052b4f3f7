// Programs: read from what ptx.py writes, and run by every thread.
#include "addresses.h"

#include <alloca.h>

#include <deque>
#include <set>
#include <sstream>

namespace emulator {

struct Program {
  int units = 0, local_bytes = 0;  // of a thread's registers, and of its local arrays
  std::vector<Step> steps;
  std::deque<std::vector<uint16_t>> operands;
  // What registers hold at the start: constants, and what differs by thread and launch.
  std::vector<std::pair<int, uint64_t>> constants;
  std::vector<std::pair<int, int>> parameters, locals;  // addresses: of an argument, of a byte of the local arrays
  std::vector<std::pair<int, std::string>> special;
};

static uint64_t special_register(const std::string& name) {
  if (name == "%laneid") return current->lane;
  if (name == "%cluster_ctarank") return current->cluster_rank;
  if (name == "dynamic_shared") return shared_start() ? generic_to_shared((uint64_t)shared_start()) : 0;
  const std::string of = name.substr(0, name.size() - 2);
  const uint3& x = of == "%tid"     ? current->thread
                   : of == "%ctaid" ? current->block
                   : of == "%ntid"  ? current->block_size
                                    : current->grid_size;
  return name.back() == 'x' ? x.x : name.back() == 'y' ? x.y : x.z;
}

static const Instructions& instructions() {
  static const Instructions all = [] {
    Instructions known;
    arithmetic(known);
    conversions(known);
    movement(known);
    hopper(known);
    return known;
  }();
  return all;
}

static const char* kept_name(const std::string& name) {  // programs and messages point to it
  static std::set<std::string> names;
  return names.insert(name).first->c_str();
}

static std::string unknown;

// A line is one of "units n", "local bytes", "constant at bits", "parameter at number", "array at byte",
// "special at name" and "step file line jump operands... : instruction".
static bool read(Program& p, const char* text) {
  std::istringstream lines(text);
  std::string line, word;
  while (std::getline(lines, line)) {
    std::istringstream words(line);
    words >> word;
    int at = 0, number = 0;
    if (word == "step") {
      Step step{};
      words >> word >> step.line >> step.jump;
      step.file = kept_name(word);
      auto& x = p.operands.emplace_back();
      while (words >> word && word != ":") x.push_back((uint16_t)std::stoi(word));
      step.x = x.data();
      std::getline(words >> std::ws, word);
      const auto found = instructions().find(word);
      if (found == instructions().end()) {
        unknown = word;
        return false;
      }
      step.run = found->second;
      p.steps.push_back(step);
    } else if (word == "units") {
      words >> p.units;
    } else if (word == "local") {
      words >> p.local_bytes;
    } else if (word == "constant") {
      uint64_t bits;
      words >> at >> bits;
      p.constants.push_back({at, bits});
    } else if (word == "special") {
      words >> at >> word;
      p.special.push_back({at, word});
    } else {  // addresses
      words >> at >> number;
      (word == "parameter" ? p.parameters : p.locals).push_back({at, number});
    }
  }
  return true;
}
}  // namespace emulator

using namespace emulator;

extern "C" {
// Returns null if an instruction is not known, whose name is then in emulator_unknown().
const void* emulator_program(const char* text) {
  auto* program = new Program;  // for as long as the process lives, as compiled kernels are
  return read(*program, text) ? program : nullptr;
}

const char* emulator_unknown() { return unknown.c_str(); }

// The kernel of all programs: the first of its arguments is one.
void emulator_interpret(void** arguments) {
  const auto& p = *(const Program*)*arguments++;
  shared_all("all of it", Site{"", 0});
  const size_t bytes = (p.units + 3) / 4 * 16;
  auto* memory = (uint8_t*)(((uintptr_t)alloca(bytes + p.local_bytes + 16) + 15) & ~15ull);
  auto* r = (Registers*)memory;
  memset(memory, 0, bytes);
  for (auto& [at, bits] : p.constants) put(r, at, bits);
  for (auto& [at, number] : p.parameters) put(r, at, (uint64_t)arguments[number]);
  for (auto& [at, byte] : p.locals) put(r, at, (uint64_t)(memory + bytes + byte));
  for (auto& [at, name] : p.special) put(r, at, special_register(name));
  for (const Step* s = p.steps.data(); s;) s = s->run(s, r);
}
}
