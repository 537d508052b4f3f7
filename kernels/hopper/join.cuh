// The state that enters a segment of a sequence, from what those before it do to a state:
//
//   S_0 as given      S_(i+1) = P_i S_i + H_i
//
// The math warpgroups of a walk do it, transposed as they hold S: S_(i+1)^T = H_i^T + S_i^T P_i^T. P lies in global
// memory in two parts of 16 bits, rounded to DTYPE and what rounding has left out, and S is split likewise. The product
// of what was left out is left out: about twice the digits of DTYPE, with sums in float.
//
// Arrays: p (2 N cut, HV, K, K), the two parts of a P one after the other; h (N, cut, HV, blocks of 64 value channels,
// K_TILES, 128, 4) in float, as the threads of a math warpgroup hold H; `cut` segments of every sequence were
// transferred. Shared memory: a buffer of KP x KP for each part.
#pragma once
#include "hopper/sums.cuh"
#include "tiles/store.cuh"

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

PRIM void keep_transfer(float* h, const float (&S)[K_TILES][4], int64_t index, int hv, int HV, int column, int thread) {
  if (column >= HEAD_V) return;
  float4* to = place_in_h(h, index, hv, HV, column, thread);
#pragma unroll
  for (int j = 0; j < K_TILES; j++) to[j * 128] = make_float4(S[j][0], S[j][1], S[j][2], S[j][3]);
}

// Both parts of 64 columns of P from `column` on, by a warpgroup that holds them transposed, through boxes of its own.
PRIM void send_transfer(const TensorMap* map, DTYPE* boxes, const float (&S)[K_TILES][4], int column, int64_t index,
                        int hv, int barrier, int thread) {
  const int warp = thread / 32, lane = thread % 32;
  uint32_t parts[2][K_STEPS][4];
  split_sums(parts[0], parts[1], S);
#pragma unroll
  for (int part = 0; part < 2; part++) {
    if (part == 1) {
      if (thread == 0) tma_store_wait_read<0>();
      named_barrier(barrier, 128);
    }
#pragma unroll
    for (int step = 0; step < K_STEPS; step++)
      stmatrix_x4_trans(
          boxes + step / 4 * TILE + swizzled(step % 4 * 16 + lane % 8 + lane / 16 * 8, warp * 16 + lane / 8 % 2 * 8),
          parts[part][step]);
    async_proxy_fence();
    named_barrier(barrier, 128);
    if (thread == 0) {
#pragma unroll
      for (int box = 0; box < K_BOXES; box++)
        tma_store(map, boxes + box * TILE, column, box * BOX, hv, (int)(2 * index + part));
      tma_store_commit();
    }
  }
  if (thread == 0) tma_store_wait_read<0>();
}

// ---- what a walk makes of it --------------------------------------------------------------------------------

constexpr int JOIN_BARRIERS = 5;

struct Joins {
  const TensorMap* p;
  float* h;
  DTYPE* parts[2];                 // buffers
  uint64_t *full, *free, *joined;  // two barriers each, and one for whoever waits for the buffers

  PRIM void init() const {
    for (int part = 0; part < 2; part++) mbarrier_init(full + part, 1), mbarrier_init(free + part, 4 * MATH);
    mbarrier_init(joined, 4 * MATH);
  }
  // One part of the P of a transfer, by one thread.
  PRIM void load(int64_t index, int hv, int part) const {
    mbarrier_arrive_expect(full + part, KP * KP * 2);
#pragma unroll
    for (int box = 0; box < K_BOXES; box++)
#pragma unroll
      for (int rows = 0; rows < KP; rows += BOX)
        tma_load(parts[part] + (box * KP + rows) * BOX, p, full + part, box * BOX, rows, hv, (int)(2 * index + part));
  }
};

PRIM Joins take_joins(DynSmem& smem, const TensorMap& p, float* h, DTYPE* high, DTYPE* rest) {
  uint64_t* barriers = smem.take<uint64_t>(JOIN_BARRIERS, "joins", sizeof(uint64_t));
  return {&p, h, {high, rest}, barriers, barriers + 2, barriers + 4};
}

// S += x P^T for a part of P.
PRIM void multiply_transfer(float (&S)[K_TILES][4], const uint32_t (&x)[K_STEPS][4], const DTYPE* part) {
#pragma unroll
  for (int step = 0; step < K_STEPS; step++)
    wgmma<DTYPE, false>(S, x[step], step_along_rows<KP * BOX>(part, step), true);
}

// S, of 64 value channels from `column` on, after `count` transfers from `index` on.
PRIM void join(float (&S)[K_TILES][4], const Joins& joins, int64_t index, int count, int column, int hv, int HV,
               int warpgroup, int thread) {
  const int lane = thread % 32;
  const bool loads = warpgroup == 0 && thread == 0;
  if (loads && count > 0)
    for (int part = 0; part < 2; part++) joins.load(index, hv, part);
  for (int i = 0; i < count; i++) {
    uint32_t high[K_STEPS][4], rest[K_STEPS][4];
    split_sums(high, rest, S);
    const float4* h = place_in_h(joins.h, index + i, hv, HV, min(column, HEAD_V - 1), thread);
#pragma unroll
    for (int j = 0; j < K_TILES; j++) {
      const float4 x = h[j * 128];
      S[j][0] = x.x, S[j][1] = x.y, S[j][2] = x.z, S[j][3] = x.w;
    }
    // A buffer is loaded again as soon as all warps are done with it.
    auto done = [&](int part) {
      __syncwarp();
      if (lane == 0) mbarrier_arrive(joins.free + part);
      if (loads && i + 1 < count) {
        mbarrier_wait(joins.free + part, i % 2);
        joins.load(index + i + 1, hv, part);
      }
      __syncwarp();
    };
    mbarrier_wait(joins.full, i % 2);
    pin(high);
    pin(rest);
    pin(S);
    wgmma_fence();
    multiply_transfer(S, rest, joins.parts[0]);
    multiply_transfer(S, high, joins.parts[0]);
    wgmma_commit();
    mbarrier_wait(joins.full + 1, i % 2);
    multiply_transfer(S, high, joins.parts[1]);
    wgmma_commit();
    wgmma_wait<1>();
    done(0);
    wgmma_wait<0>();
    pin(S);
    done(1);
  }
  __syncwarp();
  if (lane == 0) mbarrier_arrive(joins.joined);
}
