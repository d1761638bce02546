// The kernels with 32-byte vectors, for machines with AVX2 and fused multiply-add.

#include <cstddef>
#include <cstdint>

#include "bootgrad/layer.hpp"
#include "kernels.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define BOOTGRAD_ISA avx2
#define BOOTGRAD_VECTOR_BYTES 32
#include "bootgrad/kernels.hpp"

namespace bootgrad {
const Kernels kAvx2Kernels{"avx2",
                           avx2::conv,
                           avx2::conv_product,
                           avx2::linear_rank1,
                           avx2::group_norm,
                           avx2::max_pool,
                           avx2::max_pool_grad,
                           avx2::winograd,
                           avx2::winograd_sum,
                           avx2::sq_distances,
                           avx2::embedding,
                           avx2::attention_double_backward};
}  // namespace bootgrad

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
