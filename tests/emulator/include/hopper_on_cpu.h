// Host twins of kernels/primitives/hopper_device.cuh: the same names, with the semantics in runtime/.
#pragma once

PRIM void mbarrier_init(uint64_t* barrier, int arrivals, SITE) { emulator::mbarrier_init(barrier, arrivals, HERE); }
PRIM void mbarrier_init_fence() { emulator::mbarrier_init_fence(); }
PRIM void mbarrier_arrive(uint64_t* barrier, SITE) { emulator::mbarrier_arrive(barrier, 0, HERE); }
PRIM void mbarrier_arrive_expect(uint64_t* barrier, int bytes, SITE) {
  emulator::mbarrier_arrive(barrier, bytes, HERE);
}
PRIM void mbarrier_wait(uint64_t* barrier, int parity, SITE) { emulator::mbarrier_wait(barrier, parity, HERE); }

PRIM void tma_load(void* to, const TensorMap* map, uint64_t* barrier, int x, int y, int z, int w, SITE) {
  emulator::tma_load(to, map, barrier, {x, y, z, w}, HERE);
}
PRIM void tma_store(const TensorMap* map, const void* from, int x, int y, int z, int w, SITE) {
  emulator::tma_store(map, from, {x, y, z, w}, HERE);
}
PRIM void tma_store_commit() { emulator::tma_store_commit(); }
template <int PENDING>
PRIM void tma_store_wait_read() {
  emulator::tma_store_wait_read(PENDING);
}
PRIM void async_proxy_fence() { emulator::async_proxy_fence(); }

PRIM int cluster_rank() { return emulator::current->cluster_rank; }
PRIM void cluster_sync(SITE) {
  emulator::cluster_arrive(HERE);
  emulator::cluster_wait(HERE);
}
PRIM void mbarrier_arrive_remote(uint64_t* barrier, int rank, SITE) {
  emulator::mbarrier_arrive((uint64_t*)emulator::in_block(barrier, rank, HERE), 0, HERE);
}
PRIM void mbarrier_arrive_expect_remote(uint64_t* barrier, int bytes, int rank, SITE) {
  emulator::mbarrier_arrive((uint64_t*)emulator::in_block(barrier, rank, HERE), bytes, HERE);
}
PRIM void cluster_send(void* to, const void* from, int bytes, uint64_t* barrier, int rank, SITE) {
  emulator::cluster_send(emulator::in_block(to, rank, HERE), from, bytes,
                         (uint64_t*)emulator::in_block(barrier, rank, HERE), HERE);
}

// Registers are not modelled, but what the instruction takes is known.
template <int N>
PRIM void more_registers() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "registers per thread: 24 to 256, a multiple of 8");
}
template <int N>
PRIM void fewer_registers() {
  more_registers<N>();
}

PRIM void stmatrix_x4(void* row, const uint32_t (&r)[4], SITE) { emulator::stmatrix(row, r, false, HERE); }
PRIM void stmatrix_x4_trans(void* row, const uint32_t (&r)[4], SITE) { emulator::stmatrix(row, r, true, HERE); }

template <class T>
PRIM uint32_t multiply2(uint32_t x, uint32_t y) {
  const float2 a = unpack2<T>(x), b = unpack2<T>(y);
  return pack2<T>(a.x * b.x, a.y * b.y);
}

PRIM uint64_t tile_descriptor(const void* tile, int leading, int stride, SITE) {
  return (uint64_t)(emulator::shared_address(tile, HERE) >> 4) | (uint64_t)(leading >> 4) << 16 |
         (uint64_t)(stride >> 4) << 32 | 1ull << 62;
}
PRIM void wgmma_fence(SITE) { emulator::wgmma_fence(HERE); }
PRIM void wgmma_commit(SITE) { emulator::wgmma_commit(HERE); }
template <int PENDING>
PRIM void wgmma_wait(SITE) {
  emulator::wgmma_wait(PENDING, HERE);
}
template <int TILES>
PRIM void pin(float (&)[TILES][4]) {}
PRIM void pin(uint32_t (&)[4]) {}
template <int STEPS>
PRIM void pin(uint32_t (&)[STEPS][4]) {}
PRIM int opaque(int x) { return x; }
PRIM int uniform(int x, SITE) {
  const int first = __shfl_sync(~0u, x, 0, 32, file_, line_);
  emulator::check_uniform(x, first, HERE);
  return first;
}

namespace emulator {
template <class T, int TILES>
inline void wgmma(float (&d)[TILES][4], Wgmma w, Site site) {
  static_assert(std::is_same<T, bf16>::value || std::is_same<T, f16>::value, "16-bit operands");
  static_assert(TILES == 4 || TILES == 8 || TILES == 16, "32, 64 or 128 columns");
  w.kind = std::is_same<T, bf16>::value ? MMA_BF16 : MMA_F16;
  w.tiles = TILES;
  wgmma(&d[0][0], w, site);
}
}  // namespace emulator

template <class T, bool B_COLUMNS, bool NEGATE = false, int TILES>
PRIM void wgmma(float (&d)[TILES][4], const uint32_t (&a)[4], uint64_t b, bool accumulate, SITE) {
  emulator::wgmma<T>(d, {{}, 0, a, 0, b, false, B_COLUMNS, accumulate, NEGATE, false}, HERE);
}
template <class T, bool A_COLUMNS, bool B_COLUMNS, int TILES>
PRIM void wgmma(float (&d)[TILES][4], uint64_t a, uint64_t b, bool accumulate, SITE) {
  emulator::wgmma<T>(d, {{}, 0, nullptr, a, b, A_COLUMNS, B_COLUMNS, accumulate, false, false}, HERE);
}
