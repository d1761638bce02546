// The product that all kernels are made of: a block's tile  acc[m, n] = Σ_k a[k, m] b[k, n],  64×64 by 128 threads.
//
// k goes by stages. While a stage is multiplied from shared memory, the next one is on its way from global memory into
// registers; there are two buffers, so one __syncthreads a stage is enough. A chunk of 16 bytes comes by one load or
// number by number to the same place, so that strides and alignment do not change a bit of the result.
//
// `FmaMath` multiplies by fused multiply-adds, 8×4 numbers a thread. `MmaMath` and `Tf32Math` multiply by tensor cores,
// 32×32 numbers a warp; their operands lie in shared memory with k innermost, in rows of 20 words, which spreads the
// 8 rows and 4 words that a fragment is read from over all 32 banks.

#pragma once

#include <bootgrad/gather.cuh>
#include <bootgrad/mma.cuh>

namespace bootgrad {

constexpr int kTile = 64;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kEntries = kTile * kTile / kThreads;  // of a tile, a thread's

template <typename T>
struct FmaMath {
  using Element = T;
  using Sum = T;
  static constexpr int kDepth = 64 / sizeof(T);
  static constexpr bool kDepthContiguous = false;
  static constexpr int kPitch = kTile + Chunk<T>::kSize;
  static constexpr int kBuffer = kDepth * kPitch;  // numbers of one operand's stage

  template <typename In>
  __device__ static __forceinline__ T element(In value) {
    return to_accumulator(value);
  }
  __device__ static __forceinline__ int index(int k, int m) { return k * kPitch + m; }
  __device__ static __forceinline__ int row(int entry) { return int(threadIdx.x) / 16 * 8 + entry / 4; }
  __device__ static __forceinline__ int column(int entry) { return int(threadIdx.x) % 16 * 4 + entry % 4; }

  __device__ static __forceinline__ void multiply(const T* a, const T* b, int /*depth*/, T (&acc)[kEntries]) {
    constexpr int kSize = Chunk<T>::kSize;
    a += row(0);
    b += column(0);
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      Chunk<T> left[8 / kSize], right[4 / kSize];
#pragma unroll
      for (int i = 0; i < 8 / kSize; ++i) {
        left[i] = load_aligned_chunk(a, k * kPitch + i * kSize);
      }
#pragma unroll
      for (int i = 0; i < 4 / kSize; ++i) {
        right[i] = load_aligned_chunk(b, k * kPitch + i * kSize);
      }
#pragma unroll
      for (int i = 0; i < kEntries; ++i) {
        acc[i] += left[i / 4 / kSize].values[i / 4 % kSize] * right[i % 4 / kSize].values[i % kSize];
      }
    }
  }
};

// What the tensor cores' maths share; E names the kind of numbers, kStep is the depth of one instruction.
template <typename E, typename ElementType, int kStep>
struct WarpMath {
  using Element = ElementType;
  using Sum = float;
  static constexpr int kDepth = 2 * kStep;
  static constexpr bool kDepthContiguous = true;
  static constexpr int kPerWord = 4 / sizeof(Element);
  static constexpr int kPitch = 20 * kPerWord;
  static constexpr int kBuffer = kTile * kPitch;

  __device__ static __forceinline__ int index(int k, int m) { return m * kPitch + k; }
  __device__ static __forceinline__ int row(int entry) {
    return int(threadIdx.x) / 64 * 32 + entry / 16 * 16 + int(threadIdx.x) % 32 / 4 + entry % 4 / 2 * 8;
  }
  __device__ static __forceinline__ int column(int entry) {
    return int(threadIdx.x) % 64 / 32 * 32 + entry % 16 / 4 * 8 + int(threadIdx.x) % 4 * 2 + entry % 2;
  }

  __device__ static __forceinline__ uint32_t word(const Element* buffer, int k, int m) {
    return *reinterpret_cast<const uint32_t*>(buffer + index(k, m));
  }

  __device__ static __forceinline__ void multiply(const Element* a, const Element* b, int depth,
                                                  float (&acc)[kEntries]) {
    const int m = int(threadIdx.x) / 64 * 32 + int(threadIdx.x) % 32 / 4;
    const int n = int(threadIdx.x) % 64 / 32 * 32 + int(threadIdx.x) % 32 / 4;
    const int q = int(threadIdx.x) % 4 * kPerWord;
#pragma unroll
    for (int k = 0; k < kDepth; k += kStep) {
      if (k >= depth) {
        break;
      }
      uint32_t left[2][4], right[4][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          left[i][r] = word(a, k + q + r / 2 * (kStep / 2), m + i * 16 + r % 2 * 8);
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          right[j][r] = word(b, k + q + r * (kStep / 2), n + j * 8);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float d[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            d[e] = acc[(i * 4 + j) * 4 + e];
          }
          warp_multiply_add<E>(d, left[i], right[j]);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            acc[(i * 4 + j) * 4 + e] = d[e];
          }
        }
      }
    }
  }
};

template <typename T>
struct MmaMath : WarpMath<T, T, 16> {
  template <typename In>
  __device__ static __forceinline__ T element(In value) {
    return value;
  }
};

struct Tf32Math : WarpMath<Tf32, float, 8> {
  template <typename In>
  __device__ static __forceinline__ float element(In value) {
    return to_tf32(to_accumulator(value));
  }
};

// Bytes of shared memory that tile_product needs.
template <class Math>
constexpr int64_t kStageBytes = 4 * Math::kBuffer * int64_t(sizeof(typename Math::Element));

// Which chunks of a stage are this thread's: number i starts at (k, m) and goes along k or along m.
template <class Math, typename In>
struct Chunks {
  static constexpr int kSize = Chunk<In>::kSize;
  static constexpr int kCount = kTile * Math::kDepth / (kSize * kThreads);

  __device__ static __forceinline__ void place(int i, bool along_k, int& k, int& m) {
    const int number = int(threadIdx.x) + i * kThreads;
    if (along_k) {
      k = number % (Math::kDepth / kSize) * kSize;
      m = number / (Math::kDepth / kSize);
    } else if (Math::kDepthContiguous) {
      // Neighbouring threads write neighbouring k: one bank each.
      k = number % Math::kDepth;
      m = number / Math::kDepth * kSize;
    } else {
      k = number / (kTile / kSize);
      m = number % (kTile / kSize) * kSize;
    }
  }

  __device__ static __forceinline__ void store(const Chunk<In>& chunk, int i, bool along_k,
                                               typename Math::Element* buffer) {
    int k, m;
    place(i, along_k, k, m);
    if constexpr (sizeof(In) == sizeof(typename Math::Element)) {
      if (along_k == Math::kDepthContiguous) {
        Chunk<typename Math::Element> converted;
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          converted.values[j] = Math::element(chunk.values[j]);
        }
        *reinterpret_cast<uint4*>(buffer + Math::index(k, m)) = *reinterpret_cast<const uint4*>(converted.values);
        return;
      }
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      buffer[Math::index(along_k ? k + j : k, along_k ? m : m + j)] = Math::element(chunk.values[j]);
    }
  }
};

// Reads stages of a Gather whose k are positions: m are the rows from m0 on.
template <class Math, typename In>
class PositionStages {
 public:
  __device__ __forceinline__ PositionStages(const Gather<In>& gather, int64_t group, int32_t m0)
      : gather_(gather), group_(group), m0_(m0) {
#pragma unroll
    for (int i = 0; i < Slots::kCount; ++i) {
      int k, m;
      Slots::place(i, !gather_.along_rows, k, m);
      rows_[i] = gather_.row(min_of(m0 + m, gather_.index.rows > 0 ? gather_.index.rows - 1 : 0));
    }
  }

  // Positions from … end − 1, as far as the stage goes, counted from the first of sample b.
  __device__ __forceinline__ void fetch(int64_t b, int32_t from, int32_t end) {
#pragma unroll
    for (int i = 0; i < Slots::kCount; ++i) {
      int k, m;
      Slots::place(i, !gather_.along_rows, k, m);
      const bool valid = from + k < end && m0_ + m < gather_.index.rows;
      const typename Gather<In>::Position at = gather_.position(b, group_, from + k);
      staged_[i] = gather_.along_rows ? gather_.rows_at(at, rows_[i], m0_ + m, valid ? gather_.index.rows - m0_ - m : 0)
                                      : gather_.positions_of(at, rows_[i], valid ? end - from - k : 0);
    }
  }

  __device__ __forceinline__ void store(typename Math::Element* buffer) const {
#pragma unroll
    for (int i = 0; i < Slots::kCount; ++i) {
      Slots::store(staged_[i], i, !gather_.along_rows, buffer);
    }
  }

  // The same, each position times the weight of its sample; `b` and `from` as in fetch.
  template <typename A>
  __device__ __forceinline__ void store_weighted(typename Math::Element* buffer, const A* weights, int64_t b,
                                                 int32_t from, int32_t end) const {
#pragma unroll
    for (int i = 0; i < Slots::kCount; ++i) {
      int k, m;
      Slots::place(i, !gather_.along_rows, k, m);
#pragma unroll
      for (int j = 0; j < Slots::kSize; ++j) {
        const int at_k = gather_.along_rows ? k : k + j, at_m = gather_.along_rows ? m + j : m;
        const bool valid = from + at_k < end;
        const A weight = valid ? weights[b + gather_.per_sample.divide(uint32_t(from + at_k))] : A(0);
        buffer[Math::index(at_k, at_m)] = Math::element(staged_[i].values[j]) * weight;
      }
    }
  }

 private:
  using Slots = Chunks<Math, In>;

  __device__ static __forceinline__ int32_t min_of(int32_t a, int32_t b) { return a < b ? a : b; }

  const Gather<In>& gather_;
  const int64_t group_;
  const int32_t m0_;
  typename Gather<In>::Row rows_[Slots::kCount];
  Chunk<In> staged_[Slots::kCount];
};

// Reads stages of a Gather whose k are rows: m are the positions of sample b from m0 on.
template <class Math, typename In>
class RowStages {
 public:
  __device__ __forceinline__ RowStages(const Gather<In>& gather, int64_t b, int64_t group, int32_t m0)
      : gather_(gather), m0_(m0) {
#pragma unroll
    for (int i = 0; i < Slots::kCount; ++i) {
      int k, m;
      Slots::place(i, gather_.along_rows, k, m);
      at_[i] = gather_.position(b, group, m0 + m);
    }
  }

  __device__ __forceinline__ void fetch(int32_t from) {
#pragma unroll
    for (int i = 0; i < Slots::kCount; ++i) {
      int k, m;
      Slots::place(i, gather_.along_rows, k, m);
      const bool valid = from + k < gather_.index.rows && m0_ + m < gather_.positions;
      const typename Gather<In>::Row row = gather_.row(from + k);
      staged_[i] = gather_.along_rows
                       ? gather_.rows_at(at_[i], row, from + k, valid ? gather_.index.rows - from - k : 0)
                       : gather_.positions_of(at_[i], row, valid ? gather_.positions - m0_ - m : 0);
    }
  }

  __device__ __forceinline__ void store(typename Math::Element* buffer) const {
#pragma unroll
    for (int i = 0; i < Slots::kCount; ++i) {
      Slots::store(staged_[i], i, gather_.along_rows, buffer);
    }
  }

 private:
  using Slots = Chunks<Math, In>;

  const Gather<In>& gather_;
  const int32_t m0_;
  typename Gather<In>::Position at_[Slots::kCount];
  Chunk<In> staged_[Slots::kCount];
};

// Reads stages of a Matrix: k are its rows, m its columns from m0 on.
template <class Math, typename In>
class MatrixStages {
 public:
  __device__ __forceinline__ MatrixStages(const Matrix<In>& matrix, int64_t b, int64_t group, int32_t m0)
      : matrix_(matrix), data_(matrix.data + b * matrix.stride_b + group * matrix.stride_g), m0_(m0) {}

  __device__ __forceinline__ void fetch(int32_t from) {
#pragma unroll
    for (int i = 0; i < Slots::kCount; ++i) {
      int k, m;
      Slots::place(i, matrix_.along_rows, k, m);
      const bool valid = from + k < matrix_.index.rows && m0_ + m < matrix_.columns;
      const In* column = data_ + (m0_ + m) * matrix_.stride_column;
      staged_[i] = matrix_.along_rows ? matrix_.rows_at(column, from + k, valid ? matrix_.index.rows - from - k : 0)
                                      : matrix_.columns_of(column, from + k, valid ? matrix_.columns - m0_ - m : 0);
    }
  }

  __device__ __forceinline__ void store(typename Math::Element* buffer) const {
#pragma unroll
    for (int i = 0; i < Slots::kCount; ++i) {
      Slots::store(staged_[i], i, matrix_.along_rows, buffer);
    }
  }

 private:
  using Slots = Chunks<Math, In>;

  const Matrix<In>& matrix_;
  const In* data_;
  const int32_t m0_;
  Chunk<In> staged_[Slots::kCount];
};

// The pipeline. fetch(s) reads stage s into registers, store(s, a, b) writes it to shared memory, depth(s) tells how
// many of its k there are, done(s) may look at acc.
template <class Math, class Fetch, class Store, class Depth, class Done>
__device__ __forceinline__ void pipeline(int64_t stages, void* memory, typename Math::Sum (&acc)[kEntries],
                                         const Fetch& fetch, const Store& store, const Depth& depth, const Done& done) {
  using Element = typename Math::Element;
  Element* const buffers = static_cast<Element*>(memory);
  if (stages > 0) {
    fetch(0);
    store(0, buffers, buffers + Math::kBuffer);
  }
  __syncthreads();
  for (int64_t s = 0; s < stages; ++s) {
    const Element* const now = buffers + s % 2 * 2 * Math::kBuffer;
    Element* const next = buffers + (s + 1) % 2 * 2 * Math::kBuffer;
    if (s + 1 < stages) {
      fetch(s + 1);
    }
    Math::multiply(now, now + Math::kBuffer, depth(s), acc);
    done(s);
    if (s + 1 < stages) {
      store(s + 1, next, next + Math::kBuffer);
    }
    __syncthreads();
  }
}

// One product over the rows 0 … rows − 1 of a and b, RowStages or MatrixStages. `acc` is added to.
template <class Math, class A, class B>
__device__ __forceinline__ void tile_product(int32_t rows, void* memory, typename Math::Sum (&acc)[kEntries], A& a,
                                             B& b) {
  using Element = typename Math::Element;
  pipeline<Math>((int64_t(rows) + Math::kDepth - 1) / Math::kDepth, memory, acc,
                 [&](int64_t s) {
                   a.fetch(int32_t(s) * Math::kDepth);
                   b.fetch(int32_t(s) * Math::kDepth);
                 },
                 [&](int64_t, Element* left, Element* right) {
                   a.store(left);
                   b.store(right);
                 },
                 [&](int64_t s) { return rows - int32_t(s) * Math::kDepth; }, [](int64_t) {});
}

}  // namespace bootgrad
