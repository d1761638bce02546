// Everything of one instruction set, as the functions of `Kernels`. Included by one source file per instruction set.

#include "bootgrad/simd.hpp"

#include "bootgrad/gemm.hpp"
#include "bootgrad/pack.hpp"

#include "bootgrad/conv.hpp"

#include "bootgrad/conv_sums.hpp"

#include "bootgrad/conv_direct.hpp"

#include "bootgrad/conv_applied.hpp"
#include "bootgrad/conv_gram.hpp"
#include "bootgrad/conv_narrow.hpp"
#include "bootgrad/conv_planes.hpp"

#include "bootgrad/group_norm.hpp"

#include "bootgrad/max_pool.hpp"

#include "bootgrad/winograd_tiles.hpp"

#include "bootgrad/winograd.hpp"
#include "bootgrad/winograd_sum.hpp"

#include "bootgrad/sq_distances.hpp"

#include "bootgrad/embedding.hpp"

#include "bootgrad/attention.hpp"

namespace bootgrad::BOOTGRAD_ISA {

template <class In>
void conv_of(const ConvCall& call) {
  if (call.h) {
    if (!call.dgy && !call.dx) return;
    return ConvNarrow<In>::fits(*call.plan) && !call.gram ? ConvNarrow<In>(call).run() : ConvApplied<In>(call).run();
  }
  const bool norms = call.sq_norms || call.deviation, sums = call.sum || (call.bias && !call.biased);
  const bool gram = norms && call.gram && call.plan->R > 0;  // without input features there is no patch to multiply
  if (ConvNarrow<In>::fits(*call.plan) && !gram) {
    if (norms || call.inner || sums) ConvNarrow<In>(call).run();
    return;
  }
  if (call.inner) return ConvJvp<In>(call).run();
  if (sums && (gram || !norms)) ConvWeightedSum<In>(call).run();
  if (gram) ConvGram<In>(call).run();
  if (norms && !gram) {
    if (sums && !call.dx && !call.dgy && !call.biased)
      ConvStatistics<In>(call).run();
    else
      ConvDirect<In>(call).run();
  }
}

inline void conv(const ConvCall& call) {
  switch (call.dtype) {
    case DType::f32: return conv_of<float>(call);
    case DType::f64: return conv_of<double>(call);
    case DType::bf16: return conv_of<bf16>(call);
    case DType::f16: return conv_of<f16>(call);
  }
}

template <class In>
void rank1_of(const Runtime& runtime, const void* x, const void* gy, int64_t B, int64_t I, int64_t O, void* out) {
  rank1(runtime, static_cast<const In*>(x), static_cast<const In*>(gy), B, I, O, static_cast<Compute<In>*>(out));
}

inline void linear_rank1(const Runtime& runtime, DType dtype, const void* x, const void* gy, int64_t B, int64_t I,
                         int64_t O, void* out) {
  switch (dtype) {
    case DType::f32: return rank1_of<float>(runtime, x, gy, B, I, O, out);
    case DType::f64: return rank1_of<double>(runtime, x, gy, B, I, O, out);
    case DType::bf16: return rank1_of<bf16>(runtime, x, gy, B, I, O, out);
    case DType::f16: return rank1_of<f16>(runtime, x, gy, B, I, O, out);
  }
}

}  // namespace bootgrad::BOOTGRAD_ISA
