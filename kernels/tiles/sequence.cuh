// Which tokens a block works on: sequences of a batch or of cu_seqlens, and chunk slots.
//
// Chunk i of sequence n has slot cu_seqlens[n] / CHUNK + n + i, or n * ceil(T / CHUNK) + i in a batch;
// a slot that no chunk has is left alone. Values of cu_seqlens are clamped, so that wrong ones give
// wrong numbers but never an address outside the arrays.
#pragma once
#include "primitives/primitives.cuh"

struct Sequence {
  int64_t first;  // row of its first token among the B * T rows
  int tokens;
  int64_t slot;  // of its first chunk
};

PRIM int clamp_token(int64_t t, int low, int T) { return (int)min(max(t, (int64_t)low), (int64_t)T); }

// The n-th sequence.
template <int CHUNK_TOKENS>
PRIM Sequence find_sequence(const int64_t* cu_seqlens, int n, int T) {
#if VARLEN
  int start = clamp_token(cu_seqlens[n], 0, T), stop = clamp_token(cu_seqlens[n + 1], start, T);
  return {start, stop - start, start / CHUNK_TOKENS + n};
#else
  (void)cu_seqlens;
  return {(int64_t)n * T, T, (int64_t)n * ((T + CHUNK_TOKENS - 1) / CHUNK_TOKENS)};
#endif
}

// Where the states after every so many tokens of the n-th sequence begin; it has none of what is left over, so that no
// two sequences meet.
PRIM int64_t first_checkpoint(const Sequence& s, int n, int T, int every) {
#if VARLEN
  (void)n, (void)T;
  return s.first / every;
#else
  (void)s;
  return (int64_t)n * (T / every);
#endif
}

// Whether there is a place between its last one and the first one of the sequence after it: at most one, to be zero.
PRIM bool has_gap(const Sequence& s, int every) {
  return VARLEN && (s.first + s.tokens) / every - s.first / every > s.tokens / every;
}

// A sequence cut into segments: runs of whole chunks, of one length but for the first and the last one, which have
// first_percent and last_percent of it; the ones at the end may have less, or nothing.
struct Cut {
  int segments, first_percent = 100, last_percent = 100;
};

// The segment-th of the n-th sequence.
template <int CHUNK_TOKENS>
PRIM Sequence find_segment(const int64_t* cu_seqlens, int n, const Cut& cut, int segment, int T) {
  Sequence s = find_sequence<CHUNK_TOKENS>(cu_seqlens, n, T);
  if (cut.segments > 1) {
    const int between = cut.segments - 2, whole = 100 * between + cut.first_percent + cut.last_percent;
    const int chunks = (s.tokens + CHUNK_TOKENS - 1) / CHUNK_TOKENS;
    const int length = (int)((100 * (int64_t)chunks + whole - 1) / whole);
    const int last = (int)(cut.last_percent * (int64_t)length / 100);
    const int first = max(chunks - between * length - last, 0);
    const int end = segment == cut.segments - 1 ? chunks : min(first + segment * length, chunks);
    const int skipped = segment == 0 ? 0 : min(first + (segment - 1) * length, chunks);
    const int start = min(skipped * CHUNK_TOKENS, s.tokens), stop = min(end * CHUNK_TOKENS, s.tokens);
    s = {s.first + start, stop - start, s.slot + skipped};
  }
  return s;
}

struct Chunk {
  int64_t first;  // row of its first token
  int tokens;     // at most CHUNK; 0 or less: no chunk has this slot
};

// The sequence that a slot belongs to, among N.
template <int CHUNK_TOKENS>
PRIM int find_owner(const int64_t* cu_seqlens, int64_t slot, int N, int T) {
#if VARLEN
  int low = 0, high = N - 1;  // the last sequence whose first slot is not beyond `slot`
  while (low < high) {
    int middle = (low + high + 1) / 2;
    bool beyond = clamp_token(cu_seqlens[middle], 0, T) / CHUNK_TOKENS + middle > slot;
    if (beyond)
      high = middle - 1;
    else
      low = middle;
  }
  return low;
#else
  (void)cu_seqlens, (void)N;
  return (int)(slot / ((T + CHUNK_TOKENS - 1) / CHUNK_TOKENS));
#endif
}

// The chunk with the given slot, among N sequences.
template <int CHUNK_TOKENS>
PRIM Chunk find_chunk(const int64_t* cu_seqlens, int64_t slot, int N, int T) {
  const int n = find_owner<CHUNK_TOKENS>(cu_seqlens, slot, N, T);
  Sequence s = find_sequence<CHUNK_TOKENS>(cu_seqlens, n, T);
  int64_t offset = (slot - s.slot) * CHUNK_TOKENS;
  int64_t rest = s.tokens - offset;
  return {s.first + offset, (int)min(rest, (int64_t)CHUNK_TOKENS)};
}
