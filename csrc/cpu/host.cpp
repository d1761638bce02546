#include "host.h"

#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>

namespace bootgrad {

namespace {

// What a thread keeps from call to call, so that a call's scratch memory does not fault its pages in again. A piece
// beyond kKept is given back by the next call that needs less.
constexpr size_t kKept = size_t{64} << 20;
constexpr int kSlots = 3;

struct Kept {
  void* memory = nullptr;
  size_t bytes = 0;

  ~Kept() { std::free(memory); }

  void* at_least(size_t wanted) {
    wanted = (wanted + 4095) / 4096 * 4096 + 4096;
    if (wanted > bytes || (bytes > kKept && wanted <= kKept)) {
      std::free(memory);
      memory = nullptr, bytes = 0;
      if (posix_memalign(&memory, 64, wanted) != 0) throw std::bad_alloc();
      bytes = wanted;
    }
    return memory;
  }
};

void* scratch(int slot, size_t bytes) {
  thread_local Kept kept[kSlots];
  return kept[slot].at_least(bytes);
}

// Torch's parallel_for reports an exception of the work as a failure of its own: the first is kept for the caller.
void parallel(int64_t threads, void (*work)(void*), void* ctx) {
  std::exception_ptr error;
  std::mutex error_mutex;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    try {
      for (; begin < end; ++begin) work(ctx);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

int64_t threads() { return torch::stable::get_num_threads(); }

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Half: return "torch.float16";
    default: return "another dtype";
  }
}

}  // namespace

std::string shown(const Sizes& sizes) {
  std::ostringstream out;
  out << '(';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  out << (sizes.size() == 1 ? ",)" : ")");
  return out.str();
}

Sizes sizes_of(const Tensor& t) {
  Sizes sizes(static_cast<size_t>(t.dim()));
  for (size_t i = 0; i < sizes.size(); ++i) sizes[i] = t.size(static_cast<int64_t>(i));
  return sizes;
}

void check_dtype(const char* name, const Tensor& x) {
  const ScalarType type = x.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
              type == ScalarType::Half,
          name, " must be float32, float64, bfloat16 or float16 on the CPU; cast it");
}

void check_pair(const Tensor& x, const Tensor& gy) {
  check_dtype("x", x);
  const ScalarType type = x.scalar_type();
  require(type == gy.scalar_type(), "x and gy must have one dtype; got ", name_of(type), " and ",
          name_of(gy.scalar_type()));
  require(x.size(0) == gy.size(0), "x and gy must have one batch size; got ", x.size(0), " and ", gy.size(0));
}

void check_layer(const char* name, const std::optional<Tensor>& t, const Sizes& shape, const Tensor& x) {
  if (!t) return;
  require(sizes_of(*t) == shape, name, " must have shape ", shown(shape), "; got ", shown(sizes_of(*t)));
  require(t->scalar_type() == accumulation_type(x), name, " must have dtype ", name_of(accumulation_type(x)), "; got ",
          name_of(t->scalar_type()));
}

bool is_gram(StringHandle handle) {
  const char* text = nullptr;
  size_t length = 0;
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  const std::string path(text, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  require(path == "direct" || path == "gram", "path must be one of direct, gram; got '", path, "'");
  return path == "gram";
}

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: return DType::f32;
  }
}

ScalarType accumulation_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor allocate(const Tensor& like, const Sizes& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

const void* pointer(const Tensor& t) { return t.const_data_ptr(); }

const void* pointer(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

void* result(Tensor& t) { return t.numel() > 0 ? t.mutable_data_ptr() : nullptr; }

const Runtime& runtime() {
  static const Runtime services{parallel, threads, scratch};
  return services;
}

}  // namespace bootgrad
