// Group norm's derivatives, one group of one sample at a time, which stays in cache between the two passes over it.
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

  // Calls body(channel of the first, group) for every group of every sample.
  template <class Body>
  void each_group(const Body& body) const {
    share(
        *call.runtime, call.B * call.groups, [](Carver&) { return 0; }, [](int) {},
        [&](int64_t group, int) { body(group * Cg, group); });
  }

  struct Sums {
    double of_w = 0, of_wx = 0;
  };

  // Σ w and Σ w x̂ over a channel.
  Sums sums(const In* w, const In* x, T mean, T rstd) const {
    constexpr int64_t n = kLanes<T>;
    Vector<T> sum = {}, with_x = {};
    int64_t i = 0;
    for (; i + n <= N; i += n) {
      const Vector<T> wi = load_wide(w + i);
      sum += wi;
      with_x += wi * ((load_wide(x + i) - mean) * rstd);
    }
    Sums out;
    for (int64_t j = 0; j < n; ++j) {
      out.of_w += static_cast<double>(sum[j]);
      out.of_wx += static_cast<double>(with_x[j]);
    }
    for (; i < N; ++i) {
      const T wi = static_cast<T>(widen(w[i]));
      out.of_w += static_cast<double>(wi);
      out.of_wx += static_cast<double>(wi * ((static_cast<T>(widen(x[i])) - mean) * rstd));
    }
    return out;
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

  void rows() const {
    each_group([&](int64_t first, int64_t group) {
      for (int64_t c = first; c < first + Cg; ++c) {
        const Sums s = sums(at(call.gy, c), at(call.x, c), value(call.mean, group), value(call.rstd, group));
        static_cast<T*>(call.rows)[c] = static_cast<T>(s.of_wx);
        static_cast<T*>(call.bias_rows)[c] = static_cast<T>(s.of_w);
      }
    });
  }

  // dgy = a x̂ + b, dx = r P(a gy).
  void rows_backward() const {
    each_group([&](int64_t first, int64_t group) {
      const T mean = value(call.mean, group), r = value(call.rstd, group);
      double w = 0, wx = 0;
      for (int64_t c = first; c < first + Cg; ++c) {
        const Sums s = sums(at(call.gy, c), at(call.x, c), mean, r);
        w += static_cast<double>(value(call.a, c)) * s.of_w / M;
        wx += static_cast<double>(value(call.a, c)) * s.of_wx / M;
      }
      const T of_x = static_cast<T>(-wx) * r * r, constant = -of_x * mean - static_cast<T>(w) * r;
      for (int64_t c = first; c < first + Cg; ++c) {
        const T a = value(call.a, c);
        const In* x = at(call.x, c);
        combine_into(at(call.dgy, c), nullptr, T(0), nullptr, T(0), x, a * r, value(call.b, c) - a * r * mean);
        combine_into(at(call.dx, c), at(call.gy, c), a * r, nullptr, T(0), x, of_x, constant);
      }
    });
  }

  // Σ u gy over a channel.
  double product(const In* u, const In* gy) const { return dot(u, gy, N); }

  // The adjoint of gx = r P(γ gy) for a cotangent u.
  void grad_backward() const {
    each_group([&](int64_t first, int64_t group) {
      const T mean = value(call.mean, group), r = value(call.rstd, group);
      const int64_t first_of_sample = first / call.C * call.C;
      const auto gamma = [&](int64_t c) { return call.weight ? value(call.weight, c - first_of_sample) : T(1); };
      double u_mean = 0, a = 0, g_mean = 0, b = 0, ug = 0;
      T* rows = static_cast<T*>(call.rows);
      for (int64_t c = first; c < first + Cg; ++c) {
        const double weight = static_cast<double>(gamma(c));
        const Sums of_u = sums(at(call.u, c), at(call.x, c), mean, r);
        const Sums of_g = sums(at(call.gy, c), at(call.x, c), mean, r);
        u_mean += of_u.of_w / M;
        a += of_u.of_wx / M;
        g_mean += weight * of_g.of_w / M;
        b += weight * of_g.of_wx / M;
        ug += weight * product(at(call.u, c), at(call.gy, c)) / M;
      }
      const double s = ug - u_mean * g_mean - a * b, rd = static_cast<double>(r), md = static_cast<double>(mean);
      // dx = −r² [a γ gy + b u + (s − 2ab) x̂ − (a mean(γ gy) + b mean(u))], with x̂ = r x − r μ
      const double of_x = -rd * rd * rd * (s - 2 * a * b);
      const T constant = static_cast<T>(rd * rd * (a * g_mean + b * u_mean) - of_x * md);
      for (int64_t c = first; c < first + Cg; ++c) {
        const In *u = at(call.u, c), *gy = at(call.gy, c), *x = at(call.x, c);
        const double weight = static_cast<double>(gamma(c));
        const Sums of_g = sums(gy, x, mean, r);
        rows[c] = static_cast<T>(rd * (product(u, gy) - u_mean * of_g.of_w - a * of_g.of_wx));
        const double of_u = rd * weight;
        combine_into(at(call.dgy, c), u, static_cast<T>(of_u), nullptr, T(0), x, static_cast<T>(-of_u * a * rd),
                     static_cast<T>(of_u * (a * rd * md - u_mean)));
        combine_into(at(call.dx, c), gy, static_cast<T>(-rd * rd * a * weight), u, static_cast<T>(-rd * rd * b), x,
                     static_cast<T>(of_x), constant);
      }
    });
  }
};

template <class In>
void group_norm_of(const GroupNormCall& call) {
  const GroupNorm<In> norm{call};
  if (call.u) return norm.grad_backward();
  if (call.a) return norm.rows_backward();
  norm.rows();
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
