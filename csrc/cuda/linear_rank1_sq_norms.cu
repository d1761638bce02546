// The op linear_rank1_sq_norms on CUDA: checks, launch and registration.

#include <bootgrad/linear_rank1_sq_norms.cuh>

#include <limits>

#include "checks.h"
#include "launch.h"

namespace bootgrad {
namespace {

template <typename T, int kGroup>
void launch_groups(const LinearRank1SqNormsParams<T>& params, cudaStream_t stream) {
  constexpr int kPerBlock = kLinearRank1SqNormsThreads / kGroup;
  const int64_t blocks = (params.B + kPerBlock - 1) / kPerBlock;
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "batch size must be below 2^31; got ", params.B);
  linear_rank1_sq_norms_kernel<T, kGroup>
      <<<static_cast<unsigned>(blocks), kLinearRank1SqNormsThreads, 0, stream>>>(params);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void launch(const Tensor& x, const Tensor& gy, const Tensor& out) {
  LinearRank1SqNormsParams<T> params{};
  params.x = static_cast<const T*>(x.const_data_ptr());
  params.gy = static_cast<const T*>(gy.const_data_ptr());
  params.out = static_cast<Accumulator<T>*>(out.mutable_data_ptr());
  params.B = x.size(0);
  params.I = x.size(1);
  params.O = gy.size(1);
  params.stride_xb = x.stride(0);
  params.stride_xi = x.stride(1);
  params.stride_gb = gy.stride(0);
  params.stride_go = gy.stride(1);
  params.aligned_x = has_aligned_rows(params.x, params.stride_xb, params.stride_xi);
  params.aligned_gy = has_aligned_rows(params.gy, params.stride_gb, params.stride_go);
  if (linear_rank1_sq_norms_uses_warps<T>(params.I, params.O)) {
    launch_groups<T, kWarpSize>(params, current_stream(x));
  } else {
    launch_groups<T, kLinearRank1SqNormsThreads>(params, current_stream(x));
  }
}

Tensor linear_rank1_sq_norms(const Tensor& x, const Tensor& gy) {
  STD_TORCH_CHECK(x.dim() == 2 && gy.dim() == 2, "x and gy must be (B, I) and (B, O); got ", x.dim(), " and ", gy.dim(),
                  " dimensions");
  check_pair(x, gy);
  check_devices(x, gy);
  const Tensor out = torch::stable::new_empty(x, {x.size(0)}, accumulation_type(x));
  if (x.size(0) == 0) {
    return out;
  }
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  switch (x.scalar_type()) {
    case ScalarType::Double: launch<double>(x, gy, out); break;
    case ScalarType::Float: launch<float>(x, gy, out); break;
    case ScalarType::Half: launch<__half>(x, gy, out); break;
    default: launch<__nv_bfloat16>(x, gy, out);
  }
  return out;
}

}  // namespace
}  // namespace bootgrad

STABLE_TORCH_LIBRARY_IMPL(bootgrad_cuda, CUDA, m) {
  m.impl("linear_rank1_sq_norms", TORCH_BOX(&bootgrad::linear_rank1_sq_norms));
}
