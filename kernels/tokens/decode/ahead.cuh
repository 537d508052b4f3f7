// The same slice of a state that a later block has, asked for while the block's own is on its way. Registers hold less
// than memory could bring meanwhile; what is in the L2 cache when its block asks comes sooner.
#pragma once
#include "tokens/decode/inputs.cuh"

// Of the head AHEAD states further on, if there is one and its slot is no padding; indices are looked at as its own
// block does. To construct it asks for the slot's number, together with the block's own.
struct Ahead {
  uint32_t hv = 0;
  int64_t slot = -1;

  PRIM Ahead(const int64_t* state_indices, int HV, uint32_t inverse) {
    const uint32_t number = blockIdx.x / SLICES + AHEAD;
    if (AHEAD == 0 || number >= gridDim.x / SLICES) return;
    const Head head(number, HV, inverse);
    hv = head.hv;
    slot = state_indices == nullptr ? head.n : asked(&state_indices[head.n]);
  }
  PRIM void fetch(const STATE_DTYPE* state, int pool_slots, int64_t pool_stride, uint32_t thread) const {
    constexpr int STRIDE = STATE_VK ? HEAD_K * HEAD_V : HEAD_V, ROWS = HEAD_K * HEAD_V / STRIDE;
    constexpr int OWN_PART = STRIDE / HEAD_V * CHANNELS, IN_LINE = 128 / sizeof(STATE_DTYPE);
    constexpr int LINES = (OWN_PART + IN_LINE - 1) / IN_LINE;
    if (AHEAD == 0 || slot < 0 || slot >= pool_slots) return;
    const uint32_t first = blockIdx.x % SLICES * OWN_PART;
    const STATE_DTYPE* whole = state + slot * pool_stride + (int64_t)hv * (HEAD_K * HEAD_V);
#pragma unroll
    for (uint32_t i = thread; i < ROWS * LINES; i += THREADS) {
      const uint32_t element = first + i % LINES * IN_LINE;
      if (SLICES * CHANNELS == HEAD_V || element < STRIDE) prefetch_line(whole + i / LINES * STRIDE + element);
    }
  }
};
