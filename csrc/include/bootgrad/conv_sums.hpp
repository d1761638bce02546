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

// Σ_i w_i G_i: one product over samples and positions, as many samples at a time as fit the cache. Where the weights are
// so many that there are few blocks of samples, the columns of the weights are shared out too.
template <class In>
struct ConvWeightedSum : ConvLayer<In> {
  using Layer = ConvLayer<In>;
  using typename Layer::T;
  using Layer::call, Layer::plan, Layer::runtime, Layer::ld, Layer::weights, Layer::x_size;

  explicit ConvWeightedSum(const ConvCall& c) : Layer(c, false) {
    constexpr int64_t columns = 4 * kLanes<T>, size = static_cast<int64_t>(sizeof(T));
    const int64_t rows = plan.B * plan.T;
    blocks = sample_blocks(plan.B, weights * size);
    const int64_t useful = rows > 256 ? (rows + 255) / 256 : 1;
    if (blocks > useful) blocks = useful;
    parts = plan.groups > 1 || blocks == 0 ? 1 : 16 / blocks;
    const int64_t slabs = (ld + columns - 1) / columns;
    if (parts > slabs) parts = slabs > 0 ? slabs : 1;
    together = plan.T > 0 && plan.T < 256 ? 256 / plan.T : 1;
    while (together > 1 && together * (x_size + this->gyt_size) * size > (int64_t{1} << 19)) together /= 2;
    stride = together * plan.T * ld;
  }

  struct Memory {
    T *x, *gyt;
    int64_t* depth;
  };

  void run() const {
    T* partial = static_cast<T*>(runtime.scratch(kSharedScratch, static_cast<size_t>(blocks * weights) * sizeof(T)));
    share(
        runtime, blocks * parts, [&](Carver& c) { return lay_out(c); }, [&](const Memory& m) { begin(m); },
        [&](int64_t task, const Memory& m) { block(task / parts, task % parts, m, partial + task / parts * weights); });
    combine_groups(*this, partial, blocks);
  }

 private:
  int64_t blocks, parts, together, stride;

  Memory lay_out(Carver& c) const {
    Memory m{};
    if (this->copy_x) m.x = c.take<T>(together * x_size);
    m.gyt = c.take<T>(plan.groups * stride);
    m.depth = c.take<int64_t>(together * plan.T);
    return m;
  }

  void begin(const Memory& m) const {
    if (m.x) clear(m.x, together * x_size);
    if (ld != plan.Og) clear(m.gyt, plan.groups * stride);
    for (int64_t s = 0; s < together; ++s)
      for (int64_t t = 0; t < plan.T; ++t) m.depth[s * plan.T + t] = s * x_size + plan.pos[t];
  }

  void block(int64_t index, int64_t column_part, const Memory& m, T* partial) const {
    const T* w = static_cast<const T*>(call.w);
    const Range range = part(plan.B, blocks, index), vectors = part(ld / kLanes<T>, parts, column_part);
    const int64_t first = vectors.begin * kLanes<T>, last = vectors.end * kLanes<T>;
    const int64_t end = last < plan.Og ? last : plan.Og;
    for (int64_t b0 = range.begin; b0 < range.end; b0 += together) {
      const int64_t count = range.end - b0 < together ? range.end - b0 : together;
      const T* x = this->copy_x ? m.x : this->padded_x(b0, nullptr);
      for (int64_t s = 0; s < count; ++s) {
        if (this->copy_x) this->padded_x(b0 + s, m.x + s * x_size);
        T* gyt = m.gyt + s * plan.T * ld;
        this->transposed_gy(b0 + s, gyt, stride, T(1), first, end);
        if (call.bias) this->sum_positions(b0 + s, gyt, stride, first, end);
        if (w) this->transposed_gy(b0 + s, gyt, stride, w[b0 + s], first, end);
      }
      for (int64_t g = 0; g < plan.groups; ++g)
        gemm<T>(plan.R, last - first, count * plan.T, {x + g * this->x_group(), plan.tap, m.depth},
                m.gyt + g * stride + first, ld,
                Store<T>{partial + g * plan.R * ld + first, ld, last - first, T(1), b0 != range.begin, nullptr});
    }
  }
};

// ⟨G_i, v⟩ = Σ_{t,o} gy[t, o] · (v ∗ x)[t, o]; v is the call's center. Small samples are convolved together, so that the
// weights are read once for many positions.
template <class In>
struct ConvJvp : ConvLayer<In> {
  using Layer = ConvLayer<In>;
  using typename Layer::T;
  using Layer::call, Layer::plan, Layer::runtime, Layer::ld, Layer::x_size;

  explicit ConvJvp(const ConvCall& c) : Layer(c, true), together(samples_together(c.plan->T)) {}

  static int64_t samples_together(int64_t positions) { return positions >= 32 ? 1 : 32 / (positions > 0 ? positions : 1); }

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
      this->forward(count * plan.T, x + g * this->x_group(), m.rows, this->center_of(g), m.y + g * together * size, T(1));
    for (int64_t s = 0; s < count; ++s) {
      this->transposed_gy(b0 + s, m.gyt);
      double total = 0;
      for (int64_t g = 0; g < plan.groups; ++g) total += dot(m.y + (g * together + s) * size, m.gyt + g * size, size);
      static_cast<T*>(call.inner)[b0 + s] = static_cast<T>(total);
    }
  }
};

}  // namespace bootgrad::BOOTGRAD_ISA
