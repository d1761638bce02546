#include "layer_device.cuh"

namespace bootgrad {

cudaError_t run_layer_double(const LayerCall& call, const CudaDevice& device) {
  return run_layer_on<double>(call, device);
}

}  // namespace bootgrad
