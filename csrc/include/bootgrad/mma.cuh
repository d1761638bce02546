// Tensor cores: d[16, 8] += a[16, k] b[k, 8] by a warp, one instruction a call.
//
// Numbers are bfloat16 or float16 with k = 16, or Tf32, float32 with 10 bits of mantissa, with k = 8; sums are float32.
// tests/csrc/emulation/cuda_mma.h does the same for the CPU.

#pragma once

#include <bootgrad/device.cuh>

#ifdef __CUDACC__

namespace bootgrad {

struct Tf32;

// The nearest number with 10 bits of mantissa.
__device__ __forceinline__ float to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
}

template <typename E>
__device__ __forceinline__ void warp_multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define BOOTGRAD_MMA(E, shape, type)                                                          \
  template <>                                                                                 \
  __device__ __forceinline__ void warp_multiply_add<E>(float (&d)[4], const uint32_t (&a)[4], \
                                                       const uint32_t (&b)[2]) {              \
    asm("mma.sync.aligned." shape ".row.col.f32." type "." type                               \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                      \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                  \
  }

BOOTGRAD_MMA(__nv_bfloat16, "m16n8k16", "bf16")
BOOTGRAD_MMA(__half, "m16n8k16", "f16")
BOOTGRAD_MMA(Tf32, "m16n8k8", "tf32")

#undef BOOTGRAD_MMA

}  // namespace bootgrad

#else
#include "cuda_mma.h"
#endif
