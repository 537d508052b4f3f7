// The one header that kernels include for types and instructions.
//
// On the device every primitive is one instruction or one tiny idiom, written in device.cuh, the
// only file with inline PTX. With CUEMU defined the same names come from the CPU emulator's host
// twins (tests/emulator/include), which also check each use.
#pragma once

#ifdef CUEMU
#include "cuda_on_cpu.h"
#define PRIM inline
#else
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef int int32_t;
typedef long long int64_t;
#define PRIM __device__ __forceinline__
#define KSM (__CUDA_ARCH__)
#endif

// Storage of 16-bit floats; arithmetic is in float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct IsHalf {
  static constexpr bool value = false;
};
template <>
struct IsHalf<f16> {
  static constexpr bool value = true;
};

// What sums of a type are kept in.
template <class T>
struct Sum {
  typedef float type;
};
template <>
struct Sum<double> {
  typedef double type;
};

#ifdef CUEMU
#include "primitives_on_cpu.h"
#else
#include "primitives/device.cuh"
#endif
