#include "layer_device.cuh"

namespace bootgrad {

cudaError_t run_layer_tf32(const LayerCall& call, const CudaDevice& device) {
  return run_layer_on<float, true>(call, device);
}

}  // namespace bootgrad
