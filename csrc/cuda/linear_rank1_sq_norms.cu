// bootgrad::linear_rank1_sq_norms on CUDA: checks, launch and registration.

#include <bootgrad/linear_rank1_sq_norms.cuh>

#include <limits>

#include "launch.h"

namespace bootgrad {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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
  STD_TORCH_CHECK(x.size(0) == gy.size(0), "x and gy must have one batch size; got ", x.size(0), " and ", gy.size(0));
  STD_TORCH_CHECK(x.scalar_type() == gy.scalar_type(), "x and gy must have one dtype");
  STD_TORCH_CHECK(x.is_cuda() && gy.is_cuda() && x.get_device_index() == gy.get_device_index(),
                  "x and gy must be on one device");
  const ScalarType dtype = x.scalar_type();
  const Tensor out =
      torch::stable::new_empty(x, {x.size(0)}, dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  if (x.size(0) == 0) {
    return out;
  }
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  switch (dtype) {
    case ScalarType::Double: launch<double>(x, gy, out); break;
    case ScalarType::Float: launch<float>(x, gy, out); break;
    case ScalarType::Half: launch<__half>(x, gy, out); break;
    case ScalarType::BFloat16: launch<__nv_bfloat16>(x, gy, out); break;
    default: STD_TORCH_CHECK(false, "x must be float64, float32, float16 or bfloat16");
  }
  return out;
}

}  // namespace
}  // namespace bootgrad

STABLE_TORCH_LIBRARY_IMPL(bootgrad, CUDA, m) {
  m.impl("linear_rank1_sq_norms", TORCH_BOX(&bootgrad::linear_rank1_sq_norms));
}
