// Builds the offset tables of a convolution: once per call, in the size of one sample's table of positions.

#pragma once

#include <algorithm>
#include <vector>

#include "bootgrad/layer.hpp"

namespace bootgrad {

struct ConvShape {
  int64_t B, C, O, groups;
  int64_t S[3], P[3], kernel[3], stride[3], padding[3], dilation[3];
};

class ConvTables {
 public:
  // With channels_last, space is one line of T positions and the kernel one position: a linear layer.
  explicit ConvTables(const ConvShape& shape, bool channels_last = false) {
    ConvPlan& p = plan;
    p.channels_last = channels_last;
    p.B = shape.B, p.C = shape.C, p.O = shape.O, p.groups = shape.groups;
    p.Cg = p.C / p.groups, p.Og = p.O / p.groups;
    p.pixel_gram = true;
    p.K = p.T = p.pixels = p.x_plane = 1;
    for (int d = 0; d < 3; ++d) {
      p.S[d] = shape.S[d], p.P[d] = shape.P[d], p.kernel[d] = shape.kernel[d];
      p.stride[d] = shape.stride[d], p.padding[d] = shape.padding[d], p.dilation[d] = shape.dilation[d];
      p.xs[d] = p.S[d] + 2 * p.padding[d];
      p.K *= p.kernel[d], p.T *= p.P[d], p.pixels *= p.S[d], p.x_plane *= p.xs[d];
      p.pixel_gram &= p.stride[d] == 1;
    }
    p.R = p.Cg * p.K;
    taps_and_positions();
    margins();
    collect_phases();
    p.tap = tap_.data(), p.pos = pos_.data(), p.tap_order = order_.data();
    p.phases = phases_.data(), p.n_phases = static_cast<int64_t>(phases_.size());
    p.pixel = pixel_.data(), p.at_pixel = at_pixel_.data(), p.at_pos = at_pos_.data();
  }
  ConvTables(const ConvTables&) = delete;
  ConvTables& operator=(const ConvTables&) = delete;

  ConvPlan plan{};

 private:
  static int64_t flat(const int64_t i[3], const int64_t size[3]) { return (i[0] * size[1] + i[1]) * size[2] + i[2]; }

  template <class F>
  static void each(const int64_t size[3], F f) {
    int64_t i[3];
    for (i[0] = 0; i[0] < size[0]; ++i[0])
      for (i[1] = 0; i[1] < size[1]; ++i[1])
        for (i[2] = 0; i[2] < size[2]; ++i[2]) f(i);
  }

  void taps_and_positions() {
    const ConvPlan& p = plan;
    for (int64_t c = 0; c < p.Cg; ++c)
      each(p.kernel, [&](const int64_t k[3]) {
        const int64_t at[3] = {k[0] * p.dilation[0], k[1] * p.dilation[1], k[2] * p.dilation[2]};
        tap_.push_back(p.channels_last ? c : c * p.x_plane + flat(at, p.xs));
      });
    each(p.P, [&](const int64_t t[3]) {
      const int64_t at[3] = {t[0] * p.stride[0], t[1] * p.stride[1], t[2] * p.stride[2]};
      pos_.push_back(p.channels_last ? t[2] * p.C : flat(at, p.xs));
    });
    at_pos_.assign(static_cast<size_t>(p.x_plane), -1);
    at_pixel_ = at_pos_;
    each(p.S, [&](const int64_t s[3]) {
      const int64_t at[3] = {s[0] + p.padding[0], s[1] + p.padding[1], s[2] + p.padding[2]};
      at_pixel_[static_cast<size_t>(flat(at, p.xs))] = static_cast<int64_t>(pixel_.size());
      pixel_.push_back(flat(at, p.xs));
    });
    int64_t t = 0;
    each(p.P, [&](const int64_t i[3]) {
      const int64_t at[3] = {i[0] * p.stride[0], i[1] * p.stride[1], i[2] * p.stride[2]};
      at_pos_[static_cast<size_t>(flat(at, p.xs))] = t++;
    });
  }

  // The position t that pixel s reaches through kernel position k is (s + padding − dilation·k)/stride where that is
  // whole; the padded gy holds zeros at those outside 0 … P − 1.
  void margins() {
    ConvPlan& p = plan;
    p.g_plane = 1;
    for (int d = 0; d < 3; ++d) {
      int64_t low = 0, high = std::max<int64_t>(p.P[d] - 1, 0);
      for (int64_t k = 0; k < p.kernel[d]; ++k)
        for (int64_t s = 0; s < p.S[d]; ++s) {
          const int64_t numerator = s + p.padding[d] - p.dilation[d] * k;
          if (numerator % p.stride[d] != 0) continue;
          low = std::min(low, numerator / p.stride[d]);
          high = std::max(high, numerator / p.stride[d]);
        }
      p.glow[d] = -low;
      p.gs[d] = high - low + 1;
      p.g_plane *= p.gs[d];
    }
  }

  void collect_phases() {
    const ConvPlan& p = plan;
    // Pointers into the tables are taken at the end: they move while the tables grow.
    std::vector<size_t> starts_pixel, starts_depth;
    each(p.stride, [&](const int64_t phase[3]) {
      Phase entry{};
      entry.first_tap = static_cast<int64_t>(order_.size());
      starts_pixel.push_back(rows_.size());
      starts_depth.push_back(depth_.size());
      int64_t count[3];
      for (int d = 0; d < 3; ++d) count[d] = phase[d] < p.S[d] ? (p.S[d] - 1 - phase[d]) / p.stride[d] + 1 : 0;
      each(count, [&](const int64_t i[3]) {
        const int64_t s[3] = {phase[0] + i[0] * p.stride[0], phase[1] + i[1] * p.stride[1],
                              phase[2] + i[2] * p.stride[2]};
        rows_.push_back(p.channels_last ? i[2] * p.O : flat(i, p.gs));
        out_.push_back(flat(s, p.S));
        ++entry.pixels;
      });
      each(p.kernel, [&](const int64_t k[3]) {
        int64_t at[3];
        for (int d = 0; d < 3; ++d) {
          const int64_t numerator = phase[d] + p.padding[d] - p.dilation[d] * k[d];
          if (numerator % p.stride[d] != 0) return;
          at[d] = numerator / p.stride[d] + p.glow[d];
        }
        order_.push_back(flat(k, p.kernel));
        for (int64_t o = 0; o < p.Og; ++o) depth_.push_back(p.channels_last ? o : o * p.g_plane + flat(at, p.gs));
        ++entry.taps;
      });
      phases_.push_back(entry);
    });
    for (size_t i = 0; i < phases_.size(); ++i) {
      phases_[i].rows = rows_.data() + starts_pixel[i];
      phases_[i].out = out_.data() + starts_pixel[i];
      phases_[i].depth = depth_.data() + starts_depth[i];
    }
  }

  std::vector<int64_t> tap_, pos_, order_, rows_, out_, depth_, pixel_, at_pixel_, at_pos_;
  std::vector<Phase> phases_;
};

}  // namespace bootgrad
