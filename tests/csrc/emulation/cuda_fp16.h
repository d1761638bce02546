// __half for the CPU, in place of CUDA's header of this name.

#pragma once

struct __half {
  __half() = default;
  explicit __half(float value) : value(static_cast<_Float16>(value)) {}
  _Float16 value;
};

inline float __half2float(__half number) { return static_cast<float>(number.value); }

inline __half __float2half_rn(float value) { return __half(value); }
