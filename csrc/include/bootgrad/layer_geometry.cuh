// From a layer's shapes and strides to the gathers and matrices of its products. On the host.

#pragma once

#include <bootgrad/gather.cuh>
#include <bootgrad/layer_call.cuh>

namespace bootgrad {

// What one dimension of space is gathered by; see gather.cuh.
struct Axis {
  int64_t taps, extent, size, origin, step, dilation;
};

// `collapsible` allows space to be seen as one dimension where memory permits.
template <typename In>
Gather<In> make_gather(const In* data, const LayerStrides& strides, int64_t channels, const Axis (&axes)[3],
                       bool collapsible = true) {
  constexpr int64_t kSize = Chunk<In>::kSize;
  Gather<In> gather{};
  gather.data = data;
  gather.stride_b = strides.b;
  gather.stride_g = channels * strides.c;
  gather.stride_c = strides.c;
  int64_t positions = 1, taps = 1;
  bool plain = collapsible;
  for (int d = 0; d < 3; ++d) {
    const Axis& axis = axes[d];
    positions *= axis.extent;
    taps *= axis.taps;
    plain = plain && axis.taps == 1 && axis.origin == 0 && axis.step == 1 && axis.extent == axis.size;
    gather.stride_s[d] = strides.s[d];
    gather.size[d] = int32_t(axis.size);
    gather.origin[d] = int32_t(axis.origin);
    gather.step[d] = int32_t(axis.step);
    gather.dilation[d] = int32_t(axis.dilation);
    gather.extent[d] = int32_t(axis.extent);
  }
  if (plain) {
    int64_t inner = 0, expected = 0;
    for (int d = 2; d >= 0; --d) {
      if (axes[d].extent != 1) {
        inner = inner ? inner : strides.s[d];
        plain = plain && (expected == 0 || strides.s[d] == expected);
        expected = strides.s[d] * axes[d].extent;
      }
    }
    if (plain) {
      for (int d = 0; d < 2; ++d) {
        gather.stride_s[d] = 0;
        gather.size[d] = gather.extent[d] = 1;
      }
      gather.stride_s[2] = inner;
      gather.size[2] = gather.extent[2] = int32_t(positions);
    }
  }
  gather.positions = int32_t(positions);
  gather.per_sample = Divisor(positions);
  gather.extent1 = Divisor(gather.extent[1]);
  gather.extent2 = Divisor(gather.extent[2]);
  gather.index = {Divisor(channels), Divisor(axes[1].taps), Divisor(axes[2].taps), int32_t(channels * taps)};

  const bool channels_close = strides.c == 1 && channels > 1;
  gather.along_rows = channels_close && (positions == 1 || gather.stride_s[2] != 1);
  const bool aligned =
      reinterpret_cast<uintptr_t>(data) % 16 == 0 && gather.stride_b % kSize == 0 && gather.stride_g % kSize == 0;
  if (gather.along_rows) {
    gather.wide = aligned && channels % kSize == 0;
    for (int d = 0; d < 3; ++d) {
      gather.wide = gather.wide && gather.stride_s[d] % kSize == 0;
    }
  } else {
    gather.wide = aligned && plain && gather.stride_s[2] == 1 && positions % kSize == 0 && strides.c % kSize == 0;
  }
  return gather;
}

// The patches of x.
template <typename In>
Gather<In> patches_of(const In* x, const LayerStrides& strides, const LayerShape& shape) {
  Axis axes[3];
  for (int d = 0; d < 3; ++d) {
    axes[d] = {shape.kernel[d], shape.P[d], shape.S[d], -shape.padding[d], shape.stride[d], shape.dilation[d]};
  }
  return make_gather(x, strides, shape.channels(), axes);
}

// Space as it is, with the channels of a group as rows.
template <typename In>
Gather<In> plane_of(const In* data, const LayerStrides& strides, int64_t channels, const int64_t (&size)[3]) {
  Axis axes[3];
  for (int d = 0; d < 3; ++d) {
    axes[d] = {1, size[d], size[d], 0, 1, 0};
  }
  return make_gather(data, strides, channels, axes);
}

// The pixels of x that lie at one place of the stride's grid, in one dimension: first, first + stride, … The kernel
// positions that reach them are first_tap, first_tap + tap_step, …
struct Phase1d {
  int64_t first, pixels, first_tap, tap_step, taps;
  Axis axis;  // of gy at the positions that reach pixel number n by tap number i
};

inline Phase1d phase_of(const LayerShape& shape, int d, int64_t number) {
  const int64_t stride = shape.stride[d], padding = shape.padding[d], dilation = shape.dilation[d];
  Phase1d phase{};
  phase.first = ((number - padding) % stride + stride) % stride;
  phase.pixels = phase.first < shape.S[d] ? (shape.S[d] - 1 - phase.first) / stride + 1 : 0;
  phase.tap_step = 1;
  while (phase.tap_step * dilation % stride != 0) {
    ++phase.tap_step;
  }
  while (phase.first_tap < shape.kernel[d] && phase.first_tap * dilation % stride != number) {
    ++phase.first_tap;
  }
  const bool reached = phase.first_tap < shape.kernel[d];
  phase.taps = reached ? (shape.kernel[d] - 1 - phase.first_tap) / phase.tap_step + 1 : 0;
  phase.first_tap = reached ? phase.first_tap : 0;
  const int64_t origin = reached ? (phase.first + padding - phase.first_tap * dilation) / stride : 0;
  phase.axis = {phase.taps, phase.pixels, shape.P[d], origin, 1, -phase.tap_step * dilation / stride};
  return phase;
}

// Offsets of kernel positions in a gradient's rows (tap, channel).
inline void tap_strides(const LayerShape& shape, int64_t (&strides)[3]) {
  strides[2] = shape.channels();
  strides[1] = strides[2] * shape.kernel[2];
  strides[0] = strides[1] * shape.kernel[1];
}

// Gradients [B, O, (tap, channel)] as the matrix of Σ_r D[o, r] U[r, t]: columns o.
template <typename Sum>
Matrix<Sum> matrix_by_rows(const Sum* gradients, const LayerShape& shape) {
  Matrix<Sum> matrix{};
  matrix.data = gradients;
  matrix.stride_b = shape.O * shape.rows();
  matrix.stride_g = shape.outputs() * shape.rows();
  matrix.stride_column = shape.rows();
  matrix.stride_c = 1;
  tap_strides(shape, matrix.stride_tap);
  matrix.columns = int32_t(shape.outputs());
  matrix.index = {Divisor(shape.channels()), Divisor(shape.kernel[1]), Divisor(shape.kernel[2]), int32_t(shape.rows())};
  matrix.along_rows = true;
  matrix.wide = shape.channels() % Chunk<Sum>::kSize == 0;
  return matrix;
}

// The same as the matrix of Σ_{tap, o} D[o, (tap, c)] gy[o, t(p, tap)] for the pixels of a phase: columns c.
template <typename Sum>
Matrix<Sum> matrix_by_outputs(const Sum* gradients, const LayerShape& shape, const Phase1d (&phases)[3]) {
  Matrix<Sum> matrix{};
  matrix.data = gradients;
  matrix.stride_b = shape.O * shape.rows();
  matrix.stride_g = shape.outputs() * shape.rows();
  matrix.stride_column = 1;
  matrix.stride_c = shape.rows();
  tap_strides(shape, matrix.stride_tap);
  int64_t taps = 1;
  for (int d = 0; d < 3; ++d) {
    matrix.first_tap += phases[d].first_tap * matrix.stride_tap[d];
    matrix.stride_tap[d] *= phases[d].tap_step;
    taps *= phases[d].taps;
  }
  matrix.columns = int32_t(shape.channels());
  matrix.index = {Divisor(shape.outputs()), Divisor(phases[1].taps), Divisor(phases[2].taps),
                  int32_t(shape.outputs() * taps)};
  matrix.along_rows = false;
  matrix.wide = shape.channels() % Chunk<Sum>::kSize == 0;
  return matrix;
}

}  // namespace bootgrad
