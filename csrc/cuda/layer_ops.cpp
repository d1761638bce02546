// The linear_* and conv_* ops of bootgrad/ops/schema.py on CUDA: checks, results and registration.

#include <optional>
#include <tuple>

#include "checks.h"
#include "launch.h"
#include "layer.h"

namespace bootgrad {

namespace {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct Geometry {
  const Sizes &kernel, &stride, &padding, &dilation;
  int64_t groups;
};

int64_t stride_of(const Tensor& tensor, int64_t d) { return tensor.size(d) == 1 ? 0 : tensor.stride(d); }

// The call of one op, with the schema's checks made.
class Layer {
 public:
  // A linear layer.
  Layer(const Tensor& x, const Tensor& gy) : x_(x), gy_(gy), linear_(true) {
    STD_TORCH_CHECK(x.dim() == 3 && gy.dim() == 3, "x and gy must be (B, T, I) and (B, T, O); got ", x.dim(), " and ",
                    gy.dim(), " dimensions");
    check_pair(x, gy);
    STD_TORCH_CHECK(x.size(1) == gy.size(1), "x and gy must share T; got ", x.size(1), " and ", gy.size(1));
    const int64_t T = x.size(1);
    call.shape = {x.size(0), x.size(2), gy.size(2), 1,         {1, 1, T},
                  {1, 1, T}, {1, 1, 1}, {1, 1, 1},  {0, 0, 0}, {1, 1, 1}};
    weight_shape_ = {gy.size(2), x.size(2)};
    finish();
  }

  // A convolution.
  Layer(const Tensor& x, const Tensor& gy, const Geometry& g) : x_(x), gy_(gy), linear_(false) {
    const int64_t n = x.dim() - 2;
    STD_TORCH_CHECK(n >= 1 && n <= 3, "x must be (B, C, *S) with one to three spatial dimensions; got shape ",
                    shown(sizes_of(x)));
    const std::pair<const char*, const Sizes*> lists[] = {
        {"kernel_size", &g.kernel}, {"stride", &g.stride}, {"padding", &g.padding}, {"dilation", &g.dilation}};
    for (const auto& [name, list] : lists) {
      STD_TORCH_CHECK(int64_t(list->size()) == n, name, " must have ", n, " numbers, one per dimension; got ",
                      shown(*list));
    }
    STD_TORCH_CHECK(gy.dim() == x.dim(), "gy must have the dimensions of x; got shapes ", shown(sizes_of(x)), " and ",
                    shown(sizes_of(gy)));
    check_pair(x, gy);
    STD_TORCH_CHECK(g.groups >= 1 && x.size(1) % g.groups == 0 && gy.size(1) % g.groups == 0,
                    "groups must divide the channels; got ", g.groups, " for ", x.size(1), " in and ", gy.size(1),
                    " out");
    LayerShape& s = call.shape;
    s = {x.size(0), x.size(1), gy.size(1), g.groups, {}, {}, {}, {}, {}, {}};
    Sizes expected;
    for (int d = 0; d < 3; ++d) {
      const int64_t i = d - (3 - n);
      const size_t at = size_t(i);
      const bool real = i >= 0;
      s.S[d] = real ? x.size(i + 2) : 1;
      s.kernel[d] = real ? g.kernel[at] : 1;
      s.stride[d] = real ? g.stride[at] : 1;
      s.padding[d] = real ? g.padding[at] : 0;
      s.dilation[d] = real ? g.dilation[at] : 1;
      STD_TORCH_CHECK(s.kernel[d] >= 1 && s.stride[d] >= 1 && s.padding[d] >= 0 && s.dilation[d] >= 1,
                      "kernel_size, stride and dilation must be positive and padding not negative");
      const int64_t room = s.S[d] + 2 * s.padding[d] - s.dilation[d] * (s.kernel[d] - 1) - 1;
      s.P[d] = room < 0 ? 0 : room / s.stride[d] + 1;
      if (real) {
        expected.push_back(s.P[d]);
      }
    }
    const Sizes got = sizes_of(gy);
    STD_TORCH_CHECK(Sizes(got.begin() + 2, got.end()) == expected, "gy must have spatial size ", shown(expected),
                    " for this x and geometry; got ", shown(Sizes(got.begin() + 2, got.end())));
    weight_shape_ = {s.O, s.channels()};
    weight_shape_.insert(weight_shape_.end(), g.kernel.begin(), g.kernel.end());
    finish();
  }

  const void* layer_shaped(const char* name, const std::optional<Tensor>& tensor) {
    return input(name, tensor, weight_shape_);
  }
  const void* weights(const std::optional<Tensor>& w) { return input("w", w, {x_.size(0)}); }

  Tensor per_sample(void*& pointer) { return result(pointer, {x_.size(0)}, accumulation_type(x_)); }
  Tensor sum(void*& pointer) { return result(pointer, weight_shape_, accumulation_type(x_)); }
  Tensor bias_rows() { return result(call.bias, {x_.size(0), call.shape.O}, accumulation_type(x_)); }
  Tensor like(const Tensor& tensor, void*& pointer, LayerStrides& strides) {
    Tensor like = result(pointer, sizes_of(tensor), tensor.scalar_type());
    strides = strides_of(like);
    return like;
  }
  Tensor nothing(ScalarType dtype) const { return torch::stable::new_empty(x_, {0}, dtype); }
  Tensor nothing() const { return nothing(accumulation_type(x_)); }

  void run() {
    check_devices(x_, gy_);
    const torch::stable::accelerator::DeviceGuard guard(x_.get_device_index());
    int64_t refused = 0;
    CudaDevice device{current_stream(x_), 0, 0, 0, &Layer::allocate, this, &refused};
    const auto attribute = [&](cudaDeviceAttr which) {
      int value = 0;
      STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, x_.get_device_index()));
      return int64_t(value);
    };
    device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
    device.shared_limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    device.cache_bytes = attribute(cudaDevAttrL2CacheSize) / 2;
    const cudaError_t error = function()(call, device);
    STD_TORCH_CHECK(
        refused == 0, "a launch holds at most 2147483647 blocks; got ", refused, " for ", call.shape.B, " samples of ",
        call.shape.positions(), " positions",
        call.gram ? ": take path=\"direct\", or fewer samples at a time" : ": take fewer samples at a time");
    STD_CUDA_CHECK(error);
  }

  LayerCall call{};

 private:
  void finish() {
    const LayerShape& s = call.shape;
    for (const int64_t number : {s.positions(), s.pixels(), s.rows(), s.outputs() * s.taps(), s.O, s.C}) {
      STD_TORCH_CHECK(number < int64_t(1) << 30,
                      "a sample's positions, pixels, channels and patches must each be fewer "
                      "than 2^30; got ",
                      number);
    }
    call.x = x_.const_data_ptr();
    call.gy = gy_.const_data_ptr();
    call.x_strides = strides_of(x_);
    call.gy_strides = strides_of(gy_);
  }

  LayerStrides strides_of(const Tensor& tensor) const {
    if (linear_) {
      return {stride_of(tensor, 0), stride_of(tensor, 2), {0, 0, stride_of(tensor, 1)}};
    }
    LayerStrides strides{stride_of(tensor, 0), stride_of(tensor, 1), {0, 0, 0}};
    for (int64_t d = 2; d < tensor.dim(); ++d) {
      strides.s[d + 3 - tensor.dim()] = stride_of(tensor, d);
    }
    return strides;
  }

  const void* input(const char* name, const std::optional<Tensor>& tensor, const Sizes& shape) {
    if (!tensor) {
      return nullptr;
    }
    check_layer(name, *tensor, shape, x_);
    held_.push_back(torch::stable::contiguous(*tensor));
    return held_.back().const_data_ptr();
  }

  Tensor result(void*& pointer, const Sizes& shape, ScalarType dtype) const {
    Tensor tensor = torch::stable::new_empty(x_, shape, dtype);
    pointer = tensor.numel() > 0 ? tensor.mutable_data_ptr() : nullptr;
    return tensor;
  }

  static void* allocate(void* self, int64_t bytes) {
    Layer& layer = *static_cast<Layer*>(self);
    layer.held_.push_back(torch::stable::new_empty(layer.x_, {bytes}, ScalarType::Byte));
    return layer.held_.back().mutable_data_ptr();
  }

  cudaError_t (*function() const)(const LayerCall&, const CudaDevice&) {
    switch (x_.scalar_type()) {
      case ScalarType::Double: return run_layer_double;
      case ScalarType::Float: return run_layer_float;
      case ScalarType::Half: return run_layer_half;
      default: return run_layer_bfloat16;
    }
  }

  const Tensor &x_, &gy_;
  const bool linear_;
  Sizes weight_shape_;
  std::vector<Tensor> held_;
};

// The ops, on a linear layer or a convolution.

Tensor sq_norms(Layer layer, bool gram) {
  layer.call.gram = gram;
  Tensor out = layer.per_sample(layer.call.sq_norms);
  layer.run();
  return out;
}

Tensor deviation_sq_norms(Layer layer, const Tensor& center, bool gram) {
  layer.call.center = layer.layer_shaped("center", center);
  layer.call.gram = gram;
  Tensor out = layer.per_sample(layer.call.deviation);
  layer.run();
  return out;
}

Tensor jvp(Layer layer, const Tensor& v) {
  layer.call.v = layer.layer_shaped("v", v);
  Tensor out = layer.per_sample(layer.call.inner);
  layer.run();
  return out;
}

Tensor weighted_sum(Layer layer, const std::optional<Tensor>& w) {
  layer.call.w = layer.weights(w);
  Tensor out = layer.sum(layer.call.sum);
  layer.run();
  return out;
}

Results statistics(Layer layer, const std::optional<Tensor>& center, bool gram) {
  layer.call.center = layer.layer_shaped("center", center);
  layer.call.gram = gram;
  Tensor sum = layer.sum(layer.call.sum), norms = layer.per_sample(layer.call.sq_norms);
  Tensor deviation = center ? layer.per_sample(layer.call.deviation) : layer.nothing();
  Tensor bias = layer.bias_rows();
  layer.run();
  return {sum, norms, deviation, bias};
}

Results sq_norms_with_grad(Layer layer, const Tensor& x, const Tensor& gy, const std::optional<Tensor>& center,
                           bool gram, const std::vector<bool>& mask) {
  STD_TORCH_CHECK(mask.size() == 3, "mask must have 3 entries; got ", mask.size());
  layer.call.center = layer.layer_shaped("center", center);
  layer.call.gram = gram;
  Tensor s = layer.per_sample(center ? layer.call.deviation : layer.call.sq_norms);
  Tensor dx = mask[0] ? layer.like(x, layer.call.dx, layer.call.dx_strides) : layer.nothing(x.scalar_type());
  Tensor dgy = mask[1] ? layer.like(gy, layer.call.dgy, layer.call.dgy_strides) : layer.nothing(x.scalar_type());
  Tensor sum = mask[2] ? layer.sum(layer.call.sum) : layer.nothing();
  layer.run();
  return {s, dx, dgy, sum};
}

Sizes kernel_of(const char* name, const Tensor& weights, const Tensor& x) {
  const Sizes sizes = sizes_of(weights);
  STD_TORCH_CHECK(weights.dim() == x.dim() && x.dim() > 2, name, " must have the dimensions of x; got shapes ",
                  shown(sizes), " and ", shown(sizes_of(x)));
  return Sizes(sizes.begin() + 2, sizes.end());
}

Tensor linear_sq_norms(const Tensor& x, const Tensor& gy, StringHandle path) {
  const bool gram = is_gram(path);
  return sq_norms({x, gy}, gram);
}

Tensor linear_deviation_sq_norms(const Tensor& x, const Tensor& gy, const Tensor& center, StringHandle path) {
  const bool gram = is_gram(path);
  return deviation_sq_norms({x, gy}, center, gram);
}

Tensor linear_jvp(const Tensor& x, const Tensor& gy, const Tensor& v) { return jvp({x, gy}, v); }

Tensor linear_weighted_sum(const Tensor& x, const Tensor& gy, std::optional<Tensor> w) {
  return weighted_sum({x, gy}, w);
}

Results linear_statistics(const Tensor& x, const Tensor& gy, std::optional<Tensor> center, StringHandle path) {
  const bool gram = is_gram(path);
  return statistics({x, gy}, center, gram);
}

Results linear_sq_norms_with_grad(const Tensor& x, const Tensor& gy, std::optional<Tensor> center, StringHandle path,
                                  std::vector<bool> mask) {
  const bool gram = is_gram(path);
  return sq_norms_with_grad({x, gy}, x, gy, center, gram, mask);
}

Tensor conv_sq_norms(const Tensor& x, const Tensor& gy, Sizes kernel, Sizes stride, Sizes padding, Sizes dilation,
                     int64_t groups, StringHandle path) {
  const bool gram = is_gram(path);
  return sq_norms({x, gy, {kernel, stride, padding, dilation, groups}}, gram);
}

Tensor conv_deviation_sq_norms(const Tensor& x, const Tensor& gy, const Tensor& center, Sizes stride, Sizes padding,
                               Sizes dilation, int64_t groups, StringHandle path) {
  const bool gram = is_gram(path);
  const Sizes kernel = kernel_of("center", center, x);
  return deviation_sq_norms({x, gy, {kernel, stride, padding, dilation, groups}}, center, gram);
}

Tensor conv_jvp(const Tensor& x, const Tensor& gy, const Tensor& v, Sizes stride, Sizes padding, Sizes dilation,
                int64_t groups) {
  const Sizes kernel = kernel_of("v", v, x);
  return jvp({x, gy, {kernel, stride, padding, dilation, groups}}, v);
}

Tensor conv_weighted_sum(const Tensor& x, const Tensor& gy, std::optional<Tensor> w, Sizes kernel, Sizes stride,
                         Sizes padding, Sizes dilation, int64_t groups) {
  return weighted_sum({x, gy, {kernel, stride, padding, dilation, groups}}, w);
}

Results conv_statistics(const Tensor& x, const Tensor& gy, std::optional<Tensor> center, Sizes kernel, Sizes stride,
                        Sizes padding, Sizes dilation, int64_t groups, StringHandle path) {
  const bool gram = is_gram(path);
  return statistics({x, gy, {kernel, stride, padding, dilation, groups}}, center, gram);
}

Results conv_sq_norms_with_grad(const Tensor& x, const Tensor& gy, std::optional<Tensor> center, Sizes kernel,
                                Sizes stride, Sizes padding, Sizes dilation, int64_t groups, StringHandle path,
                                std::vector<bool> mask) {
  const bool gram = is_gram(path);
  return sq_norms_with_grad({x, gy, {kernel, stride, padding, dilation, groups}}, x, gy, center, gram, mask);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bootgrad_cuda, CUDA, m) {
  m.impl("linear_sq_norms", TORCH_BOX(&linear_sq_norms));
  m.impl("linear_deviation_sq_norms", TORCH_BOX(&linear_deviation_sq_norms));
  m.impl("linear_jvp", TORCH_BOX(&linear_jvp));
  m.impl("linear_weighted_sum", TORCH_BOX(&linear_weighted_sum));
  m.impl("linear_statistics", TORCH_BOX(&linear_statistics));
  m.impl("linear_sq_norms_with_grad", TORCH_BOX(&linear_sq_norms_with_grad));
  m.impl("conv_sq_norms", TORCH_BOX(&conv_sq_norms));
  m.impl("conv_deviation_sq_norms", TORCH_BOX(&conv_deviation_sq_norms));
  m.impl("conv_jvp", TORCH_BOX(&conv_jvp));
  m.impl("conv_weighted_sum", TORCH_BOX(&conv_weighted_sum));
  m.impl("conv_statistics", TORCH_BOX(&conv_statistics));
  m.impl("conv_sq_norms_with_grad", TORCH_BOX(&conv_sq_norms_with_grad));
}

}  // namespace bootgrad
