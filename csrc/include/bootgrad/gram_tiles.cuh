// The Gram path ("ghost norm") to ‖G_i‖² = Σ_{t, t'} (Uᵀ U)[t, t'] (gyᵀ gy)[t, t'], over positions instead of weights.
//
// patch_gram_kernel makes a tile of both Grams and multiplies them entry by entry, for any layer. pixel_gram_kernel
// makes the Gram of a sample's pixels once, P = xᵀ x in shared memory, where it must fit; a patch Gram's entry is a sum
// of shifted pixel Grams, (Uᵀ U)[t, t'] = Σ_tap P[pixel(t, tap), pixel(t', tap)], which needs k² times less.
//
// Grams are symmetric: of tiles beside the diagonal one of two is made, and counted twice.

#pragma once

#include <bootgrad/tile_product.cuh>

namespace bootgrad {

template <typename In>
struct GramParams {
  using Sum = Accumulator<In>;

  Gather<In> x;       // patches
  Gather<In> pixels;  // the pixels of x, one tap; pixel_gram_kernel only
  Gather<In> gy;
  int64_t B, groups;
  int32_t tiles;        // of positions
  int32_t pixel_tiles;  // of pixels
  int32_t taps;
  Sum* partial;  // patches: [B, groups · pairs of tiles · kWarps]; pixels: [B, groups · kWarps]
};

__host__ __device__ constexpr int64_t pairs(int64_t tiles) { return tiles * (tiles + 1) / 2; }

// Tiles i ≤ j of the pair's number.
__device__ __forceinline__ void unpair(int64_t pair, int32_t tiles, int32_t& i, int32_t& j) {
  i = 0;
  while (pair >= tiles - i) {
    pair -= tiles - i;
    ++i;
  }
  j = i + int32_t(pair);
}

template <class Math, typename In>
__device__ __forceinline__ void gram_tile(const Gather<In>& source, int64_t b, int64_t group, int32_t m0, int32_t n0,
                                          void* memory, typename Math::Sum (&acc)[kEntries]) {
#pragma unroll
  for (int i = 0; i < kEntries; ++i) {
    acc[i] = 0;
  }
  RowStages<Math, In> left(source, b, group, m0), right(source, b, group, n0);
  tile_product<Math>(source.index.rows, memory, acc, left, right);
}

// Grid: a block of kThreads for each sample, group and pair, with kStageBytes<Math> of shared memory.
template <class Math, typename In>
__global__ void __launch_bounds__(kThreads) patch_gram_kernel(const GramParams<In> p) {
  using Sum = typename Math::Sum;
  const int64_t per_group = pairs(p.tiles);
  const int64_t group = int64_t(blockIdx.x) / per_group % p.groups, b = int64_t(blockIdx.x) / per_group / p.groups;
  int32_t i, j;
  unpair(int64_t(blockIdx.x) % per_group, p.tiles, i, j);
  Sum u[kEntries], gy[kEntries];
  gram_tile<Math>(p.x, b, group, i * kTile, j * kTile, dynamic_shared_memory(), u);
  gram_tile<Math>(p.gy, b, group, i * kTile, j * kTile, dynamic_shared_memory(), gy);
  Sum sum = 0;
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    sum += u[e] * gy[e];
  }
  sum = warp_sum(i == j ? sum : 2 * sum);
  if (threadIdx.x % kWarpSize == 0) {
    p.partial[int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarpSize] = sum;
  }
}

// Shared memory of pixel_gram_kernel: stages, P with a row and a column of zeros, and pixel(t, tap).
template <class Math>
constexpr int64_t pixel_gram_bytes(int64_t pixels, int64_t positions, int64_t taps) {
  return kStageBytes<Math> + (pixels + 1) * (pixels + 1) * int64_t(sizeof(typename Math::Sum)) +
         positions * taps * int64_t(sizeof(uint16_t));
}

// Grid: a block of kThreads for each sample and group.
template <class Math, typename In>
__global__ void __launch_bounds__(kThreads) pixel_gram_kernel(const GramParams<In> p) {
  using Sum = typename Math::Sum;
  const int64_t group = int64_t(blockIdx.x) % p.groups, b = int64_t(blockIdx.x) / p.groups;
  const int32_t N = p.pixels.positions, T = p.gy.positions, pitch = N + 1;
  char* const memory = static_cast<char*>(dynamic_shared_memory());
  Sum* const gram = reinterpret_cast<Sum*>(memory + kStageBytes<Math>);
  uint16_t* const pixel = reinterpret_cast<uint16_t*>(gram + pitch * pitch);  // [taps, T]; N where there is none

  for (int32_t n = int32_t(threadIdx.x); n < pitch; n += kThreads) {
    gram[N * pitch + n] = 0;
    gram[n * pitch + N] = 0;
  }
  for (int32_t n = int32_t(threadIdx.x); n < p.taps * T; n += kThreads) {
    const int32_t tap = n / T, t = n % T;
    const typename Gather<In>::Position at = p.x.position(0, 0, t);
    const typename Gather<In>::Row row = p.x.row(tap * int32_t(p.x.index.channels.value));
    int32_t number = 0;
    bool found = true;
#pragma unroll
    for (int d = 0; d < 3; ++d) {
      const int32_t coordinate = at.p[d] * p.x.step[d] + row.shift[d];
      found = found && uint32_t(coordinate) < uint32_t(p.x.size[d]);
      number = number * p.x.size[d] + coordinate;
    }
    pixel[n] = uint16_t(found ? number : N);
  }

  Sum acc[kEntries];
  for (int32_t i = 0; i < p.pixel_tiles; ++i) {
    for (int32_t j = i; j < p.pixel_tiles; ++j) {
      gram_tile<Math>(p.pixels, b, group, i * kTile, j * kTile, memory, acc);
#pragma unroll
      for (int e = 0; e < kEntries; ++e) {
        const int32_t m = i * kTile + Math::row(e), n = j * kTile + Math::column(e);
        if (m < N && n < N) {
          gram[m * pitch + n] = acc[e];
          if (i != j) {
            gram[n * pitch + m] = acc[e];
          }
        }
      }
    }
  }

  // The next product's first barrier stands between what was written to P and what is read below.
  Sum total = 0;
  for (int32_t i = 0; i < p.tiles; ++i) {
    for (int32_t j = i; j < p.tiles; ++j) {
      gram_tile<Math>(p.gy, b, group, i * kTile, j * kTile, memory, acc);
      Sum sum = 0;
      for (int32_t tap = 0; tap < p.taps; ++tap) {
        const auto pixel_of = [&](int32_t t) { return t < T ? int32_t(pixel[tap * T + t]) : N; };
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
          const int32_t m = i * kTile + Math::row(e), n = j * kTile + Math::column(e);
          sum += acc[e] * gram[pixel_of(m) * pitch + pixel_of(n)];
        }
      }
      total += i == j ? sum : 2 * sum;
    }
  }
  total = warp_sum(total);
  if (threadIdx.x % kWarpSize == 0) {
    p.partial[int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarpSize] = total;
  }
}

}  // namespace bootgrad
