// The shadow of memory: what was done to every two bytes. Most lines of 16 bytes are read and written as one, and then
// have one history.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <vector>

namespace emulator {

// A moment of a thread or agent: its number (unique over the blocks of a launch) << 32 | its clock.
typedef uint64_t Moment;

// A place in kernel source: a program counter of the module, or FROM_SITE | index of a known Site.
typedef uint32_t Place;

constexpr int READS = 3;
struct Cell {  // the last write, up to three reads since that no later read covers
  Moment write, reads[READS];
  Place write_place, read_places[READS];
  bool initialised, copy_in_flight;

  // Whether the thread has done the same at this moment before.
  bool knows(Moment when, bool by_write) const {
    if (by_write) return write == when;
    return std::find(reads, reads + READS, when) != reads + READS;
  }
  bool has_moments_of(const Cell& other) const {
    Moment difference = write ^ other.write;
    for (int i = 0; i < READS; i++) difference |= reads[i] ^ other.reads[i];
    return difference == 0;
  }
};

class Shadow {
 public:
  void grow(size_t bytes) { lines.resize((bytes + LINE - 1) / LINE); }

  void clear(size_t start, size_t bytes, bool initialised) {
    for (size_t i = start / LINE; i * LINE < start + bytes; i++) {
      lines[i] = Line();
      lines[i].whole.initialised = initialised;
    }
  }

  // body(cell) for all that bytes [from, to) have; memory ends at `end`.
  template <class F>
  void each_cell(size_t from, size_t to, size_t end, F body) {
    for (size_t i = from / LINE; i * LINE < to; i++) {
      Line& line = lines[i];
      const size_t start = i * LINE, low = std::max(from, start), high = std::min(to, start + LINE);
      const bool whole = low == start && (high == start + LINE || high == end);
      if (!line.parts) {
        if (whole) {
          body(line.whole);
          continue;
        }
        line.parts.reset(new Parts);
        line.parts->fill(line.whole);
      }
      for (size_t part = (low - start) / GRANULE; part <= (high - 1 - start) / GRANULE; part++)
        body((*line.parts)[part]);
      if (whole) unite(line);
    }
  }

 private:
  static constexpr size_t GRANULE = 2, LINE = 16;
  typedef std::array<Cell, LINE / GRANULE> Parts;
  struct Line {
    Cell whole = {};
    std::unique_ptr<Parts> parts;  // where they differ
  };
  std::vector<Line> lines;

  static void unite(Line& line) {
    const Parts& parts = *line.parts;
    for (const Cell& c : parts) {
      if (!c.has_moments_of(parts[0]) || c.initialised != parts[0].initialised ||
          c.copy_in_flight != parts[0].copy_in_flight)
        return;
    }
    line.whole = parts[0];
    line.parts.reset();
  }
};
}  // namespace emulator
