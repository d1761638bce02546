// Group norm's backward pass and its adjoint, one group of one sample at a time, which stays in cache between the two
// passes over it.
//
// Letters: C channels, N positions of a channel, M = C/groups · N entries of a group, x̂ = r (x − μ), and the projection
// P(w) = w − mean(w) − x̂ mean(w x̂). The formulas stand in bootgrad/ops/group_norm.py. Gated, a ReLU is behind
// the norm, whose output is z, and gy is the gradient of z: only where z > 0 does it reach the norm.

namespace bootgrad::BOOTGRAD_ISA {

template <class In, bool gated>
struct GroupNorm {
  using T = Compute<In>;
  static constexpr int64_t n = kLanes<T>;
  const GroupNormCall& call;
  int64_t Cg = call.C / call.groups, N = call.N, full = N / n * n;
  double part = 1 / static_cast<double>(Cg * N);  // of an entry in a mean

  const In* at(const void* t, int64_t channel) const { return static_cast<const In*>(t) + channel * N; }
  In* at(void* t, int64_t channel) const { return static_cast<In*>(t) + channel * N; }
  static T value(const void* t, int64_t i) { return static_cast<const T*>(t)[i]; }

  // Calls body(its first channel, group, one Sums per channel) for every group of every sample; one thread visits
  // neighbours in turn.
  template <class Body>
  void each_group(const Body& body) const {
    constexpr int64_t entries = 1 << 14;
    const int64_t groups = call.B * call.groups, piece = Cg * N < entries ? entries / (Cg * N) : 1;
    share(
        *call.runtime, (groups + piece - 1) / piece, [&](Carver& c) { return c.take<Sums>(Cg); }, [](Sums*) {},
        [&](int64_t task, Sums* sums) {
          const int64_t end = (task + 1) * piece < groups ? (task + 1) * piece : groups;
          for (int64_t group = task * piece; group < end; ++group) body(group * Cg, group, sums);
        });
  }

  struct Sums {
    double gy, gy_x, u, u_x, u_gy;  // Σ gy, Σ gy x̂, Σ u, Σ u x̂, Σ u gy
  };

  // The last vector of a channel overlaps the one before: only what that has not seen counts in sums.
  BOOTGRAD_INLINE Vector<T> unseen(const Vector<T>& last) const {
    Vector<T> lane;
    for (int64_t j = 0; j < n; ++j) lane[j] = static_cast<T>(j);
    return lane < static_cast<T>(n - (N - full)) ? Vector<T>{} : last;
  }

  // What passes the ReLU: of a vector, and of an entry.
  static BOOTGRAD_INLINE Vector<T> passed(const Vector<T>& v, const In* z) {
    if constexpr (gated) return load_wide(z) <= T(0) ? Vector<T>{} : v;
    return v;
  }
  static T passed_one(T v, const In* z) { return gated && widen(*z) <= T(0) ? T(0) : v; }

  // Those of a short run of vectors in the compute type, with x − μ for x̂; those of u are zero where there is none.
  template <bool with_u>
  struct Run {
    Vector<T> gy = {}, gy_x = {}, u = {}, u_x = {}, u_gy = {};

    BOOTGRAD_INLINE void add(const Vector<T>& g, const Vector<T>& centered, const Vector<T>& v) {
      gy += g, gy_x += g * centered;
      if (with_u) u += v, u_x += v * centered, u_gy += v * g;
    }

    BOOTGRAD_INLINE void add_to(Sums& total) const {
      const auto sum = [](const Vector<T>& v) { return static_cast<double>(sum_of_lanes<T>(v)); };
      total.gy += sum(gy), total.gy_x += sum(gy_x);
      if (with_u) total.u += sum(u), total.u_x += sum(u_x), total.u_gy += sum(u_gy);
    }
  };

  // Sums over a channel.
  template <bool with_u>
  BOOTGRAD_INLINE Sums sums(int64_t channel, T mean, T rstd) const {
    const In *gy = at(call.gy, channel), *x = at(call.x, channel), *u = with_u ? at(call.u, channel) : nullptr;
    const In* z = gated ? at(call.z, channel) : gy;
    // Outputs are fetched while inputs are: when it is their turn, writing does not wait for memory.
    const In *dx = call.dx ? at(call.dx, channel) : nullptr, *dgy = call.dgy ? at(call.dgy, channel) : nullptr;
    const auto add = [&](Run<with_u>& run, int64_t i) {
      if (dx) __builtin_prefetch(dx + i, 1);
      if (dgy) __builtin_prefetch(dgy + i, 1);
      run.add(passed(load_wide(gy + i), z + i), load_wide(x + i) - mean, with_u ? load_wide(u + i) : Vector<T>{});
    };
    Sums total{};
    if (N == n) {  // without the loops, which cost such a channel a quarter of its time
      Run<with_u> run;
      add(run, 0);
      run.add_to(total);
    } else if (N > n) {
      for (int64_t i = 0; i < full;) {
        const int64_t end = full - i < 64 * n ? full : i + 64 * n;
        Run<with_u> run;
        for (; i < end; i += n) add(run, i);
        if (end == full && full < N) {
          const int64_t last = N - n;
          run.add(unseen(passed(load_wide(gy + last), z + last)), load_wide(x + last) - mean,
                  with_u ? unseen(load_wide(u + last)) : Vector<T>{});
        }
        run.add_to(total);
      }
    } else {
      for (int64_t i = 0; i < N; ++i) {
        const double g = static_cast<double>(passed_one(widen(gy[i]), z + i));
        const double v = with_u ? static_cast<double>(widen(u[i])) : 0;
        const double centered = static_cast<double>(widen(x[i])) - static_cast<double>(mean);
        total.gy += g, total.gy_x += g * centered;
        total.u += v, total.u_x += v * centered, total.u_gy += v * g;
      }
    }
    total.gy_x *= static_cast<double>(rstd), total.u_x *= static_cast<double>(rstd);
    return total;
  }

  // Calls vector(i) for vectors that cover a channel, the last of which may overlap the one before; scalar(i) for the
  // entries of a channel shorter than a vector.
  template <class V, class S>
  BOOTGRAD_INLINE void cover(const V& vector, const S& scalar) const {
    for (int64_t i = 0; i < full; i += n) vector(i);
    if (full == 0)
      for (int64_t i = 0; i < N; ++i) scalar(i);
    else if (full < N)
      vector(N - n);
  }

  double gamma(int64_t channel) const { return call.weight ? number(call.weight, channel) : 1; }
  static double number(const void* t, int64_t i) { return t ? static_cast<double>(value(t, i)) : 0; }

  // rows = Σ gy x̂, bias_rows = Σ gy, dx = r P(γ gy).
  void backward() const {
    each_group([&](int64_t first, int64_t group, Sums*) {
      const int64_t own = group % call.groups * Cg;  // the first channel's number in its sample
      const T mean = value(call.mean, group), rstd = value(call.rstd, group);
      const double r = static_cast<double>(rstd);
      double g_mean = 0, b = 0;  // means of γ gy and of γ gy x̂
      for (int64_t k = 0; k < Cg; ++k) {
        const int64_t c = first + k;
        const Sums s = sums<false>(c, mean, rstd);
        static_cast<T*>(call.rows)[c] = static_cast<T>(s.gy_x);
        static_cast<T*>(call.bias_rows)[c] = static_cast<T>(s.gy);
        g_mean += gamma(own + k) * part * s.gy, b += gamma(own + k) * part * s.gy_x;
      }
      if (!call.dx) return;
      const T of_x = static_cast<T>(-r * r * b);
      const T constant = static_cast<T>(r * r * b * static_cast<double>(mean) - r * g_mean);
      for (int64_t k = 0; k < Cg; ++k) {
        const int64_t c = first + k;
        const In *gy = at(call.gy, c), *x = at(call.x, c), *z = gated ? at(call.z, c) : gy;
        In* dx = at(call.dx, c);
        const T of_gy = static_cast<T>(r * gamma(own + k));
        const auto value = [&](auto g, auto x) { return g * of_gy + (x * of_x + constant); };
        cover([&](int64_t i) { store_narrow(dx + i, value(passed(load_wide(gy + i), z + i), load_wide(x + i))); },
              [&](int64_t i) { narrow(value(passed_one(widen(gy[i]), z + i), widen(x[i])), dx[i]); });
      }
    });
  }

  // The adjoint of that for cotangents u of dx, a of rows and b of bias_rows.
  template <bool with_u>
  void double_backward() const {
    each_group([&](int64_t first, int64_t group, Sums* channels) {
      const int64_t own = group % call.groups * Cg;  // the first channel's number in its sample
      const T mean = value(call.mean, group), rstd = value(call.rstd, group);
      const double mu = static_cast<double>(mean), r = static_cast<double>(rstd);
      double u_mean = 0, ux = 0, g_mean = 0, gx = 0, ug = 0;  // of u, u x̂, γ gy, γ gy x̂, γ gy u
      double a_mean = 0, ax = 0;                              // of a gy and a gy x̂
      for (int64_t k = 0; k < Cg; ++k) {
        const Sums s = channels[k] = sums<with_u>(first + k, mean, rstd);
        const double weight = gamma(own + k) * part, a = number(call.a, first + k) * part;
        u_mean += s.u * part, ux += s.u_x * part;
        g_mean += weight * s.gy, gx += weight * s.gy_x, ug += weight * s.u_gy;
        a_mean += a * s.gy, ax += a * s.gy_x;
      }
      // dgy = γ r P(u) + a x̂ + b
      // dx  = −r² [ux γ gy + gx u + (s − 2 ux gx) x̂ − (ux g_mean + gx u_mean)] + r P(a gy),  s = mean(γ gy P(u))
      const double s = ug - u_mean * g_mean - ux * gx;
      const double of_normal = -r * r * (s - 2 * ux * gx) - r * ax;
      const T dx_of_x = static_cast<T>(of_normal * r), dx_of_u = static_cast<T>(-r * r * gx);
      const T dx_constant = static_cast<T>(r * r * (ux * g_mean + gx * u_mean) - r * a_mean - of_normal * r * mu);
      for (int64_t k = 0; k < Cg; ++k) {
        const int64_t c = first + k;
        const In *u = with_u ? at(call.u, c) : nullptr, *gy = at(call.gy, c), *x = at(call.x, c);
        const In* z = gated ? at(call.z, c) : gy;
        In *dgy = at(call.dgy, c), *dx = at(call.dx, c);
        const double a = number(call.a, c), of_u = r * gamma(own + k), across = r * (a - of_u * ux);
        const T dgy_of_u = static_cast<T>(of_u), of_other = static_cast<T>(across);  // dgy's of x, and dx's of gy
        const T dgy_constant = static_cast<T>(number(call.b, c) - across * mu - of_u * u_mean);
        static_cast<T*>(call.rows)[c] =
            static_cast<T>(r * (channels[k].u_gy - u_mean * channels[k].gy - ux * channels[k].gy_x));
        const auto by_gy = [&](auto v, auto x) { return v * dgy_of_u + (x * of_other + dgy_constant); };
        const auto by_x = [&](auto v, auto g, auto x) {
          return v * dx_of_u + (g * of_other + (x * dx_of_x + dx_constant));
        };
        cover(
            [&](int64_t i) {
              const Vector<T> v = with_u ? load_wide(u + i) : Vector<T>{}, w = load_wide(x + i);
              const Vector<T> g = passed(load_wide(gy + i), z + i);
              store_narrow(dgy + i, passed(by_gy(v, w), z + i)), store_narrow(dx + i, by_x(v, g, w));
            },
            [&](int64_t i) {
              const T v = with_u ? static_cast<T>(widen(u[i])) : T(0), w = widen(x[i]);
              const T g = passed_one(widen(gy[i]), z + i);
              narrow(passed_one(by_gy(v, w), z + i), dgy[i]), narrow(by_x(v, g, w), dx[i]);
            });
      }
    });
  }
};

template <class In, bool gated>
void group_norm_of(const GroupNormCall& call) {
  const GroupNorm<In, gated> norm{call};
  if (!call.dgy) return norm.backward();
  call.u ? norm.template double_backward<true>() : norm.template double_backward<false>();
}

template <class In>
void group_norm_of(const GroupNormCall& call) {
  call.z ? group_norm_of<In, true>(call) : group_norm_of<In, false>(call);
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
