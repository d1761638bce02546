// Convolutions with many narrow groups, depthwise ones above all: a vector holds one output channel of each lane, and
// every product is between vectors, because no two lanes share a weight.
//
//   l lanes, output channels o0 + l; j < Cg; x_j[p, l] the padded plane of input channel j of lane l's group
//   G[(j,k), l]  = Σ_t x_j[pos t + tap k, l] · gy[t, l]            D = G − center
//   ∂s/∂gy[t, l] = 2 Σ_{j,k} x_j[pos t + tap k, l] · D[(j,k), l]
//   ∂s/∂x_j[p]   = 2 Σ_{l of the group} Σ_k gy[(p + padding − dilation·k)/stride, l] · D[(j,k), l]
//
// Groups do not straddle vectors: Og divides the number of lanes.

namespace bootgrad::BOOTGRAD_ISA {

template <class In>
struct ConvNarrow : ConvLayer<In> {
  using Layer = ConvLayer<In>;
  using Layer::call, Layer::plan, Layer::runtime, Layer::x_size;
  using typename Layer::T;

  // Half of the micro-kernel's lanes or more would idle, and the copies of x, one per input channel, stay small.
  static bool fits(const ConvPlan& plan) {
    return plan.groups > 1 && plan.Og > 0 && n % plan.Og == 0 && 2 * plan.Og <= n && plan.Cg <= 16 && plan.K <= 64;
  }

  explicit ConvNarrow(const ConvCall& c) : Layer(c, false) {
    if (!call.center) return;
    T* packed = static_cast<T*>(runtime.scratch(kCenterScratch, static_cast<size_t>(size) * sizeof(T)));
    clear(packed, size);
    transpose<T>(static_cast<const T*>(call.center), plan.R, plan.O, plan.R, packed, ldo, T(1));
    this->center = packed;
  }

  struct Memory {
    T *x, *rows, *lanes, *gy, *keep,
        *out;              // [C, x_plane], [n, longest plane], [Cg, x_plane, n], [g_plane, n], [R, ldo], …
    int64_t *place, *row;  // [T] position t in a padded plane of gy; [R] offset of (j, k) in `lanes`
  };

  void run() const {
    const bool sums = call.sum;
    const int64_t blocks = sums ? divide<T>(plan.B, 256, plan.groups, size, ldo).blocks : plan.B;
    T* partial = nullptr;
    if (sums)
      partial = static_cast<T*>(runtime.scratch(kSharedScratch, static_cast<size_t>(blocks * size) * sizeof(T)));
    share(
        runtime, blocks, [&](Carver& c) { return lay_out(c); }, [&](const Memory& m) { begin(m); },
        [&](int64_t block, const Memory& m) {
          const Range range = part(plan.B, blocks, block);
          for (int64_t b = range.begin; b < range.end; ++b)
            sample(b, m, sums ? partial + block * size : nullptr, b == range.begin);
        });
    if (sums) combine<T>(runtime, partial, blocks, size, plan.R, plan.O, ldo, static_cast<T*>(call.sum));
  }

 private:
  static constexpr int64_t n = kLanes<T>;
  static constexpr int kRows = 9;  // accumulators: a 3×3 kernel's
  const int64_t ldo = round_up<T>(plan.O), size = plan.R * ldo;
  const int64_t longest = plan.x_plane > plan.T ? plan.x_plane : plan.T;

  Memory lay_out(Carver& c) const {
    Memory m{};
    if (this->copy_x) m.x = c.take<T>(x_size);
    m.rows = c.take<T>(n * longest);
    m.lanes = c.take<T>(plan.Cg * plan.x_plane * n);
    m.gy = c.take<T>(plan.g_plane * n);
    m.keep = c.take<T>(size);
    m.out = c.take<T>((plan.pixels > plan.T ? plan.pixels : plan.T) * n);
    m.place = c.take<int64_t>(plan.T);
    m.row = c.take<int64_t>(plan.R);
    return m;
  }

  void begin(const Memory& m) const {
    if (m.x) clear(m.x, x_size);
    clear(m.gy, plan.g_plane * n);
    for (int64_t r = 0; r < plan.R; ++r) m.row[r] = r / plan.K * plan.x_plane + plan.tap[r % plan.K];
    for (int64_t t = 0; t < plan.T; ++t) {
      const int64_t i[3] = {t / (plan.P[1] * plan.P[2]), t / plan.P[2] % plan.P[1], t % plan.P[2]};
      m.place[t] = ((i[0] + plan.glow[0]) * plan.gs[1] + i[1] + plan.glow[1]) * plan.gs[2] + i[2] + plan.glow[2];
    }
  }

  // C[m, l] = Σ_k a[(row[m] + depth[k]), l] · b[at[k], l] for up to kRows rows, handed to finish(m0, rows,
  // accumulators).
  template <class Depth, class At, class Finish>
  static void products(int64_t M, int64_t K, const T* a, const int64_t* row, const Depth& depth, const T* b,
                       const At& at, const Finish& finish) {
    for (int64_t m0 = 0; m0 < M; m0 += kRows) {
      const int64_t count = M - m0 < kRows ? M - m0 : kRows;
      const T* from[kRows];
      Vector<T> acc[kRows][1], total[kRows];
#pragma GCC unroll 9
      for (int i = 0; i < kRows; ++i) from[i] = a + row[m0 + (i < count ? i : count - 1)] * n;
      for (int64_t k = 0;;) {
        const bool first = k == 0;
#pragma GCC unroll 9
        for (int i = 0; i < kRows; ++i) acc[i][0] = Vector<T>{};
        for (const int64_t stop = K - k > kRun ? k + kRun : K; k < stop; ++k) {
          const Vector<T> other = load<T>(b + at(k));
          const int64_t offset = depth(k) * n;
#pragma GCC unroll 9
          for (int i = 0; i < kRows; ++i) acc[i][0] += load<T>(from[i] + offset) * other;
        }
#pragma GCC unroll 9
        for (int i = 0; i < kRows; ++i) acc[i][0] += first ? Vector<T>{} : total[i];
        if (k == K) break;
#pragma GCC unroll 9
        for (int i = 0; i < kRows; ++i) total[i] = acc[i][0];
      }
      finish(m0, count, acc);
    }
  }

  void sample(int64_t b, const Memory& m, T* sum, bool first) const {
    const T* x = this->padded_x(b, m.x);
    const T* w = static_cast<const T*>(call.w);
    Total<T> plain, deviation, inner;
    const Norms<T> norms{
        ldo,       this->center, sum, first, call.dx || call.dgy ? m.keep : nullptr, call.sq_norms ? &plain : nullptr,
        &deviation};
    for (int64_t o0 = 0; o0 < plan.O; o0 += n) {
      const int64_t lanes = plan.O - o0 < n ? plan.O - o0 : n;
      load_gy(b, o0, lanes, w ? w[b] : T(1), m);
      for (int64_t j = 0; j < plan.Cg; ++j) load_x(x, o0, lanes, j, m);
      for (int64_t j = 0; j < plan.Cg; ++j)
        products(
            plan.K, plan.T, m.lanes + j * plan.x_plane * n, plan.tap, [&](int64_t t) { return plan.pos[t]; }, m.gy,
            [&](int64_t t) { return m.place[t] * n; },
            [&](int64_t k0, int64_t count, Vector<T>(&acc)[kRows][1]) {
              const int64_t row = j * plan.K + k0;
              if (call.inner)
                Dot<T>{this->center, ldo, &inner}.template finish<kRows, 1>(row, count, o0, acc);
              else
                norms.template finish<kRows, 1>(row, count, o0, acc);
            });
      if (call.dgy) gradient_of_gy(b, o0, lanes, m);
      for (int64_t j = 0; j < plan.Cg && call.dx; ++j) gradient_of_x(b, o0, lanes, j, m);
    }
    if (call.inner) static_cast<T*>(call.inner)[b] = static_cast<T>(inner.value());
    if (call.sq_norms) static_cast<T*>(call.sq_norms)[b] = static_cast<T>(plain.value());
    if (call.deviation) static_cast<T*>(call.deviation)[b] = static_cast<T>(deviation.value());
  }

  void load_gy(int64_t b, int64_t o0, int64_t lanes, T factor, const Memory& m) const {
    if (lanes < n) clear(m.out, plan.T * n);
    transpose<T>(this->gy_of(b) + o0 * plan.T, plan.T, lanes, plan.T, m.out, n, factor);
    for (int64_t t = 0; t < plan.T; ++t) store<T>(m.gy + m.place[t] * n, load<T>(m.out + t * n));
    if (call.bias) sum_rows(m.out, plan.T, n, static_cast<T*>(call.bias) + b * plan.O + o0, lanes);
  }

  void load_x(const T* x, int64_t o0, int64_t lanes, int64_t j, const Memory& m) const {
    T* to = m.lanes + j * plan.x_plane * n;
    const T* from = x + o0 * plan.x_plane;
    if (plan.Og > 1 || plan.Cg > 1) {
      for (int64_t l = 0; l < lanes; ++l)
        copy_row(x + ((o0 + l) / plan.Og * plan.Cg + j) * plan.x_plane, m.rows + l * plan.x_plane, plan.x_plane);
      from = m.rows;
    }
    if (lanes < n) clear(to, plan.x_plane * n);
    transpose<T>(from, plan.x_plane, lanes, plan.x_plane, to, n, T(1));
  }

  void gradient_of_gy(int64_t b, int64_t o0, int64_t lanes, const Memory& m) const {
    products(
        plan.T, plan.R, m.lanes, plan.pos, [&](int64_t r) { return m.row[r]; }, m.keep + o0,
        [&](int64_t r) { return r * ldo; },
        [&](int64_t t0, int64_t count, Vector<T>(&acc)[kRows][1]) {
          for (int64_t i = 0; i < count; ++i) store<T>(m.out + (t0 + i) * n, acc[i][0]);
        });
    transpose<T>(m.out, n, plan.T, lanes, static_cast<In*>(call.dgy) + (b * plan.O + o0) * plan.T, plan.T, T(2));
  }

  void gradient_of_x(int64_t b, int64_t o0, int64_t lanes, int64_t j, const Memory& m) const {
    for (int64_t i = 0; i < plan.n_phases; ++i) {
      const Phase& phase = plan.phases[i];
      products(
          phase.pixels, phase.taps, m.gy, phase.rows, [&](int64_t k) { return phase.depth[k * plan.Og]; }, m.keep + o0,
          [&](int64_t k) { return (j * plan.K + plan.tap_order[phase.first_tap + k]) * ldo; },
          [&](int64_t p0, int64_t count, Vector<T>(&acc)[kRows][1]) {
            for (int64_t p = 0; p < count; ++p)
              store<T>(m.out + (phase.first_pixel + phase.out[p0 + p]) * n, acc[p][0]);
          });
    }
    transpose<T>(m.out, n, plan.pixels, lanes, m.rows, plan.pixels, T(2));
    In* dx = static_cast<In*>(call.dx) + b * plan.C * plan.pixels;
    for (int64_t l = 0; l < lanes; l += plan.Og) {
      T* plane = m.rows + l * plan.pixels;
      for (int64_t other = 1; other < plan.Og; ++other)
        for (int64_t p = 0; p < plan.pixels; ++p) plane[p] += plane[other * plan.pixels + p];
      In* to = dx + ((o0 + l) / plan.Og * plan.Cg + j) * plan.pixels;
      for (int64_t p = 0; p < plan.pixels; ++p) narrow(plane[p], to[p]);
    }
  }
};

}  // namespace bootgrad::BOOTGRAD_ISA
