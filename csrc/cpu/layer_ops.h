// What the linear_* and conv_* ops of bootgrad/ops/schema.py do alike, once the inputs of a layer are checked.

#pragma once

#include <tuple>

#include "bootgrad/plan.hpp"
#include "host.h"

namespace bootgrad {

struct Layer {
  ConvShape shape;
  bool channels_last;  // a linear layer
  Sizes weight_shape;
  Tensor x, gy;
};

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensor sq_norms(const Layer& layer, bool gram);
Tensor deviation_sq_norms(const Layer& layer, const Tensor& center, bool gram);
Tensor jvp(const Layer& layer, const Tensor& v);
Tensor weighted_sum(const Layer& layer, const std::optional<Tensor>& w);
FourTensors statistics(const Layer& layer, const std::optional<Tensor>& center, bool gram);
// Where there are weights, weights + factor·G_i takes the place of G_i; the shift is added at every position.
Tensor applied(const Layer& layer, const Tensor& h, bool gram, bool transposed,
               const std::optional<Tensor>& weights = {}, const std::optional<Tensor>& shift = {}, double factor = 1);
FourTensors sq_norms_with_grad(const Layer& layer, const std::optional<Tensor>& center, bool gram,
                               const std::vector<bool>& mask);
FiveTensors visit(const Layer& layer, const std::optional<Tensor>& center, bool biased,
                  const std::optional<Tensor>& bias_center, bool gram, const std::vector<bool>& mask, double scale);

}  // namespace bootgrad
