// Implicit im2col: the matrix of a layer's patches U[row, position] read straight from x, whatever its strides.
//
// A row is (tap, channel), channels innermost; a position is (sample, p0, p1, p2). Their number lies at
//
//     coordinate[d] = origin[d] + p[d]·step[d] + tap[d]·dilation[d]         zero outside of 0 … size[d] − 1
//
// Everything that is multiplied has this form: the patches of x; gy and the pixels of x, which have one tap; and for
// the transposed convolution gy at the positions that reach a pixel. `Matrix` is the other factor, weights with the
// same rows, of a sample or of all.
//
// Sizes of a sample fit 31 bits; offsets are in 64.

#pragma once

#include <bootgrad/device.cuh>

namespace bootgrad {

// Division of n < 2^31 by a number known on the host: a multiplication and a shift.
struct Divisor {
  uint32_t value = 1, multiplier = 0, shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t divisor) : value(divisor > 1 ? uint32_t(divisor) : 1) {
    while ((uint64_t(1) << shift) < value) {
      ++shift;
    }
    multiplier = uint32_t(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - value)) / value + 1);
  }

  __device__ __forceinline__ uint32_t divide(uint32_t n) const {
    return (uint32_t((uint64_t(n) * multiplier) >> 32) + n) >> shift;
  }
  // Leaves the remainder in n.
  __device__ __forceinline__ uint32_t split(uint32_t& n) const {
    const uint32_t quotient = divide(n);
    n -= quotient * value;
    return quotient;
  }
};

// row = ((tap0·taps1 + tap1)·taps2 + tap2)·channels + channel
struct RowIndex {
  Divisor channels, taps1, taps2;
  int32_t rows;

  __device__ __forceinline__ int32_t decode(int32_t row, int32_t (&tap)[3]) const {
    uint32_t channel = uint32_t(row);
    uint32_t rest = channels.split(channel);
    uint32_t middle = taps2.split(rest);
    tap[2] = int32_t(rest);
    tap[0] = int32_t(taps1.split(middle));
    tap[1] = int32_t(middle);
    return int32_t(channel);
  }
};

template <typename T>
struct Gather {
  using In = T;

  const T* data;
  int64_t stride_b, stride_g, stride_c, stride_s[3];
  int32_t size[3], origin[3], step[3], dilation[3], extent[3];
  int32_t positions;  // of a sample
  Divisor per_sample, extent1, extent2;
  RowIndex index;
  bool along_rows;  // chunks are of neighbouring rows, where channels lie side by side; else of neighbouring positions
  bool wide;        // whole chunks lie on 16-byte boundaries and inside of space, or outside of it

  // A position of a sample, and where the sample's numbers begin.
  struct Position {
    int64_t base;
    int32_t p[3];
  };
  // A row's channel as an offset, its tap as coordinates.
  struct Row {
    int64_t offset;
    int32_t shift[3];
  };

  // Position number n, counted from the first one of sample b; n may reach into the samples after b.
  __device__ __forceinline__ Position position(int64_t b, int64_t group, int32_t n) const {
    uint32_t rest = uint32_t(n);
    b += per_sample.split(rest);
    uint32_t middle = extent2.split(rest);
    const uint32_t first = extent1.split(middle);
    return {b * stride_b + group * stride_g, {int32_t(first), int32_t(middle), int32_t(rest)}};
  }

  __device__ __forceinline__ Row row(int32_t number) const {
    int32_t tap[3];
    Row row{index.decode(number, tap) * stride_c, {}};
#pragma unroll
    for (int d = 0; d < 3; ++d) {
      row.shift[d] = origin[d] + tap[d] * dilation[d];
    }
    return row;
  }

  // Offset of a row at a position; negative where there is nothing, which means zero.
  __device__ __forceinline__ int64_t offset(const Position& at, const Row& row) const {
    int64_t offset = at.base + row.offset;
    bool inside = true;
#pragma unroll
    for (int d = 0; d < 3; ++d) {
      const int32_t coordinate = at.p[d] * step[d] + row.shift[d];
      inside = inside && uint32_t(coordinate) < uint32_t(size[d]);
      offset += coordinate * stride_s[d];
    }
    return inside ? offset : -1;
  }

  // Rows number … number + count − 1 at one position; `row` is the first of them.
  __device__ __forceinline__ Chunk<T> rows_at(const Position& at, const Row& row, int32_t number, int32_t count) const {
    constexpr int kSize = Chunk<T>::kSize;
    Chunk<T> chunk{};
    if (wide) {
      const int64_t from = count > 0 ? offset(at, row) : -1;
      return from >= 0 ? load_aligned_chunk(data, from) : chunk;
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      if (j < count) {
        const int64_t from = offset(at, j == 0 ? row : this->row(number + j));
        chunk.values[j] = from >= 0 ? data[from] : T();
      }
    }
    return chunk;
  }

  // One row at `count` positions, of several samples where `at` is near the end of one.
  __device__ __forceinline__ Chunk<T> positions_of(Position at, const Row& row, int32_t count) const {
    constexpr int kSize = Chunk<T>::kSize;
    Chunk<T> chunk{};
    if (wide) {
      return count > 0 ? load_aligned_chunk(data, at.base + row.offset + at.p[2]) : chunk;
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      if (j < count) {
        const int64_t from = offset(at, row);
        chunk.values[j] = from >= 0 ? data[from] : T();
        if (++at.p[2] == extent[2]) {
          at.p[2] = 0;
          if (++at.p[1] == extent[1]) {
            at.p[1] = 0;
            if (++at.p[0] == extent[0]) {
              at.p[0] = 0;
              at.base += stride_b;
            }
          }
        }
      }
    }
    return chunk;
  }
};

// m[row, column] at data + b·stride_b + group·stride_g + column·stride_column + (row's tap and channel).
template <typename T>
struct Matrix {
  const T* data;
  int64_t stride_b, stride_g, stride_column, stride_c, stride_tap[3], first_tap;
  int32_t columns;
  RowIndex index;
  bool along_rows, wide;  // as above

  __device__ __forceinline__ int64_t row(int32_t number) const {
    int32_t tap[3];
    const int32_t channel = index.decode(number, tap);
    return first_tap + channel * stride_c + tap[0] * stride_tap[0] + tap[1] * stride_tap[1] + tap[2] * stride_tap[2];
  }

  __device__ __forceinline__ Chunk<T> rows_at(const T* column, int32_t number, int32_t count) const {
    Chunk<T> chunk{};
    if (wide) {
      return count > 0 ? load_aligned_chunk(column, row(number)) : chunk;
    }
#pragma unroll
    for (int j = 0; j < Chunk<T>::kSize; ++j) {
      if (j < count) {
        chunk.values[j] = column[row(number + j)];
      }
    }
    return chunk;
  }

  __device__ __forceinline__ Chunk<T> columns_of(const T* column, int32_t number, int32_t count) const {
    Chunk<T> chunk{};
    if (wide) {
      return count > 0 ? load_aligned_chunk(column, row(number)) : chunk;
    }
#pragma unroll
    for (int j = 0; j < Chunk<T>::kSize; ++j) {
      if (j < count) {
        chunk.values[j] = column[row(number) + j * stride_column];
      }
    }
    return chunk;
  }
};

}  // namespace bootgrad
