// What the walkers of sm90/training.cu and sm90/backward_state.cu share: factors of tokens and of the state, what a
// transfer leaves of one, and how states leave.
#pragma once
#include "sm90/training/shared.cuh"
// With the sizes that it has:
#include "sm90/sums.cuh"

// Where the tiles, beta and the decays of a chunk lie.
struct Stage {
  const DTYPE *k, *q, *core, *p, *writing;
  const float *b, *carried, *reads, *writes;

  PRIM Stage(const Shared& s, int stage)
      : k(s.k + stage * K_BOXES * TILE),
        q(s.q + stage * K_BOXES * TILE),
        core(s.core + stage * TILE),
        p(s.p + stage * TILE),
        writing(PER_CHANNEL ? s.writing + stage * K_BOXES * TILE : k),
        b(s.beta + stage * CHUNK),
        carried(s.carried + stage * KP),
        reads(s.reads + stage * CHUNK),
        writes(s.writes + stage * CHUNK) {}
};

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
