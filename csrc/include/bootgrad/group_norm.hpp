// Group norm's backward pass and its adjoint, one group of one sample at a time, which stays in cache between the two
// passes over it.
//
// Letters: C channels, N positions of a channel, M = C/groups · N entries of a group, x̂ = r (x − μ), and the projection
// P(w) = w − mean(w) − x̂ mean(w x̂). The formulas stand in bootgrad/ops/group_norm.py.

namespace bootgrad::BOOTGRAD_ISA {

template <class In>
struct GroupNorm {
  using T = Compute<In>;
  const GroupNormCall& call;
  int64_t Cg = call.C / call.groups, N = call.N;
  double M = static_cast<double>(Cg * N);

  const In* at(const void* t, int64_t channel) const { return static_cast<const In*>(t) + channel * N; }
  In* at(void* t, int64_t channel) const { return static_cast<In*>(t) + channel * N; }
  static T value(const void* t, int64_t i) { return static_cast<const T*>(t)[i]; }

  // Calls body(its first channel, group, one Sums per channel) for every group of every sample.
  template <class Body>
  void each_group(const Body& body) const {
    share(
        *call.runtime, call.B * call.groups, [&](Carver& c) { return c.take<Sums>(Cg); }, [](Sums*) {},
        [&](int64_t group, Sums* sums) { body(group * Cg, group, sums); });
  }

  struct Sums {
    double gy, gy_x, u, u_x, u_gy;  // Σ gy, Σ gy x̂, Σ u, Σ u x̂, Σ u gy
  };

  // Sums over a channel, short runs in the compute type; those of u are zero where there is none.
  Sums sums(int64_t channel, T mean, T rstd) const {
    constexpr int64_t n = kLanes<T>;
    const In *gy = at(call.gy, channel), *x = at(call.x, channel), *u = call.u ? at(call.u, channel) : nullptr;
    double total[5] = {};
    int64_t i = 0;
    while (i + n <= N) {
      const int64_t end = N - i < 64 * n ? N / n * n : i + 64 * n;
      Vector<T> run[5] = {};
      for (; i < end; i += n) {
        const Vector<T> g = load_wide(gy + i), normal = (load_wide(x + i) - mean) * rstd;
        run[0] += g, run[1] += g * normal;
        if (!u) continue;
        const Vector<T> v = load_wide(u + i);
        run[2] += v, run[3] += v * normal, run[4] += v * g;
      }
      for (int k = 0; k < 5; ++k)
        for (int64_t j = 0; j < n; ++j) total[k] += static_cast<double>(run[k][j]);
    }
    for (; i < N; ++i) {
      const double g = static_cast<double>(widen(gy[i])), v = u ? static_cast<double>(widen(u[i])) : 0;
      const double normal = (static_cast<double>(widen(x[i])) - static_cast<double>(mean)) * static_cast<double>(rstd);
      total[0] += g, total[1] += g * normal;
      total[2] += v, total[3] += v * normal, total[4] += v * g;
    }
    return {total[0], total[1], total[2], total[3], total[4]};
  }

  // out = p·a + q·b + s·x + t over a channel; a null b counts as zero.
  void combine_into(In* out, const In* a, T p, const In* b, T q, const In* x, T s, T t) const {
    constexpr int64_t n = kLanes<T>;
    int64_t i = 0;
    for (; i + n <= N; i += n) {
      Vector<T> v = load_wide(x + i) * s + t;
      if (a) v += load_wide(a + i) * p;
      if (b) v += load_wide(b + i) * q;
      store_narrow(out + i, v);
    }
    for (; i < N; ++i) {
      T v = static_cast<T>(widen(x[i])) * s + t;
      if (a) v += static_cast<T>(widen(a[i])) * p;
      if (b) v += static_cast<T>(widen(b[i])) * q;
      narrow(v, out[i]);
    }
  }

  double gamma(int64_t channel) const { return call.weight ? number(call.weight, channel % call.C) : 1; }
  static double number(const void* t, int64_t i) { return t ? static_cast<double>(value(t, i)) : 0; }

  // rows = Σ gy x̂, bias_rows = Σ gy, dx = r P(γ gy).
  void backward() const {
    each_group([&](int64_t first, int64_t group, Sums* channels) {
      const T mean = value(call.mean, group), rstd = value(call.rstd, group);
      double g_mean = 0, b = 0;  // means of γ gy and of γ gy x̂
      for (int64_t k = 0; k < Cg; ++k) {
        const Sums& s = channels[k] = sums(first + k, mean, rstd);
        static_cast<T*>(call.rows)[first + k] = static_cast<T>(s.gy_x);
        static_cast<T*>(call.bias_rows)[first + k] = static_cast<T>(s.gy);
        g_mean += gamma(first + k) * s.gy / M;
        b += gamma(first + k) * s.gy_x / M;
      }
      if (!call.dx) return;
      const double r = static_cast<double>(rstd), of_x = -r * r * b;
      const T constant = static_cast<T>(-of_x * static_cast<double>(mean) - r * g_mean);
      for (int64_t c = first; c < first + Cg; ++c)
        combine_into(at(call.dx, c), at(call.gy, c), static_cast<T>(r * gamma(c)), nullptr, T(0), at(call.x, c),
                     static_cast<T>(of_x), constant);
    });
  }

  // The adjoint of that for cotangents u of dx, a of rows and b of bias_rows.
  void double_backward() const {
    each_group([&](int64_t first, int64_t group, Sums* channels) {
      const T mean = value(call.mean, group), rstd = value(call.rstd, group);
      const double mu = static_cast<double>(mean), r = static_cast<double>(rstd);
      double u_mean = 0, ux = 0, g_mean = 0, gx = 0, ug = 0;  // of u, u x̂, γ gy, γ gy x̂, γ gy u
      double a_mean = 0, ax = 0;                              // of a gy and a gy x̂
      for (int64_t k = 0; k < Cg; ++k) {
        const Sums& s = channels[k] = sums(first + k, mean, rstd);
        const double weight = gamma(first + k) / M, a = number(call.a, first + k) / M;
        u_mean += s.u / M, ux += s.u_x / M;
        g_mean += weight * s.gy, gx += weight * s.gy_x, ug += weight * s.u_gy;
        a_mean += a * s.gy, ax += a * s.gy_x;
      }
      // dgy = γ r P(u) + a x̂ + b
      // dx  = −r² [ux γ gy + gx u + (s − 2 ux gx) x̂ − (ux g_mean + gx u_mean)] + r P(a gy),  s = mean(γ gy P(u))
      const double s = ug - u_mean * g_mean - ux * gx;
      const double of_normal = -r * r * (s - 2 * ux * gx) - r * ax;
      const double constant = r * r * (ux * g_mean + gx * u_mean) - r * a_mean - of_normal * r * mu;
      for (int64_t k = 0; k < Cg; ++k) {
        const int64_t c = first + k;
        const In *u = call.u ? at(call.u, c) : nullptr, *gy = at(call.gy, c), *x = at(call.x, c);
        const double a = number(call.a, c), of_u = r * gamma(c), scale = a - of_u * ux;
        static_cast<T*>(call.rows)[c] =
            static_cast<T>(r * (channels[k].u_gy - u_mean * channels[k].gy - ux * channels[k].gy_x));
        combine_into(at(call.dgy, c), u, static_cast<T>(of_u), nullptr, T(0), x, static_cast<T>(scale * r),
                     static_cast<T>(number(call.b, c) - scale * r * mu - of_u * u_mean));
        combine_into(at(call.dx, c), gy, static_cast<T>(r * a - r * r * ux * gamma(c)), u, static_cast<T>(-r * r * gx),
                     x, static_cast<T>(of_normal * r), static_cast<T>(constant));
      }
    });
  }
};

template <class In>
void group_norm_of(const GroupNormCall& call) {
  const GroupNorm<In> norm{call};
  call.dgy ? norm.double_backward() : norm.backward();
}

inline void group_norm(const GroupNormCall& call) {
  switch (call.dtype) {
    case DType::f32: return group_norm_of<float>(call);
    case DType::f64: return group_norm_of<double>(call);
    case DType::bf16: return group_norm_of<bf16>(call);
    case DType::f16: return group_norm_of<f16>(call);
  }
}

}  // namespace bootgrad::BOOTGRAD_ISA
