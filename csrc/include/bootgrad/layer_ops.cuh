// One call for all ops on a layer: which kernels run on which samples, and their memory. On the host.
//
// Derivatives go by chunks of samples whose gradients stay in the device's cache, never all B. Of a Gram path only the
// norms without a center are left to Grams: with a center, with the weight gradient or with derivatives, a product as
// large as the direct path's is needed anyway, and the direct path gives the norms with it.
//
// `Device` launches kernels and lends memory; the launchers have one for CUDA, the tests one for the emulation:
//
//     launch(kernel, params, blocks, bytes of shared memory)      nothing for no blocks
//     void* allocate(int64_t bytes)                               16-byte aligned, until the call is over
//     multiprocessors, shared_limit, cache_bytes                  numbers

#pragma once

#include <bootgrad/adjoint_tiles.cuh>
#include <bootgrad/bias_rows.cuh>
#include <bootgrad/gradient_tiles.cuh>
#include <bootgrad/gram_tiles.cuh>
#include <bootgrad/layer_call.cuh>
#include <bootgrad/layer_geometry.cuh>

#include <type_traits>

namespace bootgrad {

// How a dtype is multiplied. Half precisions' gradients are held in float32, so they go back by TF32, which holds the
// inputs exactly. Float32 itself is never rounded: what torch is told of TF32 is not to be seen from here.
template <typename In>
struct Maths {
  static constexpr bool kHalf = sizeof(In) == 2;
  using Weighted = FmaMath<Accumulator<In>>;
  using Direct = std::conditional_t<kHalf, MmaMath<In>, Weighted>;
  using Adjoint = std::conditional_t<kHalf, Tf32Math, Weighted>;
};

enum class GramWay { kPixels, kPatches, kDirect };

template <typename In, class Device>
class LayerOps {
 public:
  using Sum = Accumulator<In>;
  using M = Maths<In>;

  LayerOps(const LayerCall& call, Device& device)
      : call_(call),
        shape_(call.shape),
        device_(device),
        x_(patches_of(static_cast<const In*>(call.x), call.x_strides, call.shape)),
        gy_(plane_of(static_cast<const In*>(call.gy), call.gy_strides, call.shape.outputs(), call.shape.P)) {}

  void run() {
    if (call_.bias) {
      bias_rows();
    }
    const bool norms_only = call_.sq_norms && !call_.deviation && !call_.inner && !call_.sum && !call_.dx && !call_.dgy;
    if (call_.gram && norms_only) {
      norms_by(gram_way());
    } else if (norms_only || call_.deviation || call_.inner || call_.sq_norms || call_.sum) {
      direct();
    }
  }

  // The Grams' ways by their multiply-adds, which come by whole tiles.
  GramWay gram_way() const {
    const int64_t bytes = pixel_gram_bytes<typename M::Direct>(shape_.pixels(), shape_.positions(), shape_.taps());
    const double T = double(tiles(shape_.positions())) * kTile, N = double(tiles(shape_.pixels())) * kTile;
    const double gy = T * (T + kTile) / 2 * double(shape_.O);
    const double patches = T * (T + kTile) / 2 * double(shape_.groups * shape_.rows());
    const double pixels =
        N * (N + kTile) / 2 * double(shape_.C) + T * (T + kTile) / 2 * double(shape_.groups * shape_.taps());
    const double direct = double(shape_.groups * tiles(shape_.outputs()) * tiles(shape_.rows())) * kTile * kTile *
                          double(shape_.positions());
    // Offsets of pixels take 16 bits.
    const bool fits = bytes <= device_.shared_limit && shape_.pixels() < 65535;
    if (fits && pixels + gy <= direct && pixels <= patches) {
      return GramWay::kPixels;
    }
    return patches + gy <= direct ? GramWay::kPatches : GramWay::kDirect;
  }

  void norms_by(GramWay way) {
    using Math = typename M::Direct;
    if (way == GramWay::kDirect) {
      direct();
      return;
    }
    GramParams<In> p{};
    p.x = x_;
    p.pixels = plane_of(static_cast<const In*>(call_.x), call_.x_strides, shape_.channels(), shape_.S);
    p.gy = gy_;
    p.B = shape_.B;
    p.groups = shape_.groups;
    p.tiles = int32_t(tiles(shape_.positions()));
    p.pixel_tiles = int32_t(tiles(shape_.pixels()));
    p.taps = int32_t(shape_.taps());
    const bool by_pixels = way == GramWay::kPixels;
    const int64_t blocks = shape_.groups * (by_pixels ? 1 : pairs(p.tiles));
    p.partial = allocate(shape_.B * blocks * kWarps);
    if (by_pixels) {
      device_.launch(pixel_gram_kernel<Math, In>, p, shape_.B * blocks,
                     pixel_gram_bytes<Math>(shape_.pixels(), shape_.positions(), shape_.taps()));
    } else {
      device_.launch(patch_gram_kernel<Math, In>, p, shape_.B * blocks, kStageBytes<Math>);
    }
    add_norms(p.partial, blocks * kWarps, call_.sq_norms, true);
  }

 private:
  static int64_t tiles(int64_t length) { return (length + kTile - 1) / kTile; }

  Sum* allocate(int64_t count) { return static_cast<Sum*>(device_.allocate(count * int64_t(sizeof(Sum)))); }

  void bias_rows() {
    BiasRowsParams<In> p{};
    p.gy = plane_of(static_cast<const In*>(call_.gy), call_.gy_strides, shape_.O, shape_.P);
    p.out = static_cast<Sum*>(call_.bias);
    p.B = shape_.B;
    p.blocks_o = int32_t((shape_.O + kBiasChannels - 1) / kBiasChannels);
    device_.launch(bias_rows_kernel<In>, p, p.B * p.blocks_o, 0);
  }

  void direct() {
    const int64_t entries = shape_.O * shape_.rows();
    const bool derivatives = call_.dx || call_.dgy;
    GradientParams<In> p{};
    p.gy = gy_;
    p.x = x_;
    p.groups = shape_.groups;
    p.tiles_o = int32_t(tiles(shape_.outputs()));
    p.tiles_r = int32_t(tiles(shape_.rows()));
    p.taps = int32_t(shape_.taps());
    p.center = static_cast<const Sum*>(call_.center);
    p.v = static_cast<const Sum*>(call_.v);
    p.w = static_cast<const Sum*>(call_.w);
    const int64_t partials = gradient_tiles(p) * kWarps;
    p.sq_norms = call_.sq_norms ? allocate(shape_.B * partials) : nullptr;
    p.deviation = call_.deviation ? allocate(shape_.B * partials) : nullptr;
    p.inner = call_.inner ? allocate(shape_.B * partials) : nullptr;

    const bool sum_only = call_.sum && !derivatives && !call_.sq_norms && !call_.deviation && !call_.inner;
    // Tensor cores must not see weights, so a sample's sum is weighted when it is complete, unless it is so short that
    // a stage would be mostly empty.
    constexpr int64_t kShort = M::kHalf ? 8 : 2 * M::Direct::kDepth;
    const bool merged_weights = p.w && shape_.positions() < kShort;
    p.merged = sum_only && (!p.w || merged_weights);

    int64_t chunk = shape_.B;
    if (derivatives && entries > 0) {
      chunk = device_.cache_bytes / (entries * int64_t(sizeof(Sum)));
      chunk = chunk < 1 ? 1 : chunk > shape_.B ? shape_.B : chunk;
      p.rows = allocate(chunk * entries);
    }
    p.splits = splits(gradient_tiles(p), chunk, p.merged);
    p.sums = call_.sum ? allocate(p.splits * entries) : nullptr;
    for (p.first = 0; p.first < shape_.B; p.first = p.last) {
      p.last = p.first + chunk < shape_.B ? p.first + chunk : shape_.B;
      p.add_to_sums = p.first > 0;
      const int64_t blocks = gradient_tiles(p) * p.splits;
      if (p.merged && p.w) {
        using Math = typename M::Weighted;
        device_.launch(gradient_tiles_kernel<Math, In>, p, blocks, gradient_bytes<Math>(p.center || p.v));
      } else {
        using Math = typename M::Direct;
        device_.launch(gradient_tiles_kernel<Math, In>, p, blocks, gradient_bytes<Math>(p.center || p.v));
      }
      if (call_.dgy) {
        derivative_by_gy(p.rows, p.first, p.last - p.first);
      }
      if (call_.dx) {
        derivative_by_x(p.rows, p.first, p.last - p.first);
      }
    }
    add_norms(p.sq_norms, partials, call_.sq_norms);
    add_norms(p.deviation, partials, call_.deviation);
    add_norms(p.inner, partials, call_.inner);
    if (call_.sum) {
      const int64_t filled = shape_.B > 0 ? p.splits : 0;
      device_.launch(
          add_sums_kernel<Sum>,
          AddSumsParams<Sum>{p.sums, static_cast<Sum*>(call_.sum), filled, entries, shape_.channels(), shape_.taps()},
          (entries + kThreads - 1) / kThreads, 0);
    }
  }

  // Among how many blocks a tile's samples are divided: enough blocks to fill the device several times over, each with
  // work for several stages, and with so few positions that their number fits 31 bits.
  int64_t splits(int64_t tiles, int64_t samples, bool merged) const {
    if (tiles == 0 || samples == 0) {
      return 1;
    }
    const int64_t wanted = (12 * int64_t(device_.multiprocessors) + tiles - 1) / tiles, T = shape_.positions();
    const int64_t most = merged ? samples * T / (8 * M::Direct::kDepth) + 1 : samples;
    int64_t splits = wanted < most ? wanted : most;
    const int64_t least = merged && T > 0 ? samples / ((int64_t(1) << 30) / T + 1) + 1 : 1;
    splits = splits < least ? least : splits;
    return splits < samples ? splits : samples;
  }

  void derivative_by_gy(const Sum* gradients, int64_t first, int64_t samples) {
    using Math = typename M::Adjoint;
    AdjointParams<In> p{};
    p.d = matrix_by_rows(gradients, shape_);
    p.source = x_;
    p.out = static_cast<In*>(call_.dgy);
    p.out_b = call_.dgy_strides.b;
    p.out_g = shape_.outputs() * call_.dgy_strides.c;
    p.out_m = call_.dgy_strides.c;
    for (int d = 0; d < 3; ++d) {
      p.out_n[d] = call_.dgy_strides.s[d];
    }
    if (p.source.positions == p.source.extent[2]) {
      p.out_n[2] = flat_stride(call_.dgy_strides, shape_.P);
    }
    launch_adjoint<Math>(p, first, samples);
  }

  void derivative_by_x(const Sum* gradients, int64_t first, int64_t samples) {
    using Math = typename M::Adjoint;
    const int64_t (&stride)[3] = shape_.stride;
    for (int64_t number = 0; number < stride[0] * stride[1] * stride[2]; ++number) {
      const Phase1d phases[3] = {phase_of(shape_, 0, number / (stride[1] * stride[2])),
                                 phase_of(shape_, 1, number / stride[2] % stride[1]),
                                 phase_of(shape_, 2, number % stride[2])};
      const Axis axes[3] = {phases[0].axis, phases[1].axis, phases[2].axis};
      AdjointParams<In> p{};
      p.d = matrix_by_outputs(gradients, shape_, phases);
      p.source = make_gather(static_cast<const In*>(call_.gy), call_.gy_strides, shape_.outputs(), axes,
                             number == 0 && is_dense());
      p.out = static_cast<In*>(call_.dx);
      p.out_b = call_.dx_strides.b;
      p.out_g = shape_.channels() * call_.dx_strides.c;
      p.out_m = call_.dx_strides.c;
      for (int d = 0; d < 3; ++d) {
        p.out_n[d] = call_.dx_strides.s[d] * stride[d];
        p.out_first += call_.dx_strides.s[d] * phases[d].first;
      }
      if (is_dense() && p.source.positions == p.source.extent[2]) {
        p.out_n[2] = flat_stride(call_.dx_strides, shape_.S);
      }
      launch_adjoint<Math>(p, first, samples);
    }
  }

  bool is_dense() const { return shape_.stride[0] == 1 && shape_.stride[1] == 1 && shape_.stride[2] == 1; }

  // Between neighbouring positions of a result, which is contiguous, where they are numbered through.
  static int64_t flat_stride(const LayerStrides& strides, const int64_t (&size)[3]) {
    for (int d = 2; d >= 0; --d) {
      if (size[d] > 1) {
        return strides.s[d];
      }
    }
    return 0;
  }

  template <class Math>
  void launch_adjoint(AdjointParams<In>& p, int64_t first, int64_t samples) {
    p.first = first;
    p.samples = samples;
    p.groups = shape_.groups;
    p.tiles_m = int32_t(tiles(p.d.columns));
    p.tiles_n = int32_t(tiles(p.source.positions));
    p.factor = 2;
    device_.launch(adjoint_tiles_kernel<Math, In>, p, adjoint_tiles(p), kStageBytes<Math>);
  }

  void add_norms(const Sum* partial, int64_t count, void* out, bool clamp = false) {
    if (out) {
      device_.launch(add_norms_kernel<Sum>,
                     AddNormsParams<Sum>{partial, static_cast<Sum*>(out), shape_.B, count, clamp},
                     (shape_.B + kWarps - 1) / kWarps, 0);
    }
  }

  const LayerCall& call_;
  const LayerShape& shape_;
  Device& device_;
  const Gather<In> x_, gy_;
};

template <typename In, class Device>
void run_layer(const LayerCall& call, Device& device) {
  LayerOps<In, Device>(call, device).run();
}

}  // namespace bootgrad
