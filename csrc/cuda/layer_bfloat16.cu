#include "layer_device.cuh"

namespace bootgrad {

cudaError_t run_layer_bfloat16(const LayerCall& call, const CudaDevice& device) {
  return run_layer_on<__nv_bfloat16>(call, device);
}

}  // namespace bootgrad
