// Which sequences walks of segments that start late have, and what a block of them walks; see sm90/starts.cu.
#pragma once
#include "sm90/forward/shared.cuh"

// Bits that any lane of a warp has.
PRIM int any_bits(int bits) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) bits |= __shfl_xor_sync(~0u, bits, distance);
  return bits;
}

// How many chunks before each segment but the first, of `counted`, a walk may start from zero, or -1: (N, counted, HV).
// 0: the segment begins with the sequence, from what is known.
struct Starts {
  const int* chunks;
  int counted, HV;

  PRIM int of(int n, int segment, int hv) const { return chunks[((int64_t)n * counted + segment - 1) * HV + hv]; }
  // Whether all heads of a sequence have a start at its second segment.
  PRIM bool suit(int n) const {
    int none = 0;
    for (int first = 0; first < HV; first += 32) none |= of(n, 1, min(first + (int)threadIdx.x % 32, HV - 1)) < 0;
    return any_bits(none) == 0;
  }
};

// Those that a launch is given, if any.
#if STARTS
#define GIVEN_STARTS \
  Starts { starts, counted, HV }
#else
#define GIVEN_STARTS \
  Starts {}
#endif

// Makes the segment at a place what a late walk has of it: chunks before it, how many of which are returned, and the
// segments after it that have no start. -1: it has none itself, and is another block's.
PRIM int start_late(Sequence& s, Place& at, const Starts& starts, const int64_t* cu_seqlens, const Cut& cut, int hv,
                    int T) {
  const int silent = at.step > 0 ? starts.of(at.n, at.step, hv) : 0;
  if (silent < 0) return -1;
  while (at.last < cut.segments - 1 && starts.of(at.n, at.last + 1, hv) < 0) at.last++;
  const Sequence end = find_segment<CHUNK>(cu_seqlens, at.n, cut, at.last, T);
  s.tokens = (int)(end.first - s.first) + end.tokens + silent * CHUNK;
  s.first -= silent * CHUNK, s.slot -= silent;
  return silent;
}
