// The embedding_* ops of bootgrad/ops/schema.py on the CPU.

#include <tuple>

#include "host.h"
#include "kernels.h"

namespace bootgrad {

namespace {

// Contiguous inputs of one call, with the schema's checks made.
class LookUps {
 public:
  LookUps(const Tensor& tokens_in, const Tensor& bounds_in, const Tensor& gy_in) : gy(gy_in) {
    check_dtype("gy", gy_in);
    require(gy_in.dim() == 2, "gy must be floating point, (N, D); got shape ", shown(sizes_of(gy_in)));
    tokens = integers("tokens", tokens_in);
    bounds = integers("bounds", bounds_in);
    gy = packed(gy_in);
    require(tokens.size(0) == gy.size(0), "tokens and gy must have one length; got ", tokens.size(0), " and ",
            gy.size(0));
    require(bounds.size(0) > 0, "bounds must have a number more than there are samples; got none");
    call.runtime = &runtime();
    call.dtype = dtype_of(gy);
    call.B = bounds.size(0) - 1;
    call.N = gy.size(0);
    call.D = gy.size(1);
    call.tokens = static_cast<const int64_t*>(pointer(tokens));
    call.bounds = static_cast<const int64_t*>(pointer(bounds));
    call.gy = pointer(gy);
    bool rises = call.bounds[0] == 0 && call.bounds[call.B] == call.N;
    for (int64_t b = 0; b < call.B; ++b) rises = rises && call.bounds[b] <= call.bounds[b + 1];
    require(rises, "bounds must rise from 0 to the number of look-ups, ", call.N);
  }

  // A table (V, D), for which tokens must be less than V.
  void take_table(const char* name, const Tensor& t) {
    require(t.dim() == 2 && t.size(1) == call.D, name, " must have shape (V, ", call.D, "); got ", shown(sizes_of(t)));
    check_layer(name, t, sizes_of(t), gy);
    table = packed(t);
    call.center = pointer(table);
    bound_tokens(t.size(0));
  }

  void bound_tokens(int64_t V) {
    call.V = V;
    int64_t largest = -1;
    for (int64_t i = 0; i < call.N; ++i) largest = call.tokens[i] > largest ? call.tokens[i] : largest;
    require(largest < V, "tokens must be less than ", V, ", the rows of the table; got ", largest);
  }

  Tensor samples() const { return allocate(gy, {call.B}, accumulation_type(gy)); }

  Tensor tokens, bounds, gy;
  std::optional<Tensor> table;
  EmbeddingCall call{};

 private:
  static Tensor integers(const char* name, const Tensor& t) {
    require(t.dim() == 1 && t.scalar_type() == ScalarType::Long, name, " must be int64 in one dimension; got shape ",
            shown(sizes_of(t)));
    return packed(t);
  }
};

Tensor norms(LookUps& look_ups, const std::optional<Tensor>& center, Tensor* rows) {
  if (center) look_ups.take_table("center", *center);
  Tensor s = look_ups.samples();
  look_ups.call.sq_norms = result(s);
  look_ups.call.rows = rows ? result(*rows) : nullptr;
  if (look_ups.call.B > 0) kernels().embedding(look_ups.call);
  return s;
}

Tensor embedding_sq_norms(const Tensor& tokens, const Tensor& bounds, const Tensor& gy, std::optional<Tensor> center) {
  LookUps look_ups(tokens, bounds, gy);
  return norms(look_ups, center, nullptr);
}

std::tuple<Tensor, Tensor> embedding_rows(const Tensor& tokens, const Tensor& bounds, const Tensor& gy,
                                          std::optional<Tensor> center) {
  LookUps look_ups(tokens, bounds, gy);
  Tensor rows = allocate(gy, sizes_of(gy), gy.scalar_type());
  Tensor s = norms(look_ups, center, &rows);
  return {s, rows};
}

Tensor embedding_jvp(const Tensor& tokens, const Tensor& bounds, const Tensor& gy, const Tensor& v) {
  LookUps look_ups(tokens, bounds, gy);
  look_ups.take_table("v", v);
  Tensor out = look_ups.samples();
  look_ups.call.inner = result(out);
  if (look_ups.call.B > 0) kernels().embedding(look_ups.call);
  return out;
}

Tensor embedding_weighted_sum(const Tensor& tokens, const Tensor& bounds, const Tensor& gy, std::optional<Tensor> w,
                              int64_t size) {
  LookUps look_ups(tokens, bounds, gy);
  require(size >= 0, "size must be that of a table; got ", size);
  look_ups.bound_tokens(size);
  check_layer("w", w, {look_ups.call.B}, look_ups.gy);
  if (w) w = packed(*w);
  Tensor sum = allocate(gy, {size, look_ups.call.D}, accumulation_type(gy));
  torch::stable::zero_(sum);
  look_ups.call.w = pointer(w);
  look_ups.call.sum = result(sum);
  if (look_ups.call.sum) kernels().embedding(look_ups.call);
  return sum;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bootgrad, CPU, m) {
  m.impl("embedding_sq_norms", TORCH_BOX(&embedding_sq_norms));
  m.impl("embedding_rows", TORCH_BOX(&embedding_rows));
  m.impl("embedding_jvp", TORCH_BOX(&embedding_jvp));
  m.impl("embedding_weighted_sum", TORCH_BOX(&embedding_weighted_sum));
}

}  // namespace bootgrad
