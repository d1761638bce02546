// The two products over whole batches: Σ_i w_i G_i, a layer, and ⟨G_i, v⟩, a number per sample.

namespace bootgrad::BOOTGRAD_ISA {

// Adds up the partial sums over blocks of samples, and turns [groups, R, ld] into the layout of the weights.
template <class In>
void combine_groups(const ConvLayer<In>& layer, const Compute<In>* partial, int64_t blocks) {
  using T = Compute<In>;
  const ConvPlan& plan = layer.plan;
  for (int64_t g = 0; g < plan.groups; ++g)
    combine<T>(layer.runtime, partial + g * plan.R * layer.ld, blocks, layer.weights, plan.R, plan.Og, layer.ld,
               static_cast<T*>(layer.call.sum) + g * plan.Og * plan.R);
}

// A task's samples come in bundles that are packed together: so many that the micro-kernel's sums are long, or that a
// tile of the weights is used often while it is in cache, and so few that the bundle stays in cache itself.
template <class In>
struct ConvSum : ConvLayer<In> {
  using Layer = ConvLayer<In>;
  using Layer::call, Layer::plan, Layer::runtime, Layer::ld, Layer::weights, Layer::x_size;
  using typename Layer::T;

  ConvSum(const ConvCall& c, bool with_center)
      : Layer(c, with_center), division(divide<T>(plan.B, plan.T, plan.groups, weights, ld)) {
    const int64_t bytes = (x_size + this->gyt_size) * static_cast<int64_t>(sizeof(T));
    together = plan.T > 0 && plan.T < 256 ? 256 / plan.T : 1;
    while (together > 1 && together * bytes > (int64_t{1} << 19)) together /= 2;
    stride = together * plan.T * ld;
  }

  struct Memory {
    T *x, *gyt;      // [together, x], [groups, together, T, ld]
    int64_t* depth;  // [together, T]
    Total<T>*plain, *deviation;
  };

  // Samples b0 … b0 + count − 1 and the columns first … last − 1 of the weights, whose sum is at `partial`.
  struct Bundle {
    int64_t b0, count, first, last, column_part;
    const T* x;
    T* partial;
    bool fresh;  // nothing has been added yet
  };

  const Division division;
  int64_t together, stride;

  // Calls body(bundle, memory) for each bundle of each task, and adds up the partial sums.
  template <class Body>
  void each_bundle(T* partial, const Body& body) const {
    share(
        runtime, division.blocks * division.parts, [&](Carver& c) { return lay_out(c); },
        [&](const Memory& m) { begin(m); },
        [&](int64_t task, const Memory& m) {
          const Range range = part(plan.B, division.blocks, task / division.parts);
          const Range vectors = part(ld / kLanes<T>, division.parts, task % division.parts);
          const int64_t first = vectors.begin * kLanes<T>, last = vectors.end * kLanes<T>;
          for (int64_t b0 = range.begin; b0 < range.end; b0 += together) {
            const int64_t count = range.end - b0 < together ? range.end - b0 : together;
            const T* x = pack(b0, count, first, last < plan.Og ? last : plan.Og, m);
            body(Bundle{b0, count, first, last, task % division.parts, x, partial + task / division.parts * weights,
                        b0 == range.begin},
                 m);
          }
        });
    if (call.sum) combine_groups(*this, partial, division.blocks);
  }

  T* partial_sums() const {
    return static_cast<T*>(runtime.scratch(kSharedScratch, static_cast<size_t>(division.blocks * weights) * sizeof(T)));
  }

 private:
  Memory lay_out(Carver& c) const {
    Memory m{};
    if (this->copy_x) m.x = c.take<T>(together * x_size);
    m.gyt = c.take<T>(plan.groups * stride);
    m.depth = c.take<int64_t>(together * plan.T);
    m.plain = c.take<Total<T>>(together);
    m.deviation = c.take<Total<T>>(together);
    return m;
  }

  void begin(const Memory& m) const {
    if (m.x) clear(m.x, together * x_size);
    if (ld != plan.Og) clear(m.gyt, plan.groups * stride);
    for (int64_t s = 0; s < together; ++s)
      for (int64_t t = 0; t < plan.T; ++t) m.depth[s * plan.T + t] = s * x_size + plan.pos[t];
  }

  const T* pack(int64_t b0, int64_t count, int64_t first, int64_t end, const Memory& m) const {
    const T* w = static_cast<const T*>(call.w);
    for (int64_t s = 0; s < count; ++s) {
      if (this->copy_x) this->padded_x(b0 + s, m.x + s * x_size);
      T* gyt = m.gyt + s * plan.T * ld;
      this->transposed_gy(b0 + s, gyt, stride, w ? w[b0 + s] : T(1), first, end);
      if (call.bias) this->sum_positions(b0 + s, gyt, stride, first, end);
    }
    return this->copy_x ? m.x : this->padded_x(b0, nullptr);
  }
};

// Σ_i w_i G_i: one product over samples and positions.
template <class In>
struct ConvWeightedSum : ConvSum<In> {
  using typename ConvSum<In>::T;
  using typename ConvSum<In>::Memory;
  using typename ConvSum<In>::Bundle;

  explicit ConvWeightedSum(const ConvCall& c) : ConvSum<In>(c, false) {}

  void run() const {
    const ConvPlan& plan = this->plan;
    const int64_t ld = this->ld;
    this->each_bundle(this->partial_sums(), [&](const Bundle& u, const Memory& m) {
      const int64_t columns = u.last - u.first;
      for (int64_t g = 0; g < plan.groups; ++g)
        gemm<T>(plan.R, columns, u.count * plan.T, {u.x + g * this->x_group(), plan.tap, m.depth},
                m.gyt + g * this->stride + u.first, ld,
                Store<T>{u.partial + g * plan.R * ld + u.first, ld, columns, T(1), !u.fresh, nullptr});
    });
  }
};

// Σ_i G_i with every sample's ‖G_i‖² and ‖G_i − center‖², by the direct path. A block of rows and columns of the
// weights, small enough for the first cache, takes all samples of a bundle before the next.
template <class In>
struct ConvStatistics : ConvSum<In> {
  using typename ConvSum<In>::T;
  using typename ConvSum<In>::Memory;
  using typename ConvSum<In>::Bundle;
  using ConvSum<In>::call, ConvSum<In>::plan, ConvSum<In>::runtime, ConvSum<In>::ld;

  explicit ConvStatistics(const ConvCall& c) : ConvSum<In>(c, true) {}

  void run() const {
    // The partial sums, and behind them each part's share of the norms.
    const int64_t sums = this->division.blocks * this->weights, norms = this->division.parts * plan.B;
    Carver carver{0};
    carver.take<T>(sums), carver.take<double>(2 * norms);
    carver = {reinterpret_cast<uintptr_t>(runtime.scratch(kSharedScratch, carver.used))};
    T* partial = carver.take<T>(sums);
    double* shares = carver.take<double>(2 * norms);
    this->each_bundle(partial, [&](const Bundle& u, const Memory& m) {
      products(u, m);
      for (int64_t s = 0; s < u.count; ++s) {
        double* share = shares + u.column_part * plan.B + u.b0 + s;
        share[0] = m.plain[s].value(), share[norms] = m.deviation[s].value();
      }
    });
    if (call.sq_norms) add_shares(shares, static_cast<T*>(call.sq_norms));
    if (call.deviation) add_shares(shares + norms, static_cast<T*>(call.deviation));
  }

 private:
  void add_shares(const double* shares, T* out) const {
    for (int64_t b = 0; b < plan.B; ++b) {
      double total = 0;
      for (int64_t p = 0; p < this->division.parts; ++p) total += shares[p * plan.B + b];
      out[b] = static_cast<T>(total);
    }
  }

  void products(const Bundle& u, const Memory& m) const {
    const int64_t columns = u.count > 1 ? 4 * kLanes<T> : u.last - u.first, rows = u.count > 1 ? 72 : plan.R;
    for (int64_t s = 0; s < u.count; ++s) m.plain[s] = m.deviation[s] = Total<T>{};
    for (int64_t g = 0; g < plan.groups; ++g)
      for (int64_t n0 = u.first; n0 < u.last; n0 += columns)
        for (int64_t m0 = 0; m0 < plan.R; m0 += rows) {
          const int64_t wide = u.last - n0 < columns ? u.last - n0 : columns;
          const int64_t high = plan.R - m0 < rows ? plan.R - m0 : rows, at = (g * plan.R + m0) * ld + n0;
          for (int64_t s = 0; s < u.count; ++s)
            gemm<T>(high, wide, plan.T, {u.x + s * this->x_size + g * this->x_group(), plan.tap + m0, plan.pos},
                    m.gyt + g * this->stride + s * plan.T * ld + n0, ld,
                    Norms<T>{ld, this->center ? this->center + at : nullptr, u.partial + at, u.fresh && s == 0, nullptr,
                             &m.plain[s], &m.deviation[s]});
        }
  }
};

// ⟨G_i, v⟩ = Σ_{t,o} gy[t, o] · (v ∗ x)[t, o]; v is the call's center. Small samples are convolved together, so that
// the weights are read once for many positions.
template <class In>
struct ConvJvp : ConvLayer<In> {
  using Layer = ConvLayer<In>;
  using Layer::call, Layer::plan, Layer::runtime, Layer::ld, Layer::x_size;
  using typename Layer::T;

  explicit ConvJvp(const ConvCall& c) : Layer(c, true), together(samples_together(c.plan->T)) {}

  static int64_t samples_together(int64_t positions) {
    return positions >= 32 ? 1 : 32 / (positions > 0 ? positions : 1);
  }

  struct Memory {
    T *x, *gyt, *y;
    int64_t* rows;
  };

  void run() const {
    share(
        runtime, (plan.B + together - 1) / together,
        [&](Carver& c) {
          Memory m{};
          if (this->copy_x) m.x = c.take<T>(together * x_size);
          m.gyt = c.take<T>(this->gyt_size);
          m.y = c.take<T>(plan.groups * together * plan.T * ld);
          m.rows = c.take<int64_t>(together * plan.T);
          return m;
        },
        [&](const Memory& m) {
          if (m.x) clear(m.x, together * x_size);
          if (ld != plan.Og) clear(m.gyt, this->gyt_size);
          for (int64_t s = 0; s < together; ++s)
            for (int64_t t = 0; t < plan.T; ++t) m.rows[s * plan.T + t] = s * x_size + plan.pos[t];
        },
        [&](int64_t task, const Memory& m) { samples(task * together, m); });
  }

 private:
  const int64_t together;

  void samples(int64_t b0, const Memory& m) const {
    const int64_t count = plan.B - b0 < together ? plan.B - b0 : together, size = plan.T * ld;
    const T* x = this->copy_x ? m.x : this->padded_x(b0, nullptr);
    for (int64_t s = 0; s < count && this->copy_x; ++s) this->padded_x(b0 + s, m.x + s * x_size);
    for (int64_t g = 0; g < plan.groups; ++g)
      this->forward(count * plan.T, x + g * this->x_group(), m.rows, this->center_of(g), m.y + g * together * size,
                    T(1));
    for (int64_t s = 0; s < count; ++s) {
      this->transposed_gy(b0 + s, m.gyt);
      double total = 0;
      for (int64_t g = 0; g < plan.groups; ++g) total += dot(m.y + (g * together + s) * size, m.gyt + g * size, size);
      static_cast<T*>(call.inner)[b0 + s] = static_cast<T>(total);
    }
  }
};

}  // namespace bootgrad::BOOTGRAD_ISA
