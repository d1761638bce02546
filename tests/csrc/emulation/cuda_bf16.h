// __nv_bfloat16 for the CPU, in place of CUDA's header of this name: the upper half of a float, rounded to nearest,
// ties to even.

#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof(word));
    bits = static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
  }
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 number) {
  const uint32_t word = uint32_t(number.bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16(value); }
