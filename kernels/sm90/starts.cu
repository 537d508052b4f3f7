// Where walks of segments start from nothing. Of a state, chunks with sums of gates G_C and tokens t leave no more than
//
//   e^(sum of G_C) prod_t max(1, |1 - b_t k_t k_t|)
//
// since all that they do to it is to decay it and, token by token, to take the part along a key away. Where the m
// chunks that a walk meets before a segment leave less than 2^-100 of any state (2^-126 where no token makes it
// longer), a walk may start m chunks earlier, from zero, and needs to know nothing of what comes before. A NaN that is
// so forgotten is forgotten, too.
//
// For every sequence, value head and segment after the first, in the order of the walk: m, or -1 where there is no such
// m up to `most` or the segment has no token. m depends on tokens before the segment alone.
//
// Where m of the second segment decides whether a sequence is cut so or by `other`, it is -1, too, where the other's
// second segment begins before this one; and no chunk counts as leaving less than LEAST: a few resets say nothing of
// later segments. In a sequence whose first segment has no token the second one begins with the sequence itself, 0
// chunks early, and the third one decides, if it has tokens.
//
// A block looks at one segment and up to HEADS value heads of one key head: a warp finds m of a value head by its
// gates, then all look at the keys of as many chunks as any of them needs.
//
// Numbers: products of floats, which are 0 or compare as less than 2^-126 alike.
//
// Arrays: starts (N, segments - 1, HV). RECORDS: what gates do is known from sm90/gates.cu, and beta, too; else from
// sm90/factors.cu.
//
// Macros: DTYPE, HEAD_K (up to 128, a multiple of 8), CHUNK (64), HAS_GATE (1), VARLEN, BACKWARD, RECORDS, WARPS (at
// least HEADS). Grid: N * (segments - 1) * H * ceil(HV / H / HEADS) blocks of 32 WARPS threads. Shared memory: m per
// value head; its largest factor per warp.
#include "tiles/sequence.cuh"
#if RECORDS
#include "sm90/tokens.cuh"
#else
#include "sm90/decays.cuh"
#endif

// What gates have to leave less than, and the binary orders that keys may bring back.
constexpr float LOST = 1.17549435e-38f, REGAINED = 26.0f, LEAST = 2.3283064e-10f;  // 2^-126, 2^-32
constexpr int GROUP = 8;  // value heads of a block, and lanes of a token
constexpr int PIECES = HEAD_K / 8, LOADS = (PIECES + GROUP - 1) / GROUP;  // of 16 bytes
constexpr int AT_ONCE = 4, TOKENS = 32 * WARPS / GROUP;  // tokens of a thread on their way; of a block at a time

// What is known of a chunk and value head.
struct Gates {
  const float* all;
  const float* beta;
  int HV;

  // What its gates leave of a state.
  PRIM float decay(int64_t slot, int hv) const {
#if RECORDS
    return ((const ChunkGates*)&all[(slot * HV + hv) * RECORD_WORDS + RECORD_GATES])->decay;
#else
    return decays_of(all, slot, hv, HV)[READS * CHUNK + CHUNK - 1];
#endif
  }
  // Of a token, which is the i-th of its chunk.
  PRIM float strength(int64_t slot, int i, int64_t token, int hv) const {
#if RECORDS
    return all[(slot * HV + hv) * RECORD_WORDS + i % 8 / 2 * 16 + i / 8 * 2 + i % 2];
#else
    return beta[token * HV + hv];
#endif
  }
};

// The keys of one head.
struct Keys {
  const DTYPE* all;
  int H, h;

  PRIM const uint4* row(int64_t token) const { return (const uint4*)(all + (token * H + h) * HEAD_K); }
};

// The chunks before a segment, as the walk meets them: the n-th before it for n from 0 on.
struct Before {
  Sequence sequence;
  int first, count;  // the chunk next to the segment, in its sequence; how many there are
  int tokens;        // of the segment

  PRIM int chunk(int n) const { return BACKWARD ? first + n : first - n; }
  PRIM int64_t slot(int n) const { return sequence.slot + chunk(n); }
};

// How many of them have gates that leave less than LOST, or 0, by a warp; none leaves less than `least`.
PRIM int chunks_to_forget(const Before& before, const Gates& gates, int hv, int most, float least, int lane) {
  constexpr int ROUNDS = 4;  // on their way at once
  float left = 1.0f;
  for (int start = 0; start < most; start += 32 * ROUNDS) {
    float decays[ROUNDS];
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
      const int n = start + 32 * i + lane;
      decays[i] = n < most ? gates.decay(before.slot(n), hv) : 1.0f;
    }
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
      float decay = decays[i] < least ? least : decays[i];  // NaN stays
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const float nearer = __shfl_sync(~0u, decay, max(lane - distance, 0));
        if (lane >= distance) decay *= nearer;
      }
      const int n = start + 32 * i + lane;
      int found = n < most && left * decay < LOST ? n + 1 : most + 1;
#pragma unroll
      for (int bits = 16; bits > 0; bits /= 2) found = min(found, __shfl_xor_sync(~0u, found, bits));
      if (found <= most) return found;
      left *= __shfl_sync(~0u, decay, 31);
    }
  }
  return 0;
}

// The largest |1 - b k k| of tokens of the last `m` of `chunks` chunks before a segment, or 1: of a thread's share, for
// the value head of its lane.
PRIM float largest_factor(const Before& before, const Gates& gates, const Keys& k, int chunks, int m, int hv) {
  const int lane = threadIdx.x % GROUP, from = BACKWARD ? before.first : before.first - chunks + 1;
  const int tokens = min(chunks * CHUNK, before.sequence.tokens - from * CHUNK);
  float largest = 1.0f;
  for (int start = threadIdx.x / GROUP; start < (tokens + TOKENS - 1) / TOKENS * TOKENS; start += AT_ONCE * TOKENS) {
    uint4 x[AT_ONCE][LOADS];
    float b[AT_ONCE];
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      const int t = start + j * TOKENS, c = t / CHUNK;
      const int64_t token = before.sequence.first + from * CHUNK + t;
      const uint4* row = k.row(token);
#pragma unroll
      for (int i = 0; i < LOADS; i++)
        x[j][i] = t < tokens && lane + i * GROUP < PIECES ? row[lane + i * GROUP] : make_uint4(0, 0, 0, 0);
      const bool counts = t < tokens && (BACKWARD ? c : chunks - 1 - c) < m;
      b[j] = counts ? gates.strength(before.sequence.slot + from + c, t % CHUNK, token, hv) : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < LOADS; i++) {
        const uint32_t pairs[4] = {x[j][i].x, x[j][i].y, x[j][i].z, x[j][i].w};
#pragma unroll
        for (int l = 0; l < 4; l++) {
          const float2 y = unpack2<DTYPE>(pairs[l]);
          sum += y.x * y.x + y.y * y.y;
        }
      }
#pragma unroll
      for (int bits = GROUP / 2; bits > 0; bits /= 2) sum += __shfl_xor_sync(~0u, sum, bits);
      largest = fmaxf(largest, fabsf(1.0f - b[j] * sum));
    }
  }
  return largest;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    segment_starts(const DTYPE* k, const float* gates_of_chunks, const float* beta, const int64_t* cu_seqlens,
                   int* starts, int T, int H, int HV, int segments, int first_percent, int last_percent,
                   int other_segments, int other_first_percent, int other_last_percent, int most) {
  const int groups = (HV / H + GROUP - 1) / GROUP, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int h = blockIdx.x / groups % H, part = blockIdx.x / (groups * H);
  const int n = part / (segments - 1), step = part % (segments - 1) + 1;
  const int first_head = h * (HV / H) + blockIdx.x % groups * GROUP;
  const int heads = min((h + 1) * (HV / H) - first_head, GROUP);
  DynSmem smem;
  int* found = smem.take<int>(GROUP, "chunks to forget");
  float* factors = smem.take<float>(WARPS * GROUP, "largest factors");
  smem.all_taken(SHARED_BYTES);

  auto look_before = [&](const Cut& cut, int step) {
    const Sequence sequence = find_sequence<CHUNK>(cu_seqlens, n, T);
    const Sequence segment = find_segment<CHUNK>(cu_seqlens, n, cut, BACKWARD ? cut.segments - 1 - step : step, T);
    const int start = (int)(segment.slot - sequence.slot), end = start + (segment.tokens + CHUNK - 1) / CHUNK;
    const int chunks = (sequence.tokens + CHUNK - 1) / CHUNK;
    return Before{sequence, BACKWARD ? end : start - 1, BACKWARD ? chunks - end : start, segment.tokens};
  };
  // Those before the first segment that has some.
  auto look_before_second = [&](const Cut& cut) {
    const Before second = look_before(cut, 1);
    return second.count > 0 || cut.segments == 2 ? second : look_before(cut, 2);
  };
  const Cut cut = {segments, first_percent, last_percent};
  const bool decides = step == 1 && other_segments > 0;
  Before before = look_before(cut, step);
  const bool begins = decides && before.count == 0 && before.tokens > 0;  // with the sequence
  if (begins) before = look_before_second(cut);
  const bool alone = begins && (before.count == 0 || before.tokens == 0);
  if (decides && other_segments > 1) {
    const Before sooner = look_before_second({other_segments, other_first_percent, other_last_percent});
    if (sooner.count > 0 && sooner.count < before.count) before.count = 0;
  }
  if (before.tokens == 0) before.count = 0;

  const Gates gates = {gates_of_chunks, beta, HV};
  if (warp < heads) {
    const int m =
        chunks_to_forget(before, gates, first_head + warp, min(before.count, most), decides ? LEAST : 0.0f, lane);
    if (lane == 0) found[warp] = m;
  }
  __syncthreads();
  int chunks = 0;
  for (int i = 0; i < heads; i++) chunks = max(chunks, found[i]);
  const int head = lane % GROUP, m = head < heads ? found[head] : 0;
  float largest = 1.0f;
  if (chunks > 0) {
    largest = largest_factor(before, gates, {k, H, h}, chunks, m, min(first_head + head, HV - 1));
#pragma unroll
    for (int bits = GROUP; bits < 32; bits *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, bits));
    if (lane < GROUP) factors[warp * GROUP + lane] = largest;
  }
  __syncthreads();
  if (warp >= heads) return;
  if (chunks > 0) {
    largest = 1.0f;
    for (int i = lane; i < WARPS; i += 32) largest = fmaxf(largest, factors[i * GROUP + warp]);
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, bits));
  }
  const int own = found[warp];
  const bool suits = alone || (own > 0 && largest <= exp2f(REGAINED / (float)(CHUNK * own)));
  if (lane == 0) starts[(int64_t)part * HV + first_head + warp] = !suits ? -1 : begins ? 0 : own;
}
