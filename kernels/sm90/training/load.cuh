// The loading warp of sm90/training.cu and sm90/backward_state.cu: tiles of each chunk by TMA, as soon as their stage
// is free, and beta and decays of its tokens.
#pragma once
#include "sm90/decays.cuh"
#include "sm90/training/shared.cuh"

struct Inputs {
  const TensorMap *q, *k, *core, *p, *rows, *writing;
  const float *beta, *decays;
};

// Of the chunk that comes next, asked for while one is copied: beta of two tokens per lane, and their decays of reads
// and writes or those of KP / 32 channels of the state.
typedef float NextBeta[2];
typedef float NextDecays[PER_TOKEN ? 4 : KP / 32];

// Those of the walk's i-th chunk; beta is zero past the end.
PRIM void ask(NextBeta& b, NextDecays& decays, const Inputs& in, const Work& work, int i, int lane) {
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const int t = work.chunk(i) * CHUNK + j * 32 + lane;
    const bool inside = i < work.chunks && t < work.sequence.tokens;
    b[j] = inside ? in.beta[(work.sequence.first + t) * work.HV + work.hv] : 0.0f;
    if (!PER_TOKEN || i >= work.chunks) continue;
    const float* rows = decays_of(in.decays, work.sequence.slot + work.chunk(i), work.hv, work.HV);
    decays[j] = rows[READS * CHUNK + j * 32 + lane], decays[2 + j] = rows[WRITES * CHUNK + j * 32 + lane];
  }
  if constexpr (PER_CHANNEL) {
    if (i >= work.chunks) return;
    const float* row = in.decays + ((work.sequence.slot + work.chunk(i)) * work.HV + work.hv) * HEAD_K;
#pragma unroll
    for (int j = 0; j < KP / 32; j++) decays[j] = j * 32 + lane < HEAD_K ? row[j * 32 + lane] : 0.0f;
  }
}
PRIM void keep(const Shared& s, const NextBeta& b, const NextDecays& decays, int stage, int tokens, int lane) {
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const int at = stage * CHUNK + j * 32 + lane;
    s.beta[at] = b[j];
    if constexpr (PER_TOKEN) s.reads[at] = decays[j], s.writes[at] = decays[2 + j];
  }
  if constexpr (PER_CHANNEL) {
#pragma unroll
    for (int j = 0; j < KP / 32; j++) s.carried[stage * KP + j * 32 + lane] = decays[j];
  }
  if constexpr (LEAVES_DV && STATES) {
    int small = (lane < tokens && is_small(b[0])) || (lane + 32 < tokens && is_small(b[1]));
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) small |= __shfl_xor_sync(~0u, small, bits);
    if (lane == 0) s.small[stage] = small;
  }
}

// Where the tiles of a stage lie.
struct Tiles {
  DTYPE *k, *q, *rows, *core, *p, *writing;

  PRIM Tiles(const Shared& s, int stage)
      : k(s.k + stage * K_BOXES * TILE),
        q(s.q + stage * K_BOXES * TILE),
        rows(s.rows + stage * MATH * TILE),
        core(s.core + stage * TILE),
        p(s.p + stage * TILE),
        writing(PER_CHANNEL ? s.writing + stage * K_BOXES * TILE : nullptr) {}
};

// The tiles of a chunk from `token` on, by one thread, in the order in which a walk needs them.
PRIM void copy(const Tiles& to, const Inputs& in, const Work& work, uint64_t* landed, int h, int token) {
  constexpr int BYTES = 2 * TILE * ((1 + READS_QUERIES + PER_CHANNEL) * K_BOXES + 1 + READS_QUERIES + MATH);
  mbarrier_arrive_expect(landed, BYTES);
#pragma unroll
  for (int box = 0; box < K_BOXES; box++) tma_load(to.k + box * TILE, in.k, landed, box * BOX, h, token, work.batch);
#pragma unroll
  for (int box = 0; box < MATH; box++)
    tma_load(to.rows + box * TILE, in.rows, landed, work.channel + box * BOX, work.hv, token, work.batch);
  if constexpr (READS_QUERIES) tma_load(to.p, in.p, landed, 0, HAS_GATE ? work.hv : work.h, token, work.batch);
  tma_load(to.core, in.core, landed, 0, work.hv, token, work.batch);
#pragma unroll
  for (int box = 0; box < K_BOXES; box++) {
    if constexpr (PER_CHANNEL) tma_load(to.writing + box * TILE, in.writing, landed, box * BOX, h, token, work.batch);
    if constexpr (READS_QUERIES) tma_load(to.q + box * TILE, in.q, landed, box * BOX, h, token, work.batch);
  }
}

// Zeros past the end, where rows are another sequence's.
PRIM void clear_past(const Tiles& tiles, int tokens, int lane) {
  clear_rows(tiles.k, K_BOXES, tokens, lane);
  if constexpr (READS_QUERIES) clear_rows(tiles.q, K_BOXES, tokens, lane);
  if constexpr (PER_CHANNEL) clear_rows(tiles.writing, K_BOXES, tokens, lane);
  clear_rows(tiles.core, 1, tokens, lane);
  if constexpr (READS_QUERIES) clear_rows(tiles.p, 1, tokens, lane);
  clear_rows(tiles.rows, MATH, tokens, lane);
}

// `joined`: from JOIN_STAGE on, buffers of K and Q serve others first.
PRIM void load(const Shared& s, const Inputs& in, const Work& work, uint64_t* joined, int lane) {
  const int h = PER_CHANNEL ? work.hv : work.h;
  NextBeta b;
  NextDecays decays;
  Ring<CHUNK_STAGES> ring;
  ask(b, decays, in, work, 0, lane);
  for (int i = 0; i < work.chunks; i++) {
    const int c = work.chunk(i), token = work.start + c * CHUNK, tokens = work.tokens(c), stage = ring.stage;
    const Tiles tiles(s, stage);
    // In a batch, tokens past the end lie outside the arrays and come as zeros.
    const bool clears = VARLEN && tokens < CHUNK;
    uint64_t* landed = clears ? s.landed : s.full + stage;
    if (JOINS && i == JOIN_STAGE) mbarrier_wait(joined, 0);
    mbarrier_wait(s.free + stage, ring.parity ^ 1);
    keep(s, b, decays, stage, tokens, lane);
    __syncwarp();
    if (lane == 0) copy(tiles, in, work, landed, h, token);
    if (clears) {
      mbarrier_wait(landed, 0);
      clear_past(tiles, tokens, lane);
      async_proxy_fence();
      __syncwarp();
      if (lane == 0) mbarrier_arrive(s.full + stage);
    }
    ask(b, decays, in, work, i + 1, lane);
    ring.advance();
  }
}
