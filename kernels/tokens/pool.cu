// States between the slots of a pool and an array with one per sequence, around walks in segments: others take them
// from slots and leave them there themselves. For each sequence n:
//
//   STORE 0:  states_n = pool[state_indices_n], zero if that is no slot, or if n is fresh
//   STORE 1:  pool[output_state_indices_n] = states_n, if that is a slot
//
// states_n is in the pool's layout.
//
// Numbers: rounded to nearest to POOL_DTYPE. Macros: ON_POOL (1), POOL_DTYPE, VECTOR: elements per access, which
// divides the size of a state and its address, 1 or 4; STORE. Grid: N * ceil(size / PIECE) blocks of THREADS threads,
// `size` elements in the state of a sequence, of all heads. Shared memory: none.
#include "tiles/pool.cuh"

constexpr int THREADS = 256, ACCESSES = 4, STEP = THREADS * VECTOR, PIECE = STEP * ACCESSES;

// Neighbours of a pool, as sums are.
PRIM float4 widen_four(const float* x) { return *(const float4*)x; }
template <class T>
PRIM float4 widen_four(const T* x) {
  const uint2 both = *(const uint2*)x;
  const float2 low = unpack2<T>(both.x), high = unpack2<T>(both.y);
  return make_float4(low.x, low.y, high.x, high.y);
}
PRIM void narrow_four(float* to, float4 x) { *(float4*)to = x; }
template <class T>
PRIM void narrow_four(T* to, float4 x) {
  *(uint2*)to = make_uint2(pack2<T>(x.x, x.y), pack2<T>(x.z, x.w));
}

// One access to or from `states`.
PRIM void load(float* state, const POOL_DTYPE* slot) {
  if constexpr (VECTOR == 4)
    *(float4*)state = slot == nullptr ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : widen_four(slot);
  else
    *state = slot == nullptr ? 0.0f : widen(*slot);
}
PRIM void store(POOL_DTYPE* slot, const float* state) {
  if constexpr (VECTOR == 4)
    narrow_four(slot, *(const float4*)state);
  else
    *slot = narrow<POOL_DTYPE>(*state);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    pool_states(const int64_t* state_indices, const int64_t* output_state_indices, const bool* fresh, POOL_DTYPE* state,
                int64_t pool_stride, int pool_slots, float* states, int64_t size) {
  const int64_t pieces = (size + PIECE - 1) / PIECE, n = blockIdx.x / pieces;
  const Slots slots = {state_indices, output_state_indices, fresh, pool_stride, pool_slots};
  const int64_t place = STORE ? slots.written(n) : slots.read(n);
  if (STORE && place < 0) return;
  float* own = states + n * size;
  const int64_t first = blockIdx.x % pieces * PIECE + (int64_t)threadIdx.x * VECTOR;
#pragma unroll
  for (int i = 0; i < ACCESSES; i++) {
    const int64_t at = first + i * STEP;
    if (at >= size) continue;
    if (STORE)
      store(state + place + at, own + at);
    else
      load(own + at, place < 0 ? nullptr : state + place + at);
  }
}
