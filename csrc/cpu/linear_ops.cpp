// The linear_* ops of bootgrad/ops/schema.py on the CPU: convolutions with one kernel position and channels last.

#include "kernels.h"
#include "layer_ops.h"

namespace bootgrad {

namespace {

Layer checked(const Tensor& x, const Tensor& gy) {
  require(x.dim() == 3 && gy.dim() == 3, "x and gy must be (B, T, ·); got shapes ", shown(sizes_of(x)), " and ",
          shown(sizes_of(gy)));
  check_pair(x, gy);
  require(x.size(1) == gy.size(1), "x and gy must share T; got ", x.size(1), " and ", gy.size(1));
  const int64_t T = x.size(1);
  return {{x.size(0), x.size(2), gy.size(2), 1, {1, 1, T}, {1, 1, T}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}},
          true,
          {gy.size(2), x.size(2)},
          x,
          gy};
}

Tensor linear_rank1_sq_norms(const Tensor& x, const Tensor& gy) {
  require(x.dim() == 2 && gy.dim() == 2, "x and gy must be (B, I) and (B, O); got shapes ", shown(sizes_of(x)), " and ",
          shown(sizes_of(gy)));
  check_pair(x, gy);
  const Tensor xp = packed(x), gyp = packed(gy);
  Tensor out = allocate(x, {x.size(0)}, accumulation_type(x));
  kernels().rank1(runtime(), dtype_of(x), pointer(xp), pointer(gyp), x.size(0), x.size(1), gy.size(1), result(out));
  return out;
}

Tensor linear_sq_norms(const Tensor& x, const Tensor& gy, StringHandle path) {
  const bool gram = is_gram(path);
  return sq_norms(checked(x, gy), gram);
}

Tensor linear_deviation_sq_norms(const Tensor& x, const Tensor& gy, const Tensor& center, StringHandle path) {
  const bool gram = is_gram(path);
  return deviation_sq_norms(checked(x, gy), center, gram);
}

Tensor linear_jvp(const Tensor& x, const Tensor& gy, const Tensor& v) { return jvp(checked(x, gy), v); }

Tensor linear_weighted_sum(const Tensor& x, const Tensor& gy, std::optional<Tensor> w) {
  return weighted_sum(checked(x, gy), w);
}

FourTensors linear_statistics(const Tensor& x, const Tensor& gy, std::optional<Tensor> center, StringHandle path) {
  const bool gram = is_gram(path);
  return statistics(checked(x, gy), center, gram);
}

FourTensors linear_sq_norms_with_grad(const Tensor& x, const Tensor& gy, std::optional<Tensor> center,
                                      StringHandle path, std::vector<bool> mask) {
  const bool gram = is_gram(path);
  return sq_norms_with_grad(checked(x, gy), center, gram, mask);
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
