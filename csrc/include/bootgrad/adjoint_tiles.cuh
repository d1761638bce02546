// The gradients D_i = G_i − center multiplied back: the derivatives of ‖D_i‖² by gy_i and x_i.
//
//     ∂/∂gy_i[o, t] = 2 Σ_r D_i[o, r] U_i[r, t]         ∂/∂x_i[c, p] = 2 Σ_{tap, o} D_i[o, (tap, c)] gy_i[o, t(p, tap)]
//
// Both are one product, of a matrix that is the sample's own and a gather. Pixels of x that lie in one place of the
// stride's grid are reached by the same taps, with whole steps between their positions in gy: one such phase a launch.

#pragma once

#include <bootgrad/tile_product.cuh>

namespace bootgrad {

template <typename In>
struct AdjointParams {
  using Sum = Accumulator<In>;

  Matrix<Sum> d;      // rows (tap, channel), columns m
  Gather<In> source;  // rows as d's, positions n
  In* out;            // out[b, group, m, n] at b·out_b + group·out_g + m·out_m + (first + Σ n[d]·out_n[d])
  int64_t out_b, out_g, out_m, out_n[3], out_first;
  int64_t first, samples, groups;  // D starts at sample `first`
  int32_t tiles_m, tiles_n;
  Sum factor;
};

template <typename In>
int64_t adjoint_tiles(const AdjointParams<In>& p) {
  return p.samples * p.groups * p.tiles_m * p.tiles_n;
}

// Grid: one tile a block of kThreads, with kStageBytes<Math> of shared memory.
template <class Math, typename In>
__global__ void __launch_bounds__(kThreads) adjoint_tiles_kernel(const AdjointParams<In> p) {
  int64_t rest = blockIdx.x;
  const int32_t n0 = int32_t(rest % p.tiles_n) * kTile;
  rest /= p.tiles_n;
  const int32_t m0 = int32_t(rest % p.tiles_m) * kTile;
  rest /= p.tiles_m;
  const int64_t group = rest % p.groups, sample = rest / p.groups, b = p.first + sample;

  typename Math::Sum acc[kEntries] = {};
  MatrixStages<Math, Accumulator<In>> d(p.d, sample, group, m0);
  RowStages<Math, In> source(p.source, b, group, n0);
  tile_product<Math>(p.d.index.rows, dynamic_shared_memory(), acc, d, source);

  In* const out = p.out + b * p.out_b + group * p.out_g + p.out_first;
#pragma unroll
  for (int i = 0; i < kEntries; ++i) {
    const int32_t m = m0 + Math::row(i), n = n0 + Math::column(i);
    if (m < p.d.columns && n < p.source.positions) {
      const typename Gather<In>::Position at = p.source.position(0, 0, n);
      out[m * p.out_m + at.p[0] * p.out_n[0] + at.p[1] * p.out_n[1] + at.p[2] * p.out_n[2]] =
          from_accumulator<In>(p.factor * acc[i]);
    }
  }
}

}  // namespace bootgrad
