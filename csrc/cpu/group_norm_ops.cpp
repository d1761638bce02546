// The group_norm_* ops of bootgrad/ops/schema.py on the CPU.

#include <tuple>

#include "host.h"
#include "kernels.h"

namespace bootgrad {

namespace {

// Contiguous inputs of one call, with the schema's checks made.
class Norm {
 public:
  Norm(const Tensor& x_in, const Tensor& gy_in, const Tensor& mean_in, const Tensor& rstd_in)
      : x(checked(x_in, mean_in, rstd_in)), gy(like_x("gy", gy_in)), mean(packed(mean_in)), rstd(packed(rstd_in)) {
    call.runtime = &runtime();
    call.dtype = dtype_of(x);
    call.B = x.size(0);
    call.C = x.size(1);
    call.groups = mean.size(1);
    call.N = 1;
    for (int64_t d = 2; d < x.dim(); ++d) call.N *= x.size(d);
    call.x = pointer(x);
    call.gy = pointer(gy);
    call.mean = pointer(mean);
    call.rstd = pointer(rstd);
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
  Tensor rows() const { return allocate(x, channels(), accumulation_type(x)); }
  Tensor activation() const { return allocate(x, sizes_of(x), x.scalar_type()); }
  void run() const {
    if (x.numel() > 0) kernels().group_norm(call);
  }

  Tensor x, gy, mean, rstd;
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

std::tuple<Tensor, Tensor> group_norm_rows(const Tensor& gy, const Tensor& x, const Tensor& mean, const Tensor& rstd) {
  Norm norm(x, gy, mean, rstd);
  Tensor rows = norm.rows(), bias = norm.rows();
  norm.call.rows = result(rows);
  norm.call.bias_rows = result(bias);
  norm.run();
  return {rows, bias};
}

std::tuple<Tensor, Tensor> group_norm_rows_backward(const Tensor& a, const Tensor& b, const Tensor& gy, const Tensor& x,
                                                    const Tensor& mean, const Tensor& rstd) {
  Norm norm(x, gy, mean, rstd);
  const Tensor ap = norm.layer("a", a, norm.channels()), bp = norm.layer("b", b, norm.channels());
  Tensor dgy = norm.activation(), dx = norm.activation();
  norm.call.a = pointer(ap);
  norm.call.b = pointer(bp);
  norm.call.dgy = result(dgy);
  norm.call.dx = result(dx);
  norm.run();
  return {dgy, dx};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_grad_backward(const Tensor& u, const Tensor& gy, const Tensor& x,
                                                            std::optional<Tensor> weight, const Tensor& mean,
                                                            const Tensor& rstd) {
  Norm norm(x, gy, mean, rstd);
  const Tensor up = norm.like_x("u", u);
  std::optional<Tensor> weights;
  if (weight) weights = norm.layer("weight", *weight, {x.size(1)});
  Tensor dgy = norm.activation(), dx = norm.activation(), rows = norm.rows();
  norm.call.u = pointer(up);
  norm.call.weight = pointer(weights);
  norm.call.dgy = result(dgy);
  norm.call.dx = result(dx);
  norm.call.rows = result(rows);
  norm.run();
  return {dgy, dx, rows};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bootgrad, CPU, m) {
  m.impl("group_norm_rows", TORCH_BOX(&group_norm_rows));
  m.impl("group_norm_rows_backward", TORCH_BOX(&group_norm_rows_backward));
  m.impl("group_norm_grad_backward", TORCH_BOX(&group_norm_grad_backward));
}

}  // namespace bootgrad
