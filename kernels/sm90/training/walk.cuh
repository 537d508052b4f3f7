// What sm90/training.cu and sm90/backward_state.cu share: sizes, shared memory, what a block works on, the
// warp that loads, and how results leave. Both read core and Pqk of a chunk from sm90/factors.cu, and `rows` of
// value channels: V, or dO.
//
// The first MATH warpgroups hold 64 value channels each; the last warp loads K, Q, core, Pqk and rows by TMA, and beta
// and decays, up to CHUNK_STAGES chunks ahead. One barrier says that a stage is full; every warp says for itself that
// it is done with one.
#pragma once
#include "sm90/decays.cuh"
#include "sm90/sums.cuh"
#include "tiles/sequence.cuh"
#include "tiles/swizzled.cuh"

static_assert(CHUNK == 64, "the chunk is wgmma's 64 rows");
constexpr int THREADS = MATH == 2 ? 384 : 160, SLICE = 64 * MATH;
constexpr int KP = HEAD_K <= 64 ? 64 : 128, K_BOXES = KP / BOX, K_STEPS = KP / 16, K_TILES = KP / 8;
constexpr int VALUE_SLICES = (HEAD_V + SLICE - 1) / SLICE;
constexpr int SLICES = VALUE_SLICES + (TRANSFER ? (HEAD_K + SLICE - 1) / SLICE : 0);  // of values, then of P
constexpr int TILE = CHUNK * BOX;                                                     // elements of one box

// With JOINS segments after the first one start from a state that transfers make, in what is K's and Q's from this
// chunk on.
constexpr int JOIN_STAGE = CHUNK_STAGES - 2;
static_assert(JOIN_STAGE >= 0, "two buffers, each as large as two stages of K");

// Registers per thread: 65536 in all, which for one math warpgroup is enough as it comes.
constexpr int LOADER_REGISTERS = 40, MATH_REGISTERS = 232;
static_assert(LOADER_REGISTERS + 2 * MATH_REGISTERS <= 3 * 168, "a warpgroup would wait for registers for ever");

struct Shared {
  DTYPE *k, *q, *core, *p, *rows, *states, *o;
  float *beta, *reads, *writes;
  uint64_t *full, *free, *landed;
};

PRIM Shared take_shared(DynSmem& smem) {
  Shared s = {};
  s.k = smem.take<DTYPE>(CHUNK_STAGES * K_BOXES * TILE, "k", 1024);
  s.q = smem.take<DTYPE>(CHUNK_STAGES * K_BOXES * TILE, "q", 1024);
  s.core = smem.take<DTYPE>(CHUNK_STAGES * TILE, "core", 1024);
  s.p = smem.take<DTYPE>(CHUNK_STAGES * TILE, "p", 1024);
  s.rows = smem.take<DTYPE>(CHUNK_STAGES * MATH * TILE, "rows", 1024);
  s.states = smem.take<DTYPE>(MATH * K_BOXES * TILE, "states", 1024);
#if !BACKWARD
  s.o = smem.take<DTYPE>(MATH * TILE, "o", 1024);
#endif
  s.beta = smem.take<float>(CHUNK_STAGES * CHUNK, "beta");
#if HAS_GATE
  s.reads = smem.take<float>(CHUNK_STAGES * CHUNK, "reads");
  s.writes = smem.take<float>(CHUNK_STAGES * CHUNK, "writes");
#endif
  s.full = smem.take<uint64_t>(CHUNK_STAGES, "full");
  s.free = smem.take<uint64_t>(CHUNK_STAGES, "free");
  s.landed = smem.take<uint64_t>(1, "last chunk landed");
  return s;
}

PRIM void init_barriers(const Shared& s) {
  for (int i = 0; i < CHUNK_STAGES; i++) mbarrier_init(s.full + i, 1), mbarrier_init(s.free + i, 4 * MATH);
  mbarrier_init(s.landed, 1);
  mbarrier_init_fence();
}

#if HAS_GATE
// d[column t] times factor[t].
template <int TILES>
PRIM void scale_columns(float (&d)[TILES][4], const float* factor, int lane) {
#pragma unroll
  for (int j = 0; j < TILES; j++) {
    const float2 f = *(const float2*)&factor[sum_column(lane, j, 0)];
    d[j][0] *= f.x, d[j][1] *= f.y, d[j][2] *= f.x, d[j][3] *= f.y;
  }
}
// d in 16 bits, column t times b[t] decay[t].
template <class T, int TILES>
PRIM void round_columns(uint32_t (&a)[TILES / 2][4], const float (&d)[TILES][4], const float* b, const float* decay,
                        int lane) {
#pragma unroll
  for (int j = 0; j < TILES; j++) {
    const float2 x = *(const float2*)&b[sum_column(lane, j, 0)], y = *(const float2*)&decay[sum_column(lane, j, 0)];
    const float2 f = make_float2(x.x * y.x, x.y * y.y);
#pragma unroll
    for (int h = 0; h < 2; h++) a[j / 2][j % 2 * 2 + h] = pack2<T>(f.x * d[j][2 * h], f.y * d[j][2 * h + 1]);
  }
}
// What a chunk leaves of a state: the last read's decay of it.
PRIM void carry(float (&d)[K_TILES][4], const float* reads) {
  const float c = reads[CHUNK - 1];
#pragma unroll
  for (int j = 0; j < K_TILES; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) d[j][i] *= c;
}
#endif

// What a block works on: a slice of value channels, or of P's columns, of one segment.
struct Work {
  Sequence sequence;
  int chunks, n, part, h, hv, batch;
  int step;     // in the order of the walk, which segment of the sequence
  bool last;    // in that order
  int channel;  // the block's first one
  bool values;  // or P
  int start;    // coordinate of its first token in the tensor maps

  // The i-th chunk of the walk.
  PRIM int chunk(int i) const { return BACKWARD ? chunks - 1 - i : i; }
  PRIM int tokens(int c) const { return min(sequence.tokens - c * CHUNK, CHUNK); }
};

PRIM Work find_work(const int64_t* cu_seqlens, int T, int H, int HV, int segments, int transferred) {
  const int slice = blockIdx.x % SLICES, walked = TRANSFER ? transferred : segments;
  Work w;
  w.hv = blockIdx.x / SLICES % HV, w.part = blockIdx.x / (SLICES * HV), w.h = w.hv / (HV / H);
  w.n = w.part / walked, w.step = w.part % walked, w.last = w.step == segments - 1, w.batch = VARLEN ? 0 : w.n;
  w.sequence = find_segment<CHUNK>(cu_seqlens, w.n, {segments}, BACKWARD ? segments - 1 - w.step : w.step, T);
  w.chunks = (w.sequence.tokens + CHUNK - 1) / CHUNK;
  w.values = slice < VALUE_SLICES;
  w.channel = (w.values ? slice : slice - VALUE_SLICES) * SLICE;
  w.start = (int)(w.sequence.first - (int64_t)w.batch * T);
  return w;
}

// The state `a` of this warp's 16 value channels in its staging boxes, and from there by TMA. In between: what was
// staged before has been read, and async_proxy_fence.
PRIM void stage_state(DTYPE* boxes, const uint32_t (&a)[K_STEPS][4], int lane) {
  if (lane == 0) tma_store_wait_read<0>();
  __syncwarp();
#pragma unroll
  for (int step = 0; step < K_STEPS; step++)
    stmatrix_x4(boxes + step / 4 * 16 * BOX + swizzled(lane % 16, step % 4 * 16 + lane / 16 * 8), a[step]);
}
PRIM void send_state(const TensorMap* map, const DTYPE* boxes, const Work& work, int value, int c) {
#pragma unroll
  for (int box = 0; box < K_BOXES; box++)
    tma_store(map, boxes + box * 16 * BOX, box * BOX, value, work.hv, (int)work.sequence.slot + c);
  tma_store_commit();
}

// This warp is done with a stage, from which thread 0 may have sent rows.
PRIM void free_stage(const Shared& s, int stage, int thread) {
  __syncwarp();
  if (thread == 0) tma_store_wait_read<0>();
  if (thread % 32 == 0) mbarrier_arrive(s.free + stage);
}

struct Maps {
  const TensorMap *q, *k, *core, *p, *rows;
};

// By one warp. `joined`: from JOIN_STAGE on, buffers of K and Q serve others first.
PRIM void load(const Shared& s, const Maps& maps, const Work& work, uint64_t* joined, const float* beta,
               const float* decays, int HV, int lane) {
  constexpr int BYTES = 2 * TILE * (2 * K_BOXES + 2 + MATH);
  // Two tokens per lane, read a chunk ahead.
  float b[2];
#if HAS_GATE
  float reads[2], writes[2];
#endif
  auto load_columns = [&](int i) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int t = work.chunk(i) * CHUNK + j * 32 + lane;
      const bool inside = i < work.chunks && t < work.sequence.tokens;
      b[j] = inside ? beta[(work.sequence.first + t) * HV + work.hv] : 0.0f;
#if HAS_GATE
      if (i >= work.chunks) continue;
      const float* rows = decays + ((work.sequence.slot + work.chunk(i)) * HV + work.hv) * DECAY_ROWS * CHUNK;
      reads[j] = rows[READS * CHUNK + j * 32 + lane], writes[j] = rows[WRITES * CHUNK + j * 32 + lane];
#endif
    }
  };
  Ring<CHUNK_STAGES> ring;
  load_columns(0);
  for (int i = 0; i < work.chunks; i++) {
    const int c = work.chunk(i), token = work.start + c * CHUNK, tokens = work.tokens(c), stage = ring.stage;
    DTYPE *k = s.k + stage * K_BOXES * TILE, *q = s.q + stage * K_BOXES * TILE, *rows = s.rows + stage * MATH * TILE;
    DTYPE *core = s.core + stage * TILE, *p = s.p + stage * TILE;
    // In a batch, tokens past the end lie outside the arrays and come as zeros.
    const bool clears = VARLEN && tokens < CHUNK;
    uint64_t* landed = clears ? s.landed : s.full + stage;
    if (JOINS && i == JOIN_STAGE) mbarrier_wait(joined, 0);
    mbarrier_wait(s.free + stage, ring.parity ^ 1);
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int at = stage * CHUNK + j * 32 + lane;
      s.beta[at] = b[j];
#if HAS_GATE
      s.reads[at] = reads[j], s.writes[at] = writes[j];
#endif
    }
    __syncwarp();
    if (lane == 0) {
      mbarrier_arrive_expect(landed, BYTES);
#pragma unroll
      for (int box = 0; box < K_BOXES; box++)
        tma_load(k + box * TILE, maps.k, landed, box * BOX, work.h, token, work.batch);
#pragma unroll
      for (int box = 0; box < MATH; box++)
        tma_load(rows + box * TILE, maps.rows, landed, work.channel + box * BOX, work.hv, token, work.batch);
      tma_load(p, maps.p, landed, 0, HAS_GATE ? work.hv : work.h, token, work.batch);
      tma_load(core, maps.core, landed, 0, work.hv, token, work.batch);
#pragma unroll
      for (int box = 0; box < K_BOXES; box++)
        tma_load(q + box * TILE, maps.q, landed, box * BOX, work.h, token, work.batch);
    }
    if (clears) {
      mbarrier_wait(landed, 0);
      clear_rows(k, K_BOXES, tokens, lane);
      clear_rows(q, K_BOXES, tokens, lane);
      clear_rows(core, 1, tokens, lane);
      clear_rows(p, 1, tokens, lane);
      clear_rows(rows, MATH, tokens, lane);
      async_proxy_fence();
      __syncwarp();
      if (lane == 0) mbarrier_arrive(s.full + stage);
    }
    load_columns(i + 1);
    ring.advance();
  }
}
