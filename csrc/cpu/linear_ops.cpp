// The linear_* ops of bootgrad/ops/schema.py on the CPU: convolutions with one kernel position and channels last.

#include <tuple>

#include "bootgrad/plan.hpp"
#include "host.h"
#include "kernels.h"

namespace bootgrad {

namespace {

// Contiguous inputs and tables of one call, with the schema's checks made.
class Layer {
 public:
  Layer(const Tensor& x_in, const Tensor& gy_in)
      : shape(checked(x_in, gy_in)), x(packed(x_in)), gy(packed(gy_in)), weight_shape{shape.O, shape.C} {
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
    const ConvTables tables(shape, true, call.gram, call.dx);
    call.plan = &tables.plan;
    kernels().conv(call);
  }

  ConvShape shape;
  Tensor x, gy;
  std::optional<Tensor> held;
  Sizes weight_shape;
  ConvCall call{};

 private:
  static ConvShape checked(const Tensor& x, const Tensor& gy) {
    require(x.dim() == 3 && gy.dim() == 3, "x and gy must be (B, T, ·); got shapes ", shown(sizes_of(x)), " and ",
            shown(sizes_of(gy)));
    check_pair(x, gy);
    require(x.size(1) == gy.size(1), "x and gy must share T; got ", x.size(1), " and ", gy.size(1));
    const int64_t T = x.size(1);
    return {x.size(0), x.size(2), gy.size(2), 1, {1, 1, T}, {1, 1, T}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}};
  }
};

Tensor linear_rank1_sq_norms(const Tensor& x, const Tensor& gy) {
  require(x.dim() == 2 && gy.dim() == 2, "x and gy must be (B, I) and (B, O); got shapes ", shown(sizes_of(x)), " and ",
          shown(sizes_of(gy)));
  check_pair(x, gy);
  const Tensor xp = packed(x), gyp = packed(gy);
  Tensor out = allocate(x, {x.size(0)}, accumulation_type(x));
  kernels().rank1(runtime(), dtype_of(x), pointer(xp), pointer(gyp), x.size(0), x.size(1), gy.size(1), result(out));
  return out;
}

Tensor linear_sq_norms(const Tensor& x, const Tensor& gy, std::string path) {
  Layer layer(x, gy);
  layer.call.gram = is_gram(path);
  Tensor out = layer.per_sample();
  layer.call.sq_norms = result(out);
  layer.run();
  return out;
}

Tensor linear_deviation_sq_norms(const Tensor& x, const Tensor& gy, const Tensor& center, std::string path) {
  Layer layer(x, gy);
  layer.center("center", center);
  layer.call.gram = is_gram(path);
  Tensor out = layer.per_sample();
  layer.call.deviation = result(out);
  layer.run();
  return out;
}

Tensor linear_jvp(const Tensor& x, const Tensor& gy, const Tensor& v) {
  Layer layer(x, gy);
  layer.center("v", v);
  Tensor out = layer.per_sample();
  layer.call.inner = result(out);
  layer.run();
  return out;
}

Tensor linear_weighted_sum(const Tensor& x, const Tensor& gy, std::optional<Tensor> w) {
  Layer layer(x, gy);
  check_layer("w", w, {layer.shape.B}, x);
  if (w) w = packed(*w);
  layer.call.w = pointer(w);
  Tensor out = layer.layer(layer.weight_shape);
  layer.call.sum = result(out);
  layer.run();
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_statistics(const Tensor& x, const Tensor& gy,
                                                             std::optional<Tensor> center, std::string path) {
  Layer layer(x, gy);
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

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_sq_norms_with_grad(const Tensor& x, const Tensor& gy,
                                                                     std::optional<Tensor> center, std::string path,
                                                                     std::vector<bool> mask) {
  require(mask.size() == 3, "mask must have 3 entries; got ", mask.size());
  Layer layer(x, gy);
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
  m.impl("linear_rank1_sq_norms", TORCH_BOX(&linear_rank1_sq_norms));
  m.impl("linear_sq_norms", TORCH_BOX(&linear_sq_norms));
  m.impl("linear_deviation_sq_norms", TORCH_BOX(&linear_deviation_sq_norms));
  m.impl("linear_jvp", TORCH_BOX(&linear_jvp));
  m.impl("linear_weighted_sum", TORCH_BOX(&linear_weighted_sum));
  m.impl("linear_statistics", TORCH_BOX(&linear_statistics));
  m.impl("linear_sq_norms_with_grad", TORCH_BOX(&linear_sq_norms_with_grad));
}

}  // namespace bootgrad
