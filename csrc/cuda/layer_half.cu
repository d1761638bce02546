#include "layer_device.cuh"

namespace bootgrad {

cudaError_t run_layer_half(const LayerCall& call, const CudaDevice& device) {
  return run_layer_on<__half>(call, device);
}

}  // namespace bootgrad
