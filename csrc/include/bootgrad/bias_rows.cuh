// The bias's per-sample gradients Σ_t gy_{i,t}: (B, O). Bound by memory: one read of gy.
//
// A block takes a sample's kBiasChannels channels. Its threads are neighbours along positions or along channels,
// whichever lie side by side in memory.

#pragma once

#include <bootgrad/gather.cuh>
#include <bootgrad/tile_product.cuh>

namespace bootgrad {

constexpr int kBiasChannels = 32;

template <typename In>
struct BiasRowsParams {
  Gather<In> gy;  // rows: all channels
  Accumulator<In>* out;
  int64_t B;
  int32_t blocks_o;  // ceil(O / kBiasChannels)
};

// Grid: B · blocks_o blocks of kThreads.
template <typename In>
__global__ void __launch_bounds__(kThreads) bias_rows_kernel(const BiasRowsParams<In> p) {
  using Sum = Accumulator<In>;
  const int64_t b = int64_t(blockIdx.x) / p.blocks_o;
  const int32_t o0 = int32_t(int64_t(blockIdx.x) % p.blocks_o) * kBiasChannels, O = p.gy.index.rows;
  const int32_t warp = int32_t(threadIdx.x) / kWarpSize, lane = int32_t(threadIdx.x) % kWarpSize;
  const auto load = [&](int32_t o, int32_t t) {
    const int64_t from = p.gy.offset(p.gy.position(b, 0, t), p.gy.row(o));
    return from >= 0 ? to_accumulator(p.gy.data[from]) : Sum(0);
  };
  if (p.gy.along_rows) {
    __shared__ Sum partial[kWarps][kBiasChannels];
    Sum sum = 0;
    for (int32_t t = warp; o0 + lane < O && t < p.gy.positions; t += kWarps) {
      sum += load(o0 + lane, t);
    }
    partial[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && o0 + lane < O) {
      for (int w = 1; w < kWarps; ++w) {
        sum += partial[w][lane];
      }
      p.out[b * O + o0 + lane] = sum;
    }
    return;
  }
  for (int32_t o = o0 + warp; o < O && o < o0 + kBiasChannels; o += kWarps) {
    Sum sum = 0;
    for (int32_t t = lane; t < p.gy.positions; t += kWarpSize) {
      sum += load(o, t);
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      p.out[b * O + o] = sum;
    }
  }
}

}  // namespace bootgrad
