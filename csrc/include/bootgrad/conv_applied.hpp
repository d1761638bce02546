// Per-sample gradients times another input: dgy = G_i ∗ h_i for h as x, or dx = G_iᵀ ∗ h_i for h as gy.
//
//   direct   G_i is formed, then multiplied, as in the direct path of the norms
//   Gram     W[t, t'] = ⟨u_t, u'_t'⟩, patches of x and of h:    G_i ∗ h [t', o]  = Σ_t W[t, t'] gy[t, o]
//            K[t, t'] = ⟨gy_t, h_t'⟩:                            G_iᵀ ∗ h [q, c] = Σ_p Q[p, q] x[p, c]
//
// with Q[p, q] = Σ_k K[p − k, q − k]. Both matrices are made as the Gram path's, of which they are the forms without
// symmetry: columns are numbered by their offset in a padded plane where the stride is 1, and by t' elsewhere.

namespace bootgrad::BOOTGRAD_ISA {

// keep = center + factor · C, all [rows, ld].
template <class T>
struct Displace {
  T* keep;
  const T* center;
  int64_t ld;
  T factor;

  template <int MR, int NV>
  BOOTGRAD_INLINE void finish(int64_t m0, int64_t mr, int64_t n0, Vector<T> (&acc)[MR][NV]) const {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      if (i < mr)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
          const int64_t at = (m0 + i) * ld + n0 + j * kLanes<T>;
          store<T>(keep + at, load<T>(center + at) + factor * acc[i][j]);
        }
    }
  }
};

template <class In>
struct ConvApplied : ConvLayer<In> {
  using Layer = ConvLayer<In>;
  using Layer::call, Layer::plan, Layer::runtime, Layer::ld, Layer::ldc;
  using typename Layer::T;

  explicit ConvApplied(const ConvCall& c) : Layer(c, true) {}

  struct Memory {
    T *x, *gyt, *h, *out;  // [C, x_plane], [groups, T, ld], planes of h, [T, ld] or [pixels, ldc]
    T *keep, *keep_t;      // direct: [R, ld], [K, Og, ldc]
    T *xt, *inner, *wide;  // Gram: [pixels, ldc], [pixels, ldp] or [T, ldk], [T, ldt] or [pixels, ldq]
    T* patches;            // Gram, other strides: [R, ldt] or [T, ldc]
    int64_t *column, *depth, *row_g, *row_inner, *row_wide, *row_x, *place;
    const T** sources;  // [K]
  };

  void run() const {
    share(
        runtime, plan.B, [&](Carver& c) { return lay_out(c); }, [&](const Memory& m) { begin(m); },
        [&](int64_t b, const Memory& m) {
          const T* x = this->padded_x(b, m.x);
          this->transposed_gy(b, m.gyt);
          copy_h(b, m);
          for (int64_t g = 0; g < plan.groups; ++g) {
            const T* gyt = m.gyt + g * plan.T * ld;
            if (!call.gram)
              direct(g, x + g * this->x_group(), gyt, m);
            else if (call.dgy)
              gram_output(g, x + g * this->x_group(), gyt, m);
            else
              gram_input(b, g, gyt, m);
            if (call.shift) add_shift(b, g, m);
            if (call.dgy)
              this->write_dgy(b, g, m.out, T(1));
            else
              this->write_dx(b, g, m.out, T(1));
          }
        });
  }

 private:
  const bool shifted = plan.pixel_gram;
  const bool columns_of_h = call.gram && call.dx;  // gy's planes of h have the Gram's columns
  const int64_t n = kLanes<T>;
  const int64_t lead = shifted && call.gram && plan.pixels > 0 ? plan.pixel[0] : 0;
  const int64_t span_x = shifted && call.gram && plan.pixels > 0 ? plan.pixel[plan.pixels - 1] - lead + 1 : 0;
  const int64_t span_t = shifted && plan.T > 0 ? plan.pos[plan.T - 1] + 1 : plan.T;
  const int64_t tap_max = plan.R > 0 ? plan.tap[plan.K - 1] : 0;
  const int64_t ldt = round_up<T>(span_t), ldp = round_up<T>(plan.x_plane) + n, ldq = round_up<T>(span_x);
  const int64_t ldk = shifted ? round_up<T>(tap_max + plan.x_plane) + 2 * n : ldt;
  const int64_t h_size = call.dgy ? plan.C * plan.x_plane + n : columns_of_h ? plan.O * ldt : plan.O * plan.g_plane;

  Memory lay_out(Carver& c) const {
    Memory m{};
    if (this->copy_x) m.x = c.take<T>(this->x_size);
    m.gyt = c.take<T>(this->gyt_size);
    m.h = c.take<T>(h_size);
    m.out = c.take<T>(call.dgy ? plan.T * ld : plan.pixels * ldc);
    if (!call.gram) {
      m.keep = c.take<T>(plan.R * ld);
      if (call.dx) m.keep_t = c.take<T>(plan.K * plan.Og * ldc);
      return m;
    }
    const int64_t most = plan.pixels > plan.T ? plan.pixels : plan.T;
    m.column = c.take<int64_t>(plan.T);
    m.depth = c.take<int64_t>(plan.Cg > plan.Og ? plan.Cg : plan.Og);
    m.row_g = c.take<int64_t>(plan.T);
    m.row_inner = c.take<int64_t>(most);
    m.row_wide = c.take<int64_t>(most);
    m.row_x = c.take<int64_t>(plan.pixels);
    m.place = c.take<int64_t>(most);
    m.sources = c.take<const T*>(plan.K);
    if (call.dx) {
      m.xt = c.take<T>(plan.pixels * ldc);
      m.inner = c.take<T>(plan.T * ldk);
      if (shifted)
        m.wide = c.take<T>(plan.pixels * ldq);
      else
        m.patches = c.take<T>(plan.T * ldc);
    } else {
      m.wide = c.take<T>(plan.T * ldt);
      if (shifted)
        m.inner = c.take<T>(plan.pixels * ldp);
      else
        m.patches = c.take<T>(plan.R * ldt);
    }
    return m;
  }

  void begin(const Memory& m) const {
    if (m.x) clear(m.x, this->x_size);
    if (ld != plan.Og) clear(m.gyt, this->gyt_size);
    clear(m.h, h_size);
    if (m.keep_t && ldc != plan.Cg) clear(m.keep_t, plan.K * plan.Og * ldc);
    if (!call.gram) return;
    if (m.xt) clear(m.xt, plan.pixels * ldc);
    if (m.inner) clear(m.inner, call.dx ? plan.T * ldk : plan.pixels * ldp);
    if (m.patches && call.dgy) clear(m.patches, plan.R * ldt);
    for (int64_t t = 0; t < plan.T; ++t) {
      m.column[t] = shifted ? plan.pos[t] : t;
      m.row_g[t] = t * ld;
      m.row_inner[t] = t * ldk;
      m.row_wide[t] = t * ldt;
    }
    if (call.dgy)
      for (int64_t c = 0; c < plan.Cg; ++c) m.depth[c] = c * plan.x_plane;
    else
      for (int64_t o = 0; o < plan.Og; ++o) m.depth[o] = o;
    if (!shifted) return;
    for (int64_t p = 0; p < plan.pixels; ++p) {
      m.row_x[p] = plan.pixel[p] - lead;
      if (call.dx) m.row_wide[p] = p * ldq;
    }
  }

  // h in planes with the margins of x, with those of gy, or with the columns of K.
  void copy_h(int64_t b, const Memory& m) const {
    const In* h = static_cast<const In*>(call.h) + b * (call.dgy ? plan.C * plan.pixels : plan.O * plan.T);
    if (call.dgy) return pad(h, plan.C, plan.S, m.h, plan.xs, plan.padding);
    if (!columns_of_h) return pad(h, plan.O, plan.P, m.h, plan.gs, plan.glow);
    const int64_t row = plan.P[2], rows = plan.P[0] * plan.P[1];
    for (int64_t o = 0; o < plan.O; ++o)
      for (int64_t r = 0; r < rows; ++r, h += row) copy_row(h, m.h + o * ldt + m.column[r * row], row);
  }

  void direct(int64_t g, const T* x, const T* gyt, const Memory& m) const {
    const Gathered<T> patches{x, plan.tap, plan.pos};
    if (this->center)
      gemm<T>(plan.R, plan.Og, plan.T, patches, gyt, ld,
              Displace<T>{m.keep, this->center_of(g), ld, static_cast<T>(call.factor)});
    else
      gemm<T>(plan.R, plan.Og, plan.T, patches, gyt, ld, Store<T>{m.keep, ld, ld, T(1), false, nullptr});
    if (call.dgy) return this->forward(plan.T, m.h + g * this->x_group(), plan.pos, m.keep, m.out, T(1));
    this->transpose_weights(m.keep, m.keep_t);
    for (int64_t i = 0; i < plan.n_phases; ++i) {
      const Phase& phase = plan.phases[i];
      this->backward(phase, phase.pixels, m.h + g * this->gy_group(), phase.rows, phase.out, m.keep_t, m.out, T(1));
    }
  }

  void add_shift(int64_t b, int64_t g, const Memory& m) const {
    const T* shift = static_cast<const T*>(call.shift) + b * plan.O + g * plan.Og;
    for (int64_t t = 0; t < plan.T; ++t)
      for (int64_t o = 0; o < plan.Og; ++o) m.out[t * ld + o] += shift[o];
  }

  void gram_output(int64_t g, const T* x, const T* gyt, const Memory& m) const {
    const T* h = m.h + g * this->x_group();
    if (shifted) {
      gemm<T>(plan.pixels, span_x, plan.Cg, {x, plan.pixel, m.depth}, h + lead, plan.x_plane,
              Store<T>{m.inner + lead, ldp, span_x, T(1), false, nullptr});
      for (int64_t t = 0; t < plan.T; ++t) {
        int64_t count = 0;
        for (int64_t k = 0; k < plan.K; ++k) {
          const int64_t p = plan.at_pixel[plan.pos[t] + plan.tap[k]];
          if (p >= 0) m.sources[count++] = m.inner + p * ldp + plan.tap[k];
        }
        add_up<T>(m.sources, count, m.wide + t * ldt, ldt);
      }
    } else {
      for (int64_t r = 0; r < plan.R; ++r)
        for (int64_t t = 0; t < plan.T; ++t) m.patches[r * ldt + t] = h[plan.tap[r] + plan.pos[t]];
      gemm<T>(plan.T, plan.T, plan.R, {x, plan.pos, plan.tap}, m.patches, ldt,
              Store<T>{m.wide, ldt, ldt, T(1), false, nullptr});
    }
    gemm<T>(plan.T, plan.Og, plan.T, {m.wide, m.column, m.row_wide}, gyt, ld,
            Store<T>{m.out, ld, ld, T(1), false, nullptr});
  }

  void gram_input(int64_t b, int64_t g, const T* gyt, const Memory& m) const {
    const int64_t front = shifted ? tap_max : 0;
    this->transposed_x(b, g, m.xt);
    gemm<T>(plan.T, span_t, plan.Og, {gyt, m.row_g, m.depth}, m.h + g * plan.Og * ldt, ldt,
            Store<T>{m.inner + front, ldk, span_t, T(1), false, nullptr});
    if (!shifted) return gram_input_strided(m);
    for (int64_t p = 0; p < plan.pixels; ++p) {
      int64_t count = 0;
      for (int64_t k = 0; k < plan.K; ++k) {
        const int64_t at = plan.pixel[p] - plan.tap[k], t = at < 0 ? -1 : plan.at_pos[at];
        if (t >= 0) m.sources[count++] = m.inner + t * ldk + tap_max - plan.tap[k] + lead;
      }
      add_up<T>(m.sources, count, m.wide + p * ldq, ldq);
    }
    gemm<T>(plan.pixels, plan.Cg, plan.pixels, {m.wide, m.row_x, m.row_wide}, m.xt, ldc,
            Store<T>{m.out, ldc, ldc, T(1), false, nullptr});
  }

  // One kernel position after the other: out[pixel of (t', k)] += Σ_t K[t, t'] x[pixel of (t, k)].
  void gram_input_strided(const Memory& m) const {
    clear(m.out, plan.pixels * ldc);
    for (int64_t k = 0; k < plan.K; ++k) {
      int64_t valid = 0;
      for (int64_t t = 0; t < plan.T; ++t) {
        const int64_t p = plan.at_pixel[plan.pos[t] + plan.tap[k]];
        if (p < 0) {
          clear(m.patches + t * ldc, ldc);
          continue;
        }
        copy_row(m.xt + p * ldc, m.patches + t * ldc, ldc);
        m.row_wide[valid] = t, m.place[valid++] = p;
      }
      gemm<T>(valid, plan.Cg, plan.T, {m.inner, m.row_wide, m.row_inner}, m.patches, ldc,
              Store<T>{m.out, ldc, ldc, T(1), true, m.place});
    }
  }
};

}  // namespace bootgrad::BOOTGRAD_ISA
