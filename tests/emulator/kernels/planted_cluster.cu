// A small kernel of clusters with a switchable mistake for each of their rules.
//
//   y_b = sum over t of x_c,t, where block c comes before b in the ring of their cluster
//
// In round t each block sends row t of its x to the next block, whose threads add it up and then free the sender's
// copy. With BUG_X defined the mistake X is made; the line that must be blamed carries the comment "blame X". Grid:
// clusters of CLUSTER blocks of 64 threads. Shared memory: 544 bytes.
#include "primitives/hopper.cuh"

constexpr int THREADS = 64, ROW_BYTES = THREADS * 4;

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS)
    planted(const float* x, float* y, int* ranks, int rounds) {
  DynSmem smem;
  uint64_t* full = smem.take<uint64_t>(1, "full");
  uint64_t* free = smem.take<uint64_t>(1, "free");
  float* sent = smem.take<float>(THREADS, "sent");
  float* received = smem.take<float>(THREADS, "received");
  const int thread = threadIdx.x, rank = cluster_rank(), before = (rank + CLUSTER - 1) % CLUSTER;
#ifdef BUG_RANK
  const int next = rank + 1;
#else
  const int next = (rank + 1) % CLUSTER;
#endif
  if (thread == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(free, THREADS);
#ifndef BUG_NO_INIT_FENCE
    mbarrier_init_fence();
#endif
    ranks[blockIdx.x] = rank;
  }
#ifdef BUG_NO_FIRST_SYNC
  __syncthreads();
#else
  cluster_sync();
#endif

  float sum = 0.0f;
  for (int t = 0; t < rounds; t++) {
#ifndef BUG_NO_FREE_WAIT
    if (t > 0) mbarrier_wait(free, (t - 1) % 2);
#endif
    sent[thread] = x[(blockIdx.x * rounds + t) * THREADS + thread];  // blame NO_FREE_WAIT
#ifndef BUG_NO_PROXY_FENCE
    async_proxy_fence();
#endif
    __syncthreads();
    if (thread == 0) {
#if defined(BUG_MANY_BYTES)
      mbarrier_arrive_expect_remote(full, ROW_BYTES + 16, next);
#elif defined(BUG_NOT_SHARED)
      mbarrier_arrive_expect_remote((uint64_t*)y, ROW_BYTES, next);  // blame NOT_SHARED
#else
      mbarrier_arrive_expect_remote(full, ROW_BYTES, next);  // blame NO_FIRST_SYNC NO_INIT_FENCE RANK
#endif
#if defined(BUG_OVERRUN)
      cluster_send(received + 4, sent, ROW_BYTES, full, next);  // blame OVERRUN
#elif defined(BUG_FAR_OVERRUN)
      cluster_send(received, sent, (256 << 10) + 16, full, next);  // blame FAR_OVERRUN
#elif defined(BUG_ALIGN)
      cluster_send(received + 2, sent, ROW_BYTES, full, next);  // blame ALIGN
#elif defined(BUG_BYTES)
      cluster_send(received, sent, ROW_BYTES - 8, full, next);  // blame BYTES
#else
      cluster_send(received, sent, ROW_BYTES, full, next);  // blame NO_PROXY_FENCE EARLY_FREE NO_LAST_SYNC
#endif
    }
#ifdef BUG_NO_FULL_WAIT
    if (rank == 1)
#endif
      mbarrier_wait(full, t % 2);  // blame MANY_BYTES
#ifdef BUG_EARLY_FREE
    mbarrier_arrive_remote(free, before);
#endif
    sum += received[thread];  // blame NO_FULL_WAIT EARLY_FREE
#ifndef BUG_EARLY_FREE
    mbarrier_arrive_remote(free, before);
#endif
  }
  y[blockIdx.x * THREADS + thread] = sum;
#ifndef BUG_NO_LAST_SYNC
  cluster_sync();
#endif
#ifdef BUG_SEND_AT_EXIT
  if (rank == 0 && thread == 0) {
    mbarrier_arrive_expect_remote(full, ROW_BYTES, 1);
    cluster_send(received, sent, ROW_BYTES, full, 1);  // blame SEND_AT_EXIT
  }
  if (rank == 1) mbarrier_wait(full, rounds % 2);
#endif
}
