// Between torch's tensors and the kernels' raw pointers: checks, allocation, and the services of bootgrad::Runtime.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "bootgrad/layer.hpp"

namespace bootgrad {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// Raises RuntimeError with the message alone unless the condition holds.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// "(2, 3)", as Python prints a shape.
std::string shown(const Sizes& sizes);
Sizes sizes_of(const Tensor& t);

// Raises unless the tensor has a supported dtype.
void check_dtype(const char* name, const Tensor& x);
// Raises unless x and gy are tensors of one supported dtype and batch size.
void check_pair(const Tensor& x, const Tensor& gy);
// Raises unless an optional layer-shaped or (B,) input has the shape and the accumulation dtype of x.
void check_layer(const char* name, const std::optional<Tensor>& t, const Sizes& shape, const Tensor& x);
// True for "gram", false for "direct". Takes the op's argument itself, and frees it: torch's conversion to std::string,
// up to 2.13, loses 48 bytes in every call.
bool is_gram(StringHandle path);

DType dtype_of(const Tensor& t);
ScalarType accumulation_type(const Tensor& t);
Tensor allocate(const Tensor& like, const Sizes& shape, ScalarType dtype);
Tensor packed(const Tensor& t);

const void* pointer(const Tensor& t);
const void* pointer(const std::optional<Tensor>& t);
// Null for an output without elements, as one is that was not wanted.
void* result(Tensor& t);

// The threads of torch's pool and memory that each thread keeps.
const Runtime& runtime();

}  // namespace bootgrad
