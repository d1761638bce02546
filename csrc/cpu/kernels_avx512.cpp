// The kernels with 64-byte vectors, for machines with AVX-512.

#include <cstddef>
#include <cstdint>

#include "bootgrad/layer.hpp"
#include "kernels.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,avx2"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,avx2,prefer-vector-width=512")
#endif

#define BOOTGRAD_ISA avx512
#define BOOTGRAD_VECTOR_BYTES 64
#include "bootgrad/kernels.hpp"

namespace bootgrad {
const Kernels kAvx512Kernels{"avx512",
                             avx512::conv,
                             avx512::conv_product,
                             avx512::linear_rank1,
                             avx512::group_norm,
                             avx512::max_pool,
                             avx512::max_pool_grad,
                             avx512::winograd,
                             avx512::winograd_sum,
                             avx512::sq_distances,
                             avx512::embedding,
                             avx512::attention_double_backward};
}  // namespace bootgrad

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
