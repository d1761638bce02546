// Checks of the ops' arguments, in one place; bootgrad/ops/schema.py says what they must be.

#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

namespace bootgrad {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// "(2, 3)", as Python prints a shape.
inline std::string shown(const Sizes& sizes) {
  std::ostringstream out;
  out << '(';
  for (size_t i = 0; i < sizes.size(); ++i) {
    out << (i ? ", " : "") << sizes[i];
  }
  out << (sizes.size() == 1 ? ",)" : ")");
  return out.str();
}

inline Sizes sizes_of(const Tensor& tensor) {
  Sizes sizes;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    sizes.push_back(tensor.size(d));
  }
  return sizes;
}

inline ScalarType accumulation_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// One dtype and batch size.
inline void check_pair(const Tensor& x, const Tensor& gy) {
  STD_TORCH_CHECK(x.size(0) == gy.size(0), "x and gy must have one batch size; got ", x.size(0), " and ", gy.size(0));
  STD_TORCH_CHECK(x.scalar_type() == gy.scalar_type(), "x and gy must have one dtype");
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::Half ||
                      dtype == ScalarType::BFloat16,
                  "x must be float64, float32, float16 or bfloat16");
}

// The last check, for which nothing has to be on a GPU to try the others.
inline void check_devices(const Tensor& x, const Tensor& gy) {
  STD_TORCH_CHECK(x.is_cuda() && gy.is_cuda() && x.get_device_index() == gy.get_device_index(),
                  "x and gy must be on one device");
}

// What is shaped as the layer, or (B,): of the accumulation dtype.
inline void check_layer(const char* name, const Tensor& tensor, const Sizes& shape, const Tensor& x) {
  STD_TORCH_CHECK(sizes_of(tensor) == shape, name, " must have shape ", shown(shape), "; got ",
                  shown(sizes_of(tensor)));
  STD_TORCH_CHECK(tensor.scalar_type() == accumulation_type(x), name, " must have the accumulation dtype of x, ",
                  accumulation_type(x) == ScalarType::Double ? "float64" : "float32");
  STD_TORCH_CHECK(tensor.is_cuda() == x.is_cuda() && tensor.get_device_index() == x.get_device_index(), name,
                  " must be on the device of x");
}

// True for "gram", false for "direct". Takes the op's argument itself, and frees it: torch's conversion to std::string,
// up to 2.13, loses 48 bytes in every call.
inline bool is_gram(StringHandle handle) {
  const char* text = nullptr;
  size_t length = 0;
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  const std::string path(text, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  STD_TORCH_CHECK(path == "gram" || path == "direct", "path must be one of direct, gram; got '", path, "'");
  return path == "gram";
}

}  // namespace bootgrad
