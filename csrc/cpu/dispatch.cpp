#include <strings.h>

#include <cstdlib>

#include "host.h"
#include "kernels.h"

namespace bootgrad {

namespace {

enum Isa { kBaseline, kAvx2, kAvx512 };
constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

// The most that BOOTGRAD_ISA lets us use; unset or empty, it leaves the choice to the machine.
Isa allowed() {
  const char* wanted = std::getenv("BOOTGRAD_ISA");
  if (wanted == nullptr || *wanted == '\0') return kAvx512;
  for (const Isa isa : {kBaseline, kAvx2, kAvx512})
    if (strcasecmp(wanted, kNames[isa]) == 0) return isa;
  require(false, "BOOTGRAD_ISA must be one of avx512, avx2, baseline; got '", wanted, "'");
  return kBaseline;
}

const Kernels& choose() {
  [[maybe_unused]] const Isa most = allowed();
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && most >= kAvx512) return kAvx512Kernels;
  if (avx2 && most >= kAvx2) return kAvx2Kernels;
#endif
  return kBaselineKernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace bootgrad

// For `bootgrad info`, which reads it through ctypes and so cannot be given an exception; empty where the ops raise it.
extern "C" __attribute__((visibility("default"))) const char* bootgrad_isa() {
  try {
    return bootgrad::kernels().name;
  } catch (const std::exception&) {
    return "";
  }
}
