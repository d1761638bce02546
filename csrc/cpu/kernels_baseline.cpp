// The kernels with 16-byte vectors, which every 64-bit machine has (SSE2, NEON).

#include <cstddef>
#include <cstdint>

#include "bootgrad/layer.hpp"
#include "kernels.h"

#define BOOTGRAD_ISA baseline
#define BOOTGRAD_VECTOR_BYTES 16
#include "bootgrad/kernels.hpp"

namespace bootgrad {
const Kernels kBaselineKernels{"baseline",
                               baseline::conv,
                               baseline::conv_product,
                               baseline::linear_rank1,
                               baseline::group_norm,
                               baseline::max_pool,
                               baseline::max_pool_grad,
                               baseline::winograd,
                               baseline::winograd_sum,
                               baseline::sq_distances,
                               baseline::embedding,
                               baseline::attention_double_backward};
}  // namespace bootgrad
