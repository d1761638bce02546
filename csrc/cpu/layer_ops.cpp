#include "layer_ops.h"

#include "kernels.h"

namespace bootgrad {

namespace {

// One call of the kernels, with contiguous copies of what it reads.
class Call : public ConvCall {
 public:
  explicit Call(const Layer& l) : ConvCall{}, layer_(l), x_(packed(l.x)), gy_(packed(l.gy)) {
    runtime = &bootgrad::runtime();
    dtype = dtype_of(x_);
    x = pointer(x_);
    gy = pointer(gy_);
  }

  void set_center(const char* name, const std::optional<Tensor>& c) {
    check_layer(name, c, layer_.weight_shape, x_);
    if (c) center_ = packed(*c);
    center = pointer(center_);
  }

  void set_bias(bool wanted, const std::optional<Tensor>& c) {
    require(wanted || !c, "bias_center is for a layer whose bias is visited, too: biased must be true");
    check_layer("bias_center", c, {layer_.shape.O}, x_);
    biased = wanted;
    if (c) bias_center_ = packed(*c);
    bias_center = pointer(bias_center_);
  }

  void set_w(const std::optional<Tensor>& t) {
    check_layer("w", t, {layer_.shape.B}, x_);
    if (t) w_ = packed(*t);
    w = pointer(w_);
  }

  Tensor per_sample() const { return sums({layer_.shape.B}); }
  Tensor sums(const Sizes& sizes) const { return allocate(x_, sizes, accumulation_type(x_)); }

  void run() {
    const ConvTables tables(layer_.shape, layer_.channels_last, gram, dx);
    plan = &tables.plan;
    kernels().conv(*this);
  }

 private:
  const Layer& layer_;
  Tensor x_, gy_;
  std::optional<Tensor> center_, bias_center_, w_;
};

}  // namespace

Tensor sq_norms(const Layer& layer, bool gram) {
  Call call(layer);
  call.gram = gram;
  Tensor out = call.per_sample();
  call.sq_norms = result(out);
  call.run();
  return out;
}

Tensor deviation_sq_norms(const Layer& layer, const Tensor& center, bool gram) {
  Call call(layer);
  call.set_center("center", center);
  call.gram = gram;
  Tensor out = call.per_sample();
  call.deviation = result(out);
  call.run();
  return out;
}

Tensor jvp(const Layer& layer, const Tensor& v) {
  Call call(layer);
  call.set_center("v", v);
  Tensor out = call.per_sample();
  call.inner = result(out);
  call.run();
  return out;
}

Tensor weighted_sum(const Layer& layer, const std::optional<Tensor>& w) {
  Call call(layer);
  call.set_w(w);
  Tensor out = call.sums(layer.weight_shape);
  call.sum = result(out);
  call.run();
  return out;
}

FourTensors statistics(const Layer& layer, const std::optional<Tensor>& center, bool gram) {
  Call call(layer);
  call.set_center("center", center);
  call.gram = gram;
  Tensor sum = call.sums(layer.weight_shape), sq_norms = call.per_sample();
  Tensor deviation = center ? call.per_sample() : call.sums({0});
  Tensor bias = call.sums({layer.shape.B, layer.shape.O});
  call.sum = result(sum);
  call.sq_norms = result(sq_norms);
  call.deviation = result(deviation);
  call.bias = result(bias);
  call.run();
  return {sum, sq_norms, deviation, bias};
}

Tensor applied(const Layer& layer, const Tensor& h, bool gram, bool transposed, const std::optional<Tensor>& weights,
               const std::optional<Tensor>& shift, double factor) {
  const char* name = transposed ? "g" : "h";
  const Sizes shape = sizes_of(transposed ? layer.gy : layer.x);
  require(sizes_of(h) == shape, name, " must have shape ", shown(shape), "; got ", shown(sizes_of(h)));
  require(h.scalar_type() == layer.x.scalar_type(), name, " must have the dtype of x and gy");
  Call call(layer);
  const Tensor input = packed(h);
  call.set_center("weight", weights);
  check_layer("shift", shift, {layer.shape.B, layer.shape.O}, layer.x);
  std::optional<Tensor> added;
  if (shift) added = packed(*shift);
  call.shift = pointer(added);
  call.factor = factor;
  call.gram = gram;
  Tensor out = allocate(h, sizes_of(transposed ? layer.x : layer.gy), h.scalar_type());
  if (layer.x.numel() == 0 || layer.gy.numel() == 0) return torch::stable::zero_(out);
  call.h = pointer(input);
  (transposed ? call.dx : call.dgy) = result(out);
  call.run();
  return out;
}

FiveTensors visit(const Layer& layer, const std::optional<Tensor>& center, bool biased,
                  const std::optional<Tensor>& bias_center, bool gram, const std::vector<bool>& mask, double scale) {
  require(mask.size() == 3, "mask must have 3 entries; got ", mask.size());
  Call call(layer);
  call.set_center("center", center);
  call.set_bias(biased, bias_center);
  call.gram = gram;
  const Tensor &x = layer.x, &gy = layer.gy;
  Tensor s = call.per_sample();
  Tensor dx = allocate(x, mask[0] ? sizes_of(x) : Sizes{0}, x.scalar_type());
  Tensor dgy = allocate(x, mask[1] ? sizes_of(gy) : Sizes{0}, x.scalar_type());
  Tensor sum = call.sums(mask[2] ? layer.weight_shape : Sizes{0});
  Tensor bias = call.sums({biased ? layer.shape.B : 0, layer.shape.O});
  (center ? call.deviation : call.sq_norms) = result(s);
  call.sum = result(sum);
  call.bias = result(bias);
  call.dx = result(dx);
  call.dgy = result(dgy);
  call.scale = scale;
  call.run();
  return {s, dx, dgy, sum, bias};
}

FourTensors sq_norms_with_grad(const Layer& layer, const std::optional<Tensor>& center, bool gram,
                               const std::vector<bool>& mask) {
  const auto [s, dx, dgy, sum, bias] = visit(layer, center, false, {}, gram, mask, 1);
  return {s, dx, dgy, sum};
}

}  // namespace bootgrad
