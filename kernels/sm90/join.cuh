// The state that enters a segment of a sequence, from what those before it do to a state:
//
//   S_0 as given      S_(i+1) = P_i S_i + H_i
//
// The math warpgroups of a walk do it, transposed as they hold S: S_(i+1)^T = c_i S_i^T + S_i^T (P_i - c_i I)^T +
// H_i^T, with c_i the decay over the segment, 1 without a gate. Where beta is small, P_i is nearly c_i I: so only the
// difference is rounded to DTYPE, once per segment; S is taken to twice the digits; sums are float.
//
// With a gate per key channel c I is a diagonal matrix, whose entries multiply the columns of S^T.
//
// Arrays: p (N cut, HV, K, K), of P - c I; h (N, cut, HV, blocks of 64 value channels, K_TILES, 128, 4) in float, as
// the threads of a math warpgroup hold H; decays (N cut, HV), or (N cut, HV, K), of c, with a gate; `cut` segments of
// every sequence were transferred. Shared memory: two buffers of KP x KP.
#pragma once
#include "sm90/sums.cuh"

template <int TILES>
PRIM void split_sums(uint32_t (&high)[TILES / 2][4], uint32_t (&rest)[TILES / 2][4], const float (&d)[TILES][4]) {
#pragma unroll
  for (int j = 0; j < TILES; j++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const uint32_t pair = pack2<DTYPE>(d[j][2 * h], d[j][2 * h + 1]);
      const float2 x = unpack2<DTYPE>(pair);
      high[j / 2][j % 2 * 2 + h] = pair;
      rest[j / 2][j % 2 * 2 + h] = pack2<DTYPE>(d[j][2 * h] - x.x, d[j][2 * h + 1] - x.y);
    }
}

// Where a thread has what it holds of 64 value channels from `column` on; neighbours 128 apart are its tiles.
PRIM float4* place_in_h(float* h, int64_t index, int hv, int HV, int column, int thread) {
  constexpr int BLOCKS = (HEAD_V + BOX - 1) / BOX;
  return (float4*)h + (((index * HV + hv) * BLOCKS + column / BOX) * K_TILES * 128 + thread);
}

// ---- what a transfer leaves ---------------------------------------------------------------------------------

PRIM void keep_transfer(float* h, const float (&S)[K_TILES][4], int64_t index, const Part& part) {
  if (part.column >= HEAD_V) return;
  float4* to = place_in_h(h, index, part.hv, part.HV, part.column, part.thread);
#pragma unroll
  for (int j = 0; j < K_TILES; j++) to[j * 128] = make_float4(S[j][0], S[j][1], S[j][2], S[j][3]);
}

// 64 columns of P - c I by a warpgroup that holds P's transposed, through boxes of its own. c is one number, or those
// of the thread's two rows.
template <class Decay>
PRIM void send_transfer(const TensorMap* map, DTYPE* boxes, float (&S)[K_TILES][4], Decay c, int64_t index,
                        const Part& part) {
  const int warp = part.warp(), lane = part.lane();
  subtract_diagonal(S, c, part.column + warp * 16, lane);
  uint32_t a[K_STEPS][4];
  round_sums<DTYPE>(a, S);
#pragma unroll
  for (int step = 0; step < K_STEPS; step++)
    stmatrix_x4_trans(
        boxes + step / 4 * TILE + swizzled(step % 4 * 16 + lane % 8 + lane / 16 * 8, warp * 16 + lane / 8 % 2 * 8),
        a[step]);
  async_proxy_fence();
  named_barrier(MATH_BARRIER + part.warpgroup, 128);
  if (part.thread > 0) return;
#pragma unroll
  for (int box = 0; box < K_BOXES; box++)
    tma_store(map, boxes + box * TILE, part.column, box * BOX, part.hv, (int)index);
  tma_store_commit();
  tma_store_wait_read<0>();
}

// ---- what a walk makes of it --------------------------------------------------------------------------------

constexpr int JOIN_BARRIERS = 5;
// Where registers suffice, H is on its way while the products are made. Elsewhere it is added before them, but with a
// gate: two launches of one division walk its blocks, and they have to agree to the bit.
constexpr bool EARLY_H = MATH_REGISTERS >= 216, H_FIRST = !EARLY_H && !HAS_GATE;

struct Joins {
  const TensorMap* p;
  float *h, *decays;
  DTYPE *first, *second;
  uint64_t *full, *free, *joined;  // one each per buffer, and one for whoever waits for the buffers

  PRIM void init() const {
    for (int i = 0; i < 2; i++) mbarrier_init(full + i, 1), mbarrier_init(free + i, 4 * MATH);
    mbarrier_init(joined, 4 * MATH);
  }
  // Not an array: indexed by what is not known, it would lie in local memory.
  PRIM DTYPE* buffer(int i) const { return i == 0 ? first : second; }
  // P of a transfer, by one thread.
  PRIM void load(int64_t index, int hv, int i) const {
    mbarrier_arrive_expect(full + i, KP * KP * 2);
#pragma unroll
    for (int box = 0; box < K_BOXES; box++)
#pragma unroll
      for (int rows = 0; rows < KP; rows += BOX)
        tma_load(buffer(i) + (box * KP + rows) * BOX, p, full + i, box * BOX, rows, hv, (int)index);
  }
};

PRIM Joins take_joins(DynSmem& smem, const TensorMap& p, float* h, float* decays, DTYPE* first, DTYPE* second) {
  uint64_t* barriers = smem.take<uint64_t>(JOIN_BARRIERS, "joins", sizeof(uint64_t));
  return {&p, h, decays, first, second, barriers, barriers + 2, barriers + 4};
}

// S^T times the decays of its columns, of which there are HEAD_K.
PRIM void decay_channels(float (&S)[K_TILES][4], const float* decays, int lane) {
#pragma unroll
  for (int j = 0; j < K_TILES; j++) {
    const int column = sum_column(lane, j, 0);
    const float2 c = column < HEAD_K ? *(const float2*)&decays[column] : make_float2(0.0f, 0.0f);
    S[j][0] *= c.x, S[j][1] *= c.y, S[j][2] *= c.x, S[j][3] *= c.y;
  }
}

// S += x P^T.
PRIM void multiply_transfer(float (&S)[K_TILES][4], const uint32_t (&x)[K_STEPS][4], const DTYPE* P) {
#pragma unroll
  for (int step = 0; step < K_STEPS; step++) wgmma<DTYPE, false>(S, x[step], step_along_rows<KP * BOX>(P, step), true);
}

// S after `count` transfers from `index` on; without H of P's columns.
template <bool WITH_H = true>
PRIM void join(float (&S)[K_TILES][4], const Joins& joins, int64_t index, int count, const Part& part) {
  // Opaque, so that nothing of the walk is computed before.
  const int thread = opaque(part.thread), lane = thread % 32;
  const bool loads = part.warpgroup == 0 && thread == 0;
  if (loads)
    for (int i = 0; i < min(count, 2); i++) joins.load(index + i, part.hv, i);
#if HAS_GATE == 1
  // Of all at once, a lane each: who waits for one waits for H, which is asked for beside it, too.
  const float decays = lane < count ? joins.decays[(index + lane) * part.HV + part.hv] : 1.0f;
#endif
#pragma unroll 1
  for (int i = 0; i < count; i++) {
    const int buffer = i % 2, parity = i / 2 % 2;
    const float4* h = place_in_h(joins.h, index + i, part.hv, part.HV, min(part.column, HEAD_V - 1), thread);
    float H[K_TILES][4];
    auto load_h = [&] {
#pragma unroll
      for (int j = 0; j < K_TILES; j++) {
        const float4 x = h[j * 128];
        H[j][0] = x.x, H[j][1] = x.y, H[j][2] = x.z, H[j][3] = x.w;
      }
    };
    auto add_h = [&] {
#pragma unroll
      for (int j = 0; j < K_TILES; j++)
#pragma unroll
        for (int l = 0; l < 4; l++) S[j][l] += H[j][l];
    };
    if (WITH_H && EARLY_H) load_h();
    uint32_t high[K_STEPS][4], rest[K_STEPS][4];
    split_sums(high, rest, S);
#if HAS_GATE == 2
    decay_channels(S, joins.decays + ((index + i) * part.HV + part.hv) * HEAD_K, lane);
#endif
    if (WITH_H && H_FIRST) {
      load_h();
      add_h();
    }
    mbarrier_wait(joins.full + buffer, parity);
    pin(high);
    pin(rest);
    pin(S);
#if HAS_GATE == 1
    // Not before S is split: its registers are not twice there.
    const float c = __shfl_sync(~0u, decays, i);
#pragma unroll
    for (int j = 0; j < K_TILES; j++)
#pragma unroll
      for (int l = 0; l < 4; l++) S[j][l] *= c;
    pin(S);
#endif
    wgmma_fence();
    multiply_transfer(S, rest, joins.buffer(buffer));
    multiply_transfer(S, high, joins.buffer(buffer));
    wgmma_commit();
    wgmma_wait<0>();
    pin(S);
    if (WITH_H && !EARLY_H && !H_FIRST) load_h();
    if (WITH_H && !H_FIRST) add_h();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(joins.free + buffer);
    if (loads && i + 2 < count) {
      mbarrier_wait(joins.free + buffer, parity);
      joins.load(index + i + 2, part.hv, buffer);
    }
    __syncwarp();
  }
  if (lane == 0) mbarrier_arrive(joins.joined);
}
