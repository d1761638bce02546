// Everything of one instruction set, as a table of functions. Included by one source file per instruction set.

#include "bootgrad/simd.hpp"

#include "bootgrad/gemm.hpp"
#include "bootgrad/pack.hpp"

#include "bootgrad/conv.hpp"

namespace bootgrad::BOOTGRAD_ISA {

template <class In>
void run_conv(const ConvCall& call) {
  Conv<In>(call).run();
}

inline void conv(const ConvCall& call) {
  switch (call.dtype) {
    case DType::f32: return run_conv<float>(call);
    case DType::f64: return run_conv<double>(call);
    case DType::bf16: return run_conv<bf16>(call);
    case DType::f16: return run_conv<f16>(call);
  }
}

}  // namespace bootgrad::BOOTGRAD_ISA
