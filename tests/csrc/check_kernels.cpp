// Runs the CPU kernels on odd shapes against plain loops in double. Built with sanitizers by test_kernels.py.

#include "check_attention.hpp"
#include "checking.hpp"

namespace {

struct Case {
  ConvShape shape;
  bool channels_last;
};

// All results of one layer by loops over samples, channels, kernel positions and output positions.
struct Oracle {
  Doubles sum, sq_norms, deviation, inner, bias, dx, dgy, dx_plain, dgy_plain;

  template <class In, class T>
  Oracle(const Case& c, const std::vector<In>& x, const std::vector<In>& gy, const std::vector<T>& center,
         const std::vector<T>& w) {
    const ConvShape& s = c.shape;
    const int64_t K = s.kernel[0] * s.kernel[1] * s.kernel[2], Cg = s.C / s.groups, Og = s.O / s.groups,
                  P = s.O * Cg * K;
    const int64_t pixels = s.S[0] * s.S[1] * s.S[2], T_ = s.P[0] * s.P[1] * s.P[2];
    sum.assign(P, 0), sq_norms.assign(s.B, 0), deviation = inner = sq_norms, bias.assign(s.B * s.O, 0);
    dx.assign(s.B * s.C * pixels, 0), dgy.assign(s.B * s.O * T_, 0), dx_plain = dx, dgy_plain = dgy;
    auto xi = [&](int64_t b, int64_t ch, int64_t p) {
      return c.channels_last ? (b * pixels + p) * s.C + ch : (b * s.C + ch) * pixels + p;
    };
    auto gi = [&](int64_t b, int64_t o, int64_t t) {
      return c.channels_last ? (b * T_ + t) * s.O + o : (b * s.O + o) * T_ + t;
    };
    for (int64_t b = 0; b < s.B; ++b) {
      Doubles G(P, 0);
      for (int pass = 0; pass < 2; ++pass) {
        for (int64_t o = 0; o < s.O; ++o)
          for (int64_t ch = 0; ch < Cg; ++ch)
            for (int64_t k = 0; k < K; ++k)
              for (int64_t t = 0; t < T_; ++t) {
                const int64_t ki[3] = {k / (s.kernel[1] * s.kernel[2]), k / s.kernel[2] % s.kernel[1], k % s.kernel[2]};
                const int64_t ti[3] = {t / (s.P[1] * s.P[2]), t / s.P[2] % s.P[1], t % s.P[2]};
                int64_t p = 0;
                bool inside = true;
                for (int d = 0; d < 3; ++d) {
                  const int64_t at = ti[d] * s.stride[d] - s.padding[d] + ki[d] * s.dilation[d];
                  inside = inside && at >= 0 && at < s.S[d];
                  p = p * s.S[d] + at;
                }
                if (!inside) continue;
                const int64_t i = (o * Cg + ch) * K + k, xa = xi(b, o / Og * Cg + ch, p), ga = gi(b, o, t);
                const double xv = value(x[xa]), gv = value(gy[ga]);
                if (pass == 0) {
                  G[i] += xv * gv;
                } else {
                  const double D = G[i] - value(center[i]);
                  dx[xa] += 2 * D * gv, dgy[ga] += 2 * D * xv, dx_plain[xa] += 2 * G[i] * gv,
                      dgy_plain[ga] += 2 * G[i] * xv;
                }
              }
      }
      for (int64_t i = 0; i < P; ++i) {
        const double ci = value(center[i]);
        sum[i] += value(w[b]) * G[i], sq_norms[b] += G[i] * G[i];
        deviation[b] += (G[i] - ci) * (G[i] - ci), inner[b] += G[i] * ci;
      }
      for (int64_t o = 0; o < s.O; ++o)
        for (int64_t t = 0; t < T_; ++t) bias[b * s.O + o] += value(gy[gi(b, o, t)]);
    }
  }
};

template <class In>
void check(const Case& c) {
  using T = tested::Compute<In>;
  using F = Format<In>;
  const ConvShape& s = c.shape;
  const ConvPlan plan = ConvTables(s, c.channels_last, false, false).plan;  // for its numbers: the tables are gone
  const auto x = draw<In>(s.B * s.C * plan.pixels), gy = draw<In>(s.B * s.O * plan.T);
  const int64_t P = s.O * plan.Cg * plan.K;
  const auto center = draw<T>(P), w = draw<T>(s.B), bias_center = draw<T>(s.O);
  const Oracle oracle(c, x, gy, center, w);
  const Oracle unweighted(c, x, gy, center, std::vector<T>(static_cast<size_t>(s.B), T(1)));
  double center_sq = 0;
  for (T v : center) center_sq += value(v) * value(v);

  struct Results {
    std::vector<T> sum, sq_norms, deviation, inner, bias;
    std::vector<In> dx, dgy;
  };
  auto run = [&](bool gram, bool with_center, bool with_w, bool sum, bool norms, bool inner, bool grads,
                 bool biased = false) {
    Results first;
    for (int64_t threads : {1, 3}) {
      n_threads = threads;
      Results r;
      ConvCall call{};
      call.runtime = &runtime, call.dtype = F::dtype, call.gram = gram;
      call.x = x.data(), call.gy = gy.data();
      if (with_center) call.center = center.data();
      if (with_w) call.w = w.data();
      auto want = [](auto& v, int64_t count, void*& to) {
        v.resize(static_cast<size_t>(count));
        if (count > 0) std::memset(static_cast<void*>(v.data()), 0xff, v.size() * sizeof v[0]), to = v.data();
      };
      if (sum) want(r.sum, P, call.sum);
      if (norms && !((grads || biased) && with_center)) want(r.sq_norms, s.B, call.sq_norms);
      if (norms && with_center) want(r.deviation, s.B, call.deviation);
      if (norms && ((sum && !grads) || biased)) want(r.bias, s.B * s.O, call.bias);
      call.biased = biased;
      if (biased && with_center) call.bias_center = bias_center.data();
      if (inner) want(r.inner, s.B, call.inner);
      if (grads) want(r.dx, s.B * s.C * plan.pixels, call.dx), want(r.dgy, s.B * s.O * plan.T, call.dgy);
      const ConvTables tables(s, c.channels_last, gram, call.dx);
      call.plan = &tables.plan;
      tested::conv(call);
      if (threads == 1) {
        first = r;
        continue;
      }
      auto same = [](const auto& a, const auto& b) {
        if (!a.empty() && std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) != 0)
          std::printf("one and three threads differ\n"), ++failures;
      };
      same(first.sum, r.sum), same(first.sq_norms, r.sq_norms), same(first.deviation, r.deviation);
      same(first.inner, r.inner), same(first.bias, r.bias), same(first.dx, r.dx), same(first.dgy, r.dgy);
    }
    return first;
  };

  std::vector<T> minus = center;
  for (T& v : minus) v = -v;
  // G_i ∗ 2x_i and G_iᵀ ∗ 2gy_i are the derivatives of ‖G_i‖², and those of G_i − center are the ones about the center.
  auto applied = [&](bool gram, bool transposed, bool displaced) {
    std::vector<In> h = transposed ? gy : x, out(transposed ? x.size() : gy.size());
    for (In& v : h) tested::narrow(static_cast<T>(2 * value(v)), v);
    if (out.empty() || h.empty()) return out;
    std::memset(static_cast<void*>(out.data()), 0xff, out.size() * sizeof out[0]);
    ConvCall call{};
    call.runtime = &runtime, call.dtype = F::dtype, call.gram = gram;
    call.x = x.data(), call.gy = gy.data(), call.h = h.data();
    if (displaced) call.center = minus.data(), call.factor = 1;
    (transposed ? call.dx : call.dgy) = out.data();
    const ConvTables tables(s, false, gram, transposed);
    call.plan = &tables.plan;
    tested::conv(call);
    return out;
  };
  for (bool gram : {false, true})
    if (!c.channels_last && !x.empty() && !gy.empty()) {
      compare("applied", applied(gram, false, false), oracle.dgy_plain, F::elements);
      compare("applied, transposed", applied(gram, true, false), oracle.dx_plain, F::elements);
      if (gram) continue;
      compare("displaced", applied(gram, false, true), oracle.dgy, F::elements);
      compare("displaced, transposed", applied(gram, true, true), oracle.dx, F::elements);
    }

  const double scale = center_sq;
  const Results jvp = run(false, true, false, false, false, true, false);
  compare("inner", jvp.inner, oracle.inner, F::sums, scale);
  compare("weighted sum", run(false, false, true, true, false, false, false).sum, oracle.sum, F::sums);
  for (bool gram : {false, true})
    for (bool with_center : {false, true}) {
      const Results r = run(gram, with_center, false, true, true, false, false);
      compare("sum", r.sum, unweighted.sum, F::sums);
      compare("norms", r.sq_norms, oracle.sq_norms, F::sums);
      compare("bias", r.bias, oracle.bias, F::sums);
      if (with_center) compare("deviation", r.deviation, oracle.deviation, F::sums, scale);
      for (bool sum : {false, true}) {
        const Results g = run(gram, with_center, false, sum, true, false, true);
        if (sum) compare("sum beside derivatives", g.sum, unweighted.sum, F::sums);
        compare("dx", g.dx, with_center ? oracle.dx : oracle.dx_plain, F::elements);
        compare("dgy", g.dgy, with_center ? oracle.dgy : oracle.dgy_plain, F::elements);
      }
      if (c.channels_last) continue;
      Doubles norms = with_center ? oracle.deviation : oracle.sq_norms,
              dgy = with_center ? oracle.dgy : oracle.dgy_plain;
      for (int64_t i = 0; i < s.B * s.O; ++i) {
        const double apart = oracle.bias[i] - (with_center ? value(bias_center[i % s.O]) : 0);
        norms[i / s.O] += apart * apart;
        for (int64_t t = 0; t < plan.T; ++t) dgy[i * plan.T + t] += 2 * apart;
      }
      for (int asked = 0; asked < 4; ++asked) {
        const bool grads = asked & 1, sum = asked & 2;
        const Results v = run(gram, with_center, false, sum, true, false, grads, true);
        if (sum) compare("sum with the bias", v.sum, unweighted.sum, F::sums);
        compare("norms with the bias", with_center ? v.deviation : v.sq_norms, norms, F::sums, scale);
        compare("the bias's rows", v.bias, oracle.bias, F::sums);
        if (grads) compare("dgy with the bias", v.dgy, dgy, 2 * F::elements);
        if (grads) compare("dx with the bias", v.dx, with_center ? oracle.dx : oracle.dx_plain, F::elements);
      }
    }
}

Case conv(int64_t B, int64_t C, int64_t O, int64_t groups, std::vector<int64_t> S, std::vector<int64_t> kernel,
          int64_t stride, int64_t padding, int64_t dilation) {
  Case c{{B, C, O, groups, {}, {}, {}, {}, {}, {}}, false};
  for (int d = 0; d < 3; ++d) {
    const int at = d - (3 - static_cast<int>(S.size()));
    const bool real = at >= 0;
    c.shape.S[d] = real ? S[at] : 1, c.shape.kernel[d] = real ? kernel[at] : 1;
    c.shape.stride[d] = real ? stride : 1, c.shape.padding[d] = real ? padding : 0;
    c.shape.dilation[d] = real ? dilation : 1;
    c.shape.P[d] = (c.shape.S[d] + 2 * c.shape.padding[d] - c.shape.dilation[d] * (c.shape.kernel[d] - 1) - 1) /
                       c.shape.stride[d] +
                   1;
  }
  return c;
}

Case linear(int64_t B, int64_t T, int64_t I, int64_t O) {
  return {{B, I, O, 1, {1, 1, T}, {1, 1, T}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}}, true};
}

// Windows of planes by loops: the first of the largest entries.
template <class In>
void check_max_pool(int64_t planes, int64_t H, int64_t W, int64_t kernel, int64_t stride, int64_t padding,
                    int64_t dilation) {
  MaxPoolCall call{};
  call.runtime = &runtime, call.dtype = Format<In>::dtype, call.planes = planes;
  for (int d = 0; d < 2; ++d) {
    call.S[d] = d ? W : H;
    call.P[d] = (call.S[d] + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
    call.kernel[d] = kernel, call.stride[d] = stride, call.padding[d] = padding, call.dilation[d] = dilation;
  }
  const int64_t P = call.P[0] * call.P[1];
  const std::vector<In> x = draw<In>(planes * H * W);
  for (n_threads = 1; n_threads <= 3; n_threads += 2) {
    std::vector<In> y(static_cast<size_t>(planes * P));
    std::vector<int64_t> index(static_cast<size_t>(planes * P));
    call.x = x.data(), call.y = y.data(), call.index = index.data();
    tested::max_pool(call);
    for (int64_t o = 0; o < planes * P; ++o) {
      const int64_t top = o % P / call.P[1] * stride - padding, left = o % call.P[1] * stride - padding;
      int64_t where = -1;
      double best = -HUGE_VAL;
      for (int64_t k = 0; k < kernel * kernel; ++k) {
        const int64_t r = top + k / kernel * dilation, c = left + k % kernel * dilation;
        if (r < 0 || r >= H || c < 0 || c >= W) continue;
        const double v = value(x[static_cast<size_t>((o / P * H + r) * W + c)]);
        if (v > best) best = v, where = r * W + c;
      }
      const size_t at = static_cast<size_t>(o);
      if (index[at] != where || value(y[at]) != best) {
        std::printf("max pool[%zu]: got %.9g at %lld\n", at, value(y[at]), static_cast<long long>(index[at]));
        ++failures;
        return;
      }
    }
  }
}

// A convolution of a 3×3 kernel, its transpose, and its weight gradient by loops over the entries of all three.
void check_winograd(int64_t B, int64_t C, int64_t O, int64_t H, int64_t W, int64_t top, int64_t left) {
  const int64_t P[2] = {H + 2 * top - 2, W + 2 * left - 2};
  const std::vector<float> x = draw<float>(B * C * H * W), weight = draw<float>(O * C * 9), bias = draw<float>(O),
                           gy = draw<float>(B * O * P[0] * P[1]), w = draw<float>(B);
  std::vector<double> y(gy.size()), gx(x.size()), gw(weight.size());
  for (int64_t at = 0; at < static_cast<int64_t>(y.size()); ++at) {
    const int64_t q = at % P[1], p = at / P[1] % P[0], o = at / (P[0] * P[1]) % O, b = at / (P[0] * P[1] * O);
    double total = bias[static_cast<size_t>(o)];
    for (int64_t c = 0; c < C; ++c)
      for (int64_t k = 0; k < 9; ++k) {
        const int64_t h = p + k / 3 - top, v = q + k % 3 - left;
        if (h < 0 || h >= H || v < 0 || v >= W) continue;
        const size_t in = static_cast<size_t>(((b * C + c) * H + h) * W + v),
                     tap = static_cast<size_t>((o * C + c) * 9 + k);
        const double g = gy[static_cast<size_t>(at)];
        total += double(x[in]) * weight[tap];
        gx[in] += g * weight[tap];
        gw[tap] += w[static_cast<size_t>(b)] * g * x[in];
      }
    y[static_cast<size_t>(at)] = total;
  }
  const auto compare = [](const char* name, const std::vector<float>& got, const std::vector<double>& expected) {
    double error = 0, size = 0;
    for (size_t i = 0; i < got.size(); ++i)
      error += (got[i] - expected[i]) * (got[i] - expected[i]), size += expected[i] * expected[i];
    if (error > 1e-12 * size) std::printf("%s: off by %.3g\n", name, std::sqrt(error / size)), ++failures;
  };
  std::vector<float> before;
  for (n_threads = 1; n_threads <= 3; n_threads += 2) {
    std::vector<float> out(y.size()), dx(x.size()), sum(weight.size());
    const WinogradLayer forward{&runtime, B, C, O, {H, W}, {P[0], P[1]}, {top, left}, x.data()};
    tested::winograd({forward, weight.data(), false, bias.data(), out.data()});
    compare("winograd", out, y);
    tested::winograd({{&runtime, B, O, C, {P[0], P[1]}, {H, W}, {2 - top, 2 - left}, gy.data()},
                      weight.data(),
                      true,
                      nullptr,
                      dx.data()});
    compare("winograd, transposed", dx, gx);
    tested::winograd_sum({forward, gy.data(), w.data(), sum.data()});
    compare("winograd sum", sum, gw);
    out.insert(out.end(), dx.begin(), dx.end());
    out.insert(out.end(), sum.begin(), sum.end());
    if (n_threads > 1 && out != before) std::printf("winograd: other bits with other threads\n"), ++failures;
    before = out;
  }
}

// A convolution and the gradient of its input by loops over the entries of all three, two dimensions of space.
void check_product(int64_t B, int64_t C, int64_t O, int64_t groups, int64_t H, int64_t W, int64_t kernel,
                   int64_t stride, int64_t padding, int64_t dilation) {
  ConvShape shape{B,
                  C,
                  O,
                  groups,
                  {1, H, W},
                  {1, 0, 0},
                  {1, kernel, kernel},
                  {1, stride, stride},
                  {0, padding, padding},
                  {1, dilation, dilation}};
  for (int d = 1; d < 3; ++d) shape.P[d] = (shape.S[d] + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
  const int64_t Cg = C / groups, Og = O / groups, P = shape.P[1] * shape.P[2];
  const std::vector<float> x = draw<float>(B * C * H * W), weight = draw<float>(O * Cg * kernel * kernel),
                           bias = draw<float>(O), gy = draw<float>(B * O * P);
  std::vector<double> y(gy.size()), gx(x.size());
  for (int64_t at = 0; at < static_cast<int64_t>(y.size()); ++at) {
    const int64_t q = at % shape.P[2], p = at / shape.P[2] % shape.P[1], o = at / P % O, b = at / (P * O);
    y[static_cast<size_t>(at)] = bias[static_cast<size_t>(o)];
    for (int64_t r = 0; r < Cg * kernel * kernel; ++r) {
      const int64_t k = r % (kernel * kernel), c = o / Og * Cg + r / (kernel * kernel);
      const int64_t h = p * stride + k / kernel * dilation - padding, v = q * stride + k % kernel * dilation - padding;
      if (h < 0 || h >= H || v < 0 || v >= W) continue;
      const size_t in = static_cast<size_t>(((b * C + c) * H + h) * W + v),
                   tap = static_cast<size_t>(o * Cg * kernel * kernel + r);
      y[static_cast<size_t>(at)] += double(x[in]) * weight[tap];
      gx[in] += double(gy[static_cast<size_t>(at)]) * weight[tap];
    }
  }
  const auto compare = [](const char* name, const std::vector<float>& got, const std::vector<double>& expected) {
    for (size_t i = 0; i < got.size(); ++i)
      if (!(std::fabs(got[i] - expected[i]) <= 1e-4 * (1 + std::fabs(expected[i])))) {
        std::printf("%s[%zu]: got %.9g instead of %.9g\n", name, i, double(got[i]), expected[i]);
        ++failures;
        return;
      }
  };
  for (n_threads = 1; n_threads <= 3; n_threads += 2) {
    std::vector<float> out(y.size()), dx(x.size());
    const ConvTables forward(shape, false, false, false), backward(shape, false, false, true);
    tested::conv_product({&forward.plan, &runtime, weight.data(), x.data(), bias.data(), nullptr, out.data(), nullptr});
    compare("convolution", out, y);
    tested::conv_product({&backward.plan, &runtime, weight.data(), nullptr, nullptr, gy.data(), nullptr, dx.data()});
    compare("gradient of its input", dx, gx);
  }
}

// Both adjoints, with and without blocked windows; an index out of its plane is told.
template <class In>
void check_max_pool_grad(int64_t planes, int64_t size, int64_t windows) {
  const size_t n = static_cast<size_t>(planes * windows), full = static_cast<size_t>(planes * size);
  std::vector<int64_t> index(n);
  const std::vector<In> gy = draw<In>(planes * windows), h = draw<In>(planes * size);
  const std::unique_ptr<bool[]> blocked(new bool[n + 1]);
  for (size_t i = 0; i < n; ++i) index[i] = static_cast<int64_t>(i * 7) % size, blocked[i] = i % 3 == 0;
  for (n_threads = 1; n_threads <= 3; n_threads += 2)
    for (int kind = 0; kind < 4; ++kind) {
      const bool gather = kind & 1, masked = kind & 2;
      std::vector<In> out(gather ? n : full);
      std::vector<double> expected(out.size());
      for (size_t i = 0; i < n; ++i) {
        const size_t at = i / static_cast<size_t>(windows) * static_cast<size_t>(size) + static_cast<size_t>(index[i]);
        const bool passes = !(masked && blocked[i]);
        if (gather)
          expected[i] = passes ? value(h[at]) : 0;
        else if (passes)
          expected[at] += value(gy[i]);
      }
      const void* in = gather ? static_cast<const void*>(h.data()) : gy.data();
      MaxPoolGradCall call{&runtime,  Format<In>::dtype, planes,
                           size,      windows,           gather,
                           in,        index.data(),      masked ? blocked.get() : nullptr,
                           out.data()};
      bool right = tested::max_pool_grad(call);
      for (size_t i = 0; i < out.size(); ++i)
        right = right && std::fabs(value(out[i]) - expected[i]) <= 0.02 * (1 + std::fabs(expected[i]));
      if (n > 0) {
        index[n - 1] += size;
        right = right && !tested::max_pool_grad(call);
        index[n - 1] -= size;
      }
      if (!right) std::printf("max pool grad of kind %d\n", kind), ++failures;
    }
}

// Group norm's backward pass and its adjoint by loops over a group, for every choice of cotangents and of a weight.
template <class In>
void check_group_norm(int64_t B, int64_t C, int64_t groups, int64_t N) {
  using T = tested::Compute<In>;
  using F = Format<In>;
  const int64_t M = C / groups * N, entries = B * C * N;
  const double scale = 4;  // above 1/√0.1, the largest factor of an element
  const std::vector<In> x = draw<In>(entries), gz = draw<In>(entries), u = draw<In>(entries), z = draw<In>(entries);
  const std::vector<T> weight = draw<T>(C), a = draw<T>(B * C), b = draw<T>(B * C);
  std::vector<T> mean(static_cast<size_t>(B * groups)), rstd(mean.size());
  for (size_t g = 0; g < mean.size(); ++g) {
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < M; ++i) {
      const double v = value(x[g * static_cast<size_t>(M) + static_cast<size_t>(i)]);
      sum += v / static_cast<double>(M), squares += v * v / static_cast<double>(M);
    }
    mean[g] = static_cast<T>(sum), rstd[g] = static_cast<T>(1 / std::sqrt(squares - sum * sum + 0.1));
  }
  for (int given = 0; given < 32; ++given) {  // 16: with a ReLU behind
    const auto part = [&](int bit, const auto& values, size_t i) { return given & bit ? value(values[i]) : 0.0; };
    const auto passes = [&](size_t i) { return given & 16 ? value(z[i]) > 0 : true; };
    Doubles gy(gz.size());
    for (size_t i = 0; i < gy.size(); ++i) gy[i] = passes(i) ? value(gz[i]) : 0;
    const auto gamma = [&](size_t channel) { return given & 8 ? value(weight[channel % static_cast<size_t>(C)]) : 1; };
    Doubles normal(x.size()), dx(x.size()), dgy(x.size()), dx2(x.size());
    Doubles rows(a.size()), bias(a.size()), rows2(a.size());
    for (size_t g = 0; g < mean.size(); ++g) {
      const size_t first = g * static_cast<size_t>(M), end = first + static_cast<size_t>(M);
      const auto channel = [&](size_t i) { return i / static_cast<size_t>(N); };
      const double r = value(rstd[g]);
      for (size_t i = first; i < end; ++i) normal[i] = r * (value(x[i]) - value(mean[g]));
      struct Mean {
        double plain, normal;
      };
      const auto means = [&](const auto& w) {
        Mean m{};
        for (size_t i = first; i < end; ++i)
          m.plain += w(i) / static_cast<double>(M), m.normal += w(i) * normal[i] / static_cast<double>(M);
        return m;
      };
      const auto of_u = [&](size_t i) { return part(1, u, i); };
      const auto of_g = [&](size_t i) { return gamma(channel(i)) * gy[i]; };
      const auto of_a = [&](size_t i) { return part(2, a, channel(i)) * gy[i]; };
      const Mean mu = means(of_u), mg = means(of_g), ma = means(of_a);
      const auto project = [&](const auto& w, const Mean& m, size_t i) {
        return w(i) - m.plain - normal[i] * m.normal;
      };
      const double s = means([&](size_t i) { return of_g(i) * project(of_u, mu, i); }).plain;
      for (size_t i = first; i < end; ++i) {
        const size_t c = channel(i);
        const double Pu = project(of_u, mu, i), Pg = project(of_g, mg, i), Pa = project(of_a, ma, i);
        rows[c] += gy[i] * normal[i], bias[c] += gy[i], rows2[c] += r * gy[i] * Pu;
        dx[i] = r * Pg;
        dgy[i] = passes(i) ? gamma(c) * r * Pu + part(2, a, c) * normal[i] + part(4, b, c) : 0;
        dx2[i] = -r * r * (mu.normal * Pg + mg.normal * Pu + s * normal[i]) + r * Pa;
      }
    }
    std::vector<T> bits[2];
    for (n_threads = 1; n_threads <= 3; n_threads += 2) {
      GroupNormCall call{};
      call.runtime = &runtime, call.dtype = F::dtype, call.B = B, call.C = C, call.groups = groups, call.N = N;
      call.x = x.data(), call.gy = gz.data(), call.mean = mean.data(), call.rstd = rstd.data();
      if (given & 16) call.z = z.data();
      if (given & 8) call.weight = weight.data();
      std::vector<In> first(x.size()), second(x.size());
      std::vector<T> sums(a.size()), shifts(a.size());
      GroupNormCall backward = call;
      backward.rows = sums.data(), backward.bias_rows = shifts.data(), backward.dx = given ? first.data() : nullptr;
      tested::group_norm(backward);
      compare("group norm's scale", sums, rows, F::sums, scale), compare("shift", shifts, bias, F::sums, scale);
      if (given) compare("group norm's dx", first, dx, F::elements, scale);
      if (given & 1) call.u = u.data();
      if (given & 2) call.a = a.data();
      if (given & 4) call.b = b.data();
      call.dgy = first.data(), call.dx = second.data(), call.rows = sums.data();
      tested::group_norm(call);
      compare("group norm's dgy", first, dgy, F::elements, scale);
      compare("group norm's second dx", second, dx2, F::elements, scale);
      compare("group norm's second scale", sums, rows2, F::sums, scale);
      std::vector<T>& all = bits[n_threads > 1];
      all = sums;
      for (const auto& out : {first, second})
        for (In v : out) all.push_back(tested::widen(v));
    }
    if (bits[0] != bits[1]) std::printf("group norm: other bits with other threads\n"), ++failures;
  }
}

// Entries around a block's and a vector's end; with and without what is subtracted.
template <class In>
void check_sq_distances(const std::vector<int64_t>& sizes) {
  std::vector<std::vector<In>> a, b;
  std::vector<const void*> of_a, of_b;
  std::vector<int64_t> first_block{0};
  for (const int64_t size : sizes) {
    a.push_back(draw<In>(size)), b.push_back(draw<In>(size));
    first_block.push_back(first_block.back() + (size + kDistanceBlock - 1) / kDistanceBlock);
  }
  for (size_t k = 0; k < sizes.size(); ++k) of_a.push_back(a[k].data()), of_b.push_back(b[k].data());
  for (const bool subtracts : {false, true}) {
    std::vector<double> bits[2];
    for (const int64_t threads : {1, 3}) {
      n_threads = threads;
      std::vector<double> out(sizes.size());
      tested::sq_distances({&runtime, Format<In>::dtype, static_cast<int64_t>(sizes.size()), of_a.data(),
                            subtracts ? of_b.data() : nullptr, sizes.data(), first_block.data(), 0.5, out.data()});
      Doubles expected;
      for (size_t k = 0; k < sizes.size(); ++k) {
        double total = 0;
        for (size_t i = 0; i < a[k].size(); ++i) {
          const double apart = 0.5 * value(a[k][i]) - (subtracts ? value(b[k][i]) : 0);
          total += apart * apart;
        }
        expected.push_back(total);
      }
      for (size_t k = 0; k < sizes.size(); ++k)
        compare("squared distance", std::vector<double>{out[k]}, {expected[k]}, Format<In>::sums);
      bits[threads > 1] = out;
    }
    if (bits[0] != bits[1]) std::printf("squared distances: other bits with other threads\n"), ++failures;
  }
}

// Look-ups of samples of some lengths in a table (V, D) by the tables themselves; a few of them are none.
template <class In>
void check_embedding(const std::vector<int64_t>& lengths, int64_t D, int64_t V) {
  using T = tested::Compute<In>;
  std::vector<int64_t> bounds{0}, tokens;
  for (const int64_t length : lengths) bounds.push_back(bounds.back() + length);
  const int64_t B = static_cast<int64_t>(lengths.size()), N = bounds.back();
  for (int64_t i = 0; i < N; ++i) tokens.push_back(static_cast<int64_t>((uniform() + 1) / 2 * (V + 1)) % (V + 1) - 1);
  const std::vector<In> gy = draw<In>(N * D);
  const std::vector<T> center = draw<T>(V * D), w = draw<T>(B);
  for (int kind = 0; kind < 6; ++kind) {  // norms, about a center, with rows; inner products; sums, with weights
    const bool centered = kind == 1 || kind == 2, inner = kind == 3, sums = kind > 3;
    Doubles s(B, 0), rows(N * D, 0), products(B, 0), total(V * D, 0);
    for (int64_t b = 0; b < B; ++b) {
      Doubles E(V * D, 0);
      for (int64_t i = bounds[b]; i < bounds[b + 1]; ++i)
        for (int64_t d = 0; d < D && tokens[i] >= 0; ++d) E[tokens[i] * D + d] += value(gy[i * D + d]);
      for (int64_t j = 0; j < V * D; ++j) {
        products[b] += E[j] * value(center[j]), total[j] += (kind == 5 ? value(w[b]) : 1) * E[j];
        E[j] -= centered ? value(center[j]) : 0;
        s[b] += E[j] * E[j];
      }
      for (int64_t i = bounds[b]; i < bounds[b + 1]; ++i)
        for (int64_t d = 0; d < D && tokens[i] >= 0; ++d) rows[i * D + d] = E[tokens[i] * D + d];
    }
    std::vector<double> bits[2];
    for (const int64_t threads : {1, 3}) {
      n_threads = threads;
      std::vector<T> of_samples(B), sum(V * D);
      std::vector<In> out(N * D);
      EmbeddingCall call{};
      call.runtime = &runtime, call.dtype = Format<In>::dtype;
      call.B = B, call.N = N, call.D = D, call.V = V;
      call.tokens = tokens.data(), call.bounds = bounds.data(), call.gy = gy.data();
      if (centered || inner) call.center = center.data();
      if (kind == 5) call.w = w.data();
      (inner ? call.inner : sums ? call.sum : call.sq_norms) = sums ? sum.data() : of_samples.data();
      if (kind == 0 || kind == 2) call.rows = out.data();
      tested::embedding(call);
      std::vector<double>& all = bits[threads > 1];
      if (sums) compare("sum of tables", sum, total, Format<In>::sums);
      if (inner)
        compare("inner product with a table", of_samples, products, Format<In>::sums, static_cast<double>(N + 1));
      if (!sums && !inner) compare("norm of tables", of_samples, s, Format<In>::sums);
      if (call.rows) compare("row of a table", out, rows, Format<In>::elements);
      for (const T v : sums ? sum : of_samples) all.push_back(static_cast<double>(v));
      for (const In v : out) all.push_back(tested::widen(v));
    }
    if (bits[0] != bits[1]) std::printf("embedding: other bits with other threads\n"), ++failures;
  }
}

}  // namespace

int main() {
  const Case cases[] = {
      conv(2, 3, 5, 1, {7}, {3}, 1, 1, 1),
      conv(3, 2, 17, 1, {9}, {3}, 2, 2, 2),
      conv(9, 3, 20, 1, {5, 6}, {3, 3}, 1, 1, 1),
      conv(2, 4, 70, 1, {6, 5}, {3, 2}, 2, 1, 1),
      conv(2, 17, 6, 1, {4, 4}, {1, 1}, 1, 0, 1),
      conv(2, 3, 4, 1, {6, 6}, {1, 1}, 2, 0, 1),
      conv(2, 3, 4, 1, {8, 12}, {4, 4}, 4, 0, 1),
      conv(2, 2, 3, 1, {2}, {4}, 5, 2, 1),
      conv(2, 3, 4, 1, {3, 4}, {1, 1}, 1 << 30, 0, 1),
      conv(2, 3, 5, 1, {3, 7}, {2, 2}, 1, 0, 2),
      conv(2, 6, 6, 6, {5, 5}, {3, 3}, 1, 1, 1),
      conv(2, 8, 12, 4, {7, 5}, {3, 3}, 2, 1, 1),
      conv(1, 40, 40, 20, {5, 4}, {3, 3}, 1, 1, 1),
      conv(1, 2, 3, 1, {4, 4}, {3, 3}, 1, 3, 2),
      conv(2, 2, 3, 1, {3, 4, 5}, {2, 3, 2}, 1, 1, 1),
      conv(0, 2, 3, 1, {4, 4}, {3, 3}, 1, 1, 1),
      // Weights beyond half a mebibyte, as panels; margins that are skipped.
      conv(3, 130, 125, 1, {3, 2}, {3, 3}, 1, 1, 1),
      conv(2, 70, 134, 2, {5, 3}, {7, 7}, 2, 3, 1),
      conv(2, 37, 19, 1, {4, 3}, {3, 3}, 1, 1, 1),
      conv(1, 40, 33, 1, {3}, {5}, 1, 4, 2),
      linear(3, 2, 390, 370),
      linear(3, 1, 5, 9),
      linear(40, 1, 33, 18),
      linear(4, 5, 16, 7),
      linear(2, 19, 6, 35),
      linear(2, 0, 3, 4),
      linear(2, 3, 0, 70),
      linear(2, 3, 4, 0),
      conv(2, 0, 5, 1, {5, 4}, {3, 3}, 1, 1, 1),
      conv(2, 0, 6, 3, {5, 4}, {3, 2}, 2, 1, 1),
      conv(2, 3, 0, 1, {5, 4}, {3, 3}, 1, 1, 1),
  };
  for (const Case& c : cases) {
    check<float>(c);
    check<double>(c);
    check<bf16>(c);
    check<f16>(c);
  }
  const int64_t pools[][7] = {{3, 7, 33, 2, 2, 0, 1},  {2, 28, 28, 3, 2, 1, 1}, {40, 5, 4, 2, 1, 1, 1},
                              {2, 9, 70, 2, 40, 1, 1}, {1, 11, 6, 3, 3, 1, 2},  {0, 4, 4, 2, 2, 0, 1}};
  for (const auto& p : pools) {
    check_max_pool<float>(p[0], p[1], p[2], p[3], p[4], p[5], p[6]);
    check_max_pool<double>(p[0], p[1], p[2], p[3], p[4], p[5], p[6]);
    check_max_pool<bf16>(p[0], p[1], p[2], p[3], p[4], p[5], p[6]);
    check_max_pool<f16>(p[0], p[1], p[2], p[3], p[4], p[5], p[6]);
  }
  const int64_t filtered[][7] = {{3, 5, 7, 7, 9, 1, 1},   {2, 17, 33, 5, 4, 0, 1},   {1, 16, 16, 3, 3, 0, 0},
                                 {2, 4, 20, 4, 5, 2, 2},  {1, 16, 24, 31, 26, 1, 1}, {9, 16, 16, 12, 12, 1, 1},
                                 {0, 3, 4, 5, 5, 1, 1},   {40, 16, 16, 4, 4, 1, 1},  {16, 16, 16, 12, 12, 1, 1},
                                 {2, 3, 256, 8, 8, 1, 1}, {1, 33, 70, 64, 66, 1, 1}};
  for (const auto& f : filtered) check_winograd(f[0], f[1], f[2], f[3], f[4], f[5], f[6]);
  const int64_t products[][10] = {
      {3, 1, 32, 1, 28, 28, 5, 1, 2, 1}, {2, 32, 32, 32, 14, 14, 3, 2, 1, 1}, {3, 5, 5, 5, 7, 9, 3, 2, 1, 1},
      {2, 12, 24, 4, 6, 11, 3, 1, 1, 1}, {3, 7, 18, 1, 14, 14, 1, 1, 0, 1},   {2, 6, 4, 1, 9, 8, 1, 2, 0, 1},
      {2, 3, 4, 1, 33, 34, 4, 2, 2, 1},  {1, 3, 4, 1, 11, 13, 2, 4, 1, 1},    {2, 3, 4, 1, 10, 37, 3, 3, 2, 1},
      {2, 3, 5, 1, 9, 12, 3, 2, 1, 3},   {1, 3, 4, 1, 3, 4, 2, 9, 0, 1},      {2, 2, 3, 1, 1, 2, 3, 1, 4, 1},
      {1, 2, 3, 1, 4, 4, 1, 1, 0, 1},    {4, 1, 6, 1, 1, 5, 1, 1, 0, 1},      {2, 1, 3, 1, 2, 2, 1, 1, 0, 1},
      {16, 1, 1, 1, 2, 2, 1, 1, 0, 1}};
  for (const auto& p : products) check_product(p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9]);
  const int64_t norms[][4] = {{3, 6, 3, 63},   {2, 4, 4, 16},   {1, 8, 1, 3}, {2, 3, 1, 1},
                              {2, 2, 2, 1111}, {40, 64, 2, 17}, {0, 4, 2, 3}};
  for (const auto& g : norms) {
    check_group_norm<float>(g[0], g[1], g[2], g[3]);
    check_group_norm<double>(g[0], g[1], g[2], g[3]);
    check_group_norm<bf16>(g[0], g[1], g[2], g[3]);
    check_group_norm<f16>(g[0], g[1], g[2], g[3]);
  }
  const int64_t adjoints[][3] = {{3, 36, 9}, {40, 20, 33}, {1, 1, 1}, {0, 4, 1}, {5, 784, 196}};
  for (const auto& a : adjoints) {
    check_max_pool_grad<float>(a[0], a[1], a[2]);
    check_max_pool_grad<double>(a[0], a[1], a[2]);
    check_max_pool_grad<bf16>(a[0], a[1], a[2]);
    check_max_pool_grad<f16>(a[0], a[1], a[2]);
  }
  const std::vector<int64_t> sizes{1, 17, 0, kDistanceBlock, 3 * kDistanceBlock + 5, kDistanceBlock - 1};
  check_sq_distances<float>(sizes);
  check_sq_distances<double>(sizes);
  check_sq_distances<bf16>(sizes);
  check_sq_distances<f16>(sizes);
  const std::vector<int64_t> lengths[] = {{5, 0, 7, 1}, {130}, {0}, {}, {3, 200, 4}};
  const int64_t widths[] = {1, 7, 64, 70, 530};
  for (const auto& l : lengths)
    for (const int64_t D : widths) {
      check_embedding<float>(l, D, 9);
      check_embedding<double>(l, D, 1);
      check_embedding<bf16>(l, D, 40);
      check_embedding<f16>(l, D, 3);
    }
  // Queries, keys and features around a vector's end; queries in more than one block; nothing.
  const int64_t attentions[][6] = {{2, 3, 5, 7, 4, 3},   {1, 2, 37, 18, 17, 16}, {1, 1, 40, 3000, 2, 5},
                                   {3, 1, 1, 1, 33, 33}, {2, 2, 4, 0, 3, 2},     {0, 2, 3, 4, 5, 5}};
  for (const auto& a : attentions) {
    check_attention<float>(a[0], a[1], a[2], a[3], a[4], a[5]);
    check_attention<double>(a[0], a[1], a[2], a[3], a[4], a[5]);
    check_attention<bf16>(a[0], a[1], a[2], a[3], a[4], a[5]);
    check_attention<f16>(a[0], a[1], a[2], a[3], a[4], a[5]);
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
