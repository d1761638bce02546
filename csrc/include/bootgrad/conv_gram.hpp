// The Gram path ("ghost norm"): ‖G‖² = ⟨U Uᵀ, K⟩ over T×T with K = gyᵀ gy, and its derivatives.
//
// At stride 1 the patch Gram is a sum of shifted pixel Grams, (U Uᵀ)[t, t'] = Σ_k P[t + k, t' + k], and in a
// zero-padded plane a shift by k is an offset: row t of U Uᵀ is the sum of K vectors. So is a row of the adjoint's Q[p,
// p'] = Σ_k K[p − k, p' − k]. Columns are therefore numbered by their offset in a padded plane ("column of t"). At
// other strides positions are few against pixels, and U Uᵀ is formed from the patches.
//
//   ∂s/∂gy = 2 (U Uᵀ) gy        ∂s/∂x = 2 Q x        with a center: − 2 (center ∗ x), − 2 (its transpose on gy)
//
// All of these matrices are symmetric. Positions and pixels are cut into runs of neighbours, and only the blocks of two
// runs on and right of the diagonal are made; where a matrix is multiplied, the others are their transposes.

namespace bootgrad::BOOTGRAD_ISA {

template <class In>
struct ConvGram : ConvLayer<In> {
  using Layer = ConvLayer<In>;
  using Layer::call, Layer::plan, Layer::runtime, Layer::ld, Layer::ldc, Layer::x_size;
  using typename Layer::T;

  explicit ConvGram(const ConvCall& c) : Layer(c, true) {
    if (call.center) {
      const T* w = static_cast<const T*>(call.center);
      center_sq = dot(w, w, plan.O * plan.R);
    }
  }

  struct Memory {
    T *x, *gyt, *gyp;          // as in the direct path, for all samples of a group
    T *planes, *gplanes, *xt;  // [C, px + a vector], [O, ldt], [pixels, ldc]
    T *pixels, *uu, *k, *q;    // [pixels, ldp], [T, ldt], [T, ldk], [pixels, ldq]
    T *patches, *dgyt, *dxt;   // [R, ldt] or [T, ldc]; results of all samples of a group
    int64_t *column, *depth_c, *depth_o, *row_uu, *row_k, *row_q, *pixel;
    int64_t *run_t, *run_p;                  // [T], [pixels]: the first position or pixel of each one's run
    int64_t *rows, *phase_rows, *phase_out;  // positions and pixels of all samples of a group
    const T** sources;                       // [K]
  };

  void run() const {
    share(
        runtime, (plan.B + together - 1) / together, [&](Carver& c) { return lay_out(c); },
        [&](const Memory& m) { begin(m); },
        [&](int64_t task, const Memory& m) {
          const int64_t b0 = task * together, count = plan.B - b0 < together ? plan.B - b0 : together;
          if (call.center) center_products(b0, count, m);
          for (int64_t s = 0; s < count; ++s) sample(b0 + s, s, m);
        });
  }

 private:
  const bool grads = call.dx || call.dgy;
  const bool shifted = plan.pixel_gram;  // columns are offsets in a padded plane
  const bool rank1 = plan.channels_last && plan.T == 1;
  const int64_t n = kLanes<T>;
  const int64_t longest_run = 2 * n, slack = longest_run + n;
  const int64_t together = call.center ? ConvJvp<In>::samples_together(plan.T) : 1;
  const int64_t px = plan.channels_last ? round_up<T>(plan.T) : plan.x_plane;  // plane of `planes`
  const int64_t lead = shifted && plan.pixels > 0 ? plan.pixel[0] : 0;
  const int64_t span_x = shifted && plan.pixels > 0 ? plan.pixel[plan.pixels - 1] - lead + 1 : 0;
  const int64_t tap_max = plan.channels_last ? 0 : plan.R > 0 ? plan.tap[plan.K - 1] : 0;
  const int64_t span_t = !shifted || plan.channels_last || plan.T == 0 ? plan.T : plan.pos[plan.T - 1] + 1;
  const int64_t ldt = round_up<T>(span_t), ldp = round_up<T>(plan.x_plane) + n, ldq = round_up<T>(span_x);
  const int64_t ldk = shifted ? round_up<T>(tap_max + plan.x_plane) + 2 * n : ldt;
  double center_sq = 0;

  Memory lay_out(Carver& c) const {
    Memory m{};
    if (this->copy_x) m.x = c.take<T>(together * x_size);
    m.gyt = c.take<T>(this->gyt_size);
    m.dgyt = c.take<T>(plan.groups * together * plan.T * ld);
    m.dxt = c.take<T>(plan.groups * together * plan.pixels * ldc);
    if (call.dx && call.center) {
      m.gyp = c.take<T>(together * this->gy_size);
      m.phase_rows = c.take<int64_t>(together * plan.pixels);
      m.phase_out = c.take<int64_t>(together * plan.pixels);
    }
    m.rows = c.take<int64_t>(together * plan.T);
    if (call.dx) m.xt = c.take<T>(plan.pixels * ldc);
    if (rank1) return m;
    m.gplanes = c.take<T>(plan.O * ldt);
    m.uu = c.take<T>(plan.T * ldt + n);
    m.column = c.take<int64_t>(plan.T);
    m.depth_c = c.take<int64_t>(plan.Cg);
    m.depth_o = c.take<int64_t>(plan.Og);
    m.row_uu = c.take<int64_t>(plan.T);
    m.row_k = c.take<int64_t>(plan.T);
    m.row_q = c.take<int64_t>(plan.pixels > plan.T ? plan.pixels : plan.T);
    m.pixel = c.take<int64_t>(plan.pixels > plan.T ? plan.pixels : plan.T);
    if (grads) m.run_t = c.take<int64_t>(plan.T);
    if (call.dx && shifted) m.run_p = c.take<int64_t>(plan.pixels);
    m.sources = c.take<const T*>(plan.K);
    if (grads) m.k = c.take<T>(plan.T * ldk + n);
    if (shifted) {
      m.planes = c.take<T>(plan.C * px + n);
      m.pixels = c.take<T>(plan.pixels * ldp);
      if (call.dx) m.q = c.take<T>(plan.pixels * ldq + n);
    } else {
      m.patches = c.take<T>(plan.R * ldt > plan.T * ldc ? plan.R * ldt : plan.T * ldc);
    }
    return m;
  }

  void begin(const Memory& m) const {
    if (m.x) clear(m.x, together * x_size);
    if (m.gyp) clear(m.gyp, together * this->gy_size);
    clear(m.gyt, this->gyt_size);
    if (m.xt) clear(m.xt, plan.pixels * ldc);
    for (int64_t s = 0; s < together; ++s)
      for (int64_t t = 0; t < plan.T; ++t) m.rows[s * plan.T + t] = s * x_size + plan.pos[t];
    if (rank1) return;
    clear(m.gplanes, plan.O * ldt);
    if (m.k) clear(m.k, plan.T * ldk);
    for (int64_t t = 0; t < plan.T; ++t) {
      m.column[t] = shifted && !plan.channels_last ? plan.pos[t] : t;
      m.row_uu[t] = t * ldt, m.row_k[t] = t * ldk;
    }
    if (m.run_t) cut(plan.T, plan.P[2], m.run_t);
    if (m.run_p) cut(plan.pixels, plan.S[2], m.run_p);
    for (int64_t c = 0; c < plan.Cg; ++c) m.depth_c[c] = c * px;
    for (int64_t o = 0; o < plan.Og; ++o) m.depth_o[o] = o * ldt;
    if (!shifted) return;
    clear(m.planes, plan.C * px + n);
    clear(m.pixels, plan.pixels * ldp);
    for (int64_t p = 0; p < plan.pixels; ++p) m.row_q[p] = p * ldq, m.pixel[p] = plan.pixel[p] - lead;
  }

  // Runs of up to `longest_run` neighbours in rows of `row`.
  void cut(int64_t count, int64_t row, int64_t* begin) const {
    const int64_t pieces = (row + longest_run - 1) / longest_run, length = pieces > 0 ? (row + pieces - 1) / pieces : 1;
    for (int64_t i = 0; i < count; ++i) begin[i] = i - i % row % length;
  }

  // The blocks left of the diagonal, from those right of it; entry (i, j) is at i·ld + column[j]. Vectors may end in
  // columns of runs that follow, as long as these are not the diagonal's and so still to be written.
  static void mirror(T* matrix, int64_t ld, int64_t count, const int64_t* column, const int64_t* run) {
    const auto end_of = [&](int64_t i) {
      for (const int64_t begin = run[i]; i < count && run[i] == begin;) ++i;
      return i;
    };
    for (int64_t j = count > 0 ? end_of(0) : 0, j_end; j < count; j = j_end) {
      j_end = end_of(j);
      for (int64_t i = 0, i_end; i < j; i = i_end) {
        i_end = end_of(i);
        for (int64_t r = i; r < i_end; r += kLanes<T>)
          for (int64_t c = j; c < j_end; c += kLanes<T>)
            transpose_block(matrix + r * ld + column[c], ld, i_end - r, j_end - c, matrix + c * ld + column[r],
                            column[r] + kLanes<T> <= column[j]);
      }
    }
  }

  // out[c, r] = in[r, c] for up to a vector of rows and of columns.
  static void transpose_block(const T* in, int64_t ld, int64_t rows, int64_t columns, T* out, bool whole) {
    constexpr int64_t n = kLanes<T>;
    Vector<T> square[n];
#pragma GCC unroll 16
    for (int64_t i = 0; i < n; ++i) square[i] = load<T>(in + (i < rows ? i : rows - 1) * ld);
    transpose_square<T>(square);
#pragma GCC unroll 16
    for (int64_t i = 0; i < n; ++i) {
      if (i >= columns) continue;
      if (whole)
        store<T>(out + i * ld, square[i]);
      else
        store_some<T>(out + i * ld, square[i], rows < n ? rows : n);
    }
  }

  // −(center ∗ x) and, for dx, −(its transpose on gy) for `count` samples, where the results will be.
  void center_products(int64_t b0, int64_t count, const Memory& m) const {
    const T* x = this->copy_x ? m.x : this->padded_x(b0, nullptr);
    for (int64_t s = 0; s < count && this->copy_x; ++s) this->padded_x(b0 + s, m.x + s * x_size);
    for (int64_t g = 0; g < plan.groups; ++g)
      this->forward(count * plan.T, x + g * this->x_group(), m.rows, this->center_of(g),
                    m.dgyt + g * together * plan.T * ld, T(-1));
    if (!call.dx) return;
    const T* gy = this->copy_gy ? m.gyp : this->padded_gy(b0, nullptr);
    for (int64_t s = 0; s < count && this->copy_gy; ++s) this->padded_gy(b0 + s, m.gyp + s * this->gy_size);
    for (int64_t i = 0; i < plan.n_phases; ++i) {
      const Phase& phase = plan.phases[i];
      for (int64_t s = 0; s < count; ++s)
        for (int64_t p = 0; p < phase.pixels; ++p) {
          m.phase_rows[s * phase.pixels + p] = s * this->gy_size + phase.rows[p];
          m.phase_out[s * phase.pixels + p] = s * plan.pixels + phase.out[p];
        }
      for (int64_t g = 0; g < plan.groups; ++g)
        this->backward(phase, count * phase.pixels, gy + g * this->gy_group(), m.phase_rows, m.phase_out,
                       this->center_t + g * plan.K * plan.Og * ldc, m.dxt + g * together * plan.pixels * ldc, T(-1));
    }
  }

  void sample(int64_t b, int64_t s, const Memory& m) const {
    this->transposed_gy(b, m.gyt);
    if (!rank1) copy_planes(b, m);
    double norm = 0, inner = 0;
    for (int64_t g = 0; g < plan.groups; ++g) {
      const T* gyt = m.gyt + g * plan.T * ld;
      T* dgyt = m.dgyt + (g * together + s) * plan.T * ld;
      T* dxt = m.dxt + (g * together + s) * plan.pixels * ldc;
      if (call.center) inner -= dot(dgyt, gyt, plan.T * ld);
      if (call.dx) this->transposed_x(b, g, m.xt);
      norm += rank1 ? rank_one(b, m, dgyt, dxt) : grads ? with_gradients(b, g, m, gyt, dgyt, dxt) : norm_only(b, g, m);
      if (call.dgy) this->write_dgy(b, g, dgyt, this->twice);
      if (call.dx) this->write_dx(b, g, dxt, this->twice);
    }
    if (call.sq_norms) static_cast<T*>(call.sq_norms)[b] = not_negative(norm);
    if (call.deviation) static_cast<T*>(call.deviation)[b] = not_negative(norm - 2 * inner + center_sq);
    this->add_bias(b);
  }

  // What rounding leaves below zero is zero; NaN stays.
  static T not_negative(double v) { return v < 0 ? T(0) : static_cast<T>(v); }

  // Planes of x and gy whose columns are the Grams' columns.
  void copy_planes(int64_t b, const Memory& m) const {
    if (plan.channels_last) {
      transpose<T>(this->x_of(b), plan.C, plan.T, plan.C, m.planes, px, T(1));
      transpose<T>(this->gy_of(b), plan.O, plan.T, plan.O, m.gplanes, ldt, T(1));
      return;
    }
    if (shifted) {
      pad(this->x_of(b), plan.C, plan.S, m.planes, plan.xs, plan.padding);
    } else if (this->copy_x && !call.center) {
      this->padded_x(b, m.x);
    }
    const In* gy = this->gy_of(b);
    const int64_t row = plan.P[2], rows = plan.P[0] * plan.P[1];
    for (int64_t o = 0; o < plan.O; ++o)
      for (int64_t r = 0; r < rows; ++r, gy += row) copy_row(gy, m.gplanes + o * ldt + m.column[r * row], row);
  }

  // ‖x‖² ‖gy‖² and its derivatives.
  double rank_one(int64_t b, const Memory& m, T* dgyt, T* dxt) const {
    const double xx = dot(this->x_of(b), this->x_of(b), plan.C), gg = dot(m.gyt, m.gyt, ld);
    if (call.dgy) add_scaled(m.gyt, static_cast<T>(xx), dgyt, ld, call.center);
    if (call.dx) add_scaled(m.xt, static_cast<T>(gg), dxt, ldc, call.center);
    return xx * gg;
  }

  static void add_scaled(const T* from, T factor, T* out, int64_t count, bool add) {
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      const Vector<T> v = load<T>(from + i) * factor;
      store<T>(out + i, add ? load<T>(out + i) + v : v);
    }
  }

  // Half of each symmetric matrix is enough: entries right of the diagonal count twice.
  double norm_only(int64_t b, int64_t g, const Memory& m) const {
    patch_gram(b, g, m);
    for (int64_t t = 0; t < plan.T; ++t) {
      T* row = m.uu + t * ldt;
      clear(row, m.column[t]);
      for (int64_t i = m.column[t] + 1; i < ldt; ++i) row[i] += row[i];
    }
    Total<T> total;
    gemm<T>(plan.T, span_t, plan.Og, {gplane(g, m), m.column, m.depth_o}, gplane(g, m), ldt, Dot<T>{m.uu, ldt, &total},
            m.column, 0);
    return total.value();
  }

  const T* gplane(int64_t g, const Memory& m) const { return m.gplanes + g * plan.Og * ldt; }

  // uu[t, column of t'] = (U Uᵀ)[t, t'] right of the diagonal and, where derivatives are wanted, in t's run.
  void patch_gram(int64_t b, int64_t g, const Memory& m) const {
    if (!shifted) {
      const T* sample_x = this->copy_x ? m.x + b % together * x_size : this->padded_x(b, nullptr);
      const T* x = sample_x + g * this->x_group();
      for (int64_t r = 0; r < plan.R; ++r)
        for (int64_t t = 0; t < plan.T; ++t) m.patches[r * ldt + t] = x[plan.tap[r] + plan.pos[t]];
      for (int64_t r = 0; r < plan.R; ++r) clear(m.patches + r * ldt + plan.T, ldt - plan.T);
      gemm<T>(plan.T, plan.T, plan.R, {x, plan.pos, plan.tap}, m.patches, ldt,
              Store<T>{m.uu, ldt, ldt, T(1), false, nullptr}, m.column, grads ? slack : 0);
      return;
    }
    const T* x = m.planes + g * plan.Cg * px;
    gemm<T>(plan.pixels, span_x, plan.Cg, {x, plan.pixel, m.depth_c}, x + lead, px,
            Store<T>{m.pixels + lead, ldp, span_x, T(1), false, nullptr}, m.pixel, grads ? slack : n);
    for (int64_t t = 0; t < plan.T; ++t) {
      const int64_t from = m.column[grads ? m.run_t[t] : t] / n * n;
      int64_t count = 0;
      for (int64_t k = 0; k < plan.K; ++k) {
        const int64_t tap = plan.channels_last ? 0 : plan.tap[k], p = plan.at_pixel[m.column[t] + tap];
        if (p >= 0) m.sources[count++] = m.pixels + p * ldp + tap + from;
      }
      add_up<T>(m.sources, count, m.uu + t * ldt + from, ldt - from);
    }
  }

  double with_gradients(int64_t b, int64_t g, const Memory& m, const T* gyt, T* dgyt, T* dxt) const {
    patch_gram(b, g, m);
    const int64_t front = shifted ? tap_max : 0;
    gemm<T>(plan.T, span_t, plan.Og, {gplane(g, m), m.column, m.depth_o}, gplane(g, m), ldt,
            Store<T>{m.k + front, ldk, span_t, T(1), false, nullptr}, m.column, slack);
    double norm = 0;
    for (int64_t t = 0, end = 0; t < plan.T; ++t) {
      while (end < plan.T && m.run_t[end] == m.run_t[t]) ++end;
      const T *uu = m.uu + t * ldt, *k = m.k + t * ldk + front;
      const int64_t begin = m.column[m.run_t[t]], rest = end < plan.T ? m.column[end] : span_t;
      norm += dot(uu + begin, k + begin, rest - begin) + 2 * dot(uu + rest, k + rest, span_t - rest);
    }
    const bool add = call.center;
    if (call.dgy) {
      mirror(m.uu, ldt, plan.T, m.column, m.run_t);
      gemm<T>(plan.T, plan.Og, plan.T, {m.uu, m.row_uu, m.column}, gyt, ld, Store<T>{dgyt, ld, ld, T(1), add, nullptr});
    }
    if (!call.dx) return norm;
    if (shifted)
      gradient_of_x_shifted(m, dxt, add);
    else
      gradient_of_x_strided(m, dxt, add);
    return norm;
  }

  void gradient_of_x_shifted(const Memory& m, T* dxt, bool add) const {
    for (int64_t p = 0; p < plan.pixels; ++p) {
      int64_t count = 0;
      for (int64_t k = 0; k < plan.K; ++k) {
        const int64_t tap = plan.channels_last ? 0 : plan.tap[k], at = plan.pixel[p] - tap;
        const int64_t t = at < 0 ? -1 : plan.at_pos[at];
        if (t >= 0) m.sources[count++] = m.k + t * ldk + tap_max - tap + lead;
      }
      const int64_t from = m.pixel[m.run_p[p]] / n * n;
      for (int64_t k = 0; k < count; ++k) m.sources[k] += from;
      add_up<T>(m.sources, count, m.q + p * ldq + from, ldq - from);
    }
    mirror(m.q, ldq, plan.pixels, m.pixel, m.run_p);
    gemm<T>(plan.pixels, plan.Cg, plan.pixels, {m.q, m.row_q, m.pixel}, m.xt, ldc,
            Store<T>{dxt, ldc, ldc, T(1), add, nullptr});
  }

  // One kernel position after the other: dx[pixel of (t, k)] += Σ_t' K[t, t'] x[pixel of (t', k)].
  void gradient_of_x_strided(const Memory& m, T* dxt, bool add) const {
    mirror(m.k, ldk, plan.T, m.column, m.run_t);
    if (!add) clear(dxt, plan.pixels * ldc);
    for (int64_t k = 0; k < plan.K; ++k) {
      int64_t valid = 0;
      for (int64_t t = 0; t < plan.T; ++t) {
        const int64_t p = plan.at_pixel[plan.pos[t] + plan.tap[k]];
        if (p < 0) {
          clear(m.patches + t * ldc, ldc);
          continue;
        }
        copy_row(m.xt + p * ldc, m.patches + t * ldc, ldc);
        m.row_q[valid] = m.row_k[t], m.pixel[valid++] = p;
      }
      gemm<T>(valid, plan.Cg, plan.T, {m.k, m.row_q, m.column}, m.patches, ldc,
              Store<T>{dxt, ldc, ldc, T(1), true, m.pixel});
    }
  }
};

// Sums of squares of vectors: the whole norm where there is one position.
template <class In>
void rank1(const Runtime& runtime, const In* x, const In* gy, int64_t B, int64_t I, int64_t O, Compute<In>* out) {
  constexpr int64_t rows = 16;
  share(
      runtime, (B + rows - 1) / rows, [](Carver&) { return 0; }, [](int) {},
      [&](int64_t task, int) {
        for (int64_t b = task * rows; b < B && b < (task + 1) * rows; ++b)
          out[b] = static_cast<Compute<In>>(dot(x + b * I, x + b * I, I) * dot(gy + b * O, gy + b * O, O));
      });
}

}  // namespace bootgrad::BOOTGRAD_ISA
