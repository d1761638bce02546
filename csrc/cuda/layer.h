// Between the ops, which know torch, and the kernels, which do not: a device, and the layer's kernels by dtype.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include <bootgrad/layer_call.cuh>

namespace bootgrad {

struct CudaDevice {
  cudaStream_t stream;
  int64_t multiprocessors;
  int64_t shared_limit;  // bytes of shared memory a block may ask for
  int64_t cache_bytes;   // of the second cache that a chunk's gradients may take
  void* (*allocate)(void* context, int64_t bytes);
  void* context;
  int64_t* refused;  // set to the blocks of a launch that no grid holds
};

cudaError_t run_layer_double(const LayerCall& call, const CudaDevice& device);
cudaError_t run_layer_float(const LayerCall& call, const CudaDevice& device);
cudaError_t run_layer_half(const LayerCall& call, const CudaDevice& device);
cudaError_t run_layer_bfloat16(const LayerCall& call, const CudaDevice& device);

}  // namespace bootgrad
