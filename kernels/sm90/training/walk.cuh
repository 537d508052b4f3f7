// What sm90/training.cu and sm90/backward_state.cu share: sizes, shared memory, what a block works on, the
// warp that loads, and how results leave. Both read core and Pqk of a chunk from sm90/factors.cu, and `rows` of
// value channels: V, or dO.
//
// With a gate per key channel K and Q are those that meet the state that enters, K e^G and Q e^G, a third tile has what
// is written into the state that leaves, K e^(G_C - G), all of them per value head, and what is left of the state has a
// factor for each of its columns: so a walk is the one without a gate but for these.
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
constexpr bool PER_TOKEN = HAS_GATE == 1, PER_CHANNEL = HAS_GATE == 2;
// A forward transfer makes no outputs.
constexpr bool READS_QUERIES = BACKWARD || !TRANSFER;
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
  DTYPE *k, *q, *writing, *core, *p, *rows, *states, *o;
  float *beta, *reads, *writes, *carried;
  uint64_t *full, *free, *landed;
};

PRIM Shared take_shared(DynSmem& smem) {
  Shared s = {};
  s.k = smem.take<DTYPE>(CHUNK_STAGES * K_BOXES * TILE, "k", 1024);
  if constexpr (READS_QUERIES) s.q = smem.take<DTYPE>(CHUNK_STAGES * K_BOXES * TILE, "q", 1024);
  if constexpr (PER_CHANNEL) s.writing = smem.take<DTYPE>(CHUNK_STAGES * K_BOXES * TILE, "k of writes", 1024);
  s.core = smem.take<DTYPE>(CHUNK_STAGES * TILE, "core", 1024);
  if constexpr (READS_QUERIES) s.p = smem.take<DTYPE>(CHUNK_STAGES * TILE, "p", 1024);
  s.rows = smem.take<DTYPE>(CHUNK_STAGES * MATH * TILE, "rows", 1024);
  if constexpr (STATES || TRANSFER) s.states = smem.take<DTYPE>(MATH * K_BOXES * TILE, "states", 1024);
  if constexpr (STATES && !BACKWARD) s.o = smem.take<DTYPE>(MATH * TILE, "o", 1024);
  s.beta = smem.take<float>(CHUNK_STAGES * CHUNK, "beta");
  if constexpr (PER_TOKEN) {
    s.reads = smem.take<float>(CHUNK_STAGES * CHUNK, "reads");
    s.writes = smem.take<float>(CHUNK_STAGES * CHUNK, "writes");
  }
  if constexpr (PER_CHANNEL) s.carried = smem.take<float>(CHUNK_STAGES * KP, "decays of the state");
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

// What all chunks of a transfer leave of a state: a factor, or with a gate per key channel those of the two rows of P^T
// that a thread has.
struct OneFactor {
  float c = 1.0f;
  PRIM void multiply(const float* reads, int) { c *= reads[CHUNK - 1]; }
  PRIM void store(float* decays, int64_t row, int column, int thread) const {
    if (HAS_GATE && column == 0 && thread == 0) decays[row] = c;
  }
};
struct TwoRows {
  float2 c = {1.0f, 1.0f};
  PRIM void multiply(const float* carried, int row) { c.x *= carried[row % KP], c.y *= carried[(row + 8) % KP]; }
  PRIM void store(float* decays, int64_t row, int column, int thread) const {
    const int channel = column + thread / 32 * 16 + thread % 32 / 4;
    if (thread % 4 == 0 && channel < HEAD_K) decays[row * HEAD_K + channel] = c.x;
    if (thread % 4 == 0 && channel + 8 < HEAD_K) decays[row * HEAD_K + channel + 8] = c.y;
  }
};
#if HAS_GATE == 2
typedef TwoRows Carried;
#else
typedef OneFactor Carried;
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
  const TensorMap *q, *k, *core, *p, *rows, *writing;
};

// By one warp. `joined`: from JOIN_STAGE on, buffers of K and Q serve others first.
PRIM void load(const Shared& s, const Maps& maps, const Work& work, uint64_t* joined, const float* beta,
               const float* decays, int HV, int lane) {
  constexpr int BYTES = 2 * TILE * ((1 + READS_QUERIES + PER_CHANNEL) * K_BOXES + 1 + READS_QUERIES + MATH);
  const int h = PER_CHANNEL ? work.hv : work.h;
  // Two tokens per lane, read a chunk ahead; of decays of the state, KP / 32 channels.
  float b[2], reads[2], writes[2], carried[KP / 32];
  auto load_columns = [&](int i) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int t = work.chunk(i) * CHUNK + j * 32 + lane;
      const bool inside = i < work.chunks && t < work.sequence.tokens;
      b[j] = inside ? beta[(work.sequence.first + t) * HV + work.hv] : 0.0f;
      if (!PER_TOKEN || i >= work.chunks) continue;
      const float* rows = decays + ((work.sequence.slot + work.chunk(i)) * HV + work.hv) * DECAY_ROWS * CHUNK;
      reads[j] = rows[READS * CHUNK + j * 32 + lane], writes[j] = rows[WRITES * CHUNK + j * 32 + lane];
    }
    if constexpr (PER_CHANNEL) {
      if (i >= work.chunks) return;
      const float* row = decays + ((work.sequence.slot + work.chunk(i)) * HV + work.hv) * HEAD_K;
#pragma unroll
      for (int j = 0; j < KP / 32; j++) carried[j] = j * 32 + lane < HEAD_K ? row[j * 32 + lane] : 0.0f;
    }
  };
  Ring<CHUNK_STAGES> ring;
  load_columns(0);
  for (int i = 0; i < work.chunks; i++) {
    const int c = work.chunk(i), token = work.start + c * CHUNK, tokens = work.tokens(c), stage = ring.stage;
    DTYPE *k = s.k + stage * K_BOXES * TILE, *q = s.q + stage * K_BOXES * TILE, *rows = s.rows + stage * MATH * TILE;
    DTYPE *core = s.core + stage * TILE, *p = s.p + stage * TILE;
    DTYPE* writing = PER_CHANNEL ? s.writing + stage * K_BOXES * TILE : nullptr;
    // In a batch, tokens past the end lie outside the arrays and come as zeros.
    const bool clears = VARLEN && tokens < CHUNK;
    uint64_t* landed = clears ? s.landed : s.full + stage;
    if (JOINS && i == JOIN_STAGE) mbarrier_wait(joined, 0);
    mbarrier_wait(s.free + stage, ring.parity ^ 1);
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int at = stage * CHUNK + j * 32 + lane;
      s.beta[at] = b[j];
      if constexpr (PER_TOKEN) s.reads[at] = reads[j], s.writes[at] = writes[j];
    }
    if constexpr (PER_CHANNEL) {
#pragma unroll
      for (int j = 0; j < KP / 32; j++) s.carried[stage * KP + j * 32 + lane] = carried[j];
    }
    __syncwarp();
    if (lane == 0) {
      mbarrier_arrive_expect(landed, BYTES);
#pragma unroll
      for (int box = 0; box < K_BOXES; box++) tma_load(k + box * TILE, maps.k, landed, box * BOX, h, token, work.batch);
#pragma unroll
      for (int box = 0; box < MATH; box++)
        tma_load(rows + box * TILE, maps.rows, landed, work.channel + box * BOX, work.hv, token, work.batch);
      if constexpr (READS_QUERIES) tma_load(p, maps.p, landed, 0, HAS_GATE ? work.hv : work.h, token, work.batch);
      tma_load(core, maps.core, landed, 0, work.hv, token, work.batch);
#pragma unroll
      for (int box = 0; box < K_BOXES; box++) {
        if constexpr (PER_CHANNEL)
          tma_load(writing + box * TILE, maps.writing, landed, box * BOX, h, token, work.batch);
        if constexpr (READS_QUERIES) tma_load(q + box * TILE, maps.q, landed, box * BOX, h, token, work.batch);
      }
    }
    if (clears) {
      mbarrier_wait(landed, 0);
      clear_rows(k, K_BOXES, tokens, lane);
      if constexpr (READS_QUERIES) clear_rows(q, K_BOXES, tokens, lane);
      if constexpr (PER_CHANNEL) clear_rows(writing, K_BOXES, tokens, lane);
      clear_rows(core, 1, tokens, lane);
      if constexpr (READS_QUERIES) clear_rows(p, 1, tokens, lane);
      clear_rows(rows, MATH, tokens, lane);
      async_proxy_fence();
      __syncwarp();
      if (lane == 0) mbarrier_arrive(s.full + stage);
    }
    load_columns(i + 1);
    ring.advance();
  }
}
