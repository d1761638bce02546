// Runs the kernels behind run_layer on the CPU, for the dtypes and layers named on the command line (all of them where
// none is), and prints for every result its error against naive loops in long double, relative to the result's natural
// size, and a checksum of its bits:
//
//     dtype layer layout op result error checksum

#include "cuda_emulation.h"

#include <bootgrad/layer_ops.cuh>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>

using namespace bootgrad;

namespace {

// Lends memory whose ends AddressSanitizer knows, full of NaN.
struct EmulatedDevice {
  int64_t multiprocessors = 1, shared_limit = 227 * 1024, cache_bytes = 1;
  std::vector<std::unique_ptr<unsigned char[]>> memory{};

  void* allocate(int64_t bytes) {
    memory.emplace_back(new unsigned char[size_t(bytes)]);
    std::memset(memory.back().get(), 0xff, size_t(bytes));
    return memory.back().get();
  }

  template <class Params>
  void launch(void (*kernel)(Params), const Params& params, int64_t blocks, int64_t bytes) {
    emulation::launch(unsigned(blocks), kThreads, [&] { kernel(params); }, size_t(bytes));
  }
};

// How the numbers of (B, C, *S) lie in memory.
struct Layout {
  const char* name;
  bool channels_last;
  int64_t offset, stride;
};

constexpr Layout kContiguous{"contiguous", false, 0, 1};
constexpr Layout kLayouts[] = {
    kContiguous,
    {"channels_last", true, 0, 1},
    {"offset", false, 1, 1},
    {"offset_last", true, 1, 1},
    {"strided", false, 0, 3},
};

template <typename T>
struct Numbers {
  Numbers(int64_t B, int64_t C, const int64_t (&S)[3], const Layout& layout, uint32_t seed)
      : size{B, C, S[0], S[1], S[2]} {
    int64_t step = layout.stride;
    for (const int d : layout.channels_last ? std::vector<int>{1, 4, 3, 2, 0} : std::vector<int>{4, 3, 2, 1, 0}) {
      stride[d] = step;
      step *= size[d];
    }
    const int64_t count = B * C * S[0] * S[1] * S[2];
    if (count > 0) {
      int64_t last = layout.offset;
      for (int d = 0; d < 5; ++d) {
        last += (size[d] - 1) * stride[d];
      }
      // Vectors are aligned to 16 bytes; ends are the last number's.
      buffer.assign(size_t(last + 1), T(std::numeric_limits<float>::quiet_NaN()));
    }
    offset = count > 0 ? layout.offset : 0;
    for (int64_t i = 0; i < count; ++i) {
      seed = seed * 1664525u + 1013904223u;
      buffer[size_t(offset + place(i))] = T(float(int(seed >> 16) - 32768) / 16384.0f);
    }
  }

  int64_t place(int64_t i) const {
    int64_t at = 0;
    for (int d = 4; d >= 0; --d) {
      at += i % size[d] * stride[d];
      i /= size[d];
    }
    return at;
  }
  const T* data() const { return buffer.data() + offset; }
  long double at(int64_t b, int64_t c, int64_t s0, int64_t s1, int64_t s2) const {
    return to_accumulator(data()[b * stride[0] + c * stride[1] + s0 * stride[2] + s1 * stride[3] + s2 * stride[4]]);
  }
  LayerStrides strides() const {
    const auto of = [&](int d) { return size[d] == 1 ? 0 : stride[d]; };
    return {of(0), of(1), {of(2), of(3), of(4)}};
  }

  int64_t size[5], stride[5], offset;
  std::vector<T> buffer;
};

struct Layer {
  const char* name;
  LayerShape shape;  // P is filled in
};

using Real = long double;

// The naive loops: all G_i (o, c, tap), and the derivatives of ‖G_i − c‖².
template <typename T>
struct Oracle {
  Oracle(const LayerShape& s, const Numbers<T>& x, const Numbers<T>& gy)
      : shape(s), entries(s.O * s.rows()), rows(size_t(s.B * entries)) {
    visit([&](int64_t b, int64_t o, int64_t c, const int64_t* p, const int64_t* t, int64_t entry) {
      rows[size_t(b * entries + entry)] += x.at(b, c, p[0], p[1], p[2]) * gy.at(b, o, t[0], t[1], t[2]);
    });
  }

  template <class Visit>
  void visit(const Visit& visit) const {
    const LayerShape& s = shape;
    int64_t k[3], t[3], p[3];
    for (int64_t b = 0; b < s.B; ++b)
      for (int64_t o = 0; o < s.O; ++o)
        for (int64_t c = 0; c < s.channels(); ++c)
          for (int64_t tap = 0; tap < s.taps(); ++tap)
            for (int64_t at = 0; at < s.positions(); ++at) {
              k[0] = tap / (s.kernel[1] * s.kernel[2]), k[1] = tap / s.kernel[2] % s.kernel[1],
              k[2] = tap % s.kernel[2];
              t[0] = at / (s.P[1] * s.P[2]), t[1] = at / s.P[2] % s.P[1], t[2] = at % s.P[2];
              bool inside = true;
              for (int d = 0; d < 3; ++d) {
                p[d] = t[d] * s.stride[d] - s.padding[d] + k[d] * s.dilation[d];
                inside = inside && p[d] >= 0 && p[d] < s.S[d];
              }
              if (inside)
                visit(b, o, o / s.outputs() * s.channels() + c, p, t, (o * s.channels() + c) * s.taps() + tap);
            }
  }

  LayerShape shape;
  int64_t entries;
  std::vector<Real> rows;
};

// Prints the largest error of a result's pieces (samples, or all of it), relative to their sizes.
template <typename A>
void report(const std::string& where, const char* result, const std::vector<A>& got, const std::vector<Real>& expected,
            const std::vector<Real>& sizes) {
  Real worst = 0;
  uint64_t checksum = 14695981039346656037u;
  const size_t pieces = sizes.size(), length = pieces ? expected.size() / pieces : 0;
  for (size_t piece = 0; piece < pieces; ++piece) {
    Real square = 0;
    for (size_t i = piece * length; i < (piece + 1) * length; ++i) {
      const Real difference = Real(to_accumulator(got[i])) - expected[i];
      square += difference * difference;
    }
    const Real error = std::sqrt(square) / (square == 0 || sizes[piece] == 0 ? 1 : sizes[piece]);
    worst = std::isnan(error) || error > worst ? error : worst;
  }
  for (const A& number : got) {
    const double value = to_accumulator(number);
    uint64_t word;
    std::memcpy(&word, &value, sizeof(word));
    checksum = (checksum ^ word) * 1099511628211u;
  }
  std::printf("%s %s %.3e %016llx\n", where.c_str(), result, double(worst), (unsigned long long)checksum);
}

template <typename In>
void run(const std::string& dtype, const Layer& layer, const Layout& layout) {
  using Sum = Accumulator<In>;
  const LayerShape& s = layer.shape;
  const Numbers<In> x(s.B, s.C, s.S, layout, 1), gy(s.B, s.O, s.P, layout, 2);
  const int64_t weight_size[3] = {s.channels(), s.taps(), 1};
  const Numbers<Sum> center(1, s.O, weight_size, kContiguous, 3), v(1, s.O, weight_size, kContiguous, 4);
  const int64_t no_size[3] = {1, 1, 1};
  const Numbers<Sum> w(1, s.B, no_size, kContiguous, 5);
  const Oracle<In> oracle(s, x, gy);
  const int64_t P = oracle.entries;

  // What is expected, and how large what it is made of is.
  const std::vector<Real> zero(size_t(s.B), 0);
  std::vector<Real> sq(zero), deviation(zero), inner(zero), v_size(zero), bias(size_t(s.B * s.O)), bias_size(zero);
  std::vector<Real> sum(size_t(P), 0), weighted(size_t(P), 0);
  std::vector<Real> dx(x.buffer.empty() ? 0 : size_t(s.B * s.C * s.pixels())), dgy(size_t(s.B * s.O * s.positions()));
  Real v_sq = 0;
  for (const Sum number : v.buffer) v_sq += Real(number) * number;
  for (int64_t b = 0; b < s.B; ++b) {
    for (int64_t i = 0; i < P; ++i) {
      const Real g = oracle.rows[size_t(b * P + i)], c = center.buffer[size_t(i)];
      sq[b] += g * g, deviation[b] += (g - c) * (g - c), inner[b] += g * v.buffer[size_t(i)];
      sum[i] += g, weighted[i] += g * w.buffer[size_t(b)];
    }
    v_size[b] = std::sqrt(sq[b] * v_sq);
    for (int64_t o = 0; o < s.O; ++o)
      for (int64_t t = 0; t < s.positions(); ++t) {
        const Real number = gy.at(b, o, t / (s.P[1] * s.P[2]), t / s.P[2] % s.P[1], t % s.P[2]);
        bias[b * s.O + o] += number, bias_size[b] += number * number;
      }
    bias_size[b] = std::sqrt(bias_size[b] * s.positions());
  }
  oracle.visit([&](int64_t b, int64_t o, int64_t c, const int64_t* p, const int64_t* t, int64_t entry) {
    const Real d = 2 * (oracle.rows[size_t(b * P + entry)] - Real(center.buffer[size_t(entry)]));
    dx[((b * s.C + c) * s.S[0] + p[0]) * s.S[1] * s.S[2] + p[1] * s.S[2] + p[2]] += d * gy.at(b, o, t[0], t[1], t[2]);
    dgy[((b * s.O + o) * s.P[0] + t[0]) * s.P[1] * s.P[2] + t[1] * s.P[2] + t[2]] += d * x.at(b, c, p[0], p[1], p[2]);
  });
  const auto norms = [](const std::vector<Real>& numbers, int64_t pieces) {
    std::vector<Real> norms(size_t(pieces), 0);
    for (size_t i = 0; i < numbers.size(); ++i) norms[i * size_t(pieces) / numbers.size()] += numbers[i] * numbers[i];
    for (Real& norm : norms) norm = std::sqrt(norm);
    return norms;
  };

  LayerCall call{};
  call.shape = s;
  call.x = x.data(), call.gy = gy.data();
  call.x_strides = x.strides(), call.gy_strides = gy.strides();
  const auto where = [&](const char* op) { return dtype + " " + layer.name + " " + layout.name + " " + op; };
  const auto results = [](size_t count) { return std::vector<Sum>(count, std::numeric_limits<Sum>::quiet_NaN()); };
  const std::vector<In> nothing;
  std::vector<Sum> s1 = results(zero.size()), s2 = s1, b1 = results(bias.size()), g1 = results(sum.size());
  EmulatedDevice device;

  call.center = center.data();
  call.sum = g1.data(), call.sq_norms = s1.data(), call.deviation = s2.data(), call.bias = b1.data();
  run_layer<In>(call, device);
  report(where("statistics"), "sum", g1, sum, norms(sum, 1));
  report(where("statistics"), "sq_norms", s1, sq, sq);
  report(where("statistics"), "deviation", s2, deviation, deviation);
  report(where("statistics"), "bias", b1, bias, bias_size);

  call.center = nullptr, call.v = v.data();
  call.sum = call.sq_norms = call.deviation = call.bias = nullptr;
  s1 = results(zero.size());
  call.inner = s1.data();
  run_layer<In>(call, device);
  report(where("jvp"), "inner", s1, inner, v_size);
  call.v = call.inner = nullptr;

  for (const void* weights : {static_cast<const void*>(nullptr), static_cast<const void*>(w.data())}) {
    g1 = results(sum.size());
    call.w = weights, call.sum = g1.data();
    run_layer<In>(call, device);
    const std::vector<Real>& expected = weights ? weighted : sum;
    report(where("weighted_sum"), weights ? "weighted" : "plain", g1, expected, norms(expected, 1));
  }
  call.w = call.sum = nullptr;

  // Chunks of two samples.
  device.cache_bytes = 2 * P * int64_t(sizeof(Sum));
  const Numbers<In> like_x(s.B, s.C, s.S, kContiguous, 0), like_gy(s.B, s.O, s.P, kContiguous, 0);
  std::vector<In> got_dx(dx.size(), In(std::numeric_limits<float>::quiet_NaN())),
      got_dgy(dgy.size(), got_dx.empty() ? In() : got_dx[0]);
  call.dx_strides = like_x.strides(), call.dgy_strides = like_gy.strides();
  call.center = center.data();
  s1 = results(zero.size()), g1 = results(sum.size());
  call.deviation = s1.data(), call.sum = g1.data(), call.dx = got_dx.data(), call.dgy = got_dgy.data();
  run_layer<In>(call, device);
  report(where("sq_norms_with_grad"), "deviation", s1, deviation, deviation);
  report(where("sq_norms_with_grad"), "sum", g1, sum, norms(sum, 1));
  report(where("sq_norms_with_grad"), "dx", got_dx, dx, norms(dx, s.B));
  report(where("sq_norms_with_grad"), "dgy", got_dgy, dgy, norms(dgy, s.B));
  call.center = call.deviation = call.sum = call.dx = call.dgy = nullptr;

  for (const auto& [name, way] : {std::pair<const char*, GramWay>{"direct", GramWay::kDirect},
                                  {"patches", GramWay::kPatches},
                                  {"pixels", GramWay::kPixels}}) {
    s1 = results(zero.size());
    call.sq_norms = s1.data(), call.gram = true;
    LayerOps<In, EmulatedDevice>(call, device).norms_by(way);
    // Terms of both signs: as large as without cancellation.
    std::vector<Real> sizes(sq);
    for (int64_t b = 0; b < s.B; ++b) sizes[b] += way == GramWay::kDirect ? 0 : bias_size[b] * bias_size[b];
    report(where("sq_norms"), name, s1, sq, sizes);
  }
}

LayerShape linear(int64_t B, int64_t T, int64_t I, int64_t O) {
  return {B, I, O, 1, {1, 1, T}, {}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}};
}

const Layer kLayers[] = {
    {"linear", linear(3, 9, 8, 72)},
    {"linear_short", linear(5, 1, 5, 3)},
    {"linear_long", linear(1, 70, 3, 5)},
    {"conv2d", {3, 8, 8, 1, {1, 4, 5}, {}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}}},
    {"conv2d_wide", {1, 16, 16, 1, {1, 4, 4}, {}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}}},
    {"conv2d_groups", {2, 6, 4, 2, {1, 7, 6}, {}, {1, 3, 2}, {1, 2, 3}, {0, 2, 0}, {1, 1, 2}}},
    {"conv2d_holes", {2, 3, 2, 1, {1, 6, 5}, {}, {1, 2, 1}, {1, 2, 2}, {0, 0, 0}, {1, 2, 1}}},
    {"conv1d", {2, 3, 5, 1, {1, 1, 11}, {}, {1, 1, 4}, {1, 1, 3}, {0, 0, 2}, {1, 1, 2}}},
    {"conv3d", {2, 2, 3, 1, {3, 4, 3}, {}, {2, 3, 2}, {1, 2, 1}, {1, 1, 0}, {2, 1, 1}}},
    {"depthwise", {2, 3, 6, 3, {1, 5, 5}, {}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}}},
    {"pixels_apart", {1, 2, 2, 1, {1, 10, 9}, {}, {1, 2, 2}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}}},
    {"no_samples", {0, 3, 2, 1, {1, 4, 4}, {}, {1, 3, 3}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}}},
    {"no_positions", {2, 3, 2, 1, {1, 2, 2}, {}, {1, 3, 3}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}}},
};

bool wanted(const char* name, const std::vector<std::string>& names) {
  return names.empty() || std::find(names.begin(), names.end(), name) != names.end();
}

template <typename In>
void run_all(const char* dtype, const std::vector<std::string>& names) {
  for (Layer layer : kLayers) {
    LayerShape& s = layer.shape;
    for (int d = 0; d < 3; ++d) {
      const int64_t room = s.S[d] + 2 * s.padding[d] - s.dilation[d] * (s.kernel[d] - 1) - 1;
      s.P[d] = room < 0 ? 0 : room / s.stride[d] + 1;
    }
    const bool all_layouts = std::string(layer.name) == "conv2d" || std::string(layer.name) == "conv2d_wide";
    for (const Layout& layout : kLayouts) {
      const bool linear = std::string(layer.name).rfind("linear", 0) == 0;
      if (wanted(layer.name, names) &&
          (all_layouts || (linear ? layout.channels_last : layout.name == kContiguous.name))) {
        run<In>(dtype, layer, layout);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> dtypes, names;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const bool layer =
        std::any_of(std::begin(kLayers), std::end(kLayers), [&](const Layer& l) { return word == l.name; });
    (layer ? names : dtypes).push_back(word);
  }
  if (wanted("double", dtypes)) run_all<double>("double", names);
  if (wanted("float", dtypes)) run_all<float>("float", names);
  if (wanted("half", dtypes)) run_all<__half>("half", names);
  if (wanted("bfloat16", dtypes)) run_all<__nv_bfloat16>("bfloat16", names);
  return 0;
}
