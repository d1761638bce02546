// attention_double_backward of bootgrad/ops/schema.py on the CPU.

#include <tuple>

#include "host.h"
#include "kernels.h"

namespace bootgrad {

namespace {

// A tensor with its features side by side.
Tensor with_rows(const Tensor& t) { return t.stride(3) == 1 || t.size(3) <= 1 ? t : torch::stable::contiguous(t); }

AttentionCall::Rows rows_of(const Tensor& t) { return {pointer(t), {t.stride(0), t.stride(1), t.stride(2)}}; }

AttentionCall::Rows rows_of(std::optional<Tensor>& t) {
  if (!t) return {};
  t = with_rows(*t);
  return rows_of(*t);
}

void check_like(const char* name, const std::optional<Tensor>& t, const Sizes& shape, ScalarType dtype) {
  require(!t || (sizes_of(*t) == shape && t->scalar_type() == dtype), name, " must have the dtype of q and shape ",
          shown(shape), "; got ", shown(t ? sizes_of(*t) : Sizes{}));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_double_backward(std::optional<Tensor> uq, std::optional<Tensor> uk,
                                                                     std::optional<Tensor> uv, Tensor g, Tensor q,
                                                                     Tensor k, Tensor v, std::optional<Tensor> mask,
                                                                     bool is_causal, double scale) {
  for (const Tensor* t : {&g, &q, &k, &v})
    require(t->dim() == 4, "g, q, k and v must have four dimensions, samples, heads, positions and features; got ",
            shown(sizes_of(*t)));
  check_dtype("q", q);
  const int64_t N = q.size(0), H = q.size(1), L = q.size(2), D = q.size(3), S = k.size(2), Dv = v.size(3);
  const ScalarType dtype = q.scalar_type();
  check_like("g", g, {N, H, L, Dv}, dtype);
  check_like("k", k, {N, H, S, D}, dtype);
  check_like("v", v, {N, H, S, Dv}, dtype);
  check_like("uq", uq, {N, H, L, D}, dtype);
  check_like("uk", uk, {N, H, S, D}, dtype);
  check_like("uv", uv, {N, H, S, Dv}, dtype);
  check_layer("mask", mask, {N, H, L, S}, q);
  for (Tensor* t : {&g, &q, &k, &v}) *t = with_rows(*t);
  Tensor dg = allocate(q, {N, L, H, Dv}, dtype), dq = allocate(q, {N, L, H, D}, dtype);
  Tensor dk = allocate(q, {N, S, H, D}, dtype), dv = allocate(q, {N, S, H, Dv}, dtype);
  AttentionCall call{};
  call.runtime = &runtime();
  call.dtype = dtype_of(q);
  call.N = N, call.H = H, call.L = L, call.S = S, call.D = D, call.Dv = Dv;
  call.uq = rows_of(uq), call.uk = rows_of(uk), call.uv = rows_of(uv);
  call.g = rows_of(g), call.q = rows_of(q), call.k = rows_of(k), call.v = rows_of(v);
  call.mask = pointer(mask);
  for (int64_t d = 0; mask && d < 4; ++d) call.mask_stride[d] = mask->stride(d);
  call.is_causal = is_causal;
  call.scale = scale;
  call.dg = result(dg), call.dq = result(dq), call.dk = result(dk), call.dv = result(dv);
  kernels().attention_double_backward(call);
  return {dg, dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bootgrad, CPU, m) {
  m.impl("attention_double_backward", TORCH_BOX(&attention_double_backward));
}

}  // namespace bootgrad
