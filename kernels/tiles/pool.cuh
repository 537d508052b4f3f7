// Slots of a pool of states: every sequence reads one and writes one. A slot is numbered from 0; without indices it is
// the sequence's own number, and without output_state_indices the one that was read.
#pragma once
#include "primitives/primitives.cuh"

// Kernels whose states may lie in a pool; POOL_DTYPE is what they are stored in.
#ifndef ON_POOL
#define ON_POOL 0
#define POOL_DTYPE float
#endif

struct Slots {
  const int64_t *state_indices, *output_state_indices;
  const bool* fresh;  // sequences that start from zero
  int64_t stride;     // elements from one slot to the next
  int count;

  // Where the state of sequence n begins that it starts from, and the one that it leaves; below zero: nowhere. An index
  // that names no slot is as good as a negative one.
  PRIM int64_t read(int64_t n) const { return fresh != nullptr && fresh[n] ? -1 : at(state_indices, n); }
  PRIM int64_t written(int64_t n) const {
    return at(output_state_indices == nullptr ? state_indices : output_state_indices, n);
  }
  PRIM int64_t at(const int64_t* indices, int64_t n) const {
    const int64_t index = indices == nullptr ? n : indices[n];
    return index >= 0 && index < count ? index * stride : -1;
  }
};
