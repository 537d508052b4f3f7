// Segments that begin from zero, since gates have what came before forgotten. Of each after the first, in the order of
// the walk, `starts` of sm90/starts.cu says how many chunks before it a walk may begin, or -1 where it has to join what
// transfers leave. Transfers that no segment joins are not made.
//
// Segments of a sequence join as ever unless all its value heads have forgotten what comes before the second one: one
// that has not takes its transfers' time, and what others walk twice would come on top. Nothing that comes after the
// beginning of the second segment decides that.
#pragma once
#include "sm90/training/shared.cuh"

struct Starts {
  const int* chunks;  // (segments - 1, HV) of the block's sequence
  bool given;         // else all segments join

  PRIM Starts(const int* starts, const Work& w, int segments)
      : chunks(starts + w.n * (segments - 1) * w.HV), given(starts != nullptr) {
    int least = 0;
    if (given)
      for (int hv = threadIdx.x % 32; hv < w.HV; hv += 32) least = min(least, chunks[hv]);
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) least = min(least, __shfl_xor_sync(~0u, least, bits));
    given = given && uniform(least) >= 0;
  }

  // How many chunks before the step-th segment it begins, or -1.
  PRIM int before(const Work& w, int step) const {
    return given && step > 0 ? uniform(chunks[(step - 1) * w.HV + w.hv]) : -1;
  }

  // Whether a segment after that of a transfer joins it.
  PRIM bool join(const Work& w, int segments) const {
    for (int step = w.step + 1; step < segments; step++)
      if (before(w, step) < 0) return true;
    return false;
  }
};

// Has the walk of a segment begin before it, where it may.
PRIM void begin_early(Work& w, const Starts& starts, const int64_t* cu_seqlens, int T) {
  const int early = starts.before(w, w.step);
  if (early < 0) return;
  const Sequence whole = find_sequence<CHUNK>(cu_seqlens, w.n, T);
  const int64_t slot = w.sequence.slot - (BACKWARD ? 0 : early);
  const int first = (int)(slot - whole.slot) * CHUNK;
  w.joined = 0, w.early = early, w.chunks += early;
  w.sequence = {whole.first + first, min(whole.tokens - first, w.chunks * CHUNK), slot};
  w.start = (int)(w.sequence.first - (int64_t)w.batch * T);
}
