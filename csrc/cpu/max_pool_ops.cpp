// max_pool2d of bootgrad/ops/schema.py on the CPU.

#include <tuple>

#include "host.h"
#include "kernels.h"

namespace bootgrad {

namespace {

// As many windows as begin inside; with `ceil`, one more where entries are left.
int64_t windows(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool ceil) {
  const int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1 + (ceil ? stride - 1 : 0);
  if (room < 0) return 0;
  const int64_t count = room / stride + 1;
  return ceil && (count - 1) * stride >= size + padding ? count - 1 : count;
}

std::tuple<Tensor, Tensor> max_pool2d(const Tensor& x_in, Sizes kernel, Sizes stride, Sizes padding, Sizes dilation,
                                      bool ceil) {
  require(x_in.dim() == 4, "x must be (B, C, H, W); got shape ", shown(sizes_of(x_in)));
  check_pair(x_in, x_in);
  const Tensor x = packed(x_in);
  const std::pair<const char*, const Sizes*> lists[] = {
      {"kernel_size", &kernel}, {"stride", &stride}, {"padding", &padding}, {"dilation", &dilation}};
  for (const auto& [name, list] : lists) require(list->size() == 2, name, " must have 2 numbers; got ", shown(*list));
  MaxPoolCall call{};
  call.runtime = &runtime();
  call.dtype = dtype_of(x);
  call.planes = x.size(0) * x.size(1);
  for (size_t d = 0; d < 2; ++d) {
    require(kernel[d] >= 1 && stride[d] >= 1 && dilation[d] >= 1, "kernel_size, stride and dilation must be positive");
    require(padding[d] >= 0 && padding[d] <= kernel[d] / 2, "padding must be between 0 and half of the kernel; got ",
            shown(padding), " for ", shown(kernel));
    call.S[d] = x.size(static_cast<int64_t>(d) + 2);
    call.P[d] = windows(call.S[d], kernel[d], stride[d], padding[d], dilation[d], ceil);
    require(call.P[d] > 0, "x must be as large as a window at least; got shape ", shown(sizes_of(x)));
    call.kernel[d] = kernel[d], call.stride[d] = stride[d], call.padding[d] = padding[d];
    call.dilation[d] = dilation[d];
  }
  // Places in a window are counted in float.
  require(((kernel[0] - 1) * dilation[0] + 1) * call.S[1] + (kernel[1] - 1) * dilation[1] < int64_t{1} << 24,
          "a window must span less than 2²⁴ entries of x; got ", shown(kernel), " of ", shown(sizes_of(x)));
  const Sizes shape{x.size(0), x.size(1), call.P[0], call.P[1]};
  Tensor y = allocate(x, shape, x.scalar_type()), index = allocate(x, shape, ScalarType::Long);
  call.x = pointer(x);
  call.y = result(y);
  call.index = result(index);
  if (call.planes > 0) kernels().max_pool(call);
  return {y, index};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bootgrad, CPU, m) { m.impl("max_pool2d", TORCH_BOX(&max_pool2d)); }

}  // namespace bootgrad
