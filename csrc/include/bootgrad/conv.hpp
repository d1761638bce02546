// Convolutions by the direct path: a sample's gradient is formed tile by tile, used in registers, and, where derivatives
// are wanted, kept for the two products that they take.
//
//   G[r, o]        = Σ_t x[tap r + pos t] · gy[t, o]
//   ∂s/∂gy[t, o]   = 2 Σ_r x[pos t + tap r] · D[r, o]                 D = G − center
//   ∂s/∂x[p, c]    = 2 Σ_{k,o} gy[(p + padding − dilation·k)/stride, o] · D[(c,k), o]
//
// The last is a sum over the kernel positions that reach pixel p, the same for all pixels of one phase (p modulo the
// stride), so it is the same kind of product as the others.

namespace bootgrad::BOOTGRAD_ISA {

template <class In>
struct Conv {
  using T = Compute<In>;

  explicit Conv(const ConvCall& c) : call(c), plan(*c.plan), runtime(*c.runtime) {}

  const ConvCall& call;
  const ConvPlan& plan;
  const Runtime& runtime;
  const int64_t ld = round_up<T>(plan.Og);   // row of G, of its center and of the transposed gy
  const int64_t ldc = round_up<T>(plan.Cg);  // row of the transposed x
  const int64_t weights = plan.groups * plan.R * ld;
  const bool same = sizeof(In) == sizeof(T);
  const bool copy_x = !same || plan.x_plane != plan.pixels;
  const bool copy_gy = !same || plan.g_plane != plan.T;

  void run() {
    if (call.center) pack_center();
    if (call.inner)
      jvp();
    else if (call.sq_norms || call.deviation)
      direct();
    else if (call.sum)
      weighted_sum();
  }

 private:
  const T* center = nullptr;  // [groups, R, ld]

  struct Memory {
    T *x, *gyt, *gyp, *keep, *keept, *dgyt, *dxt;
    int64_t* depth;
  };

  void pack_center() {
    Carver carver{reinterpret_cast<uintptr_t>(runtime.scratch(kCenterScratch, static_cast<size_t>(weights) * sizeof(T) + 64))};
    T* packed = carver.take<T>(weights);
    if (ld != plan.Og) clear(packed, weights);
    for (int64_t g = 0; g < plan.groups; ++g)
      transpose<T>(static_cast<const T*>(call.center) + g * plan.Og * plan.R, plan.R, plan.Og, plan.R,
                   packed + g * plan.R * ld, ld, T(1));
    center = packed;
  }

  const In* x_of(int64_t b) const { return static_cast<const In*>(call.x) + b * plan.C * plan.pixels; }
  const In* gy_of(int64_t b) const { return static_cast<const In*>(call.gy) + b * plan.O * plan.T; }

  // [C, x_plane]
  const T* padded_x(int64_t b, T* scratch) const {
    if (!copy_x) return reinterpret_cast<const T*>(x_of(b));
    pad(x_of(b), plan.C, plan.S, scratch, plan.xs, plan.padding);
    return scratch;
  }

  // [O, g_plane]
  const T* padded_gy(int64_t b, T* scratch) const {
    if (!copy_gy) return reinterpret_cast<const T*>(gy_of(b));
    pad(gy_of(b), plan.O, plan.P, scratch, plan.gs, plan.glow);
    return scratch;
  }

  // Group g at out + g·stride: [T, ld]
  void transposed_gy(int64_t b, T* out, int64_t stride, T factor) const {
    for (int64_t g = 0; g < plan.groups; ++g)
      transpose<T>(gy_of(b) + g * plan.Og * plan.T, plan.T, plan.Og, plan.T, out + g * stride, ld, factor);
  }

  void bias(int64_t b, const T* gyt, int64_t stride) const {
    T* out = static_cast<T*>(call.bias) + b * plan.O;
    for (int64_t g = 0; g < plan.groups; ++g)
      for (int64_t o = 0; o < ld; o += kLanes<T>) {
        Vector<T> sum{};
        for (int64_t t = 0; t < plan.T; ++t) sum += load<T>(gyt + g * stride + t * ld + o);
        const int64_t left = plan.Og - o;
        store_some<T>(out + g * plan.Og + o, sum, left < kLanes<T> ? left : kLanes<T>);
      }
  }

  void direct() {
    const bool grads = call.dx || call.dgy;
    T* partial = nullptr;
    const int64_t blocks = call.sum ? sample_blocks(plan.B, weights * static_cast<int64_t>(sizeof(T))) : plan.B;
    if (call.sum)
      partial = static_cast<T*>(runtime.scratch(kSharedScratch, static_cast<size_t>(blocks * weights) * sizeof(T)));
    auto prepare = [&](Carver& c) {
      Memory m{};
      if (copy_x) m.x = c.take<T>(plan.C * plan.x_plane);
      m.gyt = c.take<T>(plan.groups * plan.T * ld);
      if (grads) m.keep = c.take<T>(plan.R * ld);
      if (call.dgy) m.dgyt = c.take<T>(plan.T * ld);
      if (call.dx) {
        if (copy_gy) m.gyp = c.take<T>(plan.O * plan.g_plane);
        m.keept = c.take<T>(plan.K * plan.Og * ldc);
        m.dxt = c.take<T>(plan.pixels * ldc);
      }
      return m;
    };
    auto begin = [&](const Memory& m) {
      if (m.x) clear(m.x, plan.C * plan.x_plane);
      if (m.gyp) clear(m.gyp, plan.O * plan.g_plane);
      if (ld != plan.Og) clear(m.gyt, plan.groups * plan.T * ld);
      if (m.keept && ldc != plan.Cg) clear(m.keept, plan.K * plan.Og * ldc);
    };
    share(runtime, blocks, prepare, begin, [&](int64_t block, const Memory& m) {
      const Range range = part(plan.B, blocks, block);
      for (int64_t b = range.begin; b < range.end; ++b) {
        const T* x = padded_x(b, m.x);
        transposed_gy(b, m.gyt, plan.T * ld, T(1));
        if (call.bias) bias(b, m.gyt, plan.T * ld);
        const T* gyp = call.dx ? padded_gy(b, m.gyp) : nullptr;
        Total<T> plain, deviation;
        for (int64_t g = 0; g < plan.groups; ++g) {
          const T* xg = x + g * plan.Cg * plan.x_plane;
          const Norms<T> norms{ld,
                               center ? center + g * plan.R * ld : nullptr,
                               partial ? partial + block * weights + g * plan.R * ld : nullptr,
                               b == range.begin,
                               m.keep,
                               call.sq_norms ? &plain : nullptr,
                               &deviation};
          gemm<T>(plan.R, plan.Og, plan.T, {xg, plan.tap, plan.pos}, m.gyt + g * plan.T * ld, ld, norms);
          if (call.dgy) gradient_of_gy(b, g, xg, m);
          if (call.dx) gradient_of_x(b, g, gyp + g * plan.Og * plan.g_plane, m);
        }
        if (call.sq_norms) static_cast<T*>(call.sq_norms)[b] = static_cast<T>(plain.value());
        if (call.deviation) static_cast<T*>(call.deviation)[b] = static_cast<T>(deviation.value());
      }
    });
    if (call.sum) combine_groups(partial, blocks);
  }

  void combine_groups(const T* partial, int64_t blocks) const {
    for (int64_t g = 0; g < plan.groups; ++g)
      combine<T>(runtime, partial + g * plan.R * ld, blocks, weights, plan.R, plan.Og, ld,
                 static_cast<T*>(call.sum) + g * plan.Og * plan.R);
  }

  void gradient_of_gy(int64_t b, int64_t g, const T* x, const Memory& m) const {
    gemm<T>(plan.T, plan.Og, plan.R, {x, plan.pos, plan.tap}, m.keep, ld, Store<T>{m.dgyt, ld, ld, T(2), false, nullptr});
    transpose<T>(m.dgyt, ld, plan.T, plan.Og, static_cast<In*>(call.dgy) + (b * plan.O + g * plan.Og) * plan.T, plan.T,
                 T(1));
  }

  void gradient_of_x(int64_t b, int64_t g, const T* gy, const Memory& m) const {
    for (int64_t j = 0; j < plan.K; ++j)
      transpose<T>(m.keep + plan.tap_order[j] * ld, plan.K * ld, plan.Cg, plan.Og, m.keept + j * plan.Og * ldc, ldc, T(1));
    for (int64_t i = 0; i < plan.n_phases; ++i) {
      const Phase& phase = plan.phases[i];
      gemm<T>(phase.pixels, plan.Cg, phase.taps * plan.Og, {gy, phase.rows, phase.depth},
              m.keept + phase.first_tap * plan.Og * ldc, ldc, Store<T>{m.dxt, ldc, ldc, T(2), false, phase.out});
    }
    transpose<T>(m.dxt, ldc, plan.pixels, plan.Cg, static_cast<In*>(call.dx) + (b * plan.C + g * plan.Cg) * plan.pixels,
                 plan.pixels, T(1));
  }

  // ⟨G_i, v⟩ = Σ_{t,o} gy[t, o] · (v ∗ x)[t, o]
  void jvp() {
    auto prepare = [&](Carver& c) {
      Memory m{};
      if (copy_x) m.x = c.take<T>(plan.C * plan.x_plane);
      m.gyt = c.take<T>(plan.groups * plan.T * ld);
      return m;
    };
    auto begin = [&](const Memory& m) {
      if (m.x) clear(m.x, plan.C * plan.x_plane);
      if (ld != plan.Og) clear(m.gyt, plan.groups * plan.T * ld);
    };
    share(runtime, plan.B, prepare, begin, [&](int64_t b, const Memory& m) {
      const T* x = padded_x(b, m.x);
      transposed_gy(b, m.gyt, plan.T * ld, T(1));
      Total<T> total;
      for (int64_t g = 0; g < plan.groups; ++g)
        gemm<T>(plan.T, plan.Og, plan.R, {x + g * plan.Cg * plan.x_plane, plan.pos, plan.tap}, center + g * plan.R * ld, ld,
                Dot<T>{m.gyt + g * plan.T * ld, ld, &total});
      static_cast<T*>(call.inner)[b] = static_cast<T>(total.value());
    });
  }

  // Σ_i w_i G_i: one product over samples and positions, as many samples at a time as fit the cache.
  void weighted_sum() {
    const int64_t blocks = sample_blocks(plan.B, weights * static_cast<int64_t>(sizeof(T)));
    const int64_t per_sample = (plan.C * plan.x_plane + plan.groups * plan.T * ld) * static_cast<int64_t>(sizeof(T));
    int64_t together = plan.T > 0 && plan.T < 256 ? 256 / plan.T : 1;
    while (together > 1 && together * per_sample > (int64_t{1} << 19)) together /= 2;
    const int64_t x_size = plan.C * plan.x_plane, stride = together * plan.T * ld;
    T* partial = static_cast<T*>(runtime.scratch(kSharedScratch, static_cast<size_t>(blocks * weights) * sizeof(T)));
    auto prepare = [&](Carver& c) {
      Memory m{};
      if (copy_x) m.x = c.take<T>(together * x_size);
      m.gyt = c.take<T>(plan.groups * stride);
      m.depth = c.take<int64_t>(together * plan.T);
      return m;
    };
    auto begin = [&](const Memory& m) {
      if (m.x) clear(m.x, together * x_size);
      if (ld != plan.Og) clear(m.gyt, plan.groups * stride);
      for (int64_t s = 0; s < together; ++s)
        for (int64_t t = 0; t < plan.T; ++t) m.depth[s * plan.T + t] = s * x_size + plan.pos[t];
    };
    share(runtime, blocks, prepare, begin, [&](int64_t block, const Memory& m) {
      const Range range = part(plan.B, blocks, block);
      for (int64_t b0 = range.begin; b0 < range.end; b0 += together) {
        const int64_t count = range.end - b0 < together ? range.end - b0 : together;
        const T* x = copy_x ? m.x : padded_x(b0, nullptr);
        for (int64_t s = 0; s < count; ++s) {
          if (copy_x) padded_x(b0 + s, m.x + s * x_size);
          const T* w = static_cast<const T*>(call.w);
          transposed_gy(b0 + s, m.gyt + s * plan.T * ld, stride, w ? w[b0 + s] : T(1));
          if (call.bias) bias(b0 + s, m.gyt + s * plan.T * ld, stride);
        }
        for (int64_t g = 0; g < plan.groups; ++g)
          gemm<T>(plan.R, plan.Og, count * plan.T, {x + g * plan.Cg * plan.x_plane, plan.tap, m.depth}, m.gyt + g * stride,
                  ld, Store<T>{partial + block * weights + g * plan.R * ld, ld, ld, T(1), b0 != range.begin, nullptr});
      }
    });
    combine_groups(partial, blocks);
  }
};

}  // namespace bootgrad::BOOTGRAD_ISA
