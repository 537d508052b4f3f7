// Which head of which sequence tokens/decode.cu takes a number of a head for.
#define DTYPE float
#define STATE_DTYPE float
#define BETA_DTYPE float
#define GATE_DTYPE float
#define GROUP 1
#define HAS_GATE 0
#define RAW_GATE 0
#define RAW_BETA 0
#define BIAS 0
#define HEAD_K 1
#define VARLEN 0
#define ONE_TOKEN 1
#define ORDERED 1
#define STREAMED 0
#include "tokens/decode/inputs.cuh"

// Of each of 64 numbers, by so many heads.
//
// Grid: 1 block of 64 threads. No shared memory.
extern "C" __global__ void __launch_bounds__(64)
    heads(uint32_t* n, uint32_t* hv, const uint32_t* numbers, uint32_t HV, uint32_t inverse) {
  const Head head(numbers[threadIdx.x], HV, inverse);
  n[threadIdx.x] = head.n, hv[threadIdx.x] = head.hv;
}
