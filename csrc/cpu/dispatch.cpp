#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace bootgrad {

namespace {

const Kernels& choose() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("BOOTGRAD_ISA");
  const auto allowed = [&](const Kernels& k) { return wanted == nullptr || std::strcmp(wanted, k.name) == 0; };
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && allowed(kAvx512Kernels)) return kAvx512Kernels;
  if (avx2 && allowed(kAvx2Kernels)) return kAvx2Kernels;
#endif
  return kBaselineKernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace bootgrad

// For `bootgrad info`, which reads it through ctypes.
extern "C" __attribute__((visibility("default"))) const char* bootgrad_isa() { return bootgrad::kernels().name; }
