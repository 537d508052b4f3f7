// Device side of hopper.cuh: each function is one PTX instruction or one tiny idiom.
#pragma once

// ---- mbarriers: arrivals of threads and bytes of copies complete a phase -------------------------------

PRIM void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// After the inits, by the thread that made them: the copy engine sees them too.
PRIM void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
PRIM void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and lets the phase wait for `bytes` more of copies.
PRIM void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Waits until the phase of this parity, 0 for the first one, is complete.
PRIM void mbarrier_wait(uint64_t* barrier, int parity) {
  uint32_t done = 0;
  while (!done)
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
}

// ---- clusters: blocks that reach into each other's shared memory; `rank` of one, and addresses as in this block ----
//
// Arrivals have no scope: .release.cluster here, with .acquire.cluster in the wait, would flush caches each time.

PRIM int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of the cluster: after their mbarriers are initialised, and before a block exits that others still use.
PRIM void cluster_sync() { asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory"); }
PRIM uint32_t cluster_address(const void* p, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
  return address;
}
PRIM void mbarrier_arrive_remote(uint64_t* barrier, int rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(cluster_address(barrier, rank)) : "memory");
}
PRIM void mbarrier_arrive_expect_remote(uint64_t* barrier, int bytes, int rank) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cluster.b64 _, [%0], %1;" ::"r"(cluster_address(barrier, rank)),
               "r"(bytes)
               : "memory");
}
// Copies `bytes`, a multiple of 16, to the block's shared memory; they count for its barrier. Whoever wrote `from`
// calls async_proxy_fence before; `from` may be overwritten when one who waited at the barrier has said so.
PRIM void cluster_send(void* to, const void* from, int bytes, uint64_t* barrier, int rank) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   cluster_address(to, rank)),
               "r"(shared_address(from)), "r"(bytes), "r"(cluster_address(barrier, rank))
               : "memory");
}

// ---- TMA: boxes between global and swizzled shared memory; what lies outside the array is zero, or not written -----

PRIM void tma_load(void* to, const TensorMap* map, uint64_t* barrier, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
PRIM void tma_store(const TensorMap* map, const void* from, int x, int y, int z, int w) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(shared_address(from)), "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}
PRIM void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most PENDING groups of this thread still read shared memory.
template <int PENDING>
PRIM void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
// What this thread wrote to shared memory becomes visible to TMA and wgmma.
PRIM void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- registers per thread of a warpgroup -----------------------------------------------------------------

template <int N>
PRIM void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
PRIM void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- stmatrix: four 8x8 tiles of 16-bit elements; lane l gives the address of row l % 8 of tile l / 8 ------

PRIM void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
PRIM void stmatrix_x4_trans(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// ---- products of pairs of 16 bits, rounded to nearest even; of powers of two, exact -----------------------

template <class T>
PRIM uint32_t multiply2(uint32_t x, uint32_t y);
template <>
PRIM uint32_t multiply2<bf16>(uint32_t x, uint32_t y) {
  uint32_t z;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}

// ---- wgmma: products of a warpgroup, d (64 x 8 TILES) (+)= A (64 x 16) B (16 x 8 TILES) ------------------
//
// Asynchronous: from wgmma_fence on, the sums and A fragments that follow belong to the tensor cores until wgmma_wait.
// Warp w of the warpgroup holds rows 16 w to 16 w + 15, fragments as in tiles/fragments.cuh.

// Where a swizzled tile lies. Along k by rows: `stride` bytes from eight rows to the next eight. By columns
// (rows are k): `leading` bytes from 64 columns to the next 64, `stride` from eight k to the next.
PRIM uint64_t tile_descriptor(const void* tile, int leading, int stride) {
  return (uint64_t)((shared_address(tile) & 0x3ffff) >> 4) | (uint64_t)(leading >> 4) << 16 |
         (uint64_t)(stride >> 4) << 32 | 1ull << 62;
}
PRIM void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PRIM void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
PRIM void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps uses of registers on their side of the fence or wait beside which this stands.
template <int TILES>
PRIM void pin(float (&d)[TILES][4]) {
#pragma unroll
  for (int j = 0; j < TILES; j++)
    asm volatile("" : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])::"memory");
}
PRIM void pin(uint32_t (&a)[4]) { asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory"); }
template <int STEPS>
PRIM void pin(uint32_t (&a)[STEPS][4]) {
#pragma unroll
  for (int k = 0; k < STEPS; k++) pin(a[k]);
}

// x, which is the same in all threads of a warp, though the compiler cannot know: what counts up to it or branches by
// it may then live in uniform registers, where descriptors of wgmma must be.
PRIM int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// x, of which the compiler knows nothing: what depends on it is not computed ahead of a loop, for want of registers.
PRIM int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// wgmma<T, B_COLUMNS, NEGATE>(d, a, b, accumulate): A (NEGATE: -A) from registers; wgmma<T, A_COLUMNS, B_COLUMNS>(d, a,
// b, accumulate): A by its descriptor, along k or (A_COLUMNS) by columns. B by its descriptor: rows n along k, or
// (B_COLUMNS) rows k along n. Without `accumulate` d starts from zero.
#define WGMMA_SUMS_4 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_SUMS_8                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_SUMS_16                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_TILE(d, j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define WGMMA_QUARTET(d, j) WGMMA_TILE(d, j), WGMMA_TILE(d, j + 1), WGMMA_TILE(d, j + 2), WGMMA_TILE(d, j + 3)
#define WGMMA_TILES_4(d) WGMMA_QUARTET(d, 0)
#define WGMMA_TILES_8(d) WGMMA_QUARTET(d, 0), WGMMA_QUARTET(d, 4)
#define WGMMA_TILES_16(d) WGMMA_TILES_8(d), WGMMA_QUARTET(d, 8), WGMMA_QUARTET(d, 12)

// The numbers are those of the operands that follow the sums: A, B, accumulate and whether they lie by columns.
#define WGMMA_REGISTERS(TYPE, TILES, N, A0, A1, A2, A3, B, ACCUMULATE, SIGN, COLUMNS)                               \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #ACCUMULATE ", 0; wgmma.mma_async.sync.aligned.m64n" #N            \
               "k16.f32." TYPE "." TYPE " {" WGMMA_SUMS_##TILES "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B \
                                                                ", p, %" #SIGN ", 1, %" #COLUMNS ";}"               \
               : WGMMA_TILES_##TILES(d)                                                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate), "n"(NEGATE ? -1 : 1),    \
                 "n"(B_COLUMNS))
#define WGMMA_SHARED(TYPE, TILES, N, A, B, ACCUMULATE, A_BY, B_BY)                                                  \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #ACCUMULATE ", 0; wgmma.mma_async.sync.aligned.m64n" #N            \
               "k16.f32." TYPE "." TYPE " {" WGMMA_SUMS_##TILES "}, %" #A ", %" #B ", p, 1, 1, %" #A_BY ", %" #B_BY \
                                                                ";}"                                                \
               : WGMMA_TILES_##TILES(d)                                                                             \
               : "l"(a), "l"(b), "r"((int)accumulate), "n"(A_COLUMNS), "n"(B_COLUMNS))

template <class T, bool B_COLUMNS, bool NEGATE = false>
PRIM void wgmma(float (&d)[4][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  if constexpr (IsHalf<T>::value)
    WGMMA_REGISTERS("f16", 4, 32, 16, 17, 18, 19, 20, 21, 22, 23);
  else
    WGMMA_REGISTERS("bf16", 4, 32, 16, 17, 18, 19, 20, 21, 22, 23);
}
template <class T, bool B_COLUMNS, bool NEGATE = false>
PRIM void wgmma(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  if constexpr (IsHalf<T>::value)
    WGMMA_REGISTERS("f16", 8, 64, 32, 33, 34, 35, 36, 37, 38, 39);
  else
    WGMMA_REGISTERS("bf16", 8, 64, 32, 33, 34, 35, 36, 37, 38, 39);
}
template <class T, bool B_COLUMNS, bool NEGATE = false>
PRIM void wgmma(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  if constexpr (IsHalf<T>::value)
    WGMMA_REGISTERS("f16", 16, 128, 64, 65, 66, 67, 68, 69, 70, 71);
  else
    WGMMA_REGISTERS("bf16", 16, 128, 64, 65, 66, 67, 68, 69, 70, 71);
}
template <class T, bool A_COLUMNS, bool B_COLUMNS>
PRIM void wgmma(float (&d)[8][4], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (IsHalf<T>::value)
    WGMMA_SHARED("f16", 8, 64, 32, 33, 34, 35, 36);
  else
    WGMMA_SHARED("bf16", 8, 64, 32, 33, 34, 35, 36);
}
template <class T, bool A_COLUMNS, bool B_COLUMNS>
PRIM void wgmma(float (&d)[16][4], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (IsHalf<T>::value)
    WGMMA_SHARED("f16", 16, 128, 64, 65, 66, 67, 68);
  else
    WGMMA_SHARED("bf16", 16, 128, 64, 65, 66, 67, 68);
}
