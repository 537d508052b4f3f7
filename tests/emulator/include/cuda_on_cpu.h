// CUDA C++ for g++: keywords, built-in variables, vector types, shuffles and the runtime's entry points.
// Reached only through primitives/primitives.cuh with CUEMU defined; no CUDA header is involved.
#pragma once
// Hundreds of kernels read these headers, so they are few. libstdc++ leaves out its special functions (Bessel, zeta)
// when their guard is set, which halves the time that the headers take.
#define _GLIBCXX_BITS_SPECFUN_H 1
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) alignas(n)
#define __grid_constant__
// A kernel's section says how many blocks its clusters have. Other sizes than these do not compile.
#define __cluster_dims__(x, y, z) EMULATOR_CLUSTER(x, y, z)
#define EMULATOR_CLUSTER(x, y, z) __attribute__((section(CLUSTERS_OF_##x##_##y##_##z)))
#define CLUSTERS_OF_1_1_1 "clusters_of_1"
#define CLUSTERS_OF_2_1_1 "clusters_of_2"
#define CLUSTERS_OF_4_1_1 "clusters_of_4"
#define CLUSTERS_OF_8_1_1 "clusters_of_8"
#define __shared__ USE_DynSmem_INSTEAD_OF___shared__

struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}

// Where a primitive was called: trailing default arguments of every checked function.
#define SITE const char *file_ = __builtin_FILE(), int line_ = __builtin_LINE()
#define HERE \
  ::emulator::Site { file_, line_ }

namespace emulator {
struct Site {
  const char* file;
  int line;
};
struct ThreadIndex {
  uint3 thread, block, block_size, grid_size;
  int lane, warp, linear;
  int cluster_rank;
};
extern ThreadIndex* current;

void block_barrier(int id, int threads, Site);  // threads = 0: __syncthreads
void warp_barrier(unsigned mask, Site);
// The lanes of `mask` meet; the last to arrive runs body(arguments of the 32 lanes, mask) for all.
typedef void (*Collective)(void** arguments, unsigned mask);
void warp_collective(int kind, unsigned mask, void* argument, Collective body, Site);
void* shared_take(size_t bytes, size_t align, const char* name, Site);
void shared_all_taken(size_t given, Site);
void cp_async(void* to, const void* from, int bytes, int valid, Site);
void cp_async_commit(Site);
void cp_async_wait(int pending, Site);
void ldmatrix(uint32_t* r, const void* row, bool transposed, Site);
uint32_t movmatrix(uint32_t x, Site);
enum MmaKind { MMA_BF16, MMA_F16, MMA_TF32 };
void mma(float* d, const uint32_t* a, const uint32_t* b, MmaKind kind, Site);
void atomic_access(const void* p, size_t bytes, Site);
// Compute capability 9.0.
uint32_t shared_address(const void* p, Site);
void mbarrier_init(uint64_t* barrier, int arrivals, Site);
void mbarrier_init_fence();
void mbarrier_arrive(uint64_t* barrier, int bytes, Site);  // which it expects besides
void mbarrier_wait(uint64_t* barrier, int parity, Site);
struct Coordinates {
  int x, y, z, w;
};
void tma_load(void* to, const void* map, uint64_t* barrier, Coordinates, Site);
void tma_store(const void* map, const void* from, Coordinates, Site);
void tma_store_commit();
void tma_store_wait_read(int pending);
void async_proxy_fence();
void cluster_arrive(Site);
void cluster_wait(Site);
void* in_block(const void* p, int rank, Site);  // the same place in the shared memory of another block of the cluster
void cluster_send(void* to, const void* from, int bytes, uint64_t* barrier, Site);  // to and barrier of one block
void stmatrix(void* row, const uint32_t* r, bool transposed, Site);
struct Wgmma {
  MmaKind kind;
  int tiles;          // of 8 columns
  const uint32_t* a;  // fragments, or null
  uint64_t a_tile, b_tile;
  bool a_columns, b_columns, accumulate, negate;  // negate: -A
  bool at_once;  // d has its value on return, as code needs that moves registers before the wait
};
void wgmma(float* d, const Wgmma&, Site);
void wgmma_fence(Site);
void check_uniform(int mine, int first, Site);
void wgmma_commit(Site);
void wgmma_wait(int pending, Site);
// For code made from PTX: shared memory as one array, and accesses that no compiler instruments.
void shared_all(const char* name, Site);
void* shared_start();
uint8_t* shared_window();
void memory_access(const void* p, size_t bytes, bool write, Site);

template <class... A, size_t... I>
inline void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*(std::remove_reference_t<A>*)arguments[I]...);
}
template <class... A>
inline void call(void (*kernel)(A...), void** arguments) {
  call(kernel, arguments, std::index_sequence_for<A...>{});
}
template <class... A>
inline int sizes(void (*)(A...), int* out) {
  int all[] = {(int)sizeof(A)..., 0};
  memcpy(out, all, sizeof...(A) * sizeof(int));
  return sizeof...(A);
}
}  // namespace emulator

#define EMULATOR_CLUSTER_RANGE(n) \
  extern "C" __attribute__((weak, visibility("hidden"))) const char __start_clusters_of_##n[], __stop_clusters_of_##n[];
EMULATOR_CLUSTER_RANGE(2)
EMULATOR_CLUSTER_RANGE(4)
EMULATOR_CLUSTER_RANGE(8)
namespace emulator {
inline int cluster_size(const void* kernel) {
  auto within = [&](const char* start, const char* stop) { return kernel >= start && kernel < stop; };
  if (within(__start_clusters_of_2, __stop_clusters_of_2)) return 2;
  if (within(__start_clusters_of_4, __stop_clusters_of_4)) return 4;
  return within(__start_clusters_of_8, __stop_clusters_of_8) ? 8 : 1;
}
}  // namespace emulator

#define EMULATOR_EXPORT(name)                                                                      \
  extern "C" void emulator_kernel_##name(void** arguments) { ::emulator::call(&name, arguments); } \
  extern "C" int emulator_sizes_##name(int* out) { return ::emulator::sizes(&name, out); }         \
  extern "C" int emulator_cluster_##name() { return ::emulator::cluster_size((const void*)&name); }

#define threadIdx (::emulator::current->thread)
#define blockIdx (::emulator::current->block)
#define blockDim (::emulator::current->block_size)
#define gridDim (::emulator::current->grid_size)
constexpr int warpSize = 32;

inline void __syncthreads(SITE) { emulator::block_barrier(0, 0, HERE); }
inline void __syncwarp(unsigned mask = ~0u, SITE) { emulator::warp_barrier(mask, HERE); }

// ---- shuffles: 32- and 64-bit types; reading a lane outside the mask gives all ones ----------------

namespace emulator {
struct Shuffle {
  uint64_t in, out;
  int from;
};
inline void shuffle_body(void** arguments, unsigned mask) {
  for (int lane = 0; lane < 32; lane++) {
    if (!(mask >> lane & 1)) continue;
    Shuffle* s = (Shuffle*)arguments[lane];
    s->out = (mask >> s->from & 1) ? ((Shuffle*)arguments[s->from])->in : ~0ull;
  }
}
template <class T>
inline T shuffle(unsigned mask, T value, int from, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  Shuffle s{0, 0, from & 31};
  memcpy(&s.in, &value, sizeof(T));
  warp_collective(1, mask, &s, shuffle_body, site);
  T result;
  memcpy(&result, &s.out, sizeof(T));
  return result;
}
}  // namespace emulator
template <class T>
inline T __shfl_sync(unsigned mask, T value, int from, int width = 32, SITE) {
  int lane = emulator::current->lane;
  return emulator::shuffle(mask, value, (lane & ~(width - 1)) | (from & (width - 1)), HERE);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SITE) {
  int lane = emulator::current->lane, from = lane ^ bits;
  return emulator::shuffle(mask, value, (from & ~(width - 1)) == (lane & ~(width - 1)) ? from : lane, HERE);
}

// Not instrumented: atomics do not race with each other.
template <class T>
__attribute__((no_sanitize_thread, noinline)) T atomicAdd(T* p, T value, SITE) {
  static_assert(std::is_integral<T>::value, "sums of floating-point numbers must not depend on an order");
  emulator::atomic_access(p, sizeof(T), HERE);
  T old = *p;
  *p = old + value;
  return old;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __uint_as_float(unsigned x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __float_as_uint(float x) {
  unsigned y;
  memcpy(&y, &x, 4);
  return y;
}
template <class T>
inline T __ldg(const T* p) {
  return *p;
}
