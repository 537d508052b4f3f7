// Addresses as PTX has them. Shared ones count from the window's start, as in the descriptors of wgmma.
#pragma once
#include "program.h"

namespace emulator {
inline uint64_t shared_to_generic(uint64_t address) { return (uint64_t)shared_window() + (uint32_t)address; }
inline uint64_t generic_to_shared(uint64_t address) { return address - (uint64_t)shared_window(); }
// Those of other blocks of the cluster too: from this block's window, so that its own addresses stay as they are.
inline uint32_t map_shared(uint32_t address, int rank, Site site) {
  return (uint32_t)generic_to_shared((uint64_t)in_block((void*)shared_to_generic(address), rank, site));
}

// An operand [register + offset] is two: what is added is a constant.
inline uint8_t* generic_pointer(const Registers* r, const uint16_t* x) {
  return (uint8_t*)(get<uint64_t>(r, x[0]) + get<uint64_t>(r, x[1]));
}
inline uint8_t* shared_pointer(const Registers* r, const uint16_t* x) {
  return (uint8_t*)shared_to_generic(get<uint32_t>(r, x[0]) + get<uint32_t>(r, x[1]));
}
inline uint8_t* cluster_pointer(const Registers* r, const uint16_t* x) {
  return shared_window() + (int32_t)(get<uint32_t>(r, x[0]) + get<uint32_t>(r, x[1]));
}
}  // namespace emulator
