#include "layer_device.cuh"

namespace bootgrad {

cudaError_t run_layer_float(const LayerCall& call, const CudaDevice& device) {
  return run_layer_on<float>(call, device);
}

}  // namespace bootgrad
