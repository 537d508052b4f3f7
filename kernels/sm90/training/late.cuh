// Segments that start from nothing, since gates have what came before forgotten. Of each after the first, in the order
// of the walk, `starts` of sm90/starts.cu says how many chunks before it a walk may begin from zero, or -1 where it has
// to join what transfers leave. Of heads that join nothing no transfers are made.
#pragma once
#include "sm90/training/shared.cuh"

// Null: all segments join.
PRIM int start_of(const int* starts, const Work& w, int step, int segments) {
  return starts == nullptr ? -1 : uniform(starts[(w.n * (segments - 1) + step - 1) * w.HV + w.hv]);
}

// Whether a segment after that of a transfer joins it.
PRIM bool is_joined(const Work& w, const int* starts, int segments) {
  for (int step = w.step + 1; step < segments; step++)
    if (start_of(starts, w, step, segments) < 0) return true;
  return starts == nullptr;
}

// Has the walk of a segment begin before it, where it may.
PRIM void begin_early(Work& w, const int* starts, const int64_t* cu_seqlens, int T, int segments) {
  const int early = w.step == 0 ? -1 : start_of(starts, w, w.step, segments);
  if (early < 0) return;
  const Sequence whole = find_sequence<CHUNK>(cu_seqlens, w.n, T);
  const int64_t slot = w.sequence.slot - (BACKWARD ? 0 : early);
  const int first = (int)(slot - whole.slot) * CHUNK;
  w.joined = 0, w.early = early, w.chunks += early;
  w.sequence = {whole.first + first, min(whole.tokens - first, w.chunks * CHUNK), slot};
  w.start = (int)(w.sequence.first - (int64_t)w.batch * T);
}
