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
      for (int64_t g = 0; g < plan.groups && call.bias && !call.biased; ++g)
        this->sum_positions(gyt + g * stride + first, ld, end - first,
                            static_cast<T*>(call.bias) + (b0 + s) * plan.O + g * plan.Og + first);
    }
    return this->copy_x ? m.x : this->padded_x(b0, nullptr);
  }
};

// For each kernel position the output positions at which it meets a pixel and not the margin: in small maps a fifth to
// a third of the products are with zeros.
template <class T>
struct Taps {
  int64_t *rows, *place;         // [K, Cg] offset of (c, k) in a group's padded x; its row in the weights
  int64_t *count, *depth, *row;  // [K]; [K, samples·T] offsets of the positions in x and of their rows in gyt

  static Taps take(Carver& c, const ConvPlan& plan, int64_t samples) {
    return {c.take<int64_t>(plan.R), c.take<int64_t>(plan.R), c.take<int64_t>(plan.K),
            c.take<int64_t>(plan.K * samples * plan.T), c.take<int64_t>(plan.K * samples * plan.T)};
  }

  static int64_t bytes(const ConvPlan& plan, int64_t samples) {
    return 2 * plan.K * samples * plan.T * static_cast<int64_t>(sizeof(int64_t));
  }

  // Products that are not with margins, in hundredths.
  static int64_t percentage(const ConvPlan& plan) {
    int64_t met = 100;
    for (int d = 0; d < 3; ++d) {
      int64_t pairs = 0;
      for (int64_t k = 0; k < plan.kernel[d]; ++k)
        for (int64_t i = 0; i < plan.P[d]; ++i) pairs += meets(plan, d, i, k);
      if (plan.P[d] > 0) met = met * pairs / (plan.kernel[d] * plan.P[d]);
    }
    return met;
  }

  void fill(const ConvPlan& plan, int64_t samples, int64_t x_size, int64_t ld) const {
    for (int64_t k = 0; k < plan.K; ++k) {
      for (int64_t c = 0; c < plan.Cg; ++c)
        rows[k * plan.Cg + c] = plan.tap[c * plan.K + k], place[k * plan.Cg + c] = c * plan.K + k;
      const int64_t at[3] = {k / (plan.kernel[1] * plan.kernel[2]), k / plan.kernel[2] % plan.kernel[1],
                             k % plan.kernel[2]};
      int64_t *to_depth = depth + k * samples * plan.T, *to_row = row + k * samples * plan.T, n = 0;
      for (int64_t i = 0; i < plan.P[0]; ++i)
        for (int64_t j = 0; j < plan.P[1] && meets(plan, 0, i, at[0]); ++j)
          for (int64_t l = 0; l < plan.P[2] && meets(plan, 1, j, at[1]); ++l)
            if (meets(plan, 2, l, at[2])) {
              const int64_t t = (i * plan.P[1] + j) * plan.P[2] + l;
              to_depth[n] = plan.pos[t], to_row[n++] = t * ld;
            }
      count[k] = n;
      for (int64_t s = 1; s < samples; ++s)
        for (int64_t m = 0; m < n; ++m)
          to_depth[s * n + m] = s * x_size + to_depth[m], to_row[s * n + m] = s * plan.T * ld + to_row[m];
    }
  }

  // Channels c0 … c0 + channels − 1 of the sum over samples: all rows of the weights that they have.
  void products(const ConvPlan& plan, int64_t most, int64_t samples, int64_t c0, int64_t channels, int64_t columns,
                const T* x, const T* gyt, T* sum, int64_t ld, bool add) const {
    for (int64_t k = 0; k < plan.K; ++k) {
      const int64_t at = k * most * plan.T, first = k * plan.Cg + c0;
      gemm_of<T>(channels, columns, samples * count[k], GatheredBoth<T>{{x, rows + first, depth + at}, row + at}, gyt,
                 0, Store<T>{sum, ld, columns, T(1), add, place + first});
    }
  }

 private:
  static bool meets(const ConvPlan& plan, int d, int64_t position, int64_t k) {
    const int64_t s = position * plan.stride[d] + k * plan.dilation[d] - plan.padding[d];
    return plan.channels_last || (s >= 0 && s < plan.S[d]);
  }
};

// Σ_i w_i G_i: one product over samples and positions.
template <class In>
struct ConvWeightedSum : ConvSum<In> {
  using typename ConvSum<In>::T;
  using typename ConvSum<In>::Memory;
  using typename ConvSum<In>::Bundle;
  using ConvSum<In>::plan, ConvSum<In>::runtime, ConvSum<In>::ld, ConvSum<In>::x_size, ConvSum<In>::weights,
      ConvSum<In>::together;

  explicit ConvWeightedSum(const ConvCall& c) : ConvSum<In>(c, false) {}

  void run() const {
    const bool listed = Taps<T>::bytes(plan, 1) <= int64_t{1} << 24;
    if (weights * static_cast<int64_t>(sizeof(T)) > (int64_t{1} << 19) && plan.T > 0 && plan.B > 0 && listed)
      by_panels();
    else
      by_bundles();
  }

 private:
  // Weights that stay in cache: every task has a sum of its own.
  void by_bundles() const {
    const bool skip =
        plan.Cg >= 32 && Taps<T>::bytes(plan, together) < int64_t{1} << 19 && Taps<T>::percentage(plan) < 93;
    Carver carver{0};
    for (int round = 0;; ++round) {
      T* partial = carver.take<T>(this->division.blocks * weights);
      const Taps<T> taps = skip ? Taps<T>::take(carver, plan, together) : Taps<T>{};
      if (round == 0) {
        carver = {reinterpret_cast<uintptr_t>(runtime.scratch(kSharedScratch, carver.used))};
        continue;
      }
      if (skip) taps.fill(plan, together, x_size, ld);
      return this->each_bundle(partial,
                               [&](const Bundle& u, const Memory& m) { bundle(u, m, skip ? &taps : nullptr); });
    }
  }

  void bundle(const Bundle& u, const Memory& m, const Taps<T>* taps) const {
    const int64_t columns = u.last - u.first;
    for (int64_t g = 0; g < plan.groups; ++g) {
      const T *x = u.x + g * this->x_group(), *gyt = m.gyt + g * this->stride + u.first;
      T* sum = u.partial + g * plan.R * ld + u.first;
      if (taps)
        taps->products(plan, together, u.count, 0, plan.Cg, columns, x, gyt, sum, ld, !u.fresh);
      else
        gemm<T>(plan.R, columns, u.count * plan.T, {x, plan.tap, m.depth}, gyt, ld,
                Store<T>{sum, ld, columns, T(1), !u.fresh, nullptr});
    }
  }

  // Weights beyond that: operands of many samples are packed by all threads, gy as panels of columns, and a task makes
  // a block of the weights from all of them, so that the weights pass through memory once and not once per bundle.
  void by_panels() const {
    const int64_t vectors = ld / kLanes<T>, panels = (vectors + kMaxVectors - 1) / kMaxVectors;
    const int64_t width = (vectors + panels - 1) / panels * kLanes<T>;
    const int64_t gy_size = plan.groups * panels * plan.T * width, copied = this->copy_x ? x_size : 0;
    const int64_t sample = (copied + gy_size) * static_cast<int64_t>(sizeof(T)), limit = int64_t{1} << 24;
    int64_t chunk = plan.T < 1024 ? 1024 / plan.T : 1;  // samples whose panel stays in cache
    while (chunk > 1 && (chunk * sample > limit || Taps<T>::bytes(plan, chunk) > limit)) chunk /= 2;
    const int64_t fit = limit / sample;
    const int64_t most = plan.B < chunk ? plan.B : chunk;
    int64_t packed = fit / chunk * chunk;
    if (packed < most) packed = most;
    if (packed > plan.B) packed = plan.B;
    int64_t channels = 48;  // a whole number of tiles
    while (channels > 12 && plan.groups * panels * ((plan.Cg + channels - 1) / channels) < 32) channels /= 2;
    const int64_t blocks = (plan.Cg + channels - 1) / channels;
    Carver carver{0};
    for (int round = 0;; ++round) {
      T *sum = carver.take<T>(weights), *x = carver.take<T>(packed * copied), *gyt = carver.take<T>(packed * gy_size);
      const Taps<T> taps = Taps<T>::take(carver, plan, most);
      if (round == 0) {
        carver = {reinterpret_cast<uintptr_t>(runtime.scratch(kSharedScratch, carver.used))};
        continue;
      }
      taps.fill(plan, most, x_size, width);
      const auto nothing = [](Carver&) { return 0; };
      const auto no_start = [](int) {};
      for (int64_t b0 = 0; b0 < plan.B; b0 += packed) {
        const int64_t count = plan.B - b0 < packed ? plan.B - b0 : packed;
        share(runtime, count, nothing, no_start,
              [&](int64_t s, int) { pack_panels(b0 + s, x + s * copied, gyt, s, packed, panels, width); });
        share(runtime, plan.groups * panels * blocks, nothing, no_start, [&](int64_t task, int) {
          const int64_t block = task % blocks, panel = task / blocks % panels, g = task / blocks / panels;
          const int64_t c0 = block * channels, o0 = panel * width;
          const int64_t high = plan.Cg - c0 < channels ? plan.Cg - c0 : channels;
          const int64_t wide = plan.Og - o0 < width ? plan.Og - o0 : width;
          const T* panel_gyt = gyt + (g * panels + panel) * packed * plan.T * width;
          for (int64_t s = 0; s < count; s += most) {
            const T* from = this->copy_x ? x + s * x_size : this->padded_x(b0 + s, nullptr);
            taps.products(plan, most, count - s < most ? count - s : most, c0, high, round_up<T>(wide),
                          from + g * this->x_group(), panel_gyt + s * plan.T * width, sum + g * plan.R * ld + o0, ld,
                          b0 + s > 0);
          }
        });
      }
      if (this->call.sum) combine_groups(*this, sum, 1);
      return;
    }
  }

  // Sample b's planes, margins unwritten, and its gy, w_b times, in place `s` of every panel.
  void pack_panels(int64_t b, T* x, T* gyt, int64_t s, int64_t packed, int64_t panels, int64_t width) const {
    if (this->copy_x) this->padded_x(b, x);
    const T* w = static_cast<const T*>(this->call.w);
    const T factor = w ? w[b] : T(1);
    for (int64_t g = 0; g < plan.groups; ++g)
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t o0 = panel * width, wide = plan.Og - o0 < width ? plan.Og - o0 : width;
        T* out = gyt + ((g * panels + panel) * packed + s) * plan.T * width;
        if (wide < width) clear(out, plan.T * width);
        if (plan.channels_last)
          copy_rows(this->gy_of(b) + o0, plan.O, plan.T, wide, out, width, factor);
        else
          transpose<T>(this->gy_of(b) + (g * plan.Og + o0) * plan.T, plan.T, wide, plan.T, out, width, factor);
        if (this->call.bias && !this->call.biased)
          this->sum_positions(out, width, wide, static_cast<T*>(this->call.bias) + b * plan.O + g * plan.Og + o0);
      }
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
