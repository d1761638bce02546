// The group_norm_* ops of bootgrad/ops/schema.py on the CPU.

#include <tuple>

#include "host.h"
#include "kernels.h"

namespace bootgrad {

namespace {

// Contiguous inputs of one call, with the schema's checks made.
class Norm {
 public:
  Norm(const Tensor& x_in, const Tensor& gy_in, const std::optional<Tensor>& weight_in, const Tensor& mean_in,
       const Tensor& rstd_in, const std::optional<Tensor>& z_in = std::nullopt)
      : x(checked(x_in, mean_in, rstd_in)), gy(like_x("gy", gy_in)), mean(packed(mean_in)), rstd(packed(rstd_in)) {
    if (weight_in) weight = layer("weight", *weight_in, {x.size(1)});
    if (z_in) z = like_x("z", *z_in);
    call.runtime = &runtime();
    call.dtype = dtype_of(x);
    call.B = x.size(0);
    call.C = x.size(1);
    call.groups = mean.size(1);
    call.N = 1;
    for (int64_t d = 2; d < x.dim(); ++d) call.N *= x.size(d);
    call.x = pointer(x);
    call.gy = pointer(gy);
    call.z = pointer(z);
    call.mean = pointer(mean);
    call.rstd = pointer(rstd);
    call.weight = pointer(weight);
  }

  Tensor like_x(const char* name, const Tensor& t) const {
    require(sizes_of(t) == sizes_of(x) && t.scalar_type() == x.scalar_type(), name, " must be like x, of shape ",
            shown(sizes_of(x)), "; got ", shown(sizes_of(t)));
    return packed(t);
  }

  Tensor layer(const char* name, const Tensor& t, const Sizes& shape) const {
    check_layer(name, t, shape, x);
    return packed(t);
  }

  Sizes channels() const { return {x.size(0), x.size(1)}; }
  Tensor rows() const {
    Tensor out = allocate(x, channels(), accumulation_type(x));
    if (x.numel() == 0) torch::stable::zero_(out);
    return out;
  }
  Tensor activation() const { return allocate(x, sizes_of(x), x.scalar_type()); }
  void run() const {
    if (x.numel() > 0) kernels().group_norm(call);
  }

  Tensor x, gy, mean, rstd;
  std::optional<Tensor> weight, z;
  GroupNormCall call{};

 private:
  static Tensor checked(const Tensor& x, const Tensor& mean, const Tensor& rstd) {
    require(x.dim() >= 2, "x must be (B, C, …); got shape ", shown(sizes_of(x)));
    check_pair(x, x);
    require(mean.dim() == 2 && mean.size(0) == x.size(0) && mean.size(1) >= 1 && x.size(1) % mean.size(1) == 0,
            "mean and rstd must be (B, G), G a divisor of ", x.size(1), "; got ", shown(sizes_of(mean)));
    check_layer("mean", mean, sizes_of(mean), x);
    check_layer("rstd", rstd, sizes_of(mean), x);
    return packed(x);
  }
};

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

ThreeTensors backward(Norm norm, const Tensor& x, bool input_grad) {
  Tensor rows = norm.rows(), bias = norm.rows();
  Tensor dx = input_grad ? norm.activation() : allocate(x, {0}, x.scalar_type());
  norm.call.rows = result(rows);
  norm.call.bias_rows = result(bias);
  norm.call.dx = result(dx);
  norm.run();
  return {dx, rows, bias};
}

ThreeTensors double_backward(Norm norm, std::optional<Tensor> u, std::optional<Tensor> a, std::optional<Tensor> b) {
  if (u) u = norm.like_x("u", *u);
  if (a) a = norm.layer("a", *a, norm.channels());
  if (b) b = norm.layer("b", *b, norm.channels());
  Tensor dgy = norm.activation(), dx = norm.activation(), rows = norm.rows();
  norm.call.u = pointer(u);
  norm.call.a = pointer(a);
  norm.call.b = pointer(b);
  norm.call.dgy = result(dgy);
  norm.call.dx = result(dx);
  norm.call.rows = result(rows);
  norm.run();
  return {dgy, dx, rows};
}

ThreeTensors group_norm_backward(const Tensor& gy, const Tensor& x, std::optional<Tensor> weight, const Tensor& mean,
                                 const Tensor& rstd, bool input_grad) {
  return backward(Norm(x, gy, weight, mean, rstd), x, input_grad);
}

ThreeTensors group_norm_double_backward(std::optional<Tensor> u, std::optional<Tensor> a, std::optional<Tensor> b,
                                        const Tensor& gy, const Tensor& x, std::optional<Tensor> weight,
                                        const Tensor& mean, const Tensor& rstd) {
  return double_backward(Norm(x, gy, weight, mean, rstd), u, a, b);
}

ThreeTensors group_norm_relu_backward(const Tensor& gz, const Tensor& z, const Tensor& x, std::optional<Tensor> weight,
                                      const Tensor& mean, const Tensor& rstd, bool input_grad) {
  return backward(Norm(x, gz, weight, mean, rstd, z), x, input_grad);
}

ThreeTensors group_norm_relu_double_backward(std::optional<Tensor> u, std::optional<Tensor> a, std::optional<Tensor> b,
                                             const Tensor& gz, const Tensor& z, const Tensor& x,
                                             std::optional<Tensor> weight, const Tensor& mean, const Tensor& rstd) {
  return double_backward(Norm(x, gz, weight, mean, rstd, z), u, a, b);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bootgrad, CPU, m) {
  m.impl("group_norm_backward", TORCH_BOX(&group_norm_backward));
  m.impl("group_norm_double_backward", TORCH_BOX(&group_norm_double_backward));
  m.impl("group_norm_relu_backward", TORCH_BOX(&group_norm_relu_backward));
  m.impl("group_norm_relu_double_backward", TORCH_BOX(&group_norm_relu_double_backward));
}

}  // namespace bootgrad
