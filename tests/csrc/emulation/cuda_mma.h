// Tensor cores on the CPU: what mma.cuh does by one instruction of a warp, from the registers of its 32 lanes.
//
// The layouts are those of the PTX manual, "Matrix Fragments for mma.m16n8k16" and "m16n8k8": with g = lane / 4 and
// q = lane % 4, lanes hold rows g and g + 8 of A, column g of B, and columns 2q and 2q + 1 of those rows of D.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_emulation.h"

namespace bootgrad {

struct Tf32;

}  // namespace bootgrad

namespace emulation {

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) <= sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline float half_of(uint32_t word, int which, __half*) {
  return __half2float(bits_as<__half>(uint16_t(word >> (16 * which))));
}
inline float half_of(uint32_t word, int which, __nv_bfloat16*) {
  return __bfloat162float(bits_as<__nv_bfloat16>(uint16_t(word >> (16 * which))));
}

// Registers hold two numbers along k: k = 2q and 2q + 1, eight more in the upper half of the registers.
template <typename E>
struct Fragments {
  static constexpr int kDepth = 16;
  static float a(const Warp& warp, int m, int k) {
    return half_of(warp.fragments[m % 8 * 4 + k % 8 / 2][m / 8 + 2 * (k / 8)], k % 2, static_cast<E*>(nullptr));
  }
  static float b(const Warp& warp, int k, int n) {
    return half_of(warp.fragments[n * 4 + k % 8 / 2][4 + k / 8], k % 2, static_cast<E*>(nullptr));
  }
};

// One number a register: k = q, and q + 4 in the upper half. The hardware ignores the 13 lowest bits.
template <>
struct Fragments<bootgrad::Tf32> {
  static constexpr int kDepth = 8;
  static float number(uint32_t word) { return bits_as<float>(word & ~uint32_t(0x1fff)); }
  static float a(const Warp& warp, int m, int k) {
    return number(warp.fragments[m % 8 * 4 + k % 4][m / 8 + 2 * (k / 4)]);
  }
  static float b(const Warp& warp, int k, int n) { return number(warp.fragments[n * 4 + k % 4][4 + k / 4]); }
};

}  // namespace emulation

namespace bootgrad {

inline float to_tf32(float value) {
  if (!std::isfinite(value)) {
    return value;
  }
  const uint32_t bits = emulation::bits_as<uint32_t>(value);
  return emulation::bits_as<float>((bits + 0x1000u) & ~uint32_t(0x1fff));
}

template <typename E>
void warp_multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  using Fragments = emulation::Fragments<E>;
  emulation::Warp& warp = emulation::warp();
  const int lane = int(threadIdx.x % emulation::kWarpSize);
  std::memcpy(warp.fragments[lane], a, sizeof(a));
  std::memcpy(warp.fragments[lane] + 4, b, sizeof(b));
  warp.barrier.arrive_and_wait();
  for (int e = 0; e < 4; ++e) {
    for (int k = 0; k < Fragments::kDepth; ++k) {
      d[e] += Fragments::a(warp, lane / 4 + e / 2 * 8, k) * Fragments::b(warp, k, lane % 4 * 2 + e % 2);
    }
  }
  warp.barrier.arrive_and_wait();
}

}  // namespace bootgrad
