// The conv_* ops of bootgrad/ops/schema.py on the CPU.

#include "kernels.h"
#include "layer_ops.h"

namespace bootgrad {

namespace {

struct Geometry {
  const Sizes &stride, &padding, &dilation;
  int64_t groups;
};

Layer checked(const Tensor& x, const Tensor& gy, const Sizes& kernel, const Geometry& g) {
  const int64_t n = x.dim() - 2;
  require(n >= 1 && n <= 3, "x must be (B, C, *S) with one to three spatial dimensions; got shape ",
          shown(sizes_of(x)));
  const std::pair<const char*, const Sizes*> lists[] = {
      {"kernel_size", &kernel}, {"stride", &g.stride}, {"padding", &g.padding}, {"dilation", &g.dilation}};
  for (const auto& [name, list] : lists)
    require(static_cast<int64_t>(list->size()) == n, name, " must have ", n, " numbers, one per dimension; got ",
            shown(*list));
  require(gy.dim() == x.dim(), "gy must have the dimensions of x; got shapes ", shown(sizes_of(x)), " and ",
          shown(sizes_of(gy)));
  check_pair(x, gy);
  require(g.groups >= 1 && x.size(1) % g.groups == 0 && gy.size(1) % g.groups == 0,
          "groups must divide the channels; got ", g.groups, " for ", x.size(1), " in and ", gy.size(1), " out");
  ConvShape s{x.size(0), x.size(1), gy.size(1), g.groups, {}, {}, {}, {}, {}, {}};
  Sizes expected;
  for (int d = 0; d < 3; ++d) {
    const int64_t i = d - (3 - n);
    const size_t at = static_cast<size_t>(i);
    const bool real = i >= 0;
    s.S[d] = real ? x.size(i + 2) : 1;
    s.kernel[d] = real ? kernel[at] : 1;
    s.stride[d] = real ? g.stride[at] : 1;
    s.padding[d] = real ? g.padding[at] : 0;
    s.dilation[d] = real ? g.dilation[at] : 1;
    require(s.kernel[d] >= 1 && s.stride[d] >= 1 && s.padding[d] >= 0 && s.dilation[d] >= 1,
            "kernel_size, stride and dilation must be positive and padding not negative");
    const int64_t room = s.S[d] + 2 * s.padding[d] - s.dilation[d] * (s.kernel[d] - 1) - 1;
    s.P[d] = room < 0 ? 0 : room / s.stride[d] + 1;
    if (real) expected.push_back(s.P[d]);
  }
  const Sizes got = sizes_of(gy);
  require(Sizes(got.begin() + 2, got.end()) == expected, "gy must have spatial size ", shown(expected),
          " for this x and geometry; got ", shown(Sizes(got.begin() + 2, got.end())));
  Sizes weight_shape{s.O, s.C / s.groups};
  weight_shape.insert(weight_shape.end(), kernel.begin(), kernel.end());
  return {s, false, weight_shape, x, gy};
}

Sizes kernel_of(const char* name, const Tensor& weights, const Tensor& x) {
  const Sizes sizes = sizes_of(weights);
  require(weights.dim() == x.dim(), name, " must have ", x.dim(), " dimensions, as x; got shape ", shown(sizes));
  return Sizes(sizes.begin() + 2, sizes.end());
}

Tensor conv_sq_norms(const Tensor& x, const Tensor& gy, Sizes kernel, Sizes stride, Sizes padding, Sizes dilation,
                     int64_t groups, StringHandle path) {
  const bool gram = is_gram(path);
  return sq_norms(checked(x, gy, kernel, {stride, padding, dilation, groups}), gram);
}

Tensor conv_deviation_sq_norms(const Tensor& x, const Tensor& gy, const Tensor& center, Sizes stride, Sizes padding,
                               Sizes dilation, int64_t groups, StringHandle path) {
  const bool gram = is_gram(path);
  const Sizes kernel = kernel_of("center", center, x);
  return deviation_sq_norms(checked(x, gy, kernel, {stride, padding, dilation, groups}), center, gram);
}

Tensor conv_jvp(const Tensor& x, const Tensor& gy, const Tensor& v, Sizes stride, Sizes padding, Sizes dilation,
                int64_t groups) {
  return jvp(checked(x, gy, kernel_of("v", v, x), {stride, padding, dilation, groups}), v);
}

Tensor conv_weighted_sum(const Tensor& x, const Tensor& gy, std::optional<Tensor> w, Sizes kernel, Sizes stride,
                         Sizes padding, Sizes dilation, int64_t groups) {
  return weighted_sum(checked(x, gy, kernel, {stride, padding, dilation, groups}), w);
}

FourTensors conv_statistics(const Tensor& x, const Tensor& gy, std::optional<Tensor> center, Sizes kernel, Sizes stride,
                            Sizes padding, Sizes dilation, int64_t groups, StringHandle path) {
  const bool gram = is_gram(path);
  return statistics(checked(x, gy, kernel, {stride, padding, dilation, groups}), center, gram);
}

Tensor conv_applied(const Tensor& x, const Tensor& gy, const Tensor& h, Sizes kernel, Sizes stride, Sizes padding,
                    Sizes dilation, int64_t groups, StringHandle path) {
  const bool gram = is_gram(path);
  return applied(checked(x, gy, kernel, {stride, padding, dilation, groups}), h, gram, false);
}

Tensor conv_applied_transposed(const Tensor& x, const Tensor& gy, const Tensor& g, Sizes kernel, Sizes stride,
                               Sizes padding, Sizes dilation, int64_t groups, StringHandle path) {
  const bool gram = is_gram(path);
  return applied(checked(x, gy, kernel, {stride, padding, dilation, groups}), g, gram, true);
}

Tensor conv_displaced(const Tensor& x, const Tensor& gy, const Tensor& h, const Tensor& weight,
                      std::optional<Tensor> shift, double factor, Sizes stride, Sizes padding, Sizes dilation,
                      int64_t groups) {
  const Sizes kernel = kernel_of("weight", weight, x);
  return applied(checked(x, gy, kernel, {stride, padding, dilation, groups}), h, false, false, weight, shift, factor);
}

Tensor conv_displaced_transposed(const Tensor& x, const Tensor& gy, const Tensor& g, const Tensor& weight,
                                 double factor, Sizes stride, Sizes padding, Sizes dilation, int64_t groups) {
  const Sizes kernel = kernel_of("weight", weight, x);
  return applied(checked(x, gy, kernel, {stride, padding, dilation, groups}), g, false, true, weight, {}, factor);
}

FourTensors conv_sq_norms_with_grad(const Tensor& x, const Tensor& gy, std::optional<Tensor> center, Sizes kernel,
                                    Sizes stride, Sizes padding, Sizes dilation, int64_t groups, StringHandle path,
                                    std::vector<bool> mask) {
  const bool gram = is_gram(path);
  return sq_norms_with_grad(checked(x, gy, kernel, {stride, padding, dilation, groups}), center, gram, mask);
}

FiveTensors conv_visit(const Tensor& x, const Tensor& gy, std::optional<Tensor> center, bool biased,
                       std::optional<Tensor> bias_center, Sizes kernel, Sizes stride, Sizes padding, Sizes dilation,
                       int64_t groups, StringHandle path, std::vector<bool> mask, double scale) {
  const bool gram = is_gram(path);
  return visit(checked(x, gy, kernel, {stride, padding, dilation, groups}), center, biased, bias_center, gram, mask,
               scale);
}

// A call of the convolution itself, between x and y or their gradients.
void run_product(const Layer& layer, ConvProductCall& call, bool input_grad) {
  const ConvTables tables(layer.shape, false, false, input_grad);
  call.plan = &tables.plan;
  call.runtime = &runtime();
  kernels().conv_product(call);
}

void check_weight(const Tensor& weight, const Layer& layer) {
  require(layer.x.scalar_type() == ScalarType::Float, "x and weight must be float32 on the CPU");
  check_layer("weight", weight, layer.weight_shape, layer.x);
}

Tensor conv_output(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, Sizes stride, Sizes padding,
                   Sizes dilation, int64_t groups) {
  const Sizes kernel = kernel_of("weight", weight, x);
  Sizes shape{x.size(0), weight.size(0)};
  for (size_t d = 0; d < kernel.size(); ++d) {
    for (const Sizes* list : {&stride, &padding, &dilation})
      require(list->size() == kernel.size(), "stride, padding and dilation must have ", kernel.size(), " numbers");
    const int64_t room = x.size(static_cast<int64_t>(d) + 2) + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1;
    require(stride[d] >= 1 && room >= 0, "x with its padding must be as large as the kernel; got shapes ",
            shown(sizes_of(x)), " and ", shown(sizes_of(weight)));
    shape.push_back(room / stride[d] + 1);
  }
  Tensor y = allocate(x, shape, x.scalar_type());
  const Layer layer = checked(x, y, kernel, {stride, padding, dilation, groups});
  check_weight(weight, layer);
  check_layer("bias", bias, {weight.size(0)}, x);
  const Tensor from = packed(x), by = packed(weight);
  std::optional<Tensor> shift;
  if (bias) shift = packed(*bias);
  ConvProductCall call{};
  call.x = pointer(from), call.weight = pointer(by), call.bias = pointer(shift);
  call.y = result(y);
  if (call.y) run_product(layer, call, false);
  return y;
}

Tensor conv_input_grad(const Tensor& gy, const Tensor& weight, Sizes size, Sizes stride, Sizes padding, Sizes dilation,
                       int64_t groups) {
  const Sizes kernel = kernel_of("weight", weight, gy);
  require(size.size() == kernel.size(), "size must have ", kernel.size(), " numbers; got ", shown(size));
  Sizes shape{gy.size(0), weight.size(1) * groups};
  shape.insert(shape.end(), size.begin(), size.end());
  Tensor dx = allocate(gy, shape, gy.scalar_type());
  const Layer layer = checked(dx, gy, kernel, {stride, padding, dilation, groups});
  check_weight(weight, layer);
  const Tensor from = packed(gy), by = packed(weight);
  ConvProductCall call{};
  call.gy = pointer(from), call.weight = pointer(by);
  call.dx = result(dx);
  if (call.dx) run_product(layer, call, true);
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bootgrad, CPU, m) {
  m.impl("conv_visit", TORCH_BOX(&conv_visit));
  m.impl("conv_output", TORCH_BOX(&conv_output));
  m.impl("conv_input_grad", TORCH_BOX(&conv_input_grad));
  m.impl("conv_sq_norms", TORCH_BOX(&conv_sq_norms));
  m.impl("conv_deviation_sq_norms", TORCH_BOX(&conv_deviation_sq_norms));
  m.impl("conv_jvp", TORCH_BOX(&conv_jvp));
  m.impl("conv_weighted_sum", TORCH_BOX(&conv_weighted_sum));
  m.impl("conv_statistics", TORCH_BOX(&conv_statistics));
  m.impl("conv_applied", TORCH_BOX(&conv_applied));
  m.impl("conv_applied_transposed", TORCH_BOX(&conv_applied_transposed));
  m.impl("conv_displaced", TORCH_BOX(&conv_displaced));
  m.impl("conv_displaced_transposed", TORCH_BOX(&conv_displaced_transposed));
  m.impl("conv_sq_norms_with_grad", TORCH_BOX(&conv_sq_norms_with_grad));
}

}  // namespace bootgrad
