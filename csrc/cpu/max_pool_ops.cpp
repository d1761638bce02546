// The max_pool2d ops of bootgrad/ops/schema.py on the CPU.

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

// Between planes of x, whose spatial size is the last two of `full`, and the windows' maxima.
Tensor adjoint(const Tensor& in_any, const Tensor& index_any, const std::optional<Tensor>& blocked_any,
               const Sizes& full, bool gather) {
  const char* name = gather ? "h" : "gy";
  const Sizes windows = sizes_of(index_any);
  require(windows.size() == 4, "index must be (B, C, H, W); got shape ", shown(windows));
  require(index_any.scalar_type() == ScalarType::Long, "index must be int64");
  const Sizes in_shape = sizes_of(in_any), &expected = gather ? full : windows;
  require(in_shape == expected, name, " must have shape ", shown(expected), "; got ", shown(in_shape));
  check_pair(in_any, in_any);
  if (blocked_any)
    require(sizes_of(*blocked_any) == windows && blocked_any->scalar_type() == ScalarType::Bool,
            "blocked must be of bool and have the shape ", shown(windows), " of index; got shape ",
            shown(sizes_of(*blocked_any)));
  const Tensor in = packed(in_any), index = packed(index_any);
  std::optional<Tensor> blocked;
  if (blocked_any) blocked = packed(*blocked_any);
  Tensor out = allocate(in, gather ? windows : full, in.scalar_type());
  MaxPoolGradCall call{};
  call.runtime = &runtime();
  call.dtype = dtype_of(in);
  call.planes = windows[0] * windows[1];
  call.size = full[2] * full[3], call.windows = windows[2] * windows[3];
  call.gather = gather;
  call.in = pointer(in);
  call.index = static_cast<const int64_t*>(pointer(index));
  call.blocked = static_cast<const bool*>(pointer(blocked));
  call.out = result(out);
  if (call.planes > 0 && call.out)
    require(kernels().max_pool_grad(call), "index must be places in planes of ", call.size, " entries");
  return out;
}

Tensor max_pool2d_backward(const Tensor& gy, const Tensor& index, std::optional<Tensor> blocked, Sizes size) {
  require(size.size() == 2 && gy.dim() == 4 && size[0] >= 0 && size[1] >= 0,
          "size must have 2 numbers, and gy 4 dimensions; got ", shown(size), " and shape ", shown(sizes_of(gy)));
  return adjoint(gy, index, blocked, {gy.size(0), gy.size(1), size[0], size[1]}, false);
}

Tensor max_pool2d_gather(const Tensor& h, const Tensor& index, std::optional<Tensor> blocked) {
  require(h.dim() == 4 && index.dim() == 4 && h.size(0) == index.size(0) && h.size(1) == index.size(1),
          "h and index must be (B, C, H, W) of one B and C; got shapes ", shown(sizes_of(h)), " and ",
          shown(sizes_of(index)));
  return adjoint(h, index, blocked, sizes_of(h), true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bootgrad, CPU, m) {
  m.impl("max_pool2d", TORCH_BOX(&max_pool2d));
  m.impl("max_pool2d_backward", TORCH_BOX(&max_pool2d_backward));
  m.impl("max_pool2d_gather", TORCH_BOX(&max_pool2d_gather));
}

}  // namespace bootgrad
