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
  // With channels_last, space is one line of T positions and the kernel one position: a linear layer. The Gram path
  // needs the tables of pixels; the derivative by x those of phases, and margins around gy.
  ConvTables(const ConvShape& shape, bool channels_last, bool gram, bool dx) {
    ConvPlan& p = plan;
    p.channels_last = channels_last;
    p.B = shape.B, p.C = shape.C, p.O = shape.O, p.groups = shape.groups;
    p.Cg = p.C / p.groups, p.Og = p.O / p.groups;
    p.pixel_gram = true;
    p.K = p.T = p.pixels = p.x_plane = p.g_plane = 1;
    for (int d = 0; d < 3; ++d) {
      p.S[d] = shape.S[d], p.P[d] = shape.P[d], p.kernel[d] = shape.kernel[d];
      p.stride[d] = shape.stride[d], p.padding[d] = shape.padding[d], p.dilation[d] = shape.dilation[d];
      p.xs[d] = p.S[d] + 2 * p.padding[d];
      // The position t that pixel s reaches through kernel position k is (s + padding − dilation·k)/stride where that
      // is whole; the padded gy holds zeros at those outside 0 … P − 1.
      const int64_t low = (p.padding[d] - p.dilation[d] * (p.kernel[d] - 1)) / p.stride[d];
      const int64_t high = (p.padding[d] + p.S[d] - 1) / p.stride[d];
      p.glow[d] = dx && low < 0 ? -low : 0;
      p.gs[d] = p.glow[d] + (dx && high >= p.P[d] ? high + 1 : p.P[d]);
      p.K *= p.kernel[d], p.T *= p.P[d], p.pixels *= p.S[d], p.x_plane *= p.xs[d], p.g_plane *= p.gs[d];
      // Where dilation skips pixels for good, their values must not enter: 0·NaN is NaN.
      p.pixel_gram &= p.stride[d] == 1 && (p.kernel[d] == 1 || p.P[d] >= p.dilation[d]);
    }
    p.R = p.Cg * p.K;
    taps_and_positions();
    if (gram && (p.pixel_gram || dx)) collect_pixels(dx);
    if (dx) collect_phases();
  }
  ConvTables(const ConvTables&) = delete;
  ConvTables& operator=(const ConvTables&) = delete;

  ConvPlan plan{};

 private:
  using Table = std::vector<int64_t>;

  static void resize(Table& table, int64_t count) { table.resize(static_cast<size_t>(count)); }

  static int64_t flat(const int64_t i[3], const int64_t size[3]) { return (i[0] * size[1] + i[1]) * size[2] + i[2]; }

  static void line(int64_t* out, int64_t count, int64_t first, int64_t step) {
    for (int64_t i = 0; i < count; ++i) out[i] = first + i * step;
  }

  // Writes the offsets of i·step in a plane of `size`, beyond `first`, for all i below `count`.
  static void grid(int64_t* out, int64_t first, const int64_t count[3], const int64_t step[3], const int64_t size[3]) {
    for (int64_t i = 0; i < count[0]; ++i)
      for (int64_t j = 0; j < count[1]; ++j, out += count[2])
        line(out, count[2], first + (i * step[0] * size[1] + j * step[1]) * size[2], step[2]);
  }

  void taps_and_positions() {
    ConvPlan& p = plan;
    resize(tap_, p.R), resize(pos_, p.T);
    if (p.channels_last) {
      line(tap_.data(), p.C, 0, 1);
      line(pos_.data(), p.T, 0, p.C);
    } else {
      for (int64_t c = 0; c < p.Cg; ++c) grid(tap_.data() + c * p.K, c * p.x_plane, p.kernel, p.dilation, p.xs);
      grid(pos_.data(), 0, p.P, p.stride, p.xs);
    }
    p.tap = tap_.data(), p.pos = pos_.data();
  }

  void collect_pixels(bool dx) {
    ConvPlan& p = plan;
    const int64_t ones[3] = {1, 1, 1};
    resize(pixel_, p.pixels);
    grid(pixel_.data(), flat(p.padding, p.xs), p.S, ones, p.xs);
    at_pixel_.assign(static_cast<size_t>(p.x_plane), -1);
    for (int64_t i = 0; i < p.pixels; ++i) at_pixel_[static_cast<size_t>(pixel_[static_cast<size_t>(i)])] = i;
    p.pixel = pixel_.data(), p.at_pixel = at_pixel_.data();
    if (!p.pixel_gram || !dx) return;
    at_pos_.assign(static_cast<size_t>(p.x_plane), -1);
    for (int64_t t = 0; t < p.T; ++t)
      at_pos_[static_cast<size_t>(p.channels_last ? t : pos_[static_cast<size_t>(t)])] = t;
    p.at_pos = at_pos_.data();
  }

  // The kernel positions of one dimension that reach pixels, by the pixels' residue modulo the stride.
  struct Reach {
    int64_t residues;
    Table begin, k, at;  // [residues + 1] where a residue's begin; position k, place in the padded gy of pixel 0's t
  };

  Reach reach(int d) const {
    const int64_t stride = plan.stride[d], padding = plan.padding[d], dilation = plan.dilation[d];
    Reach r{std::min(stride, plan.S[d]), {}, {}, {}};
    resize(r.begin, r.residues + 1);
    const auto each = [&](const auto& body) {
      int64_t residue = (stride - padding % stride) % stride;
      for (int64_t k = 0; k < plan.kernel[d]; ++k, residue = (residue + dilation) % stride)
        if (residue < r.residues) body(k, residue);
    };
    each([&](int64_t, int64_t residue) { ++r.begin[static_cast<size_t>(residue) + 1]; });
    for (size_t i = 1; i < r.begin.size(); ++i) r.begin[i] += r.begin[i - 1];
    resize(r.k, r.begin.back()), resize(r.at, r.begin.back());
    Table next = r.begin;
    each([&](int64_t k, int64_t residue) {
      const size_t i = static_cast<size_t>(next[static_cast<size_t>(residue)]++);
      r.k[i] = k, r.at[i] = (residue + padding - dilation * k) / stride + plan.glow[d];
    });
    return r;
  }

  void collect_phases() {
    ConvPlan& p = plan;
    const Reach by[3] = {reach(0), reach(1), reach(2)};
    p.n_phases = p.reached = 1;
    for (const Reach& r : by) p.n_phases *= r.residues, p.reached *= r.begin.back();
    phases_.reserve(static_cast<size_t>(p.n_phases));
    resize(order_, p.reached), resize(depth_, p.reached * p.Og);
    const int64_t o_step = p.channels_last ? 1 : p.g_plane;
    int64_t taps = 0, s[3];
    for (s[0] = 0; s[0] < by[0].residues; ++s[0])
      for (s[1] = 0; s[1] < by[1].residues; ++s[1])
        for (s[2] = 0; s[2] < by[2].residues; ++s[2]) {
          Phase phase = pixels_of(s);
          phase.first_tap = taps;
          phase.depth = depth_.data() + taps * p.Og;
          int64_t i[3], end[3];
          for (int d = 0; d < 3; ++d) end[d] = by[d].begin[static_cast<size_t>(s[d]) + 1];
          const auto begin = [&](int d) { return by[d].begin[static_cast<size_t>(s[d])]; };
          for (i[0] = begin(0); i[0] < end[0]; ++i[0])
            for (i[1] = begin(1); i[1] < end[1]; ++i[1])
              for (i[2] = begin(2); i[2] < end[2]; ++i[2], ++taps) {
                int64_t k[3], at[3];
                for (int d = 0; d < 3; ++d)
                  k[d] = by[d].k[static_cast<size_t>(i[d])], at[d] = by[d].at[static_cast<size_t>(i[d])];
                order_[static_cast<size_t>(taps)] = flat(k, p.kernel);
                line(depth_.data() + taps * p.Og, p.Og, p.channels_last ? 0 : flat(at, p.gs), o_step);
              }
          phase.taps = taps - phase.first_tap;
          phases_.push_back(phase);
        }
    p.tap_order = order_.data(), p.phases = phases_.data();
  }

  // A phase's pixels. Two phases with as many of them in every dimension share the tables; those have one less that
  // start beyond the last pixel's residue.
  Phase pixels_of(const int64_t s[3]) {
    const ConvPlan& p = plan;
    int64_t count[3];
    size_t which = 0;
    for (int d = 0; d < 3; ++d) {
      count[d] = (p.S[d] - 1 - s[d]) / p.stride[d] + 1;
      which = 2 * which + (s[d] > (p.S[d] - 1) % p.stride[d]);
    }
    Phase phase{};
    phase.pixels = count[0] * count[1] * count[2];
    phase.first_pixel = flat(s, p.S);
    Table &rows = rows_[which], &out = out_[which];
    if (rows.empty()) {
      const int64_t ones[3] = {1, 1, 1};
      resize(rows, phase.pixels), resize(out, phase.pixels);
      if (p.channels_last)
        line(rows.data(), p.T, 0, p.O);
      else
        grid(rows.data(), 0, count, ones, p.gs);
      grid(out.data(), 0, count, p.stride, p.S);
    }
    phase.rows = rows.data(), phase.out = out.data();
    return phase;
  }

  Table tap_, pos_, pixel_, at_pixel_, at_pos_, order_, depth_, rows_[8], out_[8];
  std::vector<Phase> phases_;
};

}  // namespace bootgrad
