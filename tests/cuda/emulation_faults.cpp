// Kernels that do what the emulation must do right, or catch:  sum | race | overrun | misaligned

#include "cuda_emulation.h"

#include <cstdio>
#include <string>

namespace {

constexpr unsigned kThreads = 64;

// Every thread gets the sum over the block, by shuffles and shared memory; `synchronized` is what a careless author
// forgets.
void block_sum(const float* values, float* out, bool synchronized) {
  __shared__ float partials[kThreads / emulation::kWarpSize];
  float sum = values[blockIdx.x * kThreads + threadIdx.x];
  for (int offset = 16; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  }
  if (threadIdx.x % emulation::kWarpSize == 0) {
    partials[threadIdx.x / emulation::kWarpSize] = sum;
  }
  if (synchronized) {
    __syncthreads();
  }
  out[blockIdx.x * kThreads + threadIdx.x] = partials[0] + partials[1];
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  std::vector<float> values(2 * kThreads), out(2 * kThreads, -1.0f);
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = float(i);
  }
  if (mode == "sum" || mode == "race") {
    emulation::launch(2, kThreads, [&] { block_sum(values.data(), out.data(), mode == "sum"); });
  } else if (mode == "overrun") {
    emulation::launch(1, kThreads, [&] { out[threadIdx.x] = values.data()[2 * threadIdx.x + 2]; });
  } else if (mode == "misaligned") {
    uint4 loaded[kThreads / 4];
    emulation::launch(1, kThreads / 4, [&] {
      loaded[threadIdx.x] = *reinterpret_cast<const uint4*>(values.data() + 4 * threadIdx.x + 1);
    });
    out[0] = float(loaded[0].x);
  }
  for (const float value : out) {
    std::printf("%g\n", double(value));
  }
  return 0;
}
