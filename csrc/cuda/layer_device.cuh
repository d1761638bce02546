// A CUDA device as layer_ops.cuh wants it, and the definition of one dtype's run_layer. No torch here, which makes the
// kernels quick to compile.

#pragma once

#include <bootgrad/layer_ops.cuh>

#include <cuda_runtime.h>

#include <limits>

#include "layer.h"

namespace bootgrad {

class CudaLauncher {
 public:
  explicit CudaLauncher(const CudaDevice& device)
      : multiprocessors(device.multiprocessors),
        shared_limit(device.shared_limit),
        cache_bytes(device.cache_bytes),
        device_(device) {}

  void* allocate(int64_t bytes) { return device_.allocate(device_.context, bytes); }

  template <class Params>
  void launch(void (*kernel)(Params), const Params& params, int64_t blocks, int64_t bytes) {
    if (blocks == 0 || error != cudaSuccess) {
      return;
    }
    if (blocks > std::numeric_limits<int32_t>::max()) {
      error = cudaErrorInvalidConfiguration;
      *device_.refused = blocks;
      return;
    }
    // More than this has to be asked for.
    if (bytes > 48 * 1024) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
      if (error != cudaSuccess) {
        return;
      }
    }
    kernel<<<unsigned(blocks), kThreads, size_t(bytes), device_.stream>>>(params);
    error = cudaGetLastError();
  }

  const int64_t multiprocessors, shared_limit, cache_bytes;
  cudaError_t error = cudaSuccess;

 private:
  const CudaDevice& device_;
};

template <typename In>
cudaError_t run_layer_on(const LayerCall& call, const CudaDevice& device) {
  CudaLauncher launcher(device);
  run_layer<In>(call, launcher);
  return launcher.error;
}

}  // namespace bootgrad
