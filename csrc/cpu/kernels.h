// The instruction sets compiled into this library, and the choice among them.

#pragma once

#include "bootgrad/layer.hpp"

namespace bootgrad {

#if defined(__x86_64__)
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx2Kernels;
#endif
extern const Kernels kBaselineKernels;

// The best that this machine runs, at most what BOOTGRAD_ISA=avx512|avx2|baseline in the environment names.
const Kernels& kernels();

}  // namespace bootgrad
