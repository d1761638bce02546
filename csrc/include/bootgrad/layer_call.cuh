// What the CUDA kernels are told about a layer: shapes, strides, pointers. Plain C++, for the launchers, too.
//
// Letters: B samples, C channels in, O out, S space of x, P of gy. Space has three dimensions; one- and two-dimensional
// layers carry leading ones. A linear layer is a convolution with one kernel position over space (1, 1, T).

#pragma once

#include <cstdint>

namespace bootgrad {

// In elements; those of dimensions of size one are zero.
struct LayerStrides {
  int64_t b, c, s[3];
};

struct LayerShape {
  int64_t B, C, O, groups;
  int64_t S[3], P[3];  // spatial size of x and of gy
  int64_t kernel[3], stride[3], padding[3], dilation[3];

  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t pixels() const { return S[0] * S[1] * S[2]; }
  int64_t positions() const { return P[0] * P[1] * P[2]; }
  int64_t channels() const { return C / groups; }       // of a group
  int64_t outputs() const { return O / groups; }        // of a group
  int64_t rows() const { return channels() * taps(); }  // of a group's patches
};

struct LayerCall {
  LayerShape shape;
  bool gram;
  const void *x, *gy;
  LayerStrides x_strides, gy_strides;
  LayerStrides dx_strides, dgy_strides;
  const void* center;  // (O, C/groups, *K) or null
  const void* v;       // the same
  const void* w;       // (B,) or null
  // Results; null where not wanted.
  void* sum;        // (O, C/groups, *K)  Σ_i w_i G_i
  void* sq_norms;   // (B,)  ‖G_i‖²
  void* deviation;  // (B,)  ‖G_i − center‖²
  void* inner;      // (B,)  ⟨G_i, v⟩
  void* bias;       // (B, O)
  void* dx;         // as x   derivative of ‖G_i − center‖²
  void* dgy;        // as gy
};

}  // namespace bootgrad
