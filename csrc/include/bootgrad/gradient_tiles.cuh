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
  const Sum* v;       // never beside a center or rows
  const Sum* w;       // null: ones
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

// Shared memory: stages, and a tile of the center or of v where there is one.
template <class Math>
constexpr int64_t gradient_bytes(bool layer) {
  return kStageBytes<Math> + (layer ? kTile * kTile * int64_t(sizeof(typename Math::Sum)) : 0);
}

// Grid: tiles · splits blocks of kThreads, with gradient_bytes<Math>(center or v) of shared memory.
template <class Math, typename In>
__global__ void __launch_bounds__(kThreads) gradient_tiles_kernel(const GradientParams<In> p) {
  using Sum = typename Math::Sum;
  const int64_t tiles = p.groups * p.tiles_o * p.tiles_r;
  const int64_t split = int64_t(blockIdx.x) / tiles, tile = int64_t(blockIdx.x) % tiles;
  const int64_t group = tile / (p.tiles_o * p.tiles_r);
  const int32_t o0 = int32_t(tile / p.tiles_r % p.tiles_o) * kTile, r0 = int32_t(tile % p.tiles_r) * kTile;
  const int64_t first = p.first + (p.last - p.first) * split / p.splits;
  const int64_t last = p.first + (p.last - p.first) * (split + 1) / p.splits;
  const int32_t O = p.gy.index.rows, R = p.x.index.rows;

  const auto inside = [&](int entry) { return o0 + Math::row(entry) < O && r0 + Math::column(entry) < R; };
  const auto row_of = [&](int entry) { return (group * O + o0 + Math::row(entry)) * R; };

  // The tile of the center or of v, each thread's numbers its own, so nobody has to wait.
  Sum* const held =
      reinterpret_cast<Sum*>(static_cast<char*>(dynamic_shared_memory()) + kStageBytes<Math>) + threadIdx.x;
  const Sum* const layer = p.center ? p.center : p.v;
  if (layer) {
#pragma unroll 4
    for (int i = 0; i < kEntries; ++i) {
      uint32_t channel = uint32_t(r0 + Math::column(i));
      const uint32_t tap = p.x.index.channels.split(channel);
      held[i * kThreads] = inside(i) ? layer[row_of(i) + int64_t(channel) * p.taps + tap] : Sum(0);
    }
  }
  const auto other = [&](int entry) { return held[entry * kThreads]; };

  Sum acc[kEntries] = {}, sum[kEntries] = {};
  const int64_t T = p.x.positions, length = p.merged ? (last - first) * T : T;
  const int32_t end = int32_t(length);
  const int64_t stages = length > 0 ? (length + Math::kDepth - 1) / Math::kDepth : 1;  // of a sample, or of all
  PositionStages<Math, In> gy(p.gy, group, o0), x(p.x, group, r0);

  // Whether gy is weighted as it is read; tensor cores' operands would lose digits by it.
  constexpr bool kWeighted = !Math::kDepthContiguous;
  const bool weighted = kWeighted && p.merged && p.w != nullptr;

  const auto finish = [&](int64_t b) {
    // One after the other, each with few numbers beside the tile.
    const auto write = [&](Sum* partial, const auto& term) {
      Sum value = 0;
#pragma unroll
      for (int i = 0; i < kEntries; ++i) {
        value += term(i);
      }
      value = warp_sum(value);
      if (threadIdx.x % kWarpSize == 0) {
        partial[(b * tiles + tile) * kWarps + threadIdx.x / kWarpSize] = value;
      }
    };
    const auto difference = [&](int i) { return p.center ? acc[i] - other(i) : acc[i]; };
    if (p.sq_norms) {
      write(p.sq_norms, [&](int i) { return acc[i] * acc[i]; });
    }
    if (p.deviation) {
      write(p.deviation, [&](int i) {
        const Sum d = difference(i);
        return d * d;
      });
    }
    if (p.inner) {
      write(p.inner, [&](int i) { return acc[i] * other(i); });
    }
    if (p.rows) {
      Sum* const rows = p.rows + (b - p.first) * p.groups * O * R + r0;
#pragma unroll
      for (int i = 0; i < kEntries; ++i) {
        if (inside(i)) {
          rows[row_of(i) + Math::column(i)] = difference(i);
        }
      }
    }
    const Sum weight = p.w && !weighted ? p.w[b] : Sum(1);
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      sum[i] += weight * acc[i];
      acc[i] = 0;
    }
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
  bool clamp;  // what rounding left below zero
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
    p.out[b] = Sum(p.clamp && sum < 0 ? 0 : sum);
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
