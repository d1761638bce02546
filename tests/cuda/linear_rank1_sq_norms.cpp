// Runs linear_rank1_sq_norms_kernel on the CPU, for the dtypes named on the command line, and prints for every case its
// largest relative error against a naive loop in long double, and a checksum of the result's bits:
//
//     dtype group I O layout error checksum

#include "cuda_emulation.h"

#include <bootgrad/linear_rank1_sq_norms.cuh>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <utility>

using namespace bootgrad;

namespace {

// Where the numbers of a (rows, length) matrix lie: number n of row b at offset + b * row_stride + n * stride.
struct Layout {
  const char* name;
  int64_t offset, row_padding, stride;
};

// Buffers end with the last number, so that AddressSanitizer sees a read beyond it.
template <typename T>
struct Matrix {
  Matrix(int64_t rows, int64_t length, const Layout& layout, uint32_t seed)
      : stride(layout.stride),
        row_stride(length * layout.stride + layout.row_padding),
        offset(layout.offset),
        rows(rows),
        length(length),
        buffer(rows * length == 0 ? 0 : size_t(offset + (rows - 1) * row_stride + (length - 1) * stride + 1),
               T(std::numeric_limits<float>::quiet_NaN())) {
    for (int64_t b = 0; b < rows; ++b) {
      for (int64_t n = 0; n < length; ++n) {
        seed = seed * 1664525u + 1013904223u;
        buffer[size_t(offset + b * row_stride + n * stride)] = T(float(int(seed >> 16) - 32768) / 16384.0f);
      }
    }
  }

  const T* data() const { return buffer.data() + (buffer.empty() ? 0 : offset); }

  long double sq_norm(int64_t b) const {
    long double sum = 0;
    for (int64_t n = 0; n < length; ++n) {
      const long double value = to_accumulator(data()[b * row_stride + n * stride]);
      sum += value * value;
    }
    return sum;
  }

  int64_t stride, row_stride, offset, rows, length;
  std::vector<T> buffer;
};

template <typename T, int kGroup>
void run(const char* dtype, int64_t B, int64_t I, int64_t O, const Layout& layout) {
  const Matrix<T> x(B, I, layout, 1), gy(B, O, layout, 2);
  std::vector<Accumulator<T>> out(size_t(B), std::numeric_limits<Accumulator<T>>::quiet_NaN());
  const LinearRank1SqNormsParams<T> params{x.data(),
                                           gy.data(),
                                           out.data(),
                                           B,
                                           I,
                                           O,
                                           x.row_stride,
                                           x.stride,
                                           gy.row_stride,
                                           gy.stride,
                                           has_aligned_rows(x.data(), x.row_stride, x.stride),
                                           has_aligned_rows(gy.data(), gy.row_stride, gy.stride)};
  const int64_t per_block = kLinearRank1SqNormsThreads / kGroup;
  emulation::launch(unsigned((B + per_block - 1) / per_block), kLinearRank1SqNormsThreads,
                    [&] { linear_rank1_sq_norms_kernel<T, kGroup>(params); });
  double error = 0;
  uint64_t checksum = 14695981039346656037u;
  for (int64_t b = 0; b < B; ++b) {
    const long double expected = x.sq_norm(b) * gy.sq_norm(b);
    const double difference = double(std::fabs((long double)(out[size_t(b)]) - expected));
    error = std::isnan(difference) ? difference
                                   : std::max(error, expected == 0 ? difference : double(difference / expected));
    const double bits = out[size_t(b)];
    uint64_t word;
    std::memcpy(&word, &bits, sizeof(word));
    checksum = (checksum ^ word) * 1099511628211u;
  }
  std::printf("%s %d %lld %lld %s %.3e %016llx\n", dtype, kGroup, (long long)I, (long long)O, layout.name, error,
              (unsigned long long)checksum);
}

template <typename T>
void run_all(const char* dtype) {
  const int64_t pad = Chunk<T>::kSize;
  const Layout contiguous{"contiguous", 0, 0, 1};
  for (const auto& [I, O] : {std::pair<int64_t, int64_t>{0, 5}, {1, 1}, {63, 127}, {127, 64}, {2500, 40}}) {
    run<T, kWarpSize>(dtype, 9, I, O, contiguous);  // more samples than a block of warps takes: its last warps are idle
    run<T, kLinearRank1SqNormsThreads>(dtype, 1, I, O, contiguous);
  }
  for (const Layout& layout : {Layout{"aligned", 0, pad, 1}, Layout{"padded", 0, 1, 1}, Layout{"offset", 1, 0, 1},
                               Layout{"strided", 0, 3, 3}}) {
    run<T, kWarpSize>(dtype, 3, 16 * pad, 65 * pad, layout);
    run<T, kLinearRank1SqNormsThreads>(dtype, 2, 16 * pad, 300 * pad, layout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string dtype = argv[i];
    if (dtype == "double") {
      run_all<double>("double");
    } else if (dtype == "float") {
      run_all<float>("float");
    } else if (dtype == "half") {
      run_all<__half>("half");
    } else if (dtype == "bfloat16") {
      run_all<__nv_bfloat16>("bfloat16");
    } else {
      return 2;
    }
  }
  return 0;
}
