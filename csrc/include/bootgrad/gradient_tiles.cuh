// Tiles of the per-sample gradients G_i[o, r] = Σ_t gy_i[o, t] U_i[r, t], and what is wanted of them.
//
// A block takes one tile and a range of samples. When a sample's tile is complete, in registers, it is squared, with
// and without the center subtracted, multiplied with a direction v, stored as G_i − center, and added to Σ_i w_i G_i,
// each if asked for, and forgotten. What a warp finds for a sample, and what a block adds up over its samples, goes to
// partial results in global memory, which add_norms_kernel and add_sums_kernel add in a fixed order.
//
// Where only the sum is wanted, the positions of all samples are one long k, with weights applied as gy is read.
//
// Rows are r = (tap, channel); layer-shaped inputs and results are (O, channel, tap), as torch has them.

#pragma once

#include <bootgrad/tile_product.cuh>

namespace bootgrad {

template <typename In>
struct GradientParams {
  using Sum = Accumulator<In>;

  Gather<In> gy, x;        // rows of gy: one group's o; of x: r
  int64_t first, last;     // samples
  int64_t groups, splits;  // of the samples, among blocks
  int32_t tiles_o, tiles_r, taps;
  const Sum* center;  // null: zero
  const Sum* v;
  const Sum* w;  // null: ones
  // [B, tiles·kWarps], null where not wanted: ‖G_i‖², ‖G_i − center‖², ⟨G_i, v⟩
  Sum *sq_norms, *deviation, *inner;
  Sum* rows;         // [last − first, O, r]  G_i − center, null where not wanted
  Sum* sums;         // [splits, O, r]  Σ_i w_i G_i, null where not wanted
  bool add_to_sums;  // to what is there already
  bool merged;       // one long k: nothing but sums
};

template <typename In>
int64_t gradient_tiles(const GradientParams<In>& p) {
  return p.groups * p.tiles_o * p.tiles_r;
}

// Grid: tiles · splits blocks of kThreads, with kStageBytes<Math> of shared memory.
template <class Math, typename In>
__global__ void __launch_bounds__(kThreads) gradient_tiles_kernel(const GradientParams<In> p) {
  using Sum = typename Math::Sum;
  // A center in registers would not leave room for float64.
  constexpr bool kHoldsCenter = sizeof(Sum) == 4;
  const int64_t tiles = p.groups * p.tiles_o * p.tiles_r;
  const int64_t split = int64_t(blockIdx.x) / tiles, tile = int64_t(blockIdx.x) % tiles;
  const int64_t group = tile / (p.tiles_o * p.tiles_r);
  const int32_t o0 = int32_t(tile / p.tiles_r % p.tiles_o) * kTile, r0 = int32_t(tile % p.tiles_r) * kTile;
  const int64_t first = p.first + (p.last - p.first) * split / p.splits;
  const int64_t last = p.first + (p.last - p.first) * (split + 1) / p.splits;
  const int32_t O = p.gy.index.rows, R = p.x.index.rows;

  const auto inside = [&](int entry) { return o0 + Math::row(entry) < O && r0 + Math::column(entry) < R; };
  const auto row_of = [&](int entry) { return (group * O + o0 + Math::row(entry)) * R; };
  const auto layer = [&](const Sum* values, int entry) {
    uint32_t channel = uint32_t(r0 + Math::column(entry));
    const uint32_t tap = p.x.index.channels.split(channel);
    return inside(entry) ? values[row_of(entry) + int64_t(channel) * p.taps + tap] : Sum(0);
  };

  Sum acc[kEntries] = {}, sum[kEntries] = {}, held[kHoldsCenter ? kEntries : 1];
  const Sum* const subtracted = p.center ? p.center : p.v;  // there is never both
  if constexpr (kHoldsCenter) {
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      held[i] = subtracted ? layer(subtracted, i) : Sum(0);
    }
  }
  const auto other = [&](int entry) {
    if constexpr (kHoldsCenter) {
      return held[entry];
    } else {
      return subtracted ? layer(subtracted, entry) : Sum(0);
    }
  };

  const int64_t T = p.x.positions, length = p.merged ? (last - first) * T : T;
  const int32_t end = int32_t(length);
  const int64_t stages = length > 0 ? (length + Math::kDepth - 1) / Math::kDepth : 1;  // of a sample, or of all
  PositionStages<Math, In> gy(p.gy, group, o0), x(p.x, group, r0);

  // Whether gy is weighted as it is read; tensor cores' operands would lose digits by it.
  constexpr bool kWeighted = !Math::kDepthContiguous;
  const bool weighted = kWeighted && p.merged && p.w != nullptr;

  const auto finish = [&](int64_t b) {
    Sum square = 0, deviation = 0, inner = 0;
    const Sum weight = p.w && !weighted ? p.w[b] : Sum(1);
    Sum* const rows = p.rows ? p.rows + (b - p.first) * p.groups * O * R : nullptr;
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      const Sum value = acc[i], c = other(i), difference = value - c;
      square += value * value;
      deviation += difference * difference;
      inner += value * c;
      sum[i] += weight * value;
      if (rows && inside(i)) {
        rows[row_of(i) + r0 + Math::column(i)] = p.center ? difference : value;
      }
      acc[i] = 0;
    }
    const auto write = [&](Sum* partial, Sum value) {
      if (partial) {
        value = warp_sum(value);
        if (threadIdx.x % kWarpSize == 0) {
          partial[(b * tiles + tile) * kWarps + threadIdx.x / kWarpSize] = value;
        }
      }
    };
    write(p.sq_norms, square);
    write(p.deviation, deviation);
    write(p.inner, inner);
  };

  // What is read next, and what is multiplied next: the sample and its first position.
  int64_t reading = first, multiplying = first;
  int32_t read_from = 0, multiply_from = 0;
  int64_t stored = first;
  int32_t stored_from = 0;
  const int64_t runs = p.merged ? (last > first) : last - first;
  pipeline<Math>(
      runs * stages, dynamic_shared_memory(), acc,
      [&](int64_t) {
        gy.fetch(reading, read_from, end);
        x.fetch(reading, read_from, end);
        stored = reading;
        stored_from = read_from;
        read_from += Math::kDepth;
        if (read_from >= end) {
          read_from = 0;
          ++reading;
        }
      },
      [&](int64_t, typename Math::Element* left, typename Math::Element* right) {
        if constexpr (kWeighted) {
          if (weighted) {
            gy.store_weighted(left, p.w, stored, stored_from, end);
          } else {
            gy.store(left);
          }
        } else {
          gy.store(left);
        }
        x.store(right);
      },
      [&](int64_t) { return end - multiply_from; },
      [&](int64_t) {
        multiply_from += Math::kDepth;
        if (multiply_from >= end) {
          finish(multiplying);
          multiply_from = 0;
          ++multiplying;
        }
      });

  if (p.sums) {
    Sum* const sums = p.sums + split * p.groups * O * R;
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      if (inside(i)) {
        Sum* const to = sums + row_of(i) + r0 + Math::column(i);
        *to = p.add_to_sums ? *to + sum[i] : sum[i];
      }
    }
  }
}

template <typename Sum>
struct AddNormsParams {
  const Sum* partial;  // [B, count]
  Sum* out;            // [B]
  int64_t B, count;
};

// A warp per sample. Grid: ceil(B / kWarps) blocks of kThreads.
template <typename Sum>
__global__ void __launch_bounds__(kThreads) add_norms_kernel(const AddNormsParams<Sum> p) {
  const int64_t b = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  if (b >= p.B) {
    return;
  }
  double sum = 0;
  for (int64_t i = threadIdx.x % kWarpSize; i < p.count; i += kWarpSize) {
    sum += double(p.partial[b * p.count + i]);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarpSize == 0) {
    p.out[b] = Sum(sum);
  }
}

template <typename Sum>
struct AddSumsParams {
  const Sum* partial;  // [splits, O, taps, channels]
  Sum* out;            // [O, channels, taps]
  int64_t splits, entries, channels, taps;
};

// A thread per entry. Grid: ceil(entries / kThreads) blocks of kThreads.
template <typename Sum>
__global__ void __launch_bounds__(kThreads) add_sums_kernel(const AddSumsParams<Sum> p) {
  const int64_t entry = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (entry >= p.entries) {
    return;
  }
  Sum sum = 0;
  for (int64_t s = 0; s < p.splits; ++s) {
    sum += p.partial[s * p.entries + entry];
  }
  const int64_t o = entry / (p.channels * p.taps), tap = entry / p.channels % p.taps, channel = entry % p.channels;
  p.out[(o * p.channels + channel) * p.taps + tap] = sum;
}

}  // namespace bootgrad
