// A launch that no grid holds is refused before CUDA is asked, and says how large it was. Runs without a GPU.

#include "layer_device.cuh"

#include <cstdio>

struct Params {};

int main() {
  int64_t refused = 0;
  bootgrad::CudaDevice device{};
  device.refused = &refused;
  bootgrad::CudaLauncher launcher(device);
  launcher.launch<Params>(nullptr, Params{}, 0, 0);
  std::printf("%lld %d\n", (long long)refused, int(launcher.error));
  launcher.launch<Params>(nullptr, Params{}, int64_t(1) << 31, 0);
  std::printf("%lld %d\n", (long long)refused, int(launcher.error));
  return 0;
}
