// What the CUDA kernels share: numbers as their accumulation type, 16-byte chunks of a row, a block's dynamic shared
// memory, sums over a group of threads.
//
// Plain CUDA C++ on raw pointers. tests/csrc/emulation compiles it unchanged for the CPU, one thread per CUDA thread.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace bootgrad {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

__device__ __forceinline__ float to_accumulator(float value) { return value; }
__device__ __forceinline__ double to_accumulator(double value) { return value; }
__device__ __forceinline__ float to_accumulator(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_accumulator(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_accumulator(decltype(to_accumulator(T())) value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_accumulator<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_accumulator<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// The type in which sums over numbers of type T are kept.
template <typename T>
using Accumulator = decltype(to_accumulator(T()));

// As many numbers as one 16-byte load brings.
template <typename T>
struct alignas(16) Chunk {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

// Whether every row that starts at data + i * row_stride can be read in whole chunks.
template <typename T>
__host__ __device__ __forceinline__ bool has_aligned_rows(const T* data, int64_t row_stride, int64_t stride) {
  return stride == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride % Chunk<T>::kSize == 0;
}

template <typename T>
__device__ __forceinline__ Chunk<T> load_aligned_chunk(const T* row, int64_t start) {
  Chunk<T> chunk;
  *reinterpret_cast<uint4*>(chunk.values) = *reinterpret_cast<const uint4*>(row + start);
  return chunk;
}

// The same numbers one by one: any stride, zeros from the end of the row on.
template <typename T>
__device__ __forceinline__ Chunk<T> load_chunk(const T* row, int64_t start, int64_t length, int64_t stride) {
  Chunk<T> chunk;
#pragma unroll
  for (int j = 0; j < Chunk<T>::kSize; ++j) {
    chunk.values[j] = start + j < length ? row[(start + j) * stride] : T();
  }
  return chunk;
}

#ifdef __CUDACC__
// The block's shared memory whose size the launch tells.
__device__ __forceinline__ void* dynamic_shared_memory() {
  extern __shared__ uint4 memory[];
  return memory;
}
#endif

// The sum over the 32 threads of a warp, in a fixed order, known to all of them.
template <typename A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullMask, value, offset);
  }
  return value;
}

}  // namespace bootgrad
