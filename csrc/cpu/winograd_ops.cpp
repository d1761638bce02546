// The conv3x3 ops of bootgrad/ops/schema.py on the CPU.

#include "host.h"
#include "kernels.h"

namespace bootgrad {

namespace {

Tensor conv3x3(const Tensor& x_in, const Tensor& weight_in, std::optional<Tensor> bias_in, Sizes padding,
               bool transposed) {
  require(x_in.dim() == 4, "x must be (B, C, H, W); got shape ", shown(sizes_of(x_in)));
  const Sizes kernel = sizes_of(weight_in);
  const size_t in = transposed ? 0 : 1, out = 1 - in;
  require(kernel.size() == 4 && kernel[2] == 3 && kernel[3] == 3 && kernel[in] == x_in.size(1),
          "weight must be a 3×3 kernel for ", x_in.size(1), " channels; got shape ", shown(kernel));
  require(padding.size() == 2, "padding must have 2 numbers; got ", shown(padding));
  for (const Tensor* t : {&x_in, &weight_in})
    require(t->scalar_type() == ScalarType::Float, "x and weight must be float32 on the CPU");
  WinogradCall call{};
  call.runtime = &runtime();
  call.B = x_in.size(0), call.C = x_in.size(1), call.O = kernel[out];
  for (size_t d = 0; d < 2; ++d) {
    call.S[d] = x_in.size(static_cast<int64_t>(d) + 2);
    call.padding[d] = padding[d];
    call.P[d] = call.S[d] + 2 * padding[d] - 2;
    require(padding[d] >= 0 && call.P[d] > 0, "padding must make x as large as the kernel; got ", shown(padding),
            " for shape ", shown(sizes_of(x_in)));
  }
  if (bias_in)
    require(sizes_of(*bias_in) == Sizes{call.O} && bias_in->scalar_type() == ScalarType::Float,
            "bias must have shape (", call.O, ",) and be float32; got shape ", shown(sizes_of(*bias_in)));
  const Tensor x = packed(x_in), weight = packed(weight_in);
  std::optional<Tensor> bias;
  if (bias_in) bias = packed(*bias_in);
  Tensor y = allocate(x, {call.B, call.O, call.P[0], call.P[1]}, ScalarType::Float);
  call.transposed = transposed;
  call.x = pointer(x), call.weight = pointer(weight), call.bias = pointer(bias);
  call.out = result(y);
  if (call.out) kernels().winograd(call);
  return y;
}

Tensor conv3x3_weighted_sum(const Tensor& x_in, const Tensor& gy_in, std::optional<Tensor> w_in, Sizes padding) {
  require(x_in.dim() == 4 && gy_in.dim() == 4, "x and gy must be (B, C, H, W); got shapes ", shown(sizes_of(x_in)),
          " and ", shown(sizes_of(gy_in)));
  check_pair(x_in, gy_in);
  require(x_in.scalar_type() == ScalarType::Float, "x and gy must be float32 on the CPU");
  require(padding.size() == 2, "padding must have 2 numbers; got ", shown(padding));
  check_layer("w", w_in, {x_in.size(0)}, x_in);
  WinogradSumCall call{};
  call.runtime = &runtime();
  call.B = x_in.size(0), call.C = x_in.size(1), call.O = gy_in.size(1);
  for (size_t d = 0; d < 2; ++d) {
    call.S[d] = x_in.size(static_cast<int64_t>(d) + 2);
    call.P[d] = gy_in.size(static_cast<int64_t>(d) + 2);
    call.padding[d] = padding[d];
    require(padding[d] >= 0 && call.P[d] > 0 && call.P[d] == call.S[d] + 2 * padding[d] - 2,
            "gy must have the size of the output for x of shape ", shown(sizes_of(x_in)), " and padding ",
            shown(padding), "; got ", shown(sizes_of(gy_in)));
  }
  const Tensor x = packed(x_in), gy = packed(gy_in);
  std::optional<Tensor> w;
  if (w_in) w = packed(*w_in);
  Tensor out = allocate(x, {call.O, call.C, 3, 3}, ScalarType::Float);
  call.x = pointer(x), call.gy = pointer(gy), call.w = pointer(w);
  call.out = result(out);
  if (call.out) kernels().winograd_sum(call);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bootgrad, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3));
  m.impl("conv3x3_weighted_sum", TORCH_BOX(&conv3x3_weighted_sum));
}

}  // namespace bootgrad
