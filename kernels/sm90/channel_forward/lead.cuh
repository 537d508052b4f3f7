// Segments of a sequence, walked at once by sm90/channel_forward.cu with CUT. A segment's walk begins from zero, with
// the chunks of its lead (sm90/channel_leads.cu), of which it keeps no outputs. Over these it also walks what they do
// to a state, P, from the identity without V: where no number of P is above 2^-100, what entered them is forgotten.
// Where one is, or the lead has no end, the call is declined, and what was computed is written over by the kernels that
// are launched after this one for that.
//
// Numbers: P is rounded to DTYPE after every chunk.
#pragma once
#include "sm90/channel_forward/walk.cuh"

// How sequences are cut, in chunks: the first segment, and all others but for the last one, which may be shorter.
struct Segments {
  int count, first, length;
};

// The longest lead, or -1 if one has no end, by every warp.
PRIM int longest_lead(const int* leads, int count) {
  int longest = 0;
  bool endless = false;
  for (int i = opaque(threadIdx.x) % 32; i < count; i += 32) {
    longest = max(longest, leads[i]);
    endless |= leads[i] < 0;
  }
  if (endless) longest = 1 << 30;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) longest = max(longest, __shfl_xor_sync(~0u, longest, distance));
  return uniform(longest == 1 << 30 ? -1 : longest);
}

// So many chunks later both rings are where they were.
constexpr int RINGS = 12;
static_assert(RINGS % (2 * KEY_STAGES) == 0 && RINGS % (2 * STAGES) == 0, "from phase to phase of all barriers");

// Like find_work; `leads` are those of all segments but the first ones.
PRIM Work find_work(int T, int H, int HV, const Segments& cut, const int* leads, int longest, const Shared& s) {
  Work w;
  const int hv = blockIdx.x % HV, part = blockIdx.x / HV, segment = uniform(part % cut.count);
  w.hv = uniform(hv), w.n = w.batch = uniform(part / cut.count), w.h = uniform(hv / (HV / H)), w.HV = HV;
  w.begins = segment == 0, w.ends = segment == cut.count - 1;
  if (!w.begins) w.lead = uniform(leads[(w.batch * (cut.count - 1) + segment - 1) * HV + w.hv]);
  const int chunk = w.begins ? 0 : cut.first + (segment - 1) * cut.length - w.lead;
  w.start = chunk * CHUNK;
  const int end = w.ends ? T : (cut.first + segment * cut.length) * CHUNK;
  w.sequence = {(int64_t)w.batch * T + w.start, end - w.start, 0};
  const int chunks = (end - w.start + CHUNK - 1) / CHUNK;
  // Others are through with their leads a chunk after the longest one. Then those that walk look; whoever is ahead of
  // them by all stages knows when it comes to `known`, where rings are as at the beginning.
  w.looks = longest + 1;
  const int known = (w.looks + STAGES + RINGS) / RINGS * RINGS;
  w.chunks = uniform(chunks > known + STAGES ? known : chunks), w.later = uniform(chunks - w.chunks);
  return w;
}

// The same chunks in two parts for every role, of which it leaves the second one out if the call is declined. A part
// begins with a state in units of 1, and gates sum from there.
template <class Role>
PRIM void in_parts(const Shared& s, Work work, const Role& role) {
  for (;;) {
    role(work);
    if (work.later == 0 || uniform(*s.declined) != 0) return;
    work.start += work.chunks * CHUNK;
    work.sequence.first += work.chunks * CHUNK, work.sequence.tokens -= work.chunks * CHUNK;
    work.chunks = work.later, work.lead = work.later = 0, work.looks = -1;
  }
}

// 2^-101 in bfloat16: P is in units of less than 2.
constexpr uint32_t FORGOTTEN = (127 - 101) << 7;

struct LeadWalker {
  const Walker& walker;
  const Shared& s;
  const Work& work;
  const Part& part;

  // P^T, of which a warpgroup has 64 columns of P as S has value channels, waits in global memory: beside S there are
  // no registers for it. A thread's operands of step i.
  PRIM uint4& kept(int i) const { return work.p[i * 128 * MATH + threadIdx.x]; }
  template <int STEPS>
  PRIM void load_p(uint32_t (&a)[STEPS][4], int first) const {
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
      const uint4 x = kept(first + i);
      a[i][0] = x.x, a[i][1] = x.y, a[i][2] = x.z, a[i][3] = x.w;
    }
  }
  template <int TILES>
  PRIM void keep_p(const float (&d)[TILES][4], int first) const {
    uint32_t a[TILES / 2][4];
    round_sums<DTYPE>(a, d);
#pragma unroll
    for (int i = 0; i < TILES / 2; i++) kept(first + i) = make_uint4(a[i][0], a[i][1], a[i][2], a[i][3]);
  }

  // Whether what entered the lead is forgotten, as far as a warp knows.
  PRIM bool walk(Place& place) const {
    {
      float identity[K_TILES][4];
      clear(identity);
      add_identity(identity, 1.0f, part.column + part.warp() * 16, part.lane());
      keep_p(identity, 0);
    }
    for (int c = 0; c < work.lead; c++, place.advance()) {
      const int stage = place.stage.stage;
      const Stage at(s, place.key.stage, stage);
      mbarrier_wait(s.factors_full + stage, place.stage.parity);
      mbarrier_wait(s.core_full + stage, place.stage.parity);
      step_of_p(at);
      step_of_state(at, c);
      walker.say(s.keys_free + place.key.stage);
      walker.say(s.stage_free + stage);
    }
    return largest_bits() <= FORGOTTEN;
  }
  // The largest of a warp's numbers of P without their signs, as bits, of which NaN has the most.
  PRIM uint32_t largest_bits() const {
    uint32_t P[K_STEPS][4], largest = 0;
    load_p(P, 0);
#pragma unroll
    for (int i = 0; i < K_STEPS; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) largest = max(largest, max(P[i][j] & 0x7fff, P[i][j] >> 16 & 0x7fff));
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
      largest = max(largest, __shfl_xor_sync(~0u, largest, distance));
    return largest;
  }

  PRIM void step_of_p(const Stage& at) const {
    float R[8][4];
    uint32_t N[4][4];
    {
      uint32_t P[K_STEPS][4];
      load_p(P, 0);
      walker.read(R, P, at);
      wgmma_wait<0>();
      pin(R);
      pin(P);
    }
    walker.correct(R, at);
    round_columns<DTYPE>(N, R, at.beta, part.lane());
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sums[8][4];
      {
        uint32_t P[K_STEPS / 2][4];
        load_p(P, half * K_STEPS / 2);
        widen(sums, P);
      }
      scale_columns(sums, at.carried + half * BOX, part.lane());
      walker.write(sums, N, at.writes + half * TILE);
      keep_p(sums, half * K_STEPS / 2);
      __syncwarp();  // it is on its way: nothing of what follows takes registers before
    }
  }
  static PRIM void widen(float (&d)[8][4], const uint32_t (&a)[4][4]) {
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float2 x = unpack2<DTYPE>(a[j / 2][j % 2 * 2 + h]);
        d[j][2 * h] = x.x, d[j][2 * h + 1] = x.y;
      }
  }

  PRIM void step_of_state(const Stage& at, int c) const {
    float R[8][4];
    uint32_t state[K_STEPS][4], N[4][4];
    round_sums<DTYPE>(state, walker.S);
    walker.read_state(R, state, at);
    mbarrier_wait(s.values_full + part.warpgroup, c % 2);
    walker.add_values(R);
    named_barrier(MATH_BARRIER + part.warpgroup, 128);  // V is read
    if (part.thread == 0) walker.ask_values(c + 1);
    walker.correct(R, at);
    round_columns<DTYPE>(N, R, at.beta, part.lane());
    walker.write(walker.S, N, at.writes);
  }
};
