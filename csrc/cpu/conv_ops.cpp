// The conv_* ops of bootgrad/ops/schema.py on the CPU.

#include <tuple>

#include "bootgrad/plan.hpp"
#include "host.h"
#include "kernels.h"

namespace bootgrad {

namespace {

struct Geometry {
  const Sizes &stride, &padding, &dilation;
  int64_t groups;
};

// Contiguous inputs and tables of one call, with the schema's checks made.
class Layer {
 public:
  Layer(const Tensor& x_in, const Tensor& gy_in, const Sizes& kernel, const Geometry& g)
      : shape(checked(x_in, gy_in, kernel, g)), x(packed(x_in)), gy(packed(gy_in)) {
    weight_shape = {shape.O, shape.C / shape.groups};
    weight_shape.insert(weight_shape.end(), kernel.begin(), kernel.end());
    call.runtime = &runtime();
    call.dtype = dtype_of(x);
    call.x = pointer(x);
    call.gy = pointer(gy);
  }

  void center(const char* name, const std::optional<Tensor>& c) {
    check_layer(name, c, weight_shape, x);
    if (!c) return;
    held = packed(*c);
    call.center = pointer(*held);
  }

  Tensor per_sample() const { return allocate(x, {shape.B}, accumulation_type(x)); }
  Tensor layer(const Sizes& sizes) const { return allocate(x, sizes, accumulation_type(x)); }
  void run() {
    const ConvTables tables(shape, false, call.gram, call.dx);
    call.plan = &tables.plan;
    kernels().conv(call);
  }

  ConvShape shape;
  Tensor x, gy;
  std::optional<Tensor> held;
  Sizes weight_shape;
  ConvCall call{};

 private:
  static ConvShape checked(const Tensor& x, const Tensor& gy, const Sizes& kernel, const Geometry& g) {
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
    return s;
  }
};

Sizes kernel_of(const char* name, const Tensor& weights, const Tensor& x) {
  const Sizes sizes = sizes_of(weights);
  require(weights.dim() == x.dim(), name, " must have ", x.dim(), " dimensions, as x; got shape ", shown(sizes));
  return Sizes(sizes.begin() + 2, sizes.end());
}

Tensor conv_sq_norms(const Tensor& x, const Tensor& gy, Sizes kernel, Sizes stride, Sizes padding, Sizes dilation,
                     int64_t groups, std::string path) {
  Layer layer(x, gy, kernel, {stride, padding, dilation, groups});
  layer.call.gram = is_gram(path);
  Tensor out = layer.per_sample();
  layer.call.sq_norms = result(out);
  layer.run();
  return out;
}

Tensor conv_deviation_sq_norms(const Tensor& x, const Tensor& gy, const Tensor& center, Sizes stride, Sizes padding,
                               Sizes dilation, int64_t groups, std::string path) {
  Layer layer(x, gy, kernel_of("center", center, x), {stride, padding, dilation, groups});
  layer.center("center", center);
  layer.call.gram = is_gram(path);
  Tensor out = layer.per_sample();
  layer.call.deviation = result(out);
  layer.run();
  return out;
}

Tensor conv_jvp(const Tensor& x, const Tensor& gy, const Tensor& v, Sizes stride, Sizes padding, Sizes dilation,
                int64_t groups) {
  Layer layer(x, gy, kernel_of("v", v, x), {stride, padding, dilation, groups});
  layer.center("v", v);
  Tensor out = layer.per_sample();
  layer.call.inner = result(out);
  layer.run();
  return out;
}

Tensor conv_weighted_sum(const Tensor& x, const Tensor& gy, std::optional<Tensor> w, Sizes kernel, Sizes stride,
                         Sizes padding, Sizes dilation, int64_t groups) {
  Layer layer(x, gy, kernel, {stride, padding, dilation, groups});
  check_layer("w", w, {layer.shape.B}, x);
  if (w) w = packed(*w);
  layer.call.w = pointer(w);
  Tensor out = layer.layer(layer.weight_shape);
  layer.call.sum = result(out);
  layer.run();
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_statistics(const Tensor& x, const Tensor& gy,
                                                           std::optional<Tensor> center, Sizes kernel, Sizes stride,
                                                           Sizes padding, Sizes dilation, int64_t groups,
                                                           std::string path) {
  Layer layer(x, gy, kernel, {stride, padding, dilation, groups});
  layer.center("center", center);
  layer.call.gram = is_gram(path);
  Tensor sum = layer.layer(layer.weight_shape), sq_norms = layer.per_sample();
  Tensor deviation = center ? layer.per_sample() : layer.layer({0});
  Tensor bias = layer.layer({layer.shape.B, layer.shape.O});
  layer.call.sum = result(sum);
  layer.call.sq_norms = result(sq_norms);
  layer.call.deviation = result(deviation);
  layer.call.bias = result(bias);
  layer.run();
  return {sum, sq_norms, deviation, bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_sq_norms_with_grad(const Tensor& x, const Tensor& gy,
                                                                   std::optional<Tensor> center, Sizes kernel,
                                                                   Sizes stride, Sizes padding, Sizes dilation,
                                                                   int64_t groups, std::string path,
                                                                   std::vector<bool> mask) {
  require(mask.size() == 3, "mask must have 3 entries; got ", mask.size());
  Layer layer(x, gy, kernel, {stride, padding, dilation, groups});
  layer.center("center", center);
  layer.call.gram = is_gram(path);
  Tensor s = layer.per_sample();
  Tensor dx = allocate(x, mask[0] ? sizes_of(x) : Sizes{0}, x.scalar_type());
  Tensor dgy = allocate(x, mask[1] ? sizes_of(gy) : Sizes{0}, x.scalar_type());
  Tensor sum = layer.layer(mask[2] ? layer.weight_shape : Sizes{0});
  (center ? layer.call.deviation : layer.call.sq_norms) = result(s);
  layer.call.sum = result(sum);
  layer.call.dx = result(dx);
  layer.call.dgy = result(dgy);
  layer.run();
  return {s, dx, dgy, sum};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bootgrad, CPU, m) {
  m.impl("conv_sq_norms", TORCH_BOX(&conv_sq_norms));
  m.impl("conv_deviation_sq_norms", TORCH_BOX(&conv_deviation_sq_norms));
  m.impl("conv_jvp", TORCH_BOX(&conv_jvp));
  m.impl("conv_weighted_sum", TORCH_BOX(&conv_weighted_sum));
  m.impl("conv_statistics", TORCH_BOX(&conv_statistics));
  m.impl("conv_sq_norms_with_grad", TORCH_BOX(&conv_sq_norms_with_grad));
}

}  // namespace bootgrad
