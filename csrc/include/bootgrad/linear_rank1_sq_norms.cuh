// Squared norms of a linear layer's per-sample gradients where there is one position: G_i = gy_i ⊗ x_i has rank one.
//
//     s_i = ‖x_i‖² ‖gy_i‖²           x (B, I), gy (B, O), s (B,)
//
// Bound by memory: one read of x and gy. A group of kGroup threads takes one sample: a warp for short rows, a whole
// block for long ones. Number n of a row always belongs to the same thread, whether it comes by a 16-byte load or
// alone, so alignment and strides do not change a bit of the result.

#pragma once

#include <bootgrad/device.cuh>

namespace bootgrad {

// Strides in elements. The aligned_ flags promise what has_aligned_rows checks.
template <typename T>
struct LinearRank1SqNormsParams {
  const T* x;
  const T* gy;
  Accumulator<T>* out;
  int64_t B;
  int64_t I;
  int64_t O;
  int64_t stride_xb;
  int64_t stride_xi;
  int64_t stride_gb;
  int64_t stride_go;
  bool aligned_x;
  bool aligned_gy;
};

constexpr int kLinearRank1SqNormsThreads = 256;

// Rows of up to 16 KiB in all leave at most 32 loads to a thread of a warp.
template <typename T>
__host__ __device__ constexpr bool linear_rank1_sq_norms_uses_warps(int64_t I, int64_t O) {
  return (I + O) * int64_t(sizeof(T)) <= 16384;
}

// Thread `rank` of `kGroup` sums the squares of every kGroup-th chunk of a row.
template <typename T, int kGroup>
__device__ __forceinline__ Accumulator<T> partial_sq_norm(const T* row, int64_t length, int64_t stride, bool aligned,
                                                          int rank) {
  constexpr int kSize = Chunk<T>::kSize;
  Accumulator<T> sum = 0;
  auto add = [&sum](const Chunk<T>& chunk) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const Accumulator<T> value = to_accumulator(chunk.values[j]);
      sum += value * value;
    }
  };
  int64_t start = int64_t(rank) * kSize;
  if (aligned) {
#pragma unroll 4
    for (; start + kSize <= length; start += kGroup * kSize) {
      add(load_aligned_chunk(row, start));
    }
  }
  for (; start < length; start += kGroup * kSize) {
    add(load_chunk(row, start, length, stride));
  }
  return sum;
}

// Grid: ceil(B * kGroup / kLinearRank1SqNormsThreads) blocks of kLinearRank1SqNormsThreads; kGroup is 32 or all of a
// block.
template <typename T, int kGroup>
__global__ void __launch_bounds__(kLinearRank1SqNormsThreads)
    linear_rank1_sq_norms_kernel(const LinearRank1SqNormsParams<T> p) {
  constexpr int kWarps = kGroup / kWarpSize;
  const int rank = threadIdx.x % kGroup;
  const int64_t b = int64_t(blockIdx.x) * (kLinearRank1SqNormsThreads / kGroup) + threadIdx.x / kGroup;
  if (b >= p.B) {
    return;
  }
  Accumulator<T> xx = partial_sq_norm<T, kGroup>(p.x + b * p.stride_xb, p.I, p.stride_xi, p.aligned_x, rank);
  Accumulator<T> gg = partial_sq_norm<T, kGroup>(p.gy + b * p.stride_gb, p.O, p.stride_go, p.aligned_gy, rank);
  xx = warp_sum(xx);
  gg = warp_sum(gg);
  if constexpr (kWarps > 1) {
    __shared__ Accumulator<T> partials[2][kWarps];
    if (rank % kWarpSize == 0) {
      partials[0][rank / kWarpSize] = xx;
      partials[1][rank / kWarpSize] = gg;
    }
    __syncthreads();
    if (rank >= kWarpSize) {
      return;
    }
    xx = warp_sum(rank < kWarps ? partials[0][rank] : Accumulator<T>(0));
    gg = warp_sum(rank < kWarps ? partials[1][rank] : Accumulator<T>(0));
  }
  if (rank == 0) {
    p.out[b] = xx * gg;
  }
}

}  // namespace bootgrad
